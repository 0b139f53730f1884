"""A trained model to experiment on: SmolLM2-135M-Instruct, its activations, and English text.

Random weights hide what matters: outlier channels, attention sinks, the growth of the residual
stream. SmolLM2 is a Llama (30 layers, D = 576, H = 9 query heads, K = 3 key/value heads, d = 64,
F = 1536, V = 49152, RoPE base 100000, tied embedding) that computes a page of text in a second.
Its weights here were stored in 4 bits (GGUF Q4_1) and widened to float32.

Source: Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025, arXiv:2502.02737. The weights are
under the Apache-2.0 licence.
"""

import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SMOLLM2 = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m"


class Activation(NamedTuple):
    """What a submodule was given (its first tensor) and what it returned (its first tensor)."""

    input: Tensor
    output: Tensor


class Attention(NamedTuple):
    """One layer's attention as the model computed it; q and k carry their rotary positions."""

    q: Float[Tensor, "B H T d"]
    k: Float[Tensor, "B K T d"]
    v: Float[Tensor, "B K T d"]
    probabilities: Float[Tensor, "B H T T"]
    output: Float[Tensor, "B H T d"]


def passage() -> str:
    """The opening of Alice's Adventures in Wonderland: three paragraphs, about 280 tokens.

    Source: Lewis Carroll, 1865, chapter I; public domain (quotes straightened, italics dropped).
    """
    return Path(__file__).with_name("alice.txt").read_text(encoding="utf-8").strip()


def corpus() -> str:
    """A few hundred thousand characters of English: the Python language reference.

    Source: pydoc_data.topics of the standard library; its length depends on Python's version.
    """
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def load_smollm2(folder: Path = SMOLLM2) -> tuple[Any, Any]:
    """The model and its tokenizer from transformers: float32, eager attention, eval mode.

    Raises: FileNotFoundError, with the remedy, where the model has not been fetched.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"SmolLM2 is not in {folder}: run `make model` in the course's folder (once, 90 MB)"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    showed_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if showed_progress:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def capture(
    model: nn.Module, input_ids: Int[Tensor, "B T"], names: Iterable[str]
) -> dict[str, Activation]:
    """One forward pass, without gradients, watching the submodules called `names`.

    A name is one of `model.named_modules()`, such as "model.layers.3.self_attn.q_proj". The
    tensors are the model's own: clone one before writing to it.

    Raises: ValueError for a name that the model does not have.
    """
    seen = _watch(model, input_ids, names)
    return {
        name: Activation(given, returned if isinstance(returned, Tensor) else returned[0])
        for name, (given, returned) in seen.items()
    }


def _watch(
    model: nn.Module, input_ids: Tensor, names: Iterable[str]
) -> dict[str, tuple[Tensor, Any]]:
    """What each submodule was given first and all that it returned."""
    modules = dict(model.named_modules())
    names = list(names)
    for name in names:
        if name not in modules:
            raise ValueError(f"names: the model has no submodule {name!r}; see named_modules()")
    seen: dict[str, tuple[Tensor, Any]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            seen[name] = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), output

        return hook

    handles = [modules[n].register_forward_hook(hook_for(n), with_kwargs=True) for n in names]
    try:
        with torch.no_grad():
            model(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in names}


def capture_attention(model: Any, input_ids: Int[Tensor, "B T"], layer: int) -> Attention:
    """q, k, v (after RoPE), attention probabilities and per-head output of one layer of a Llama.

    Raises: ValueError for a layer that the model does not have.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    if not 0 <= layer < model.config.num_hidden_layers:
        raise ValueError(f"layer: expected 0 to {model.config.num_hidden_layers - 1}, got {layer}")
    inside = f"model.layers.{layer}.self_attn"
    seen = _watch(model, input_ids, [inside, *(f"{inside}.{p}_proj" for p in "qkvo")])
    head_dim = model.config.head_dim

    def split(x: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, d)
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    q, k, v = (split(seen[f"{inside}.{p}_proj"][1]) for p in "qkv")
    cos, sin = model.model.rotary_emb(q, torch.arange(q.shape[2], device=q.device)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    output = split(seen[f"{inside}.o_proj"][0])
    return Attention(q, k, v, seen[inside][1][1], output)


def attention_maps(model: Any, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "L B H T T"]:
    """The attention probabilities of every layer; needs eager attention, as load_smollm2 gives."""
    with torch.no_grad():
        return torch.stack(model(input_ids, output_attentions=True).attentions)
