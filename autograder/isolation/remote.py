"""An answer file that runs in confined workers, as the engine sees it: functions by name."""

import builtins
import linecache
import time
import types
from collections.abc import Sequence
from typing import Any

from autograder import refusals, spies
from autograder.declarations import Exercise
from autograder.isolation.channel import Closed, Late
from autograder.isolation.peer import Peer, RemoteError
from autograder.isolation.wire import WireError
from autograder.isolation.workers import Workers
from autograder.limits import OutOfTime
from autograder.refusals import Refusal
from autograder.student import IMPORT_SECONDS, Student, with_replacement

GRACE_SECONDS = 20.0
MAX_CHECK_BYTES = 2**30
MAX_RANKS = 64


class RemoteStudent(Student):
    """A Student whose functions run elsewhere; the limit of a check is kept by the channel."""

    grace_seconds = GRACE_SECONDS

    def __init__(
        self, submission: "RemoteSubmission", namespace: dict[str, Any], source: str
    ) -> None:
        super().__init__(namespace, source)
        self._submission = submission

    def begin(self, seconds: float) -> None:
        self._submission.begin(seconds)


class RemoteSubmission:
    """One answer file: a worker for plain calls, and one for each rank where there are ranks.

    `text` are the file's bytes; `given` is the exercise file as it came, as text and as a module.
    """

    def __init__(
        self, workers: Workers, text: bytes, shown: str, given: str, adapters: types.ModuleType
    ) -> None:
        self._workers, self._text, self._shown = workers, text, shown
        self._given, self._adapters = given, adapters
        self._peers: dict[int, tuple[int, Peer]] = {}
        self._deadline = time.monotonic()
        self.printed: list[str] = []
        self.num_started = 0
        lines = text.decode("latin-1").splitlines(True)
        linecache.cache[shown] = (len(text), None, lines, shown)  # messages quote its lines

    def student(self, exercise: Exercise) -> RemoteStudent:
        """What the engine calls for an exercise. Raises: Refusal where the file does not import."""
        self.begin(IMPORT_SECONDS)
        names = self._names()
        namespace = {name: _Call(self, name) for name in names}
        if exercise.entry != exercise.name:
            namespace.pop(exercise.entry, None)
            if exercise.name in names:
                namespace[exercise.entry] = self._adapted(exercise)
        student = RemoteStudent(self, namespace, self._shown)
        student.printed = self.printed = []
        return student

    def begin(self, seconds: float) -> None:
        """Give the calls that follow so many seconds in all."""
        self._deadline = time.monotonic() + seconds
        for _, peer in self._peers.values():
            self._limit(peer)
            peer.forget()

    def close(self) -> None:
        for place in list(self._peers):
            self._end(place)

    def _names(self) -> set[str]:
        peer = self.peer(0)
        return {name for name in peer.names if name.isidentifier()}  # type: ignore[attr-defined]

    def _adapted(self, exercise: Exercise) -> Any:
        if not exercise.on_ranks:
            return _Call(self, exercise.name, adapter=exercise.entry)
        on_rank = _Call(self, exercise.name, counts_flops=exercise.is_measured)
        return with_replacement(self._adapters, exercise.entry, exercise.name, on_rank)[
            exercise.entry
        ]

    def peer(self, place: int) -> Peer:
        """The worker of a rank (0: also that of plain calls), started and loaded."""
        if place not in self._peers:
            if not 0 <= place < MAX_RANKS:
                raise ValueError(f"rank: expected 0 to {MAX_RANKS - 1}, got {place}")
            process, channel = self._workers.start()
            self.num_started += 1
            peer = Peer(channel, {}, _exported, is_trusted=True)
            self._peers[place] = process, peer
            self._limit(peer)
            try:
                self._check_loaded(peer, self._loaded(place))
            except BaseException:
                if place in self._peers:
                    self._end(place)
                raise
        return self._peers[place][1]

    def _loaded(self, place: int) -> Any:
        """What the worker says of its import. It never raises there, unless somebody forges it."""
        given = [self._shown, self._text.decode("latin-1"), self._given]
        try:
            return self.ask(place, "load", given)
        except (Exception, SystemExit) as error:
            if isinstance(error, Refusal):
                raise
            message = f"{self._shown} does not import: {type(error).__name__}."
            raise Refusal(refusals.IMPORT_FAILED, message) from None

    def _check_loaded(self, peer: Peer, loaded: Any) -> None:
        if type(loaded) is not dict or type(loaded.get("names")) is not list:
            raise Refusal(refusals.IMPORT_FAILED, f"{self._shown} gave no list of its functions.")
        if loaded.get("refused"):
            refused = loaded["refused"]
            message = refused[-1] if type(refused) is list and refused else "It was refused."
            raise Refusal(refusals.IMPORT_FAILED, str(message)[:4000])
        peer.names = [n for n in loaded["names"] if type(n) is str]  # type: ignore[attr-defined]

    def _limit(self, peer: Peer) -> None:
        peer.channel.deadline = self._deadline
        peer.channel.budget_bytes = MAX_CHECK_BYTES

    def ask(self, place: int, name: str, args: list[Any]) -> Any:
        """Call a function of the worker's own, and see to what goes wrong with the worker."""
        peer = self._peers[place][1]
        try:
            return peer.call(name, args, {})[0]
        except RemoteError as error:
            raise _as_local(error) from None
        except Late:
            self._end(place)
            raise OutOfTime from None
        except Closed:
            status = self._end(place)
            raise Refusal(refusals.CRASHED, _told_end(status)) from None
        except WireError as error:
            self._end(place)
            raise Refusal(
                refusals.CRASHED,
                f"What came back is no value that a function can return here ({error}).",
            ) from None

    def _end(self, place: int) -> int:
        process, _ = self._peers.pop(place)
        return self._workers.end(process)


