"""Which misconception an answer equals: replay its recorded calls on each one and compare."""

from collections.abc import Callable, Iterable
from typing import Any

from autograder.declarations import Misconception
from autograder.limits import OutOfTime, captured_output, time_limit
from autograder.recording import Call, Raised, Returned, distance, snapshot

REPLAY_SECONDS = 5.0
Namespace = dict[str, Any]


def diagnose(
    calls: list[Call],
    candidates: Iterable[tuple[Misconception, Namespace]],
    fails_alike: Callable[[Namespace], bool],
) -> Misconception | None:
    """The candidate whose outcomes equal the recorded ones on every call, or None.

    Several may: then one that fails the same checks (`fails_alike`) wins, then the nearest.
    """
    matches = []
    for misconception, namespace in candidates:
        gap = replay(calls, namespace)
        if gap is not None:
            matches.append((gap, misconception, namespace))
    if len(matches) > 1:
        matches = [m for m in matches if fails_alike(m[2])] or matches
    return min(matches, key=lambda match: match[0])[1] if matches else None


def replay(calls: list[Call], namespace: Namespace) -> float | None:
    """The largest distance between recorded and replayed outcomes; None if any differs.

    A call that raised in the student's code says little about values, so it is passed over unless
    the candidate raises the same; at least one call must agree.
    """
    gaps = []
    try:
        with captured_output(), time_limit(REPLAY_SECONDS):
            for call in calls:
                outcome = _outcome(call, namespace)
                if isinstance(call.outcome, Raised):
                    gaps += [0.0] if outcome == call.outcome else []
                    continue
                if isinstance(outcome, Raised):
                    return None
                gap = distance(call.outcome.value, outcome.value)
                if gap is None:
                    return None
                gaps.append(gap)
    except OutOfTime:
        return None
    return max(gaps, default=None)


def _outcome(call: Call, namespace: Namespace) -> Returned | Raised:
    args, kwargs = snapshot((call.args, call.kwargs))
    try:
        return Returned(namespace[call.function](*args, **kwargs))
    except Exception as error:
        return Raised(f"{type(error).__name__}: {error}")
