"""The process that answers are forked from: it has imported what they need, and nothing else.

Started by `Workers` as `python -m autograder.isolation.host DESCRIPTOR FOLDER LAYER ...`, with an
empty environment; without a layer its workers are not confined. It never runs an answer itself. It
knows no grader and no solution, so there is none in the memory that its children inherit.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

import autograder.spies  # noqa: F401
import autograder.student  # noqa: F401  (children must not need to read it)
from autograder.isolation import answers, namespace, sandbox

LAYERS = ("landlock", "bubblewrap", "other_user")  # of sandbox.Layers, in its order
MEMORY_BYTES = 2**30
COMMAND_BYTES = 2**16


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    root = Path(sys.argv[2])
    closed_by = sandbox.Layers(*(name in sys.argv[3:] for name in LAYERS))
    sandbox.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    sys.path[:] = [p for p in sys.path if p not in ("", str(root))]
    readable = namespace.readable_places(root)
    warm_up()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, COMMAND_BYTES, 1)
        if not data:
            os._exit(0)
        command = json.loads(data)
        reply = carry_out(command, descriptors, control, readable, closed_by)
        control.sendall(json.dumps(reply).encode() + b"\n")


def carry_out(
    command: dict[str, Any],
    descriptors: list[int],
    control: socket.socket,
    readable: list[Path],
    closed_by: sandbox.Layers,
) -> Any:
    """'import' modules, 'fork' a worker on a descriptor, or 'end' one."""
    if command["do"] == "import":
        return [name for name in command["names"] if not imported(name)]
    if command["do"] == "fork":
        gc.freeze()
        child = os.fork()
        if child == 0:
            control.close()
            confined_worker(descriptors[0], readable, closed_by)
        os.close(descriptors[0])
        return child
    os.kill(command["process"], signal.SIGKILL)
    return os.waitpid(command["process"], 0)[1]


def confined_worker(descriptor: int, readable: list[Path], closed_by: sandbox.Layers) -> None:
    """Lock this process up and serve one submission; never returns."""
    try:
        sandbox.die_with_parent()
        silence(descriptor)
        if closed_by:
            sandbox.enter(readable, closed_by, memory_bytes=MEMORY_BYTES)
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


if __name__ == "__main__":
    main()
