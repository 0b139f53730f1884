"""What a process may still do once an answer runs in it: compute, and talk over one socket.

A seccomp filter refuses sockets, new processes, signals to others, files to write, other namespaces
and what outlives a process; resource limits bound memory, files and threads. What it may read is
closed by Landlock (kernel 5.13), by bubblewrap's namespaces (see namespace.py), or by both. None
needs root, and all hold for good.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from autograder.isolation import namespace
from autograder.isolation.system_calls import (
    ARCHITECTURES,
    CLONE,
    CLONE3,
    CLONE_THREAD,
    ONLY,
    OPEN,
    OPENAT,
    OPENAT2,
    PRCTL,
    PRCTL_REFUSED,
    REFUSED,
    TGKILL,
    WRITES,
)

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# All rights of the file system by version of the interface, and from version 4 on of the network.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
LATEST_FILE_RIGHTS = (1 << 16) - 1
TCP_RIGHTS = 0b11
SCOPES = 0b11  # abstract sockets, signals; from version 6 on
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_DUMPABLE, PR_SET_PDEATHSIG = 38, 22, 4, 1

EPERM, EACCES, ENOSYS = 1, 13, 38
NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


class NoSandbox(RuntimeError):
    """This machine cannot isolate a process; the message says why."""


@dataclass(frozen=True)
class Layers:
    """What closes the file system to a worker. `other_user` leaves it to the files' modes."""

    landlock: bool
    bubblewrap: bool
    other_user: bool = False

    def __bool__(self) -> bool:
        return self.landlock or self.bubblewrap or self.other_user


def layers() -> Layers:
    """What this machine has."""
    return Layers(landlock_version() >= 1, namespace.works())


def unavailable() -> str:
    """Why there can be no sandbox here; '' where there can.

    The kernel is asked, nothing is changed.
    """
    if reason := _no_filter():
        return reason
    if not layers():
        return (
            "what an answer reads cannot be closed: the kernel has no Landlock (5.13 or later, "
            "with 'landlock' among its lsm=), and bubblewrap (bwrap) is absent or not allowed"
        )
    return ""


def can_change_user() -> bool:
    """Whether workers can run as nobody: for root, where files are closed to others."""
    return not _no_filter() and os.geteuid() == 0


def _no_filter() -> str:
    if not sys.platform.startswith("linux"):
        return f"the sandbox needs Linux (seccomp, Landlock); this is {platform.system()}"
    if platform.machine() not in ARCHITECTURES:
        return f"no list of system calls for {platform.machine()}: x86_64 and aarch64 have one"
    if _libc.prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        return "the kernel has no seccomp"
    return ""


def landlock_version() -> int:
    """The version of the kernel's Landlock interface; 0 or less without."""
    return int(_libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def enter(readable: list[Path], closed_by: Layers, *, memory_bytes: int) -> None:
    """Confine this process for good: only `readable` can be read, nothing written.

    The process has one thread, and is inside of bubblewrap already where `closed_by` has it.
    `memory_bytes` is what it may map beyond what it has mapped. Raises: NoSandbox where a step
    fails; the caller must not run an answer then.
    """
    if not closed_by:
        raise NoSandbox("nothing closes the file system")
    if reason := _no_filter():
        raise NoSandbox(reason)
    _limit(memory_bytes)
    if closed_by.other_user:
        become_nobody()
        die_with_parent()  # the change of user has undone it
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    if closed_by.landlock:
        _close_files(readable)
    drop_powers()
    _filter_calls()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def become_nobody() -> None:
    """Leave root's rights to files behind, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_powers() -> None:
    """Give up all capabilities: a process of root's is then one like others."""
    header = struct.pack("<Ii", 0x20080522, 0)
    _check(_libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))), "capset")


def _limit(memory_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bytes_mapped = pages * resource.getpagesize()
    for what, bound in (
        (resource.RLIMIT_AS, bytes_mapped + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 1),  # 0 would still feed a core_pattern that is a program
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 512),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound))


def _close_files(readable: list[Path]) -> None:
    version = landlock_version()
    handled = FILE_RIGHTS.get(version, LATEST_FILE_RIGHTS)
    attributes = struct.pack(
        "<QQQ", handled, TCP_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _libc.syscall(
        LANDLOCK_CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    _check(ruleset, "landlock_create_ruleset")
    for path in readable:
        if not path.exists():
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FILE | READ_DIR if path.is_dir() else READ_FILE
        rule = struct.pack("<Qi", rights, place)
        added = _libc.syscall(LANDLOCK_ADD, ruleset, 1, ctypes.c_char_p(rule), ctypes.c_uint32(0))
        os.close(place)
        _check(added, f"landlock_add_rule {path}")
    _check(_libc.syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset)


def _filter_calls() -> None:
    """A classic BPF program: kill foreign architectures, refuse the listed calls and writing."""
    column, architecture = ARCHITECTURES[platform.machine()]
    errno = 0x00050000  # SECCOMP_RET_ERRNO
    kill, allow = 0x80000000, 0x7FFF0000
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),
    ]  # fmt: skip
    # clone: threads pass, processes do not. clone3 and openat2 hide their flags behind a pointer:
    # absent.
    program += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD),
                (give, 0, 0, errno | EPERM), (load, 0, 0, 0)]  # fmt: skip
    for hidden in (CLONE3, OPENAT2):
        program += [(equal, 0, 1, hidden[column]), (give, 0, 0, errno | ENOSYS)]
    for call, flags in ((OPEN, 24), (OPENAT, 32)):  # where seccomp finds the flags
        if call[column] >= 0:
            program += [(equal, 0, 4, call[column]), (load, 0, 0, flags), (any_bit, 0, 1, WRITES),
                        (give, 0, 0, errno | EACCES), (load, 0, 0, 0)]  # fmt: skip
    for numbers, place, values in ONLY:
        program += [(equal, 0, len(values) + 3, numbers[column]), (load, 0, 0, place)]
        program += [(equal, len(values) - i, 0, v) for i, v in enumerate(values)]
        program += [(give, 0, 0, errno | EPERM), (load, 0, 0, 0)]
    program += [(equal, 0, 5, PRCTL[column]), (load, 0, 0, 16), (equal, 1, 0, PRCTL_REFUSED[0]),
                (equal, 0, 1, PRCTL_REFUSED[1]), (give, 0, 0, errno | EPERM),
                (load, 0, 0, 0)]  # fmt: skip
    # A process may signal its own threads (abort does).
    program += [(equal, 0, 3, TGKILL[column]), (load, 0, 0, 16), (equal, 1, 0, os.getpid()),
                (give, 0, 0, errno | EPERM), (load, 0, 0, 0)]  # fmt: skip
    for numbers in REFUSED.values():
        if numbers[column] >= 0:
            program += [(equal, 0, 1, numbers[column]), (give, 0, 0, errno | EPERM)]
    program.append((give, 0, 0, allow))
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    found = _libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(fprog), 0, 0)
    _check(found, "seccomp")


def _check(code: int, what: str) -> None:
    if code < 0:
        raise NoSandbox(f"{what}: {os.strerror(ctypes.get_errno())}")
