"""A wrapper that is not there when names are asked for.

A wrapped model's parameters keep their names: `layers.0.weight` and not `module.layers.0.weight`.
So weight-decay rules by name go on to hold, and a checkpoint fits with and without the wrapper.
(torch's DistributedDataParallel does add "module.", which many a checkpoint did not load for.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Transparent(nn.Module):
    """Has the parameters, buffers and state of `self.module`, by the names that they have there."""

    module: nn.Module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own."""
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The module's own."""
        return self.module.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's own."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)


def check_learning(module: nn.Module, expected: Iterable[nn.Parameter]) -> None:
    """Raises: RuntimeError where other parameters require a gradient than `expected`.

    Gradients of those that began to learn later would stay on their rank, without a word.
    """
    known = {id(parameter) for parameter in expected}
    new = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in known]
    if new:
        raise RuntimeError(
            f"{', '.join(new)}: requires a gradient now and did not when the model was wrapped; "
            "set requires_grad first, then wrap"
        )
