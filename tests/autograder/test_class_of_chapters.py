"""A class that hands in real chapters: right, right in other ways, each known mistake, hostile.

By default three chapters; with THOROUGH=1 all of them, more than a thousand students.
"""

import ast
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from autograder.classroom import command
from autograder.isolation import sandbox
from autograder.isolation.tampering import suspicions
from autograder.workspace import chapter_stems, find_root, load_chapter

ROOT = find_root(Path(__file__).parent)
CHAPTERS = ("start_here", "normalization", "activations")
if os.environ.get("THOROUGH"):
    CHAPTERS = tuple(chapter_stems(ROOT))
pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable())


@dataclass
class HandedIn:
    """A file, and what it must get: all points but for `refused`, with this status and name."""

    stem: str
    text: bytes
    refused: str = ""  # an exercise, or "all"
    status: str = ""
    diagnosis: str = ""

    @property
    def is_doubtful(self) -> bool:
        """Whether the file could have changed what is measured in its process."""
        return bool(suspicions(self.text))


# What is added to the right answers of normalization: the refused exercise, its status.
HOSTILE = {
    "exits": ("import os\nos._exit(0)", "all", "ended the process"),
    "forks": ("import os\nos.fork()", "all", "import failed"),
    "reads": ("open('/etc/passwd').read()", "all", "import failed"),
    "writes": ("open('/tmp/of-a-student', 'w').write('x')", "all", "import failed"),
    "talks": ("import socket\nsocket.socket()", "all", "import failed"),
    "patches torch": ("torch.allclose = torch.equal = lambda *a, **k: True", "", ""),
    "prints verdicts": ("print('{\"status\": \"passed\"}' * 1000)", "", ""),
    "never returns": ("def rms_norm(*a, **k):\n    while True: pass", "rms_norm", "out of time"),
    "hoards": ("def rms_norm(*a, **k):\n    return [bytearray(2**28) for _ in range(99)]",
               "rms_norm", "raised"),
    "always equal": ("class T(torch.Tensor):\n    __eq__ = lambda s, o: True\n"
                     "def rms_norm(x, *a, **k):\n    return x.as_subclass(T)",
                     "rms_norm", "wrong type"),
    "raises a verdict": ("def rms_norm(*a, **k):\n    raise SystemExit('passed')",
                         "rms_norm", "raised"),
}  # fmt: skip


def _written(catalogue, name):
    """An entry of a catalogue as a student would have written it, with what it calls."""
    tree = ast.parse(catalogue)
    tree.body = [
        node for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and node.module == "autograder")
    ]  # fmt: skip
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.decorator_list = []
    while unused := _unused(tree, name):
        tree.body = [node for node in tree.body if node not in unused]
    return ast.unparse(tree)


def _unused(tree, kept):
    named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return [
        node for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in named | {kept}
    ]  # fmt: skip


def _class():
    for stem in CHAPTERS:
        solution = (ROOT / "solutions" / f"{stem}.py").read_text()
        catalogue = (ROOT / "misconceptions" / f"{stem}.py").read_text()
        chapter = load_chapter(ROOT, stem)
        yield f"{stem} right", HandedIn(stem, solution.encode())
        untouched = (ROOT / "exercises" / f"{stem}.py").read_bytes()
        yield f"{stem} untouched", HandedIn(stem, untouched, "all", "untouched")
        cut = solution[: solution.rindex("return")] + "return ("
        yield f"{stem} torn", HandedIn(stem, cut.encode(), "all", "import failed")
        wide = solution.encode("utf-16")
        yield f"{stem} utf-16", HandedIn(stem, wide, "all", "import failed")
        yield f"{stem} empty", HandedIn(stem, b"# " + stem.encode(), "all", "missing")
        for entry in [*chapter.misconceptions, *chapter.alternatives]:
            written = _written(catalogue, entry.implementation.__name__)
            text = f"{solution}\n\n{written}\n\n"
            text += f"{entry.exercise} = {entry.implementation.__name__}\n"
            if entry in chapter.alternatives:
                yield f"{stem} also {entry.name}", HandedIn(stem, text.encode())
            else:
                yield (f"{stem} mistaken {entry.name} {entry.exercise}",
                       HandedIn(stem, text.encode(), entry.exercise, "", entry.name))  # fmt: skip
    solution = (ROOT / "solutions/normalization.py").read_text()
    huge = solution.encode() + b"#" * 2**20
    yield "huge", HandedIn("normalization", huge, "all", "not taken")
    for name, (code, refused, status) in HOSTILE.items():
        text = f"{solution}\n\n{code}\n".encode()
        yield f"hostile {name}", HandedIn("normalization", text, refused, status)


def test_every_student_gets_exactly_what_is_due(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    handed_in = dict(_class())
    assert len(handed_in) >= 200
    students = {f"student {i:04d}": name for i, name in enumerate(handed_in)}
    for student, name in students.items():
        (tmp_path / "in" / student).mkdir(parents=True)
        (tmp_path / "in" / student / f"{handed_in[name].stem}.py").write_bytes(handed_in[name].text)
    assert command.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1  # the huge one
    data = json.loads((tmp_path / "out/results.json").read_text())
    verdicts = {students[s["student"]]: s for s in data["submissions"]}
    assert verdicts.keys() == handed_in.keys()
    wrong = [
        (name, said)
        for name, due in handed_in.items()
        for said in _differences(verdicts[name], due)
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert "not verified" in str(verdicts["hostile patches torch"])
    assert not Path("/tmp/of-a-student").exists()


# Whose solutions call which exercise: a mistake there is a mistake here.
DEPENDS = {"zero_memory": ("choose_stage",)}


def _differences(verdict, due):
    if due.status == "not taken":
        if not verdict["problem"] or verdict["exercises"]:
            yield "was graded"
        return
    for result in verdict["exercises"]:
        name, status = result["exercise"], result["status"]
        is_full = result["earned"] == result["points"]
        if status == "not verified":
            if is_full or not due.is_doubtful:
                yield f"{name}: {status}"
            continue
        if due.refused not in ("all", name):
            if name in DEPENDS.get(due.refused, ()):
                continue
            if status != "passed" or not is_full:
                yield f"{name}: {status}"
        elif due.status == "untouched":
            if result["earned"] or status not in ("not written", "not repaired"):
                yield f"{name}: {status}, {result['earned']}"
        elif due.diagnosis:
            told = (result["diagnosis"] or {}).get("name")
            if is_full or (told != due.diagnosis and status != "raised"):
                yield f"{name}: {status}, {told}"
        elif status != due.status or (due.refused == "all" and result["earned"]):
            yield f"{name}: {status}, {result['earned']}"
