"""The grader's end: a host process, and the confined workers that it forks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from autograder.isolation import namespace, sandbox
from autograder.isolation.channel import Channel

HOST_SECONDS = 120.0


class Workers:
    """Forks workers from one host process, and ends them. Use as a context manager.

    `layers` close the file system to them, by default all that this machine has; trusted ones are
    not confined. Raises: NoSandbox, unless `is_trusted`, where there are none.
    """

    def __init__(
        self, root: Path, *, is_trusted: bool = False, layers: sandbox.Layers | None = None
    ) -> None:
        if is_trusted:
            layers = sandbox.Layers(False, False)
        elif layers is None:
            if reason := sandbox.unavailable():
                raise sandbox.NoSandbox(reason)
            layers = sandbox.layers()
        ours, theirs = socket.socketpair()
        self._control = ours
        ours.settimeout(HOST_SECONDS)
        package = str(Path(__file__).parents[2])
        command = [sys.executable, "-s", "-m", "autograder.isolation.host", str(theirs.fileno()),
                   str(root), *(name for name, is_on in vars(layers).items() if is_on)]  # fmt: skip
        if layers.bubblewrap:
            command = namespace.inside(command, self._places(root, Path(package)))
        self._host = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=clean_environment(package), cwd=root,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._processes: dict[int, Channel] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @staticmethod
    def _places(root: Path, package: Path) -> list[Path]:
        """What the host itself needs; its workers are left with less where Landlock closes more."""
        places = namespace.readable_places(root)
        return [*places, *namespace.interpreter(), package / "autograder"]

    @property
    def pid(self) -> int:
        return self._host.pid

    def prepare(self, modules: list[str]) -> None:
        """Import modules in the host, so that workers find them in memory."""
        self._command({"do": "import", "names": modules})

    def start(self) -> tuple[int, Channel]:
        """A fresh worker and the channel to it."""
        ours, theirs = socket.socketpair()
        process = self._command({"do": "fork"}, [theirs.fileno()])
        theirs.close()
        channel = Channel(ours.detach())
        self._processes[process] = channel
        return process, channel

    def end(self, process: int) -> int:
        """Kill a worker, if it still lives; returns its exit status as os.waitpid gives it."""
        self._processes.pop(process).close()
        status: int = self._command({"do": "end", "process": process})
        return status

    def close(self) -> None:
        """End all workers and the host."""
        self._host.kill()
        self._host.wait()
        for channel in self._processes.values():
            channel.close()
        self._control.close()

    def _command(self, command: dict[str, Any], descriptors: list[int] | None = None) -> Any:
        data = json.dumps(command).encode()
        reply = b""
        try:
            socket.send_fds(self._control, [data], descriptors or [])
            while not reply.endswith(b"\n"):
                part = self._control.recv(65536)
                if not part:
                    raise ConnectionError
                reply += part
        except TimeoutError:
            self._host.kill()
            raise RuntimeError(
                f"the host of the workers was silent for {HOST_SECONDS:g} s"
            ) from None
        except ConnectionError:
            status = self._host.wait()
            raise RuntimeError(f"the host of the workers ended, status {status}") from None
        return json.loads(reply)


def clean_environment(package: str) -> dict[str, str]:
    """Nothing of the instructor's: tokens live in environments."""
    kept = {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}
    return kept | {
        "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8", "HOME": "/",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
