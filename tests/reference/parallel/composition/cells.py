"""One cell of the matrix: a technique with a feature is one rank, or is refused by name, or keeps
a property that is said here. Nothing else is an outcome."""

import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch.testing import assert_close

from reference.parallel.ranks import run
from tests.reference.parallel.composition import by_model, by_rows, ways, workload
from tests.reference.parallel.composition.features import FEATURES
from tests.tolerances import TOLERANCE

FLOAT32, BFLOAT16 = TOLERANCE[torch.float32], TOLERANCE[torch.bfloat16]["rtol"]


@dataclass(frozen=True)
class Technique:
    """`sizes`: of the run, of one that goes on from its checkpoint, and thorough ones."""

    name: str
    way: type[ways.Way]
    size: int = 2
    other_size: int = 4
    thorough_size: int = 4
    divides_rows: bool = True


TECHNIQUES = [
    Technique("DDP", by_rows.Replicas),
    Technique("ZeRO-1", by_rows.Stage),
    Technique("ZeRO-2", by_rows.StageTwo),
    Technique("FSDP", by_rows.Shards),
    Technique("HSDP", by_rows.HybridShards, size=4, other_size=2, thorough_size=8),
    Technique("TP", by_model.Tensors, divides_rows=False),
    Technique("TP-SP", by_model.TensorsInSequence, divides_rows=False),
    Technique("Ulysses", by_model.Heads, divides_rows=False),
    Technique("ring", by_model.Positions, divides_rows=False),
    Technique("pipeline", by_model.Stages, other_size=1, thorough_size=2, divides_rows=False),
    Technique(
        "zero bubble", by_model.DeferredStages, other_size=1, thorough_size=2, divides_rows=False
    ),
]
# (technique, feature): what the message must say, and a sentence for the page.
OTHER_KIND = (
    "norm: expected a Llama of .* got ProbedNorm, which is not divided here",
    "The layer that has them is of a kind that tensor parallelism does not divide; a part without "
    "it would be another model.",
)
ONE_PLACE = (
    "embed_tokens.weight stands in two places, and config.is_tied is False",
    "Embedding and head lie on different stages; is_tied in the configuration says that their "
    "gradients are to be summed.",
)
ONE_DTYPE = (
    "v: expected torch.float32 as k, got torch.bfloat16",
    "A stage's attention wants keys and values of one dtype, and takes no kernel that casts them: "
    "make the model bfloat16.",
)
REFUSED = {
    ("TP", "buffers and unused parameters"): OTHER_KIND,
    ("TP-SP", "buffers and unused parameters"): OTHER_KIND,
    ("TP", "accumulation, other parameters used"): OTHER_KIND,
    ("TP-SP", "accumulation, other parameters used"): OTHER_KIND,
    **{(name, "one parameter, two places"): ONE_PLACE for name in ("pipeline", "zero bubble")},
    **{(name, "autocast"): ONE_DTYPE for name in ("pipeline", "zero bubble")},
}
COPIES = (
    "agree",
    "Which numbers are dropped depends on the rank's part, so no run on one rank is the same; what "
    "ranks hold in common stays equal, bit for bit.",
)
AGAIN = (
    "again",
    "Each stage draws its own masks; what is tested: with blocks computed again in backward, "
    "losses, gradients and weights are bit for bit those without.",
)
ANEW = (
    "anew",
    "The weights go on at the other size, as on one rank whose optimizer begins anew; its states "
    "are each rank's own to save.",
)
PROPERTIES = {
    **{(name, "dropout"): COPIES for name in ("TP", "TP-SP", "Ulysses", "ring")},
    **{(name, "dropout"): AGAIN for name in ("pipeline", "zero bubble")},
    **{
        (name, "checkpoint at another size"): ANEW
        for name in ("TP", "TP-SP", "pipeline", "zero bubble")
    },
}


