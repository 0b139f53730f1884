"""`python -m tools.fetch_oracles`: production systems for tests to compare with.

Each lies in a folder of its own under .cache/, named by its version, and never enters .venv: there
it would pull in other versions of its neighbours, or slow down whoever finds it. A test that needs
one puts its folder on the path of a process of its own (tests/oracles.py), or is skipped.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ORACLES = Path(__file__).parent.parent / ".cache" / "oracles"


class FetchError(RuntimeError):
    """A system could not be fetched; the message says why."""


@dataclass(frozen=True)
class Oracle:
    """A system, its `wheels` as pip names them, and a `package` to cut out of its source archive.

    The archive is for a system that has no wheel, and whose setup would compile for a GPU.
    """

    name: str
    version: str
    megabytes: int
    wheels: tuple[str, ...] = ()
    package: str = ""

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


MEGATRON = Oracle("megatron-core", "0.16.1", 3, wheels=("megatron-core==0.16.1",))
DEEPSPEED = Oracle(
    "deepspeed",
    "0.19.8",
    6,
    wheels=(
        "einops==0.8.2",
        "hjson==3.1.0",
        "py-cpuinfo==9.0.0",
        # What pydantic needs is pinned by itself.
        "pydantic==2.12.5",
        "pydantic-core==2.41.5",
        "annotated-types==0.7.0",
        "typing-inspection==0.4.2",
    ),
    package="deepspeed",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fetch_oracles", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ORACLES, help="where the systems go")
    options = parser.parse_args(argv)
    missing = 0
    for oracle in (MEGATRON, DEEPSPEED):
        if (options.folder / oracle.folder).is_dir():
            continue
        print(f"Fetching {oracle.folder} (about {oracle.megabytes} MB) ...", flush=True)
        try:
            fetch(oracle, options.folder)
        except FetchError as error:
            print(f"fetch_oracles: {error}; tests that need it are skipped", file=sys.stderr)
            missing += 1
    return int(missing > 0)


def fetch(oracle: Oracle, folder: Path) -> None:
    """Put it into `folder` in one step, under its name and version.

    Raises: FetchError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as temporary:
        work = Path(temporary)
        pip(oracle, "install", "--target", str(work / "done"), "--only-binary", ":all:",
            *oracle.wheels)  # fmt: skip
        if oracle.package:
            # The environment's own setuptools and torch serve its setup, which pip asks for a name.
            pip(oracle, "download", "--dest", str(work), "--no-binary", oracle.name,
                "--no-build-isolation", f"{oracle.name}=={oracle.version}")  # fmt: skip
            unpack(oracle, work)
        try:
            (work / "done").rename(folder / oracle.folder)
        except OSError as error:
            if not (folder / oracle.folder).is_dir():
                raise FetchError(f"cannot move {oracle.folder} into place: {error}") from error


def pip(oracle: Oracle, *arguments: str) -> None:
    """Pip honours the user's index and proxy settings."""
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check",
               "--no-deps", "--retries", "1", *arguments[1:]]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FetchError(f"pip could not fetch {oracle.folder} ({reason})")


def unpack(oracle: Oracle, work: Path) -> None:
    """The package alone, out of the archive that lies in `work`."""
    inside = f"{oracle.folder}/{oracle.package}/"
    try:
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            members = [m for m in archive.getmembers() if m.name.startswith(inside)]
            archive.extractall(work / "source", members, filter="data")
    except (OSError, StopIteration, tarfile.TarError) as error:
        raise FetchError(f"{oracle.folder}: expected an archive of its source: {error}") from error
    if not members:
        raise FetchError(f"expected {inside} in its archive, found no such folder")
    (work / "source" / inside).rename(work / "done" / oracle.package)


if __name__ == "__main__":
    sys.exit(main())
