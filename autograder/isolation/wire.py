"""Values as bytes: JSON for structure, raw bytes for tensors. Nothing that arrives is executed.

A frame is the header's length (4 bytes), a JSON header, then the tensors' bytes. Lists, strings,
numbers, booleans and None are themselves; everything else is an object with one tag:

    {"t": [...]} tuple        {"d": [[key, value], ...]} dict    {"x": i} tensor i of the frame
    {"y": "float32"} dtype    {"v": "cpu"} device                {"g": i} generator with state i
    {"p": i} the caller's own tensor i                           {"i": "0x..."} a large integer
    {"r": id, ...} an object left behind                         {"o": "ndarray"} does not travel

Tensors are rebuilt with their strides, so that a view arrives as a view. What comes from the other
side is checked before it is used: types, dtypes, sizes, depth.
"""

import json
import re
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_FRAME_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
MAX_DEPTH = 40
MAX_DIMS = 16
MAX_PAIRS = 10_000  # of all dicts in a frame: keys may collide
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSOR_TYPES = (Tensor, torch.nn.Parameter)


class WireError(Exception):
    """What came over the wire is not what this side accepts."""


class Foreign:
    """Stands for a value of a type that does not travel; its class has that type's name."""


def foreign(name: str) -> Foreign:
    safe = re.sub(r"\W", "_", name)[:60] or "object"
    made: Foreign = type(safe, (Foreign,), {})()
    return made


