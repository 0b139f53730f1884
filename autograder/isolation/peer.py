"""Two processes that call each other's functions: the grader's side and the answer's are the same.

A call carries values (see wire). What does not travel as a value stays where it is, and the other
side gets a stub that calls back. A result with a graph keeps it where it was computed; on the other
side its backward asks for a vector-Jacobian product. Arguments that a function changes in place
are changed on the caller's side too, when it returns.

Calls nest strictly: whoever waits for an answer serves the requests that come before it.
"""

import contextlib
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autograder.isolation.changes import contents, outline, refill, swapped
from autograder.isolation.channel import Channel
from autograder.isolation.stubs import RemoteGraph, Stub
from autograder.isolation.wire import Decoder, Encoder, WireError
from autograder.recording import _without_spies

MAX_NESTING = 60
MAX_GRAPHS = 256
MAX_TEXT = 4000
MAX_RAISED = 8
# What a frame that is well-formed but makes no sense raises while it is taken in.
SENSELESS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError,
             MemoryError)  # fmt: skip

PACKAGE = str(Path(__file__).parents[1])


class RemoteError(Exception):
    """What was raised on the other side: names of its type's bases, its text, a fuller message."""

    def __init__(self, types: list[str], text: str, told: str, again: Any = None) -> None:
        super().__init__(text)
        self.types, self.text, self.told, self.again = types, text, told, again


@contextlib.contextmanager
def _making_sense() -> Iterator[None]:
    """Take in what the other side says; nonsense is a WireError, whatever it trips over."""
    try:
        yield
    except SENSELESS as error:
        raise WireError(f"{type(error).__name__} while it was read") from None