class _Call:
    """A function of the answers': called here, run there."""

    def __init__(
        self,
        submission: RemoteSubmission,
        name: str,
        *,
        adapter: str | None = None,
        counts_flops: bool = False,
    ) -> None:
        self._submission, self._name, self._adapter = submission, name, adapter
        self._counts_flops = counts_flops

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        comm = next((a for a in args if hasattr(type(a), "global_rank")), None)
        place = 0 if comm is None else comm.global_rank
        peer = self._submission.peer(place)
        peer.on_spent = comm.compute if comm is not None and self._counts_flops else _ignore
        watching = spies.active()
        commissions = [spy.commission((args, kwargs)) for spy in watching]
        request = [self._name, self._adapter, commissions, self._counts_flops, args, kwargs]
        peer.arrived = {}
        try:
            return self._submission.ask(place, "run", request)
        finally:
            self._absorb(peer.arrived, watching)

    def _absorb(self, arrived: dict[str, Any], watching: list[Any]) -> None:
        printed, reports = arrived.get("printed"), arrived.get("spies")
        if type(printed) is str and printed:
            self._submission.printed.append(printed[:2500])
        for spy, report in zip(watching, reports if type(reports) is list else [], strict=False):
            try:
                spy.absorb(report)
            except (TypeError, ValueError):
                raise Refusal(refusals.CRASHED, "The measurement did not come back.") from None


def _ignore(work: float) -> None:
    pass


def _exported(value: Any) -> Sequence[str] | None:
    """What a worker may do with an object of the grader's: call a function, or what the object
    itself lists as `remote`."""
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return ["__call__"]
    return getattr(value, "remote", None)


def _as_local(error: RemoteError) -> BaseException:
    """An exception of the same name and text, of the nearest built-in type."""
    if error.types[:1] == ["SystemExit"]:
        return SystemExit(error.text)
    base: type[Exception] = Exception
    for name in error.types:
        found = getattr(builtins, name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            base = found
            break
    name = error.types[0] if error.types and error.types[0].isidentifier() else "Exception"
    kind = base if base.__name__ == name else type(name, (base,), {})
    try:
        made = kind(error.text)
        if str(made) != error.text:  # KeyError quotes its text
            made = type(name, (base,), {"__str__": lambda self: error.text})(error.text)
    except Exception:
        made = type(name, (Exception,), {})(error.text)
    return _marked(made, error)


def _marked(made: Exception, error: RemoteError) -> Exception:
    made.explained_where_raised = error.told  # type: ignore[attr-defined]
    return made


def _told_end(status: int) -> str:
    how = f"by signal {status & 127}" if status & 127 else f"with exit status {status >> 8}"
    return f"The answer's process ended {how}: did it call os._exit, or crash in native code?"
