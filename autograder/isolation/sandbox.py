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

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# All rights of the file system by version of the interface, and from version 4 on of the network.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
LATEST_FILE_RIGHTS = (1 << 16) - 1
TCP_RIGHTS = 0b11
SCOPES = 0b11  # abstract sockets, signals; from version 6 on
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_DUMPABLE, PR_SET_PDEATHSIG = 38, 22, 4, 1

# Refused system calls: numbers on x86-64 and on aarch64.
REFUSED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "process_madvise": (440, 440),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsmount": (432, 432), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "reboot": (169, 142), "swapon": (167, 224), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "personality": (135, 92), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, -1), "fchown": (93, 55), "fchownat": (260, 54), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "flock": (73, 32),
    "setuid": (105, 146), "setgid": (106, 144), "inotify_init1": (294, 26),
    "creat": (85, -1), "mkdir": (83, -1), "mkdirat": (258, 34), "mknod": (133, -1),
    "mknodat": (259, 33), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, -1), "linkat": (265, 37), "symlink": (88, -1), "symlinkat": (266, 36),
    "unlink": (87, -1), "unlinkat": (263, 35), "rmdir": (84, -1), "truncate": (76, 45),
    "lchown": (94, -1), "fchmodat2": (452, 452), "utime": (132, -1), "utimes": (235, -1),
    "futimesat": (261, -1), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "inotify_init": (253, -1), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "shmctl": (31, 195),
    "semctl": (66, 191), "semop": (65, 193), "semtimedop": (220, 192), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_unlink": (241, 181), "syslog": (103, 116),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "ioprio_set": (251, 30),
    "setsid": (112, 157), "setpgid": (109, 154), "mount_setattr": (442, 442),
    "fsconfig": (431, 431), "fspick": (433, 433), "open_tree_attr": (467, 467),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "process_mrelease": (448, 448),
    "setresuid": (117, 147), "setresgid": (119, 149), "quotactl": (179, 60), "uselib": (134, -1),
}  # fmt: skip
# Calls that pass with these values of one argument alone: numbers, the argument's place, values.
ONLY = (
    ((302, 261), 16, (0,)),  # prlimit64: of itself
    ((72, 25), 24, (0, 1, 2, 3, 4, 1030, 1032)),  # fcntl: no locks, owners, signals, leases
    ((16, 29), 24, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # ioctl: what files need
)
PRCTL, PRCTL_REFUSED = (157, 167), (1, 4)  # the parent's death, dumpable
# Of these the flags say whether anything is written.
OPEN, OPENAT, OPENAT2 = (2, -1), (257, 56), (437, 437)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE, CLONE3, TGKILL = (56, 220), (435, 435), (234, 131)
CLONE_THREAD = 0x00010000
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
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
