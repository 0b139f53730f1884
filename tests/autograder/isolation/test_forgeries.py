"""Ledgers that the grader keeps cannot be touched; measurements in the answer's process can, and
then the points wait for a person."""

from pathlib import Path

import pytest

from autograder import refusals
from autograder.isolation import sandbox
from autograder.isolation.grading import IsolatedGrader
from autograder.isolation.tampering import suspicions
from autograder.workspace import chapter_stems, find_root

ROOT = find_root(Path(__file__).parent)
pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable())

# Right values by a gather of everything: too many bytes, and a collective besides.
GATHERS = """

def ring_all_reduce(comm, parts):
    n = comm.size
    {attack}
    return [comm.all_gather(p.reshape(1, -1)).sum(0).view(p.shape) for p in parts]
"""
LEDGER_ATTACKS = {
    "resets the ledger": "comm.traffic.reset()",
    "reaches inside": "comm._me.traffic.reset()",
    "takes time back": "comm.compute(-1e15)",
    "runs a machine of its own": "from reference.parallel.ranks import run; run(n, lambda c: 0)",
    "asks for a name that is not offered": "getattr(comm, '__class__').all_gather = None",
}

# Right values with the whole (T, S) matrix of scores in memory.
NAIVE = """

def flash_attention(q, k, v, block_q, block_k, is_causal=False):
    {attack}
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        T, S = s.shape[-2:]
        s = s.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1 + S - T), -torch.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)
"""
SPY_ATTACKS = {
    "patches the report": "import autograder.spies as s\n    "
    "s.largest_new_tensor.report = lambda self: [1, 1, []]",
    "leaves the mode": "from torch.utils import _python_dispatch as d\n    d._disable_current_modes"
    "().__enter__()",
    "works in a thread": "import threading",
    "works in numpy": "q = torch.from_numpy(q.numpy())",
}


def _grade(grader, stem, extra, exercise):
    text = (ROOT / "solutions" / f"{stem}.py").read_text() + extra
    return next(r for r in grader.grade(stem, text.encode()) if r.exercise == exercise)


@pytest.fixture(scope="module")
def grader():
    with IsolatedGrader(ROOT) as grader:
        yield grader


@pytest.mark.parametrize("name", LEDGER_ATTACKS)
def test_ledgers_of_traffic_are_out_of_reach(grader, name):
    honest = _grade(grader, "data_parallel", GATHERS.format(attack="pass"), "ring_all_reduce")
    attack = GATHERS.format(attack=LEDGER_ATTACKS[name])
    forged = _grade(grader, "data_parallel", attack, "ring_all_reduce")
    assert 0 < honest.earned < honest.points
    assert forged.earned <= honest.earned


LOCKS = """

import fcntl, struct
FILES, FAR = [], 2**40
def lock(command, kind, start, size):
    words = struct.pack("hhqqi4x", kind, 0, start, size, 0)
    return struct.unpack("hhqqi4x", fcntl.fcntl(FILES[0], command, words))
def numbers(t):
    return [v & 0xffffffff for v in t.contiguous().flatten().view(torch.int32).tolist()]
def ring_all_reduce(comm, parts):
    FILES[:] = FILES or [open(torch.__file__, "rb")]
    mine = [n for p in parts for n in numbers(p.float())]
    for i, n in enumerate(mine):
        lock(fcntl.F_SETLK, fcntl.F_RDLCK, FAR + (comm.rank * 4096 + i) * 2**33 + n, 1)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for _ in range(comm.size - 1):
        token = torch.zeros(1, dtype=torch.uint8)
        handle = comm.isend(token, right)
        comm.recv(token.clone(), left)
        handle.wait()
    totals = [p.clone() for p in parts]
    for other in set(range(comm.size)) - {comm.rank}:
        heard = []
        for i in range(len(mine)):
            at = FAR + (other * 4096 + i) * 2**33
            heard.append(lock(fcntl.F_GETLK, fcntl.F_WRLCK, at, 2**33)[2] - at)
        at = 0
        for total in totals:
            words = torch.tensor([h - 2**32 if h >= 2**31 else h for h in
                                  heard[at:at + total.numel()]], dtype=torch.int32)
            total += words.view(torch.float32).view(total.shape).to(total.dtype)
            at += total.numel()
    return totals
"""


