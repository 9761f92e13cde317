"""The sandbox's seccomp filter: the system calls that generated code may not make; for `bwrap --seccomp`.

It closes what namespaces leave open: new processes, so that one process's limits bound the whole sandbox;
a handler for the signal that its CPU time is used up, which would hide that;
sockets of families that know no namespace (AF_VSOCK, AF_ALG); memory that no limit counts; namespaces of the
program's own; and parts of the kernel with a history of faults. Calls that need capabilities are refused
without a filter.

The format is classic BPF (linux/filter.h, linux/seccomp.h, linux/audit.h); numbers are those of
asm/unistd_64.h for x86-64 and of asm-generic/unistd.h for aarch64.
"""

from __future__ import annotations

import errno
import struct

SIGACTION = {"x86_64": 13, "aarch64": 134}
SIGXCPU = 24
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
CLONE_THREAD = 0x10000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # The bit of x86-64's second set of calls: their numbers are not those that are denied.

# The numbers of a call on x86-64 and on aarch64.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),  # Each watch holds kernel memory, by the hundred thousand.
    "inotify_init1": (294, 26),
    "setxattr": (188, 5),  # On tmpfs an attribute is kernel memory that no size of it bounds.
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "modify_ldt": (154, None),
    "syslog": (103, 116),
}

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST, SECOND = (
    0,
    4,
    16,
    24,
)  # Offsets in struct seccomp_data; clone's flags come first.
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def program(machine: str) -> bytes:
    """Return the filter for a machine, as `platform.machine()` names it.

    Raises:
        ValueError: The machine's call numbers are not known here.
    """
    if machine not in AUDIT:
        raise ValueError(f"the sandbox has no system call filter for {machine}; it has {' and '.join(AUDIT)}")
    column = list(AUDIT).index(machine)
    numbers = [row[column] for row in DENIED.values() if row[column] is not None]
    deny = ERROR | errno.EPERM
    # A line is (operation, jump if true, jump if false, operand).
    lines: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, deny),
        # A filter cannot read clone3's flags, which are behind a pointer. The C library then takes clone.
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
    ]
    for number in numbers:
        lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, deny)]
    lines += [
        (EQUAL, 0, 8, SIGACTION[machine]),
        (LOAD, 0, 0, FIRST),
        (EQUAL, 0, 5, SIGXCPU),
        (LOAD, 0, 0, SECOND),  # A pointer to the new handler; none where the old one is asked for.
        (EQUAL, 0, 2, 0),
        (LOAD, 0, 0, SECOND + 4),
        (EQUAL, 1, 0, 0),
        (RETURN, 0, 0, deny),
        (RETURN, 0, 0, ALLOW),
        (EQUAL, 0, 3, CLONE[machine]),
        (LOAD, 0, 0, FIRST),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, deny),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
