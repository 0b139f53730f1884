"""System calls by number, on x86-64 and on aarch64; -1 where there is none.

What computing and one channel do not need is refused: whatever makes processes, talks, signals,
writes, changes what others see, or outlives the process.
"""

import os

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