def outcome(technique, feature, *, backend="simulated", is_wide=False):
    """{"outcome": "equal", "refused" or "property", "why": a sentence or ""}.

    Raises: what went wrong in a cell that is not refused; AssertionError in one that should be, or
    that differs from one rank.
    """
    cell = technique.name, feature.name
    size = technique.thorough_size if is_wide else technique.size
    words, why = REFUSED.get(cell, (None, ""))
    with _is_refused(words), tempfile.TemporaryDirectory() as folder:
        results = _run(technique, feature, size, backend, Path(folder))
    if words is not None:
        return {"outcome": "refused", "why": why}
    kind, why = PROPERTIES.get(cell, (None, ""))
    if kind == "agree":
        _check_copies(results)
    elif kind == "again":
        again = replace(feature, checkpointing="full")
        _check_copies([*results, *_run(technique, again, size, backend, None)], size)
    else:
        check_equal(results, _truth(technique, feature, size, kind == "anew"), feature)
    return {"outcome": "equal" if kind is None else "property", "why": why}


@contextmanager
def _is_refused(words):
    """By this message, where there is one, and not otherwise."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if words is None or not re.search(words, str(error)):
            raise
    else:
        assert words is None, f"expected to be refused: {words}"


def _run(technique, feature, size, backend, folder):
    def of(size, steps, folder, is_continued=False):
        return run(size, ways.train, technique.way, feature, steps, folder, is_continued,
                   backend=backend, is_measured=False).results  # fmt: skip

    every = range(workload.NUM_STEPS)
    if not feature.restarts:
        return of(size, every, None)
    first, then = of(size, every[:1], folder), of(technique.other_size, every[1:], folder, True)
    for result in then:
        for series in ("losses", "gradients"):
            result[series] = first[0][series] + result[series]
        if issubclass(technique.way, by_model.Stages):  # gradients of both stages' ranks
            result["gradients"][0] = {n: g for r in first for n, g in r["gradients"][0].items()}
    return then


def _truth(technique, feature, size, is_anew):
    return _one_rank(feature, size if technique.divides_rows else 1, is_anew, workload.SEED)


@cache
def _one_rank(feature, num_parts, is_anew, seed):
    with torch.random.fork_rng():
        return workload.one_rank(feature, num_parts, is_anew)


def check_equal(results, truth, feature):
    """Each rank has what it has as one rank has it, and together they have all."""
    compare = _assert_near if feature.is_autocast else assert_close_or_none
    for key in ("state", "kinds"):
        assert {n for r in results for n in r[key]} == truth[key].keys(), key
    for step in range(workload.NUM_STEPS):
        found = {n for r in results for n in r["gradients"][step]}
        assert found == truth["gradients"][step].keys()
    for rank, result in enumerate(results):
        for name, kind in result["kinds"].items():
            assert kind == truth["kinds"][name], f"{name}, rank {rank}"
        for step, (loss, gradients) in enumerate(
            zip(result["losses"], result["gradients"], strict=True)
        ):
            where = f"step {step}, rank {rank}"
            compare(loss, truth["losses"][step], where)
            for name, gradient in gradients.items():
                compare(gradient, truth["gradients"][step][name], f"{name}, {where}")
        for name, tensor in result["state"].items():
            start = truth["start"][name] if feature.is_autocast else 0
            compare(tensor - start, truth["state"][name] - start, f"{name}, rank {rank}")
            assert tensor.dtype == truth["state"][name].dtype, name


def assert_close_or_none(found, truth, where):
    assert (found is None) == (truth is None), where
    if truth is not None:
        assert_close(found, truth, **FLOAT32, msg=lambda text: f"{where}: {text}")


def _assert_near(found, truth, where):
    """In bfloat16 sums round in another order: the whole tensor's error beside its size."""
    assert (found is None) == (truth is None), where
    if truth is not None:
        assert (found - truth).norm() <= BFLOAT16 * truth.norm(), where


def _check_copies(results, every=1):
    """Bit for bit: of all ranks, or of each rank and the one `every` later."""
    for one, other in zip(results, results[every:], strict=False):
        for key in ("losses", "gradients"):
            for a, b in zip(one[key], other[key], strict=True):
                assert_close(a, b, rtol=0, atol=0)
        assert_close(one["state"], other["state"], rtol=0, atol=0)
        assert one["kinds"] == other["kinds"]


def all_outcomes():
    """By technique and feature."""
    return {t.name: {f.name: outcome(t, f) for f in FEATURES} for t in TECHNIQUES}


__all__ = ["FEATURES", "TECHNIQUES", "Technique", "all_outcomes", "check_equal", "outcome"]
