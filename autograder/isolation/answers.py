"""In the worker: the submission's module, and the calls that the grader makes into it."""

import linecache
import types
from collections.abc import Callable
from typing import Any

from autograder import spies
from autograder.isolation.channel import Channel, Closed
from autograder.isolation.peer import Peer
from autograder.limits import captured_output
from autograder.refusals import Refusal
from autograder.student import load_source, with_replacement


def serve(descriptor: int) -> None:
    """Answer the grader until it hangs up."""
    submission = Submission()
    peer = Peer(Channel(descriptor), submission.functions(), lambda value: None, is_trusted=False)
    submission.peer = peer
    try:
        while True:
            peer.serve_one()
    except Closed:
        return


class Submission:
    """One answer file in this process, loaded by the first call."""

    def __init__(self) -> None:
        self.peer: Peer
        self._module = types.ModuleType("empty")
        self._given = types.ModuleType("empty")
        self._flops: Any = None
        self._told_flops = 0.0

    def functions(self) -> dict[str, Callable[..., Any]]:
        return {"load": self.load, "run": self.run}

    def load(self, shown: str, text: str, given: str) -> dict[str, Any]:
        """Import the answers, bytes as latin-1; `given` is the exercise as it came, whose adapters
        count."""
        try:
            linecache.cache[shown] = (len(text), None, text.splitlines(True), shown)
            self._module = load_source(shown, text.encode("latin-1"), shown)
        except Refusal as refusal:
            return {"refused": [refusal.kind, refusal.message], "names": []}
        self._given = types.ModuleType("given")
        exec(compile(given, "given", "exec"), self._given.__dict__)
        names = [n for n, v in vars(self._module).items() if callable(v) and not n.startswith("_")]
        return {"refused": None, "names": [str(n) for n in names][:2000]}

    def run(
        self, name: str, adapter: str | None, watch: list[Any], counts_flops: bool,
        args: Any, kwargs: Any,
    ) -> Any:  # fmt: skip
        """Call an answer, or `adapter` of the exercise as it came with the answer in its place."""
        function = vars(self._module)[name]
        if adapter is not None:
            function = with_replacement(self._given, adapter, name, function)[adapter]
        reports: Callable[[], list[Any]] = list
        with captured_output() as printed:
            try:
                with spies.watched(watch, (args, kwargs)) as reports:
                    if not counts_flops:
                        return function(*args, **kwargs)
                    return self._counted(function, args, kwargs)
            finally:
                self.peer.leaving = {"printed": printed.summary(), "spies": reports()}

    def _counted(self, function: Any, args: Any, kwargs: Any) -> Any:
        with spies.count_flops() as self._flops:
            self._told_flops = 0.0
            self.peer.spent = self._spent
            return function(*args, **kwargs)

    def _spent(self) -> float:
        if self._flops is None:
            return 0.0
        new, self._told_flops = self._flops.total - self._told_flops, self._flops.total
        return new
