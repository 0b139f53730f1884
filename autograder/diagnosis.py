"""Which misconception an answer equals: replay its recorded calls on each one and compare."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from autograder.declarations import Misconception
from autograder.limits import OutOfTime, captured_output, time_limit
from autograder.recording import Call, Raised, Returned, distance, fingerprint, snapshot
from autograder.results import CheckResult

REPLAY_SECONDS = 5.0
Namespace = dict[str, Any]


@dataclass
class Memory:
    """What misconceptions gave, for whoever grades many answers to one exercise.

    `outcomes` by name and fingerprint of the arguments; `verdicts` by name and seed.
    """

    outcomes: dict[tuple[str, bytes], Returned | Raised] = field(default_factory=dict)
    verdicts: dict[tuple[str, int], list[CheckResult]] = field(default_factory=dict)


def diagnose(
    calls: list[Call],
    candidates: Iterable[tuple[Misconception, Namespace]],
    likeness: Callable[[Misconception, Namespace], int | None],
    *,
    is_sure: bool = True,
    memory: Memory | None = None,
) -> Misconception | None:
    """The candidate whose outcomes equal the recorded ones on every call, or None.

    `likeness` counts the checks that refuse a candidate in the same words; None where it fails
    other checks. It decides between several, and is asked about a single one as well where
    outcomes alone are no proof (not `is_sure`). Then the nearest wins.
    """
    memory = memory or Memory()
    keyed = [(call, fingerprint((call.function, call.args, call.kwargs))) for call in calls]
    matches = []
    for misconception, namespace in candidates:
        gap = _replay(keyed, namespace, misconception.name, memory)
        if gap is not None:
            matches.append((gap, misconception, namespace))
    if is_sure and len(matches) < 2:
        return matches[0][1] if matches else None
    graded = [(likeness(m, namespace), gap, m) for gap, m, namespace in matches]
    alike = [(-like, gap, i) for i, (like, gap, _) in enumerate(graded) if like is not None]
    return graded[min(alike)[2]][2] if alike else None


def replay(calls: list[Call], namespace: Namespace) -> float | None:
    """The largest distance between recorded and replayed outcomes; None if any differs.

    A call that raised in the student's code says little about values, so it is passed over, unless
    the candidate raises as well: the same agrees, another type of error differs. At least one call
    must agree.
    """
    return _replay([(call, b"%d" % i) for i, call in enumerate(calls)], namespace, "", Memory())


def _replay(
    keyed: list[tuple[Call, bytes]], namespace: Namespace, name: str, memory: Memory
) -> float | None:
    gaps = []
    for call, key in keyed:
        if (name, key) not in memory.outcomes:
            try:
                memory.outcomes[name, key] = _outcome(call, namespace)
            except OutOfTime:
                return None
        outcome = memory.outcomes[name, key]
        if isinstance(call.outcome, Raised):
            if isinstance(outcome, Raised) and outcome.error_type != call.outcome.error_type:
                return None
            gaps += [0.0] if outcome == call.outcome else []
            continue
        if isinstance(outcome, Raised):
            return None
        gap = distance(call.outcome.value, outcome.value)
        if gap is None:
            return None
        gaps.append(gap)
    return max(gaps, default=None)


def _outcome(call: Call, namespace: Namespace) -> Returned | Raised:
    args, kwargs = snapshot((call.args, call.kwargs))
    with captured_output(), time_limit(REPLAY_SECONDS):
        try:
            return Returned(namespace[call.function](*args, **kwargs))
        except Exception as error:
            return Raised(f"{type(error).__name__}: {error}")