def test_ranks_do_not_talk_past_the_ledger_by_locks(grader):
    honest = _grade(grader, "data_parallel", GATHERS.format(attack="pass"), "ring_all_reduce")
    forged = _grade(grader, "data_parallel", LOCKS, "ring_all_reduce")
    assert forged.earned <= honest.earned
    assert "PermissionError" in repr(forged.checks)


@pytest.mark.parametrize("name", SPY_ATTACKS)
def test_forged_measurements_earn_nothing(grader, name):
    honest = _grade(grader, "flash_attention", NAIVE.format(attack="pass"), "flash_attention")
    forged = _grade(
        grader, "flash_attention", NAIVE.format(attack=SPY_ATTACKS[name]), "flash_attention"
    )
    assert honest.earned < honest.points
    assert forged.earned <= honest.earned
    measured = [c for c in forged.checks if c.is_measured]
    assert measured and all(c.status != "passed" for c in measured)


def test_a_doubtful_file_keeps_what_needs_no_measurement(grader):
    result = _grade(grader, "flash_attention", "\nimport gc\n", "flash_attention")
    by_status = {c.status: c for c in result.checks}
    assert set(by_status) == {"passed", refusals.UNVERIFIED}
    assert "import gc" in by_status[refusals.UNVERIFIED].message
    assert 0 < result.earned < result.points


@pytest.mark.parametrize("stem", chapter_stems(ROOT))
def test_solutions_are_above_suspicion(stem):
    assert suspicions((ROOT / "solutions" / f"{stem}.py").read_bytes()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import gc", "import numpy as np", "from torch.utils import _python_dispatch",
        "import torch.utils._python_dispatch", "from autograder import spies", "import sys",
        "import torch as t\nt.matmul = 1", "torch.nn.functional.relu.__code__ = 1",
        "import torch\nfor torch.matmul in [1]: pass", "eval('1')", "getattr(x, 'y')",
        "x.__class__.__mro__", "x.numpy()", "class A:\n    def __torch_function__(self): pass",
        "from . import spies", "import importlib", "__builtins__", "torch.ops.aten.mm(a, b)",
        "from torch import _C", "import torch.multiprocessing", "def f(", "\0",
        "with a as torch.mm: pass", "globals()['x']", "from torch import *",
        "from dataclasses import builtins as b", "import dataclasses\ndataclasses.builtins.exec",
        "torch.sys", "import random\nrandom._os", "from transformers.utils.generic import sys",
        "from operator import attrgetter", "import operator\noperator.methodcaller('numpy')",
        "import string\nstring.Formatter()", "from typing import get_type_hints", "x._backing",
        "match x:\n    case object(__class__=c): pass",
    ],
)  # fmt: skip
def test_rejects_what_reaches_for_the_machinery(code):
    assert suspicions(b"import torch\n" + code.encode() if "(" != code[-1] else code.encode())


@pytest.mark.parametrize(
    "code",
    [
        "import torch.nn.functional as F\nF.relu(x)", "from torch import Tensor, nn",
        "import math\nfrom dataclasses import dataclass", "self.weight = nn.Parameter(x)",
        "from reference.attention import sdpa", "super().__init__()", "x.data = y", "_ = 3",
        "class A:\n    def __call__(self): pass", "from typing import Any", "x.grad = None",
        "class A:\n    def f(self):\n        return self._kept", "model.eval()",
    ],
)  # fmt: skip
def test_accepts_what_ordinary_answers_do(code):
    assert suspicions(code.encode()) == []
