"""The process that answers are forked from: it has imported what they need, and nothing else.

Started by `Workers` as `python -m autograder.isolation.host DESCRIPTOR FOLDER`, with an empty
environment. It never runs an answer itself. It knows no grader and no solution, so there is none in
the memory that its children inherit.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

import autograder.spies  # noqa: F401
import autograder.student  # noqa: F401  (children must not need to read it)
from autograder.isolation import answers, sandbox

MEMORY_BYTES = 2**30
COMMAND_BYTES = 2**16


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    root = Path(sys.argv[2])
    sandbox.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    sys.path[:] = [p for p in sys.path if p not in ("", str(root))]
    readable = readable_places(root)
    warm_up()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, COMMAND_BYTES, 1)
        if not data:
            os._exit(0)
        command = json.loads(data)
        reply = carry_out(command, descriptors, control, readable)
        control.sendall(json.dumps(reply).encode() + b"\n")


def carry_out(
    command: dict[str, Any], descriptors: list[int], control: socket.socket, readable: list[Path]
) -> Any:
    """'import' modules, 'fork' a worker on a descriptor, or 'end' one."""
    if command["do"] == "import":
        return [name for name in command["names"] if not imported(name)]
    if command["do"] == "fork":
        gc.freeze()
        child = os.fork()
        if child == 0:
            control.close()
            confined_worker(descriptors[0], readable, command["is_trusted"])
        os.close(descriptors[0])
        return child
    os.kill(command["process"], signal.SIGKILL)
    return os.waitpid(command["process"], 0)[1]


def confined_worker(descriptor: int, readable: list[Path], is_trusted: bool) -> None:
    """Lock this process up and serve one submission; never returns."""
    try:
        sandbox.die_with_parent()
        silence(descriptor)
        if not is_trusted:
            sandbox.enter(readable, memory_bytes=MEMORY_BYTES)
        answers.serve(descriptor)
    finally:
        os._exit(1)


def silence(descriptor: int) -> None:
    """Standard streams lead nowhere; all other files but the channel are closed."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 4096)


def imported(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def warm_up() -> None:
    """Do once what torch does on first use."""
    leaf = torch.ones(2, 2, requires_grad=True)
    (leaf @ leaf).relu().sum().backward()
    torch.utils.data  # noqa: B018


def readable_places(root: Path) -> list[Path]:
    """The interpreter, its libraries, and the course's library; nobody's answers, no grader."""
    paths = sysconfig.get_paths()
    places: list[str | Path] = [
        paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    places += [sys.prefix, sys.base_prefix, root / "reference", "/usr/lib", "/usr/lib64", "/lib",
               "/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
               "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]  # fmt: skip
    found = {Path(p).resolve() for p in places}
    # /usr as a prefix would open more than libraries.
    return sorted(p for p in found if p not in (Path("/"), Path("/usr"), root, *root.parents))


if __name__ == "__main__":
    main()
