"""Decoding SmolLM2 with a cache beside transformers' generate, and serving beside static batches.

The same weights, dtype, threads and prompts; both sides choose greedily and generate the same
tokens. Flatness: one token of ours with 512 generated beside one with none. Serving: the same
requests with strongly varied answers, on SmolLM2, through both schedulers; time, and the passes
through the model, which no machine changes.
"""

import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import Row
from reference.kv_cache import (
    BlockManager,
    DynamicCache,
    Int8Cache,
    PagedCache,
    Request,
    RollingCache,
    StaticCache,
    generate,
    left_pad,
    serve,
    serve_static,
)
from reference.pretrained import SMOLLM2, corpus
from reference.transformer import fused_causal_attention, load_pretrained

NEW, LONG, MAX_BATCH, LONGEST = 48, 512, 8, 128


def rows() -> list[Row]:
    return [*_decoding(), *_flatness(), *_serving()]


def _decoding() -> list[Row]:
    """Prompt and 48 tokens, one text and four of different lengths."""
    ours = partial(_smollm2(), attend=fused_causal_attention)
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, local_files_only=True).eval()
    theirs.generation_config.eos_token_id = None  # as many tokens as asked for
    ids = _ids()
    found = []
    for what, prompts in (
        ("one text", [ids[:32]]),
        ("four texts, 8 to 40 tokens", [ids[:40], ids[100:108], ids[200:224], ids[300:316]]),
    ):
        tokens, padding = left_pad(prompts)
        seen = (torch.arange(tokens.shape[1]) >= padding[:, None]).long()

        def their_tokens(tokens: Tensor = tokens, seen: Tensor = seen) -> Tensor:
            out = theirs.generate(
                tokens, attention_mask=seen, max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
            return out[:, tokens.shape[1] :]

        def our_tokens(prompts: list[Tensor] = prompts) -> Tensor:
            return generate(ours, prompts, NEW, cache=StaticCache(40 + NEW))

        if not torch.equal(our_tokens(), their_tokens()):
            raise RuntimeError("the two sides generated different tokens")
        seconds = _in_turns(our_tokens, their_tokens)
        found.append(Row(f"SmolLM2-135M, {NEW} tokens, {what}", *(1e6 * s for s in seconds), "us"))
    return found


def _flatness() -> list[Row]:
    """Microseconds of one token behind 512 generated ones, and behind the prompt alone."""
    model, ids = partial(_smollm2(), attend=fused_causal_attention), _ids()
    found = []
    for name, make in (
        ("growing", DynamicCache),
        ("static", partial(StaticCache, LONG + 64)),
        ("rolling, 128", partial(RollingCache, 128)),
        ("int8", Int8Cache),
    ):
        short, long = make(), make()
        with torch.no_grad():
            model(ids[None, :16], cache=short, num_logits=1)
            for part in ids[None, : 16 + LONG].split(16, 1):
                mask = _window_mask(long) if isinstance(long, RollingCache) else None
                model(part, cache=long, mask=mask, num_logits=1)

            def token(cache: Any) -> Tensor:
                return model(ids[None, :1], cache=cache, num_logits=1)

            seconds = _in_turns(partial(token, long), partial(token, short), turns=15)
        what = f"one token of SmolLM2, {name} cache: 512 generated beside 0"
        found.append(Row(what, *(1e6 * s for s in seconds), "us"))
    return found


def _window_mask(cache: RollingCache) -> Tensor:
    past = cache.get_seq_length()
    distance = torch.arange(past, past + 16)[:, None] - cache.key_columns(16)
    return (distance >= 0) & (distance < cache.window)


def _serving() -> list[Row]:
    """40 requests, most answers short and some long, at most eight at a time."""
    model = partial(_smollm2(), attend=fused_causal_attention)
    requests = trace(_ids(), 40)
    answers: dict[str, Any] = {}
    config = model.func.config

    def continuous() -> None:
        cache = PagedCache(
            BlockManager(96, 16), num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        )  # fmt: skip
        answers["ours"] = serve(model, requests, cache, max_batch=MAX_BATCH)

    def static() -> None:
        answers["static"] = serve_static(
            model, requests, batch_size=MAX_BATCH, max_len=40 + LONGEST
        )

    seconds = _in_turns(continuous, static, turns=1)
    if answers["ours"][0] != answers["static"][0]:
        raise RuntimeError("the two schedulers gave different answers")
    places = [MAX_BATCH * len(history) for _, history in answers.values()]
    peak = [max(i.used_slots for i in history) for _, history in answers.values()]
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    what = "40 requests, continuous beside static batching"
    return [
        Row(what, *(1e6 * s for s in seconds), "us"),
        Row(f"{what}: passes x places", *map(float, places), "places"),
        Row(f"{what}: most cache set aside", *(float(p * token_bytes) for p in peak), "bytes"),
    ]


def trace(text: Tensor, num_requests: int, seed: int = 0) -> list[Request]:
    """Prompts of 4 to 40 tokens; answers log-normal, median 12, mean about 30, cut at LONGEST."""
    generator = random.Random(seed)
    requests = []
    for i in range(num_requests):
        start = generator.randrange(len(text) - 40)
        prompt = tuple(text[start : start + generator.randint(4, 40)].tolist())
        length = min(LONGEST, 1 + int(generator.lognormvariate(math.log(12), 1.4)))
        requests.append(Request(f"r{i}", prompt, length))
    return requests


def _smollm2() -> Any:
    return load_pretrained(SMOLLM2).requires_grad_(False)


def _ids() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True)
    return tokenizer(corpus()[:10000], return_tensors="pt").input_ids[0]


def _in_turns(*calls: Callable[[], Any], turns: int = 3) -> list[float]:
    """Median seconds of calls that take too long for a timer's loops."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [sorted(times)[len(times) // 2] for times in taken]
