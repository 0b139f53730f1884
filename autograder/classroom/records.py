"""The file that a batch can be killed on: one line a verdict, appended whole or not at all."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class InUse(RuntimeError):
    """Another grader is writing to the same folder."""


class Records:
    """Verdicts by key, in `path`, one JSON line each. A torn last line is cut off on opening.

    Use as a context manager, which holds a lock on the file. Raises: InUse; ValueError for a file
    that is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verdicts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Records":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InUse(f"{self._path}: another grader is at work on this folder") from None
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._verdicts[key]

    def __len__(self) -> int:
        return len(self._verdicts)

    def add(self, key: str, verdict: dict[str, Any]) -> None:
        """Keep a verdict; it is on disk when this returns. The last one for a key counts."""
        line = json.dumps({"key": key, **verdict}).encode() + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(f"{self._path}: wrote {written} of {len(line)} bytes; is the disk full?")
        os.fsync(self._file)
        self._verdicts[key] = verdict

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self._verdicts[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError):
                raise ValueError(
                    f"{self._path}: line {number} is no verdict; move the file away"
                ) from None