class Encoder:
    """Encodes values of one message; `tensors` and `generators` are those it met, in order.

    `own` maps id(tensor) to the number under which the other side knows it as its own. `reference`
    turns an object that stays here into a number, or None where it may not be referred to.
    """

    def __init__(
        self,
        own: dict[int, int] | None = None,
        reference: Callable[[Any], dict[str, Any] | None] = lambda value: None,
    ) -> None:
        self.tensors: list[Tensor] = []
        self.generators: list[torch.Generator] = []
        self.facts: list[list[Any]] = []
        self.chunks: list[bytes] = []
        self._own, self._reference = own or {}, reference
        self._index: dict[int, int] = {}

    def value(self, value: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            return {"o": "too_deep"}
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if abs(value) < 2**63 else {"i": hex(value)}
        if kind is list:
            return [self.value(v, depth + 1) for v in value]
        if kind is tuple:
            return {"t": [self.value(v, depth + 1) for v in value]}
        if kind is dict:
            pairs = list(value.items())
            return {"d": [[self.value(k, depth + 1), self.value(v, depth + 1)] for k, v in pairs]}
        if kind in TENSOR_TYPES:
            return self._tensor(value)
        if kind is torch.dtype:
            return {"y": NAMES[value]} if value in NAMES else {"o": "dtype"}
        if kind is torch.Generator:
            self.generators.append(value)
            return {"g": self._place(value.get_state())}
        if kind is torch.device:
            return {"v": value.type}
        if kind is torch.Size:
            return {"t": list(value)}
        return self._reference(value) or {"o": kind.__name__}

    def _tensor(self, tensor: Tensor) -> Any:
        if id(tensor) in self._own:
            return {"p": self._own[id(tensor)]}
        if tensor.layout is not torch.strided or tensor.dtype not in NAMES or tensor.is_meta:
            return {"o": f"tensor_of_{str(tensor.dtype).removeprefix('torch.')}"}
        return {"x": self._place(tensor)}

    def _place(self, tensor: Tensor) -> int:
        if id(tensor) not in self._index:
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            data, stride = _storage_order(tensor)
            self.facts.append(
                [NAMES[tensor.dtype], list(tensor.shape), stride, bool(tensor.requires_grad)]
            )
            self.chunks.append(data)
        return self._index[id(tensor)]

    def frame(self, header: dict[str, Any]) -> bytes:
        header["tensors"] = [f + [len(c)] for f, c in zip(self.facts, self.chunks, strict=True)]
        text = json.dumps(header).encode()
        return b"".join([struct.pack("<I", len(text)), text, *self.chunks])


def _storage_order(tensor: Tensor) -> tuple[bytes, list[int]]:
    """The elements between a tensor's first and last in memory, and its strides there."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if not plain.numel():
        return b"", list(plain.stride())
    span = 1 + sum((n - 1) * s for n, s in zip(plain.shape, plain.stride(), strict=True))
    if span > 4 * plain.numel():
        plain = plain.contiguous()
        span = plain.numel()
    line = plain.as_strided((span,), (1,))
    return line.contiguous().view(torch.uint8).numpy().tobytes(), list(plain.stride())


class Decoder:
    """Reads one frame. `resolve` turns {"r": ...} into a value; `own` are this side's tensors."""

    def __init__(
        self,
        frame: bytes,
        own: list[Tensor] | None = None,
        resolve: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        (length,) = struct.unpack_from("<I", frame)
        if length > MAX_HEADER_BYTES or 4 + length > len(frame):
            raise WireError(f"header of {length} bytes in a frame of {len(frame)}")
        try:
            header = json.loads(frame[4 : 4 + length])
        except (ValueError, RecursionError) as error:
            raise WireError(f"header: {type(error).__name__}") from None
        if not isinstance(header, dict):
            raise WireError("header: expected an object")
        self.header: dict[str, Any] = header
        self._own, self._resolve = own or [], resolve
        self.tensors: list[Tensor] = []
        self.generators: list[torch.Generator] = []
        self._bytes_left, self._pairs_left = MAX_FRAME_BYTES, MAX_PAIRS
        place = 4 + length
        for facts in _listed(header.get("tensors", [])):
            tensor, place = _tensor_at(frame, place, facts)
            self.tensors.append(self._charged(tensor))
        if place != len(frame):
            raise WireError("frame: bytes left over")

    def value(self, encoded: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH + 2:
            raise WireError("value: too deep")
        if encoded is None or type(encoded) in (bool, int, float, str):
            return encoded
        if type(encoded) is list:
            return [self.value(v, depth + 1) for v in encoded]
        if type(encoded) is not dict or not encoded:
            raise WireError("value: expected a tagged object")
        return self._tagged(encoded, depth)

    def _tagged(self, encoded: dict[str, Any], depth: int) -> Any:
        tag, inner = next(iter(encoded.items()))
        if tag == "t":
            return tuple(self.value(v, depth + 1) for v in _listed(inner))
        if tag == "d":
            return self._dict(inner, depth)
        if tag == "x":
            return self._charged(_at(self.tensors, inner))
        if tag == "p":
            return self._charged(_at(self._own, inner))
        if tag == "y" and type(inner) is str and inner in DTYPES:
            return DTYPES[inner]
        if tag == "v" and inner == "cpu":
            return torch.device("cpu")
        if tag == "i" and type(inner) is str and len(inner) < 4000:
            try:
                return int(inner, 16)
            except ValueError:
                raise WireError("value: not a number") from None
        if tag == "g":
            return self._generator(inner)
        if tag == "o" and type(inner) is str:
            return foreign(inner)
        if tag == "r" and self._resolve is not None:
            return self._resolve(encoded)
        raise WireError(f"value: unknown tag {str(tag)[:20]!r}")

    def _charged(self, tensor: Tensor) -> Tensor:
        """A frame says little and may mean much: views of one number, one tensor many times."""
        self._bytes_left -= tensor.numel() * tensor.element_size()
        if self._bytes_left < 0:
            raise WireError(f"tensors: more than {MAX_FRAME_BYTES:,} bytes in all")
        return tensor

    def _dict(self, pairs: Any, depth: int) -> dict[Any, Any]:
        made = {}
        self._pairs_left -= len(_listed(pairs))
        if self._pairs_left < 0:
            raise WireError(f"dicts: more than {MAX_PAIRS:,} entries in all")
        for pair in _listed(pairs):
            key, value = (self.value(v, depth + 1) for v in _listed(pair, 2))
            try:
                made[key] = value
            except TypeError:
                raise WireError("dict: a key that cannot be one") from None
        return made

    def _generator(self, index: Any) -> torch.Generator:
        generator = torch.Generator()
        try:
            generator.set_state(_at(self.tensors, index))
        except (RuntimeError, TypeError):
            raise WireError("generator: not a state") from None
        self.generators.append(generator)
        return generator


def _listed(value: Any, length: int | None = None) -> list[Any]:
    if type(value) is not list or (length is not None and len(value) != length):
        raise WireError("expected a list")
    return value


def _at(items: list[Any], index: Any) -> Any:
    if type(index) is not int or not 0 <= index < len(items):
        raise WireError(f"no item {str(index)[:20]}")
    return items[index]


def _tensor_at(frame: bytes, place: int, facts: Any) -> tuple[Tensor, int]:
    """The tensor whose bytes begin at `place`, and where the next ones do."""
    name, shape, stride, has_grad, num_bytes = _listed(facts, 5)
    dtype = DTYPES.get(name) if type(name) is str else None
    sizes = [*_listed(shape), *_listed(stride), num_bytes]
    if dtype is None or any(type(n) is not int or not 0 <= n < 2**40 for n in sizes):
        raise WireError("tensor: dtype or sizes")
    if len(shape) != len(stride) or len(shape) > MAX_DIMS or place + num_bytes > len(frame):
        raise WireError("tensor: shape or length")
    end = place + num_bytes
    try:
        if num_bytes:
            line = torch.frombuffer(bytearray(frame[place:end]), dtype=torch.uint8).view(dtype)
            tensor = line.as_strided(shape, stride)
        else:
            tensor = torch.empty(0, dtype=dtype).as_strided(shape, stride)
    except (RuntimeError, ValueError, OverflowError):
        raise WireError("tensor: shape does not fit its bytes") from None
    if tensor.numel() * tensor.element_size() > MAX_FRAME_BYTES:
        raise WireError("tensor: too large")
    if has_grad is True and (dtype.is_floating_point or dtype.is_complex):
        tensor.requires_grad_()
    return tensor, end
