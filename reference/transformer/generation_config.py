"""How a model's makers have it write: what stands in generation_config.json, both ways.

    do_sample, temperature, top_k, top_p    how a token is chosen      `chooser`
    eos_token_id, one or several            where an answer ends       `stop`
    max_new_tokens, max_length              how far it may go          `room`

Keys are a closed world (`reference.configuration`): a repetition penalty that is passed over gives
other answers, and nothing fails. A key that is not there means what transformers takes it to mean:
greedy choice, and under sampling the 50 most likely tokens, a default that others do not have.

Source: GenerationConfig of transformers 5; what passing over led to: lm-evaluation-harness #3154,
vLLM #50767 (penalties), mlx-vlm #1331 (temperature, top-k, top-p).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.configuration import COUNT, FLAG, NOTHING, NUMBER, Keys, read_json, write_json
from reference.transformer.sampling import filter_logits, greedy, sample
from reference.transformer.stopping import Stop

FILE = "generation_config.json"
KEYS = Keys(
    file=FILE,
    honoured={
        "do_sample": FLAG + NOTHING, "temperature": NUMBER + NOTHING, "top_k": COUNT + NOTHING,
        "top_p": NUMBER + NOTHING, "eos_token_id": (int, list, *NOTHING),
        "max_new_tokens": COUNT + NOTHING, "max_length": COUNT + NOTHING,
    },
    plain={
        "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,),
        "early_stopping": (False,), "repetition_penalty": (1,), "encoder_repetition_penalty": (1,),
        "length_penalty": (1,), "diversity_penalty": (0,), "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
        "eta_cutoff": (0,), "min_length": (0,), "remove_invalid_values": (False,),
        "renormalize_logits": (False,), "token_healing": (False,), "guidance_scale": (1,),
    },
    harmless=frozenset(
        "_from_model_config transformers_version bos_token_id pad_token_id decoder_start_token_id "
        "use_cache cache_implementation output_attentions output_hidden_states output_scores "
        "output_logits return_dict_in_generate disable_compile".split()
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """One file's. `stop_tokens`: ids that end an answer; lengths: None where there is no limit.

    Raises: ValueError for a temperature, top_k or top_p that no logits can be filtered by, for a
    negative id or a length below 1.
    """

    is_sampled: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        filter_logits(torch.zeros(1, 1), **self._cuts)
        for token in self.stop_tokens:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(f"eos_token_id: expected ids from 0 on, got {token!r}")
        for name in ("max_new_tokens", "max_length"):
            length = getattr(self, name)
            if length is not None and length < 1:
                raise ValueError(f"{name}: expected at least 1, got {length}")

    @property
    def _cuts(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def chooser(self, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
        """A `choose` for `generate`: (B, V) logits -> (B,) tokens."""
        return partial(sample, **self._cuts, generator=generator) if self.is_sampled else greedy

    @property
    def stop(self) -> Stop | None:
        """A `stop` for `generate`."""
        if len(self.stop_tokens) < 2:
            return self.stop_tokens[0] if self.stop_tokens else None
        return lambda tokens: tokens[-1] in self.stop_tokens

    def room(self, prompt_len: int) -> int | None:
        """How many tokens may follow a prompt, None for no limit: max_new_tokens goes before.

        Raises: ValueError where the prompt has taken all of max_length.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if prompt_len >= self.max_length:
            raise ValueError(
                f"prompt_len: expected less than max_length, {self.max_length}, got {prompt_len}; "
                "set max_new_tokens"
            )
        return self.max_length - prompt_len


def from_entries(entries: Mapping[str, Any]) -> GenerationSettings:
    """What a generation_config.json says.

    Raises: ValueError for keys that are not known, and values that cannot be honoured.
    """
    known = KEYS.read(entries)
    ends = known.pop("eos_token_id", ())
    known["is_sampled"] = known.pop("do_sample", False)
    try:
        stop_tokens = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
        return GenerationSettings(stop_tokens=stop_tokens, **known)
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from error


def to_entries(settings: GenerationSettings) -> dict[str, Any]:
    """What `from_entries` and transformers read as these settings."""
    ends = settings.stop_tokens
    entries = {
        "do_sample": settings.is_sampled,
        # Without sampling transformers warns of cuts: they would not be used.
        **(settings._cuts if settings.is_sampled else {}),
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
        "max_new_tokens": settings.max_new_tokens,
        "max_length": settings.max_length,
    }
    return {key: value for key, value in entries.items() if value is not None}


def load_generation_settings(folder: Path | str) -> GenerationSettings:
    """Of a checkpoint's folder. Raises: FileNotFoundError; ValueError as `from_entries`."""
    return from_entries(read_json(Path(folder) / FILE))


def save_generation_settings(folder: Path | str, settings: GenerationSettings) -> None:
    """Beside a checkpoint. Raises: FileNotFoundError for a folder that is missing."""
    write_json(Path(folder) / FILE, to_entries(settings))
