"""Namespaces around the process that workers are forked from, made by bubblewrap where it is.

Inside there are the libraries, read-only, an empty /tmp, no network, and no other process.
"""

import functools
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

BUBBLEWRAP = "bwrap"
SECONDS = 10.0


def readable_places(root: Path) -> list[Path]:
    """The interpreter, its libraries, and the course's library; nobody's answers, no grader."""
    paths = sysconfig.get_paths()
    places: list[str | Path] = [
        paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    places += [sys.prefix, sys.base_prefix, root / "reference", "/usr/lib", "/usr/lib64", "/lib",
               "/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
               "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]  # fmt: skip
    found = {Path(p) for p in places} | {Path(p).resolve() for p in places}
    # /usr as a prefix would open more than libraries.
    forbidden = (Path("/"), Path("/usr"), root, *root.parents)
    return sorted(p for p in found if p.resolve() not in forbidden and p.exists())


def interpreter() -> list[Path]:
    """This Python as it was called, and each link on the way to its file."""
    found = [Path(sys.executable)]
    while found[-1].is_symlink():
        found.append(found[-1].parent / found[-1].readlink())
    return found


def inside(command: list[str], places: list[Path]) -> list[str]:
    """`command`, run where only `places` are."""
    made = [shutil.which(BUBBLEWRAP) or BUBBLEWRAP, "--unshare-all", "--die-with-parent",
            "--new-session", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev",
            "--tmpfs", "/tmp", "--chdir", "/"]  # fmt: skip
    bound = [Path("/dev")]
    for place in sorted(set(places)):
        if not any(place.is_relative_to(other) for other in bound):
            bound.append(place)
            made += ["--ro-bind", str(place), str(place)]
    return [*made, "--", *command]


@functools.cache
def works() -> bool:
    """Whether bubblewrap is there and may make namespaces: it is tried."""
    if shutil.which(BUBBLEWRAP) is None:
        return False
    places = [*readable_places(Path("/nowhere")), *interpreter()]
    try:
        done = subprocess.run(
            inside([sys.executable, "-I", "-S", "-c", "open('/proc/self/status')"], places),
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
