"""Which line of the user's program a call stands for, and which part of the library asked for it.

A collective is often called by a wrapper in a hook: the line that a reader can act on is the one
of the program beneath, `loss.backward()` or `model(x)`. Frames of this library, of the standard
library and of installed packages are passed over. A hook that autograd runs in a thread of its own
has no program beneath it; then the library's own line has to do.
"""

import linecache
import sys
import sysconfig
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).parent)
LIBRARY = (
    str(Path(__file__).parents[2]),
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    "<frozen",
    "<string>",
)
Source = tuple[str, int, str]
NOWHERE: Source = ("", 0, "")


def calling_line() -> tuple[Source, Source]:
    """File, line and function: of the program, and of the library's function that asked for it.

    The second is NOWHERE where the program itself called. A frame that carries out a call for
    another process names its place there as `asked_from`.
    """
    frame: FrameType | None = sys._getframe(1)
    asker: FrameType | None = None
    while frame is not None:
        filename = frame.f_code.co_filename
        kind = _kinds.get(filename) or _kind(filename)
        if kind != "package":
            asker = asker or frame
            if kind == "program":
                break
        frame = frame.f_back
    assert asker is not None  # a thread starts outside of this package
    if frame is None:
        return _place(asker), NOWHERE
    return _place(frame), NOWHERE if frame is asker else _place(asker)


def text(source: Source) -> str:
    """For instance: train.py:12 in program: comm.all_reduce(x)."""
    filename, line, function = source
    code = linecache.getline(filename, line).strip()
    return f"{Path(filename).name}:{line} in {function}" + (f": {code}" if code else "")


def _kind(filename: str) -> str:
    kind = "library" if filename.startswith(LIBRARY) else "program"
    _kinds[filename] = "package" if filename.startswith(PACKAGE) else kind
    return _kinds[filename]


_kinds: dict[str, str] = {}


def _place(frame: FrameType) -> Source:
    # f_locals keeps what it shows alive, so only there.
    if "asked_from" in frame.f_code.co_varnames and frame.f_locals.get("asked_from"):
        filename, line, function = frame.f_locals["asked_from"]
        return filename, line, function
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