class Peer:
    """One end of the channel.

    `functions` are what the other side may call by name; `export` says which attributes of an
    object that stays here the other side may use (None: the object may not be referred to).
    """

    def __init__(
        self,
        channel: Channel,
        functions: dict[str, Callable[..., Any]],
        export: Callable[[Any], Sequence[str] | None],
        *,
        is_trusted: bool,
    ) -> None:
        self.channel, self._functions, self._export = channel, functions, export
        self._is_trusted = is_trusted  # whether this side believes what comes back about errors
        self._objects: dict[int, tuple[Any, tuple[str, ...], list[Tensor]]] = {}
        self._graphs: OrderedDict[int, tuple[list[Tensor], list[Tensor]]] = OrderedDict()
        self._raised: dict[int, BaseException] = {}
        self._count, self._depth = 0, 0
        self.spent: Callable[[], float] = lambda: 0.0  # work since it was last asked
        self.on_spent: Callable[[float], None] = lambda work: None
        self.leaving: dict[str, Any] = {}  # what the next answer of this side carries besides
        self.arrived: dict[str, Any] = {}  # what the last answer of the other side carried

    def forget(self) -> None:
        """Let go of objects, graphs and errors of earlier calls."""
        self._objects.clear()
        self._raised.clear()

    # Calling

    def call(
        self, name: Any, args: Any, kwargs: Any, given: list[Tensor] | None = None, **more: Any
    ) -> tuple[Any, list[Tensor]]:
        """Call a function of the other side; also gives the tensors that went there.

        `given`: tensors that an earlier call left there, and that this one may have changed.
        Raises: RemoteError for what it raises; Closed, Late and WireError for the channel.
        """
        with _without_spies():
            return self._ask(name, args, kwargs, given or [], more)

    def _ask(
        self, name: str, args: Any, kwargs: Any, given: list[Tensor], more: dict[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        message = Encoder(reference=self._refer)
        header = {
            "m": "call", "f": name, "a": message.value(list(args)), "k": message.value(kwargs),
            "grad": torch.is_grad_enabled(), "spent": self.spent(), "at": list(_place()), **more,
        }  # fmt: skip
        self.channel.send(message.frame(header))
        own = message.tensors + given
        answer = self._answer(own)
        with _making_sense():
            self._write_back(answer, own, message.generators, [args, kwargs])
            value = answer.value(answer.header.get("r"))
            return self._with_graph(value, answer, message.tensors), message.tensors

    def _answer(self, own: list[Tensor]) -> Decoder:
        while True:
            frame = self.channel.receive()
            with _making_sense():
                answer = Decoder(frame, own, self._stub)
                kind = answer.header.get("m")
                if kind not in ("done", "fail"):
                    self._serve(answer)
                    continue
                self._note_work(answer.header)
                arrived = answer.value(answer.header.get("besides", {"d": []}))
                self.arrived = arrived if type(arrived) is dict else {}
                error = self._error_of(answer.header) if kind == "fail" else None
            if error is not None:
                raise error
            return answer

    def _note_work(self, header: dict[str, Any]) -> None:
        work = header.get("spent")
        if isinstance(work, (int, float)) and 0 < work < 1e18:
            self.on_spent(float(work))

    def _error_of(self, header: dict[str, Any]) -> BaseException:
        again = header.get("again")
        kept = self._raised.get(again) if self._is_trusted and type(again) is int else None
        if kept is not None:
            return kept
        types = [str(t)[:80] for t in _list_of(header.get("e"))[:20]]
        text, told = (str(header.get(key))[:MAX_TEXT] for key in ("s", "x"))
        return RemoteError(types, text, told, header.get("again"))

    def _write_back(
        self, answer: Decoder, own: list[Tensor], generators: list[Any], before: list[Any]
    ) -> None:
        with torch.no_grad():
            for pair in answer.header.get("changed", []):
                index, encoded = pair
                new = answer.value(encoded)
                if not 0 <= index < len(own) or type(new) is not Tensor:
                    raise WireError("changed: expected a tensor")
                if own[index].shape == new.shape and own[index].dtype == new.dtype:
                    own[index].copy_(new)
                else:
                    own[index].data = new.detach()
        states = [answer.value(s) for s in answer.header.get("states", [])]
        for generator, state in zip(generators, states, strict=False):
            generator.set_state(state.get_state())
        if "lists" in answer.header:
            refill(before, answer.value(answer.header["lists"]))

    def _with_graph(self, value: Any, answer: Decoder, sent: list[Tensor]) -> Any:
        marked = answer.header.get("graph")
        if marked is None or not torch.is_grad_enabled():
            return value
        call, indices, leaves = marked
        outputs = [answer.tensors[i] for i in indices]
        inputs = [sent[i] for i in leaves]
        if not inputs or not any(t.requires_grad for t in inputs):
            return value
        with_graph = RemoteGraph.apply(self, call, [o.detach() for o in outputs], *inputs)
        swaps = {id(old): new for old, new in zip(outputs, with_graph, strict=True)}
        return swapped(value, swaps)

    def vjp(self, call: int, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of a call's inputs, given those of its outputs."""
        with _without_spies():
            message = Encoder()
            self.channel.send(
                message.frame({"m": "vjp", "c": call, "g": message.value(list(grads))})
            )
            answer = self._answer([])
            with _making_sense():
                found: list[Tensor | None] = answer.value(answer.header.get("r"))
            return found

    # Serving

    def serve_one(self) -> None:
        """Wait for one request and answer it."""
        self._serve(Decoder(self.channel.receive(), [], self._stub))

    def _serve(self, request: Decoder) -> None:
        self._note_work(request.header)
        self._depth += 1
        try:
            if self._depth > MAX_NESTING:
                raise WireError("calls are nested too deep")
            if request.header.get("m") == "vjp":
                frame = self._served_vjp(request)
            elif request.header.get("m") == "call":
                frame = self._served_call(request)
            else:
                raise WireError("message: expected a call")
        finally:
            self._depth -= 1
        self.channel.send(frame)

    def _served_call(self, request: Decoder) -> bytes:
        header = request.header
        args = [request.value(a) for a in _list_of(header.get("a"))]
        kwargs = request.value(header.get("k"))
        if type(kwargs) is not dict or not all(type(k) is str for k in kwargs):
            raise WireError("keywords: expected names")
        function, given, known = self._target(header.get("f"))
        before = contents(request.tensors)
        before_call = outline([args, kwargs])
        asked_from = _checked_place(header.get("at"))  # noqa: F841  (ranks quote it in messages)
        try:
            with torch.set_grad_enabled(header.get("grad") is True):
                value = function(*args, **kwargs)
        except WireError:
            raise
        except BaseException as error:
            return self._failed(error)
        own = request.tensors + given
        message = Encoder(
            {id(t): i for i, t in enumerate(own)}, lambda v: self._refer(v, request.tensors)
        )
        done: dict[str, Any] = {"m": "done", "r": message.value(value)}
        results = list(message.tensors)
        done["changed"] = self._changed(own, before + known, message)
        done["states"] = [message.value(g) for g in request.generators]
        if outline([args, kwargs]) != before_call:
            done["lists"] = message.value([args, kwargs])
        self._keep_graph(done, request.tensors, results)
        return message.frame(done | self._besides(message))

    def _besides(self, message: Encoder) -> dict[str, Any]:
        besides, self.leaving = message.value(self.leaving), {}
        return {"besides": besides, "spent": self.spent()}

    def _changed(self, own: list[Tensor], before: list[bytes], message: Encoder) -> list[Any]:
        changed = []
        for i, (tensor, then) in enumerate(zip(own, before, strict=True)):
            if contents([tensor]) != [then]:
                changed.append([i, message.value(tensor.detach())])
        return changed

    def _keep_graph(
        self, done: dict[str, Any], inputs: list[Tensor], results: list[Tensor]
    ) -> None:
        outputs = [(i, t) for i, t in enumerate(results) if t.grad_fn is not None]
        leaves = [(i, t) for i, t in enumerate(inputs) if t.requires_grad]
        if not outputs or not leaves:
            return
        self._count += 1
        self._graphs[self._count] = ([t for _, t in leaves], [t for _, t in outputs])
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        done["graph"] = [self._count, [i for i, _ in outputs], [i for i, _ in leaves]]

    def _served_vjp(self, request: Decoder) -> bytes:
        grads = request.value(request.header.get("g"))
        try:
            inputs, outputs = self._graphs[request.header["c"]]
            wanted = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [o for o, _ in wanted], inputs, [g for _, g in wanted],
                allow_unused=True, retain_graph=True,
            )  # fmt: skip
        except BaseException as error:
            return self._failed(error)
        message = Encoder()
        return message.frame({"m": "done", "r": message.value(list(found))})

    def _failed(self, error: BaseException) -> bytes:
        header: dict[str, Any] = {"m": "fail"}
        if isinstance(error, RemoteError):
            header |= {"e": error.types, "s": error.text, "x": error.told}
        else:
            header["e"] = [t.__name__ for t in type(error).__mro__]
            header["s"], header["x"] = _text(error), explained(error)
        if self._is_trusted:
            self._count += 1
            self._raised[self._count] = error
            header["again"] = self._count
            while len(self._raised) > MAX_RAISED:
                del self._raised[next(iter(self._raised))]
        elif type(again := getattr(error, "again", None)) is int:
            header["again"] = again
        message = Encoder()
        return message.frame(header | self._besides(message))

    def _target(self, name: Any) -> tuple[Callable[..., Any], list[Tensor], list[bytes]]:
        if type(name) is str and name in self._functions:
            return self._functions[name], [], []
        if type(name) is list and len(name) == 2 and name[0] in self._objects:
            found, names, given = self._objects[name[0]]
            if name[1] == "__call__" and "__call__" in names:
                return found, given, contents(given)
            if type(name[1]) is str and name[1] in names:
                attribute = getattr(found, name[1])
                if callable(attribute):
                    return attribute, given, contents(given)
                return (lambda: attribute), given, contents(given)
        raise WireError("call: no such function")

    def _refer(self, value: Any, given: list[Tensor] | None = None) -> dict[str, Any] | None:
        if isinstance(value, Stub):
            return {"o": value._kind}
        names = self._export(value)
        if names is None:
            return None
        key = id(value)
        self._objects.setdefault(key, (value, tuple(names), given or []))
        plain = [n for n in names if n != "__call__" and not callable(getattr(value, n, None))]
        return {"r": key, "n": list(names), "plain": plain, "kind": type(value).__name__}

    def _stub(self, encoded: dict[str, Any]) -> Any:
        if self._is_trusted:
            raise WireError("an object of the other side's: only values are taken")
        names = [str(n) for n in encoded.get("n", [])][:100]
        stub = Stub(self, encoded["r"], names, [str(n) for n in encoded.get("plain", [])])
        stub._kind = str(encoded.get("kind"))
        return stub


def _place() -> tuple[str, int, str]:
    """File, line and function of the innermost frame outside of the autograder."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def _checked_place(place: Any) -> tuple[str, int, str] | None:
    if type(place) is not list or [type(p) for p in place] != [str, int, str]:
        return None
    return place[0][:200], place[1], place[2][:100]


def _list_of(value: Any) -> list[Any]:
    if type(value) is not list:
        raise WireError("arguments: expected a list")
    return value


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except Exception:
        return f"an exception of type {type(error).__name__} that cannot be printed"


def explained(error: BaseException) -> str:
    from autograder.student import explain_error

    try:
        return explain_error(error)[:MAX_TEXT]
    except Exception:
        return "".join(traceback.format_exception_only(type(error), None)).strip()
