"""A student's answers as the grader sees them: a namespace whose functions record their calls."""

import contextlib
import linecache
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autograder import refusals
from autograder.limits import OutOfTime, captured_output, time_limit
from autograder.recording import Call, Raised, Returned, snapshot, unchanged
from autograder.refusals import Refusal

IMPORT_SECONDS = 20.0
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


class StudentError(Exception):
    """An exception that came out of a student's function."""

    def __init__(self, original: Exception, message: str) -> None:
        super().__init__(message)
        self.original = original
        self.message = message


class Student:
    """`student.rms_norm(...)` calls the answer and records the call in `calls`.

    `refused` holds those of them that belong to a check that failed.

    A name that the answers lack, a None result and a changed input raise a Refusal; an exception
    raises a StudentError that quotes the line of the answer where it happened.
    """

    def __init__(self, namespace: dict[str, Any], source: str) -> None:
        self._namespace = namespace
        self._source = source
        self.calls: list[Call] = []
        self.refused: list[Call] = []
        self.printed: list[str] = []

    grace_seconds = 0.0  # what a check may take beyond its limit where that is kept elsewhere

    def begin(self, seconds: float) -> None:
        """A check begins, which has so many seconds."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._namespace:
            raise Refusal(
                refusals.MISSING,
                f"{self._source} has no {name}. Was it renamed or deleted? "
                f"`git show HEAD:{self._source}` shows the file as it came.",
            )
        function = self._namespace[name]
        if not callable(function):
            raise Refusal(
                refusals.MISSING,
                f"{self._source}: {name} should be a function, it is {function!r}.",
            )
        return lambda *args, **kwargs: self._call(name, function, args, kwargs)

    def _call(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        before = snapshot((args, kwargs))
        with captured_output() as printed:
            try:
                value = function(*args, **kwargs)
            except NotImplementedError as error:
                raise Refusal(
                    refusals.NOT_WRITTEN, str(error) or f"{name}: not written yet"
                ) from None
            except Refusal:
                raise
            except Exception as error:
                self.calls.append(
                    Call(name, before[0], before[1], Raised(f"{type(error).__name__}: {error}"))
                )
                raise StudentError(error, explain_error(error)) from error
            finally:
                if printed.written:
                    self.printed.append(printed.summary())
        self.calls.append(Call(name, before[0], before[1], Returned(snapshot(value))))
        if value is None:
            raise Refusal(
                refusals.RETURNED_NONE, f"{name} returned None. Is its return statement missing?"
            )
        if not unchanged((args, kwargs), before):
            raise Refusal(
                refusals.MUTATED,
                f"{name} changed its input ({_changed_argument(args, kwargs, before)}) in place. "
                "The caller still needs it: compute a new tensor (x = x * 2, not x *= 2 or "
                "x[...] = ...), or change a copy (x.clone(), dict(config), list(blocks)).",
            )
        return value


def _changed_argument(args: Any, kwargs: Any, before: Any) -> str:
    for i, (now, then) in enumerate(zip(args, before[0], strict=True)):
        if not unchanged(now, then):
            return f"argument {i + 1}"
    return ", ".join(k for k in kwargs if not unchanged(kwargs[k], before[1][k]))


def explain_error(error: BaseException) -> str:
    """'ValueError: ... (line 12, in rms_norm: `x.mean(-1)`)': the deepest line of the answer."""
    if told := getattr(error, "explained_where_raised", ""):
        return str(told)
    ours = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours) and "site-packages" not in frame.filename
        and not frame.filename.startswith((sys.prefix, STANDARD_LIBRARY, "<frozen"))
    ]  # fmt: skip
    where = ""
    if frames:
        last = frames[-1]
        quoted = f": `{last.line}`" if last.line else ""
        where = f" (line {last.lineno}, in {last.name}{quoted})"
    text = str(error)
    return f"{type(error).__name__}: {text[:500]}{' ...' if len(text) > 500 else ''}{where}"


def load_module(path: Path, shown: str) -> types.ModuleType:
    """Import an answer file afresh, whatever was imported before.

    Raises: Refusal (import failed, out of time) that names the line; nothing else comes out.
    """
    linecache.checkcache(str(path))
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise Refusal(
            refusals.IMPORT_FAILED, f"{shown} is not there. `make exercises` brings it back."
        ) from None
    return load_source(str(path), source, shown)


def load_source(filename: str, source: bytes, shown: str) -> types.ModuleType:
    """Execute an answer file's text as a module of its own; `filename` stands in tracebacks.

    Raises: Refusal, as load_module.
    """
    name = f"answers_of_{Path(filename).stem}"
    module = types.ModuleType(name)
    module.__file__ = filename
    try:
        with captured_output(), time_limit(IMPORT_SECONDS), _default_settings():
            code = compile(source, filename, "exec")
            sys.modules[name] = module
            exec(code, module.__dict__)
    except SyntaxError as error:
        line = f"`{(error.text or '').strip()}`" if error.text else ""
        raise Refusal(
            refusals.IMPORT_FAILED,
            f"{shown} is not valid Python: {error.msg}, line {error.lineno}: {line}".rstrip(": "),
        ) from None
    except OutOfTime:
        raise Refusal(
            refusals.IMPORT_FAILED,
            f"{shown} was still running after {IMPORT_SECONDS:.0f} s of import. Code outside of "
            "functions runs at import: move experiments into a notebook.",
        ) from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Refusal(
            refusals.IMPORT_FAILED, f"{shown} does not import. {explain_error(error)}"
        ) from None
    return module


@contextlib.contextmanager
def _default_settings() -> Iterator[None]:
    """Undo what an answer file sets for the whole process (a default dtype, no gradients)."""
    dtype, has_gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(has_gradients)


def with_replacement(module: types.ModuleType, entry: str, name: str, value: Any) -> dict[str, Any]:
    """The namespace in which the adapter `entry` uses `value` for `name`."""
    if entry == name:
        return {name: value}
    adapter = getattr(module, entry, None)
    if not isinstance(adapter, types.FunctionType):
        return {}
    rebound = types.FunctionType(
        adapter.__code__,
        {**adapter.__globals__, name: value},
        entry,
        adapter.__defaults__,
        adapter.__closure__,
    )
    rebound.__kwdefaults__ = adapter.__kwdefaults__
    return {entry: rebound}
