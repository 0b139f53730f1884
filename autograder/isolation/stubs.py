"""Stands for what stayed on the other side: an object, and the graph of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Caller(Protocol):
    """The end of the channel that a stub asks: a Peer."""

    def call(
        self, name: Any, args: Any, kwargs: Any, given: list[Tensor] | None = None
    ) -> tuple[Any, list[Tensor]]: ...

    def vjp(self, call: int, grads: Sequence[Tensor | None]) -> list[Tensor | None]: ...


class Stub:
    """An object of the other side's: its listed attributes, read or called there."""

    def __init__(self, peer: Caller, key: int, names: list[str], plain: list[str]) -> None:
        self._peer, self._key, self._names, self._plain = peer, key, names, plain
        self._given: list[Tensor] = []
        self._kind = "object"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._names:
            listed = ", ".join(n for n in self._names if not n.startswith("_"))
            raise AttributeError(f"{name}: there are {listed}")
        if name in self._plain:
            return self._request(name, (), {})
        return lambda *args, **kwargs: self._request(name, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._request("__getitem__", (key,), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._request("__call__", args, kwargs)

    def _request(self, name: str, args: Any, kwargs: Any) -> Any:
        value, sent = self._peer.call([self._key, name], args, kwargs, self._given)
        if isinstance(value, Stub):
            value._given = sent
        return value


class RemoteGraph(torch.autograd.Function):
    """The tensors that a call gave back, whose graph is on the other side."""

    @staticmethod
    def forward(ctx: Any, peer: Caller, call: int, outputs: list[Tensor], *inputs: Tensor) -> Any:
        ctx.peer, ctx.call = peer, call
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *ctx.peer.vjp(ctx.call, grads)
