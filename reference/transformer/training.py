"""Training a language model: batches from one long text, AdamW, a schedule, a checkpoint.

A step's batch is a function of the seed and the step's number alone, so a run that was interrupted
continues with the batches that it would have had: resumed and uninterrupted losses are equal bit
for bit. Gradients of `accumulation` small batches are summed before one update.

Shapes: B batch, T tokens, N tokens of the text.
Recipe: Llama, arXiv 2302.13971, sec. 2.3 (AdamW, cosine with warm-up, clipping at 1.0).
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from reference.transformer.batches import Text, batch_at
from reference.transformer.loss import next_token_loss
from reference.transformer.model import Llama
from reference.transformer.optimizer import AdamW, clip_gradients, decay_groups
from reference.transformer.schedule import cosine_with_warmup


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A run. `batch_size` counts the sequences of one of the `accumulation` batches of an update.

    Raises: ValueError for counts below 1.
    """

    total_steps: int
    batch_size: int
    seq_len: int
    peak_lr: float = 3e-3
    final_lr: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_norm: float = 1.0
    accumulation: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_size", "seq_len", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.accumulation


@dataclass(frozen=True)
class Step:
    """What one update did: loss in nats a token, learning rate, gradient norm before clipping."""

    loss: float
    lr: float
    grad_norm: float


class Trainer:
    """A model, its optimizer and where they are in the run.

    `attend` is the attention kernel, as in `Llama`. `history` has one `Step` an update.
    """

    def __init__(
        self,
        model: Llama,
        text: Text,
        config: TrainingConfig,
        *,
        attend: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.text, self.config = model, text, config
        self.options = {} if attend is None else {"attend": attend}
        self.optimizer = AdamW(decay_groups(model, config.weight_decay), lr=config.peak_lr)
        self.history: list[Step] = []

    def step(self) -> Step:
        """One update."""
        config, loss_sum = self.config, 0.0
        self.optimizer.zero_grad()
        for part in range(config.accumulation):
            tokens = batch_at(
                self.text,
                step=len(self.history) * config.accumulation + part,
                batch_size=config.batch_size,
                seq_len=config.seq_len,
                seed=config.seed,
            )
            loss = next_token_loss(self.model(tokens, **self.options), tokens)
            (loss / config.accumulation).backward()
            loss_sum += loss.item()
        grad_norm = clip_gradients(self.model.parameters(), config.max_norm)
        lr = self._learning_rate()
        self.optimizer.step()
        self.history.append(Step(loss_sum / config.accumulation, lr, grad_norm))
        return self.history[-1]

    def _learning_rate(self) -> float:
        config = self.config
        lr = cosine_with_warmup(
            len(self.history) + 1,
            peak=config.peak_lr,
            warmup_steps=config.warmup_steps,
            total_steps=config.total_steps,
            final=config.final_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def run(self, until: int | None = None) -> list[Step]:
        """Train to step `until` (the end by default), with a progress bar in a terminal."""
        last = self.config.total_steps if until is None else until
        with tqdm(total=last, initial=len(self.history), disable=None, unit="step") as bar:
            while len(self.history) < last:
                bar.set_postfix(loss=f"{self.step().loss:.2f}", refresh=False)
                bar.update()
        return self.history

    def save(self, path: Path | str) -> None:
        """Write weights, moments and history to one file; the old one stays until it is whole."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter.detach()
            for moment in ("m", "v") if state else ():
                tensors[f"{moment}.{name}"] = state[moment]
        steps = [dataclasses.astuple(step) for step in self.history]
        tensors["history"] = torch.tensor(steps, dtype=torch.float64).view(-1, 3)
        metadata = {"training": json.dumps(dataclasses.asdict(self.config))}
        unfinished = path.with_name(path.name + ".unfinished")
        safetensors.torch.save_file(
            {k: v.contiguous() for k, v in tensors.items()}, unfinished, metadata
        )
        os.replace(unfinished, path)

    def load(self, path: Path | str) -> None:
        """Continue where `save` left off; nothing changes if the file does not fit.

        Raises: ValueError for a file that is cut, foreign, or of another model or another run.
        """
        tensors, config = _read(Path(path))
        if config != dataclasses.asdict(self.config):
            raise ValueError(f"{path}: expected the run {self.config}, got {config}")
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            stored = tensors.get(f"model.{name}")
            if stored is None or stored.shape != parameter.shape:
                got = "nothing" if stored is None else tuple(stored.shape)
                raise ValueError(f"{path}: expected {name} {tuple(parameter.shape)}, got {got}")
        self.history = [Step(*row) for row in tensors["history"].tolist()]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state.pop(parameter, None)
                if f"m.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": len(self.history),
                        "m": tensors[f"m.{name}"],
                        "v": tensors[f"v.{name}"],
                    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a checkpoint, got a file that is cut or foreign"
        ) from error
    if "training" not in metadata or "history" not in tensors:
        raise ValueError(f"{path}: expected a checkpoint of Trainer.save, got other tensors")
    return tensors, json.loads(metadata["training"])
