"""Takes from a verifier process what judging does not need: network, changes of files, other programs and processes.

What it judges is a model's output, read by a large library; were that led to run code, the code could do no more than
compute and read. A seccomp filter, which any process may put on itself; it can't be taken off. It is a list of what is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Mapping, Sequence

# From linux/seccomp.h, linux/filter.h, linux/audit.h and linux/prctl.h.
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP, _SET_MODE_FILTER, _ALL_THREADS = 317, 1, 1
_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_RETURN_ALLOW, _RETURN_ERRNO = 0x7FFF0000, 0x00050000
_ARCH_X86_64 = 0xC000003E
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
"""In the record of a call: its number, its interface, its six arguments of 8 bytes."""

_ALLOWED: Mapping[str, Sequence[int]] = {
    # read, pread64, readv, preadv, preadv2, write, writev, lseek, close, close_range, dup, dup2, dup3, pipe, pipe2.
    "open files": (0, 17, 19, 295, 327, 1, 20, 8, 3, 436, 32, 33, 292, 22, 293),
    # stat, fstat, lstat, newfstatat, statx, statfs, fstatfs, access, faccessat, faccessat2, readlink, readlinkat, getcwd,
    # getdents, getdents64, fadvise64.
    "looking": (4, 5, 6, 262, 332, 137, 138, 21, 269, 439, 89, 267, 79, 78, 217, 221),
    # poll, ppoll, select, pselect6, eventfd2; epoll_create, epoll_create1, epoll_ctl, epoll_wait, epoll_pwait, epoll_pwait2.
    "waiting": (7, 271, 23, 270, 290, 213, 291, 233, 232, 281, 441),
    # mmap, mprotect, munmap, brk, mremap, mincore, madvise, pkey_mprotect, pkey_alloc, pkey_free, mseal.
    "memory": (9, 10, 11, 12, 25, 27, 28, 329, 330, 331, 462),
    # futex, futex_waitv, futex_wake, futex_wait, futex_requeue, set_robust_list, set_tid_address, rseq, membarrier,
    # arch_prctl, exit, exit_group, wait4, waitid, restart_syscall; map_shadow_stack.
    "threads": (202, 449, 454, 455, 456, 273, 218, 334, 324, 158, 60, 231, 61, 247, 219, 453),
    # sched_yield, sched_getaffinity, sched_getparam, sched_getscheduler, sched_get_priority_max and _min, getcpu, getpriority.
    "scheduling": (24, 204, 143, 145, 146, 147, 309, 140),
    # rt_sigaction, rt_sigprocmask, rt_sigreturn, rt_sigpending, rt_sigtimedwait, rt_sigsuspend, sigaltstack, pause.
    "own signals": (13, 14, 15, 127, 128, 130, 131, 34),
    # nanosleep, clock_nanosleep, clock_gettime, clock_getres, gettimeofday, time, times, alarm, getitimer, setitimer;
    # timer_create, timer_settime, timer_gettime, timer_getoverrun, timer_delete.
    "time": (35, 230, 228, 229, 96, 201, 100, 37, 36, 38, 222, 223, 224, 225, 226),
    # getpid, getppid, gettid, getpgrp, getpgid, getsid, the user and group identities, getrlimit, getrusage, sysinfo, uname,
    # getrandom.
    "itself": (39, 110, 186, 111, 121, 124, 102, 107, 104, 108, 118, 120, 115, 97, 98, 99, 63, 318),
}
"""All that is judging, reading, and answering over a pipe. What is not named here, or in the tables below, is refused."""
_ALLOWED_WHERE: Mapping[int, tuple[int, Sequence[int]]] = {
    # ioctl: TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX. Others type into a terminal, or name a signal's receiver.
    16: (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5450, 0x5451)),
    # fcntl: F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL. F_SETOWN with F_SETSIG makes a pipe send any signal to any
    # process; F_SETFL changes files that others have open, too.
    72: (1, (0, 1030, 1, 2, 3)),
    # prctl: PR_SET_NAME, PR_GET_NAME, PR_SET_VMA. PR_SET_PDEATHSIG would let it outlive its parent.
    157: (0, (15, 16, 0x53564D41)),
}
"""Calls of which a few kinds are allowed: the argument that tells the kind, and those kinds. The kernel takes that argument,
as it takes process numbers and flags, from the lower half of its 8 bytes alone."""
_SIGNALS = (62, 234)
"""kill and tgkill, first argument the process: abort() and Python's raise_signal send to their own."""
_PRLIMIT, _NEW_LIMIT = 302, 2
"""prlimit64 reads limits where this argument, an address, is null; else it sets them, for root also above the hard limit."""
_CLONE, _CLONE_THREAD, _NEW_NAMESPACES = 56, 0x00010000, 0x7E020000
"""clone makes threads; without that flag it makes processes, which nobody would limit in time."""
_OPENS = {2: 1, 257: 2}
"""open and openat: which argument holds the flags."""
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_UNKNOWN = (437, 435)
"""openat2 and clone3 have their flags in memory, where a filter can't look; callers fall back where they are not known."""
_FIRST_UNKNOWN = 463
"""Later calls than these tables know, and those of the x32 interface: to be taken for a kernel that lacks them, so that a
newer C library falls back."""


