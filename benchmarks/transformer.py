"""Our Llama beside transformers' LlamaForCausalLM: the same weights, the same text, the same run.

A model of 7.4 million parameters trains on the Python reference's text, byte by byte: one step is
forward, loss, backward and torch's AdamW, on both sides; transformers takes its default attention
(torch's fused kernel), and so do we, by `attend=`. Then forward and decoding of SmolLM2-135M, whose
time is that of its matrices: there, what a model adds in Python shows for one token alone.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from benchmarks.measure import Row, peak_bytes, saved_bytes, time_in_turns
from reference.pretrained import SMOLLM2, corpus
from reference.transformer import (
    Llama,
    LlamaConfig,
    fused_causal_attention,
    load_pretrained,
    next_token_loss,
    to_huggingface,
)

SMALL = LlamaConfig(
    vocab_size=256,
    dim=288,
    hidden_dim=768,
    num_layers=8,
    num_heads=6,
    num_kv_heads=3,
    max_seq_len=256,
)
BATCH, PROMPT, CACHED = 4, 128, 512


def rows() -> list[Row]:
    return [*_training(), *_smollm2()]


def _training() -> list[Row]:
    torch.manual_seed(0)
    ours = Llama(SMALL)
    theirs = LlamaForCausalLM(TheirConfig(**to_huggingface(SMALL)))
    theirs.load_state_dict(
        {n if n == "lm_head.weight" else f"model.{n}": t for n, t in ours.state_dict().items()}
    )

    def our_loss(tokens: Tensor) -> Tensor:
        return next_token_loss(ours(tokens, attend=fused_causal_attention), tokens)

    def their_loss(tokens: Tensor) -> Tensor:
        return theirs(tokens, labels=tokens, use_cache=False).loss

    batches = list(itertools.islice(_batches(), 16))
    what = f"training step, {BATCH} x {SMALL.max_seq_len} tokens"
    losses = [partial(loss_of, batches[0]) for loss_of in (our_loss, their_loss)]
    kept = (saved_bytes(loss) for loss in losses)
    peak = (peak_bytes(lambda loss=loss: loss().backward()) for loss in losses)
    measured = [
        Row(f"{what}: kept for backward", *kept, "bytes"),
        Row(f"{what}: peak memory", *peak, "bytes"),
    ]
    steps = _step(ours, our_loss, batches), _step(theirs, their_loss, batches)
    return [Row(what, *time_in_turns(*steps), "us"), *measured]


def _smollm2() -> list[Row]:
    ours = load_pretrained(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True)
    tokens = tokenizer(corpus()[:10000], return_tensors="pt").input_ids[:, :CACHED]
    with torch.no_grad():
        prompt = time_in_turns(
            lambda: ours(tokens[:, :PROMPT], attend=fused_causal_attention),
            lambda: theirs(tokens[:, :PROMPT], use_cache=False),
        )
        caches = DynamicCache(), DynamicCache()
        ours(tokens, cache=caches[0], num_logits=1)
        theirs(tokens, past_key_values=caches[1], logits_to_keep=1)
        last = tokens[:, -1:]

        def our_token() -> Any:
            out = ours(last, cache=caches[0], attend=fused_causal_attention)
            caches[0].crop(-1)
            return out

        def their_token() -> Any:
            out = theirs(last, past_key_values=caches[1])
            caches[1].crop(-1)
            return out

        token = time_in_turns(our_token, their_token)
    return [
        Row(f"SmolLM2-135M, {PROMPT} tokens forward", *prompt, "us"),
        Row(f"SmolLM2-135M, one token with {CACHED} cached", *token, "us"),
    ]


def _step(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    endless = itertools.cycle(batches)

    def step() -> None:
        loss_of(next(endless)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batches() -> Iterator[Tensor]:
    text = torch.tensor(list(corpus().encode()))
    generator = torch.Generator().manual_seed(0)
    length = SMALL.max_seq_len
    while True:
        starts = torch.randint(len(text) - length, (BATCH,), generator=generator)
        yield torch.stack([text[s : s + length] for s in starts])
