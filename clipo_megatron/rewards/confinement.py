"""Takes from a verifier process what judging does not need: network, changes of files, other programs and processes.

What it judges is a model's output, read by a large library; were that led to run code, the code could do no more than
compute and read. A seccomp filter, which any process may put on itself; it can't be taken off and children inherit it.
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
_FIRST_X32 = 0x40000000
"""Calls of the x32 interface, which has numbers of its own."""
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
"""In the record of a call: its number, its interface, its six arguments of 8 bytes."""

_REFUSED: Mapping[str, Sequence[int]] = {
    # socket, connect, accept, sendto, sendmsg, bind, listen, socketpair, accept4, sendmmsg.
    "network": (41, 42, 43, 44, 46, 49, 50, 53, 288, 307),
    # creat, truncate; rename, mkdir, rmdir, link, unlink, symlink, mknod and their later forms; open_by_handle_at.
    "files": (85, 76, 82, 264, 316, 83, 258, 84, 86, 265, 87, 263, 88, 266, 133, 259, 304),
    # chmod, chown, extended attributes, times.
    "attributes": (90, 91, 268, 452, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199, 132, 235, 261, 280),
    # execve, execveat; kill, pidfd_send_signal, ptrace, process_vm_readv and _writev.
    "processes": (59, 322, 62, 424, 101, 310, 311),
    # For a process of root: mount, umount2, pivot_root, chroot, unshare, setns, modules, bpf, the new mount calls, reboot.
    "system": (165, 166, 155, 161, 272, 308, 175, 313, 321, 428, 429, 430, 432, 442, 169, 246, 320),
    # Its own queue of calls, which the filter does not see.
    "io_uring": (425, 426, 427),
}
_OPENS = {2: 1, 257: 2}
"""open and openat: which argument holds the flags."""
_OPENAT2 = 437
"""Its flags lie in memory, where a filter can't look; callers fall back to openat where it is not known."""
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def confine() -> str:
    """Put the filter on this process, all its threads, and all that it starts later. What is refused fails with EPERM.

    Files that are open stay usable, pipes to the parent among them.

    Returns:
        Empty; or, where this system has no such filter, why: then nothing is confined.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"a filter of system calls is written for Linux on x86_64 alone, this is {sys.platform} on {platform.machine()}"
    program = _program()
    content = ctypes.create_string_buffer(b"".join(program))
    description = struct.pack("HxxxxxxP", len(program), ctypes.addressof(content))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        _SECCOMP, _SET_MODE_FILTER, _ALL_THREADS, description
    ):
        return f"the kernel takes no filter of system calls: {os.strerror(ctypes.get_errno())}"
    return ""


def _program() -> list[bytes]:
    """The filter, in the kernel's instructions."""
    refuse = [_instruction(_RETURN, _RETURN_ERRNO | errno.EPERM)]
    unknown = [_instruction(_RETURN, _RETURN_ERRNO | errno.ENOSYS)]
    allow = [_instruction(_RETURN, _RETURN_ALLOW)]
    program = [_load(_ARCH_AT), *_unless(_JUMP_EQUAL, _ARCH_X86_64, refuse), _load(_NUMBER_AT)]
    program += _where(_JUMP_AT_LEAST, _FIRST_X32, refuse)
    for number in (number for numbers in _REFUSED.values() for number in numbers):
        program += _where(_JUMP_EQUAL, number, refuse)
    program += _where(_JUMP_EQUAL, _OPENAT2, unknown)
    for number, argument in _OPENS.items():
        of_flags = [_load(_ARGUMENTS_AT + 8 * argument), *_where(_JUMP_BITS, _CHANGING, refuse), *allow]
        program += _where(_JUMP_EQUAL, number, of_flags)
    return program + allow


def _where(jump: int, value: int, then: list[bytes]) -> list[bytes]:
    return [_instruction(jump, value, when_false=len(then)), *then]


def _unless(jump: int, value: int, then: list[bytes]) -> list[bytes]:
    return [_instruction(jump, value, when_true=len(then)), *then]


def _load(place: int) -> bytes:
    return _instruction(_LOAD_WORD, place)


def _instruction(code: int, value: int, *, when_true: int = 0, when_false: int = 0) -> bytes:
    """Of 8 bytes; jumps count the instructions that are passed over."""
    return struct.pack("HBBI", code, when_true, when_false, value)
