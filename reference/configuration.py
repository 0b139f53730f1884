"""Configuration files are a closed world: a key is honoured, known to be harmless, or refused.

Whoever wrote a key meant something by it. A reader that passes over a key that it does not know
builds another model than the writer's, and nothing fails: the answers are a little worse. So each
file has one table of its keys here, and what stands in no table is refused by its name and value.
A key that says nothing (null, {}, []) may have any name.

Source: what passing over led to: transformers #42189 and vLLM #27722 (YaRN's `truncate`), lorax
#700 (`use_rslora`), transformers #34468 (PiSSA).
"""

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBER, COUNT, FLAG, TEXT = (int, float), (int,), (bool,), (str,)
NOTHING = (type(None),)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of one file. `honoured`: the types of those that are read, `NOTHING` where null
    stands for the default. `plain`: the values in which a key asks for nothing. `harmless`: keys
    that change no number, whatever they say.
    """

    file: str
    honoured: Mapping[str, tuple[type, ...]]
    plain: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()

    def read(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The honoured entries that are set.

        Raises: ValueError for keys that are not known, and for values that cannot be honoured.
        """
        problems, unknown = [], []
        for key, value in entries.items():
            if key in self.honoured:
                if not _has_type(value, self.honoured[key]):
                    problems.append(f"{key}: expected {_names(self.honoured[key])}, got {value!r}")
            elif key in self.plain:
                if value is not None and value not in self.plain[key]:
                    wanted = " or ".join(repr(plain) for plain in self.plain[key])
                    problems.append(f"{key}: expected {wanted}, got {reprlib.repr(value)}")
            elif key not in self.harmless and value not in (None, {}, []):
                unknown.append(f"{key}={reprlib.repr(value)}")
        if unknown:
            problems.append(
                f"{', '.join(unknown)} not known here; remove a key only if it changes no number"
            )
        if problems:
            raise ValueError(f"{self.file}: {'; '.join(problems)}")
        return {k: v for k, v in entries.items() if k in self.honoured and v is not None}


def _has_type(value: object, types: tuple[type, ...]) -> bool:
    """`isinstance`, but true is no number."""
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _names(types: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises: FileNotFoundError; ValueError for what is no JSON, no object, or has a key twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is the folder complete?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as `read_json` reads it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, that takes the place of `path` once the writing has succeeded."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted({k for k, _ in pairs if [key for key, _ in pairs].count(k) > 1})
        raise ValueError(f"a key twice: {', '.join(twice)}")
    return found