def confine() -> str:
    """Put the filter on this process and all its threads. What is refused fails with EPERM.

    Files that are open stay usable, pipes to the parent among them. To be called in the process itself, not before a fork:
    the filter knows it by its number.

    Returns:
        Empty; or, where this system has no such filter, why: then nothing is confined.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"a filter of system calls is written for Linux on x86_64 alone, this is {sys.platform} on {platform.machine()}"
    program = _program(os.getpid())
    content = ctypes.create_string_buffer(b"".join(program))
    description = struct.pack("HxxxxxxP", len(program), ctypes.addressof(content))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        _SECCOMP, _SET_MODE_FILTER, _ALL_THREADS, description
    ):
        return f"the kernel takes no filter of system calls: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(pid: int) -> list[bytes]:
    """The filter of process `pid`, in the kernel's instructions."""
    program = [_load(_ARCH_AT), *_unless(_JUMP_EQUAL, _ARCH_X86_64, _REFUSE), _load(_NUMBER_AT)]
    for number in (number for numbers in _ALLOWED.values() for number in numbers):
        program += _where(_JUMP_EQUAL, number, _ALLOW)
    for number, rule in _rules(pid).items():
        program += _where(_JUMP_EQUAL, number, rule)
    for number in _UNKNOWN:
        program += _where(_JUMP_EQUAL, number, _NOT_KNOWN)
    return program + _where(_JUMP_AT_LEAST, _FIRST_UNKNOWN, _NOT_KNOWN) + _REFUSE


def _rules(pid: int) -> dict[int, list[bytes]]:
    """Of the calls whose arguments decide, by number. Each rule ends with allowing or refusing."""
    rules = {}
    for number, (argument, kinds) in _ALLOWED_WHERE.items():
        of_kinds = [word for kind in kinds for word in _where(_JUMP_EQUAL, kind, _ALLOW)]
        rules[number] = [_load_argument(argument), *of_kinds, *_REFUSE]
    for number in _SIGNALS:
        rules[number] = [_load_argument(0), *_where(_JUMP_EQUAL, pid, _ALLOW), *_REFUSE]
    for number, argument in _OPENS.items():
        rules[number] = [_load_argument(argument), *_where(_JUMP_BITS, _CHANGING, _REFUSE), *_ALLOW]
    is_null = [_load_argument(_NEW_LIMIT, half=1), *_unless(_JUMP_EQUAL, 0, _REFUSE)]
    rules[_PRLIMIT] = [*is_null, _load_argument(_NEW_LIMIT), *_where(_JUMP_EQUAL, 0, _ALLOW), *_REFUSE]
    is_here = _where(_JUMP_BITS, _NEW_NAMESPACES, _REFUSE)
    rules[_CLONE] = [_load_argument(0), *is_here, *_where(_JUMP_BITS, _CLONE_THREAD, _ALLOW), *_REFUSE]
    return rules


def _where(jump: int, value: int, then: list[bytes]) -> list[bytes]:
    return [_instruction(jump, value, when_false=len(then)), *then]


def _unless(jump: int, value: int, then: list[bytes]) -> list[bytes]:
    return [_instruction(jump, value, when_true=len(then)), *then]


def _load(place: int) -> bytes:
    return _instruction(_LOAD_WORD, place)


def _load_argument(argument: int, *, half: int = 0) -> bytes:
    """Half 0 is the lower one."""
    return _load(_ARGUMENTS_AT + 8 * argument + 4 * half)


def _instruction(code: int, value: int, *, when_true: int = 0, when_false: int = 0) -> bytes:
    """Of 8 bytes; jumps count the instructions that are passed over."""
    return struct.pack("HBBI", code, when_true, when_false, value)


_ALLOW = [_instruction(_RETURN, _RETURN_ALLOW)]
_REFUSE = [_instruction(_RETURN, _RETURN_ERRNO | errno.EPERM)]
_NOT_KNOWN = [_instruction(_RETURN, _RETURN_ERRNO | errno.ENOSYS)]
