"""No answer scores above the honest wrong one, reads, writes, talks, lingers or stops the rest."""

import os
import resource
import socket
import threading
import time
from pathlib import Path

import pytest

from autograder.isolation import remote, sandbox
from autograder.isolation.grading import IsolatedGrader
from autograder.isolation.sandbox import Layers
from tests.autograder.isolation import attacks

SECRET = "secret-word-4711"
pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable())


@pytest.fixture
def target(course, tmp_path_factory, monkeypatch):
    """The course with solutions, and things outside of it that answers must not reach."""
    outside = tmp_path_factory.mktemp("outside")
    secret = outside / "secret.txt"
    secret.write_text(SECRET)
    (course / "solutions").mkdir()
    (course / "solutions/toy.py").write_text(f"# {SECRET}\n")
    for file in course.rglob("*.py"):
        file.write_text(file.read_text() + f"\n# {SECRET}\n")
    monkeypatch.setenv("COURSE_TOKEN", SECRET)
    monkeypatch.setattr(remote, "IMPORT_SECONDS", 3.0)
    return course, outside, secret


@pytest.fixture
def listener():
    """Somebody who listens on this machine; `heard` is what reached them."""
    heard = []
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        server.settimeout(0.1)
        datagrams.settimeout(0.1)
        is_over = threading.Event()

        def listen():
            while not is_over.is_set():
                for wait in (server.accept, lambda: datagrams.recv(10)):
                    try:
                        heard.append(wait())
                    except TimeoutError:
                        pass

        thread = threading.Thread(target=listen)
        thread.start()
        yield port, heard
        is_over.set()
        thread.join()


def _descendants(pid):
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, set()).add(int(entry.name))
    found, waiting = set(), {pid}
    while waiting:
        waiting = set().union(*(children.get(p, ()) for p in waiting))
        found |= waiting
    return found


def _snapshot(folder):
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.rglob("*"))
    }


def _graded(grader, code):
    results = grader.grade("toy", code.encode())
    return sum(r.earned for r in results), results


ALL_LAYERS = sandbox.layers()
# One layer at a time closes the file system as well, and the attacks on it are tried on each.
ALONE = [
    pytest.param(
        layers,
        marks=pytest.mark.skipif(not is_there, reason="not on this machine"),
        id=next(name for name, is_on in vars(layers).items() if is_on),
    )
    for layers, is_there in (
        (Layers(True, False), ALL_LAYERS.landlock),
        (Layers(False, True), ALL_LAYERS.bubblewrap),
        (Layers(False, False, other_user=True), sandbox.can_change_user()),
    )
]


def test_no_attack_does_more_than_the_honest_wrong_answer(target, listener):
    _attack(attacks.ALL, target, listener, ALL_LAYERS)


@pytest.mark.parametrize("layers", ALONE)
def test_each_layer_alone_holds(target, listener, layers):
    tried = attacks.READERS | attacks.WRITERS | attacks.METADATA | attacks.TALKERS
    _attack(tried | attacks.KILLERS, target, listener, layers)


def _attack(tried, target, listener, layers):
    course, outside, secret = target
    port, heard = listener
    marker = str(os.getpid())
    places = dict(secret=str(secret), outside=str(outside), root=str(course), port=port,
                  marker=marker)  # fmt: skip
    before = _snapshot(outside), _snapshot(course)
    shared = set(os.listdir("/dev/shm")), Path("/proc/sysvipc/shm").read_text()
    temporary = {name for name in os.listdir("/tmp") if "answer" in name}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with IsolatedGrader(course, layers=layers) as grader:
        honest, _ = _graded(grader, attacks.WRONG)
        assert honest == 1
        quiet = _descendants(grader.workers.pid)
        failures = []
        for name, code in tried.items():
            start = time.monotonic()
            text = attacks.WRONG + (code if name in attacks.VERBATIM else _filled(code, places))
            results = grader.grade("toy", text.encode())  # an error here would stop the batch
            earned = sum(r.earned for r in results)
            if earned > honest:
                failures.append(f"{name}: earned {earned}, an honest wrong answer {honest}")
            if SECRET in repr(results) or "secret-word" in repr(results):
                failures.append(f"{name}: read a secret")
            if time.monotonic() - start > 30:
                failures.append(f"{name}: took {time.monotonic() - start:.0f} s")
            if left := _descendants(grader.workers.pid) - quiet:
                failures.append(f"{name}: left processes {left}")
            assert _graded(grader, attacks.WRONG)[0] == honest, name
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
        if most > 2**20:  # kB
            failures.append(f"the grader took {most:,} kB")
    assert not failures
    assert (_snapshot(outside), _snapshot(course)) == before
    assert not heard
    assert (set(os.listdir("/dev/shm")), Path("/proc/sysvipc/shm").read_text()) == shared
    assert {name for name in os.listdir("/tmp") if "answer" in name} == temporary
    assert not _running(f"61.{marker}")


def _filled(code, places):
    return code.format(**places) if "{" in code else code


def _running(word):
    commands = []
    for entry in Path("/proc").iterdir():
        try:
            commands.append((entry / "cmdline").read_bytes())
        except OSError:
            continue
    return [c for c in commands if word.encode() in c]


def test_there_are_many_attacks():
    assert len(attacks.ALL) >= 40


def test_the_attacks_work_where_nothing_is_confined(course, tmp_path_factory):
    """Else a test of the sandbox could pass by a typing mistake."""
    outside = tmp_path_factory.mktemp("open")
    secret = outside / "secret.txt"
    secret.write_text(SECRET)
    places = dict(secret=str(secret), outside=str(outside), root=str(course), port=1, marker="0")
    with IsolatedGrader(course, is_trusted=True) as grader:
        for name in ("reads a secret by its path", "runs cat"):
            text = attacks.WRONG + attacks.READERS[name].format(**places)
            assert SECRET in repr(grader.grade("toy", text.encode())), name
        for name in ("writes a file", "makes a folder", "saves a tensor"):
            grader.grade("toy", (attacks.WRONG + _filled(attacks.WRITERS[name], places)).encode())
    assert {"written", "made", "tensor.pt"} <= set(os.listdir(outside))
