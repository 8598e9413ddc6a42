"""Laws of a verifier process, call by call: no system call reaches another process or the system; its own work goes on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from pebble import ProcessExpired, ProcessPool

from clipo_megatron.rewards.worker import start_worker

MEMORY = 2 << 30
PIDFD_OPEN, PIDFD_GETFD, PIDFD_SEND_SIGNAL = 434, 438, 424


@pytest.fixture(scope="module")
def confined():
    """A process started as the verifiers' pool starts its own."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(max_workers=1, initializer=start_worker, initargs=(os.getpid(), MEMORY), context=context)
    yield pool
    pool.stop()
    pool.join()


@pytest.fixture
def victim():
    """A process of the same user that sleeps."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def _call(number: int, *arguments: int) -> int:
    """One system call with all 64 bits of its arguments.

    Raises:
        OSError: it failed; PermissionError where it was refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    found = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments))
    if found == -1:
        raise OSError(ctypes.get_errno(), f"call {number}")
    return found


def _queued_signal() -> tuple[ctypes.Array, int]:
    """A siginfo of SI_QUEUE, and its address."""
    content = ctypes.create_string_buffer(128)
    ctypes.cast(content, ctypes.POINTER(ctypes.c_int))[0] = signal.SIGKILL
    ctypes.cast(content, ctypes.POINTER(ctypes.c_int))[2] = -1
    return content, ctypes.addressof(content)


def _kill(pid: int) -> None:
    _call(62, pid, signal.SIGKILL)


def _tkill(pid: int) -> None:
    _call(200, pid, signal.SIGKILL)


def _tgkill(pid: int) -> None:
    _call(234, pid, pid, signal.SIGKILL)


def _tgkill_with_its_own_number_in_the_upper_half(pid: int) -> None:
    _call(234, os.getpid() << 32 | pid, pid, signal.SIGKILL)


def _rt_sigqueueinfo(pid: int) -> None:
    _content, address = _queued_signal()
    _call(129, pid, signal.SIGKILL, address)


def _rt_tgsigqueueinfo(pid: int) -> None:
    _content, address = _queued_signal()
    _call(297, pid, pid, signal.SIGKILL, address)


def _pidfd_send_signal(pid: int) -> None:
    _call(PIDFD_SEND_SIGNAL, _call(PIDFD_OPEN, pid, 0), signal.SIGKILL, 0, 0)


def _pipe_that_signals(pid: int) -> None:
    """A pipe tells its owner of a byte by a signal, and any process and signal can be named."""
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, pid)
    fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")


ENDING: tuple[Callable[[int], None], ...] = (
    *(_kill, _tkill, _tgkill, _tgkill_with_its_own_number_in_the_upper_half, _rt_sigqueueinfo, _rt_tgsigqueueinfo),
    *(_pidfd_send_signal, _pipe_that_signals),
)


@pytest.mark.parametrize("deed", ENDING, ids=lambda deed: deed.__name__.strip("_"))
def test_what_ends_another_process_is_refused(confined, victim, deed):
    with pytest.raises(PermissionError):
        confined.schedule(deed, args=(victim.pid,)).result(timeout=60)
    with pytest.raises(subprocess.TimeoutExpired):
        victim.wait(0.1)
    deed(victim.pid)  # here it works: it is the confinement that refused it
    assert victim.wait(30) == -signal.SIGKILL


def _set_limit(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (7, 7))


def _set_limit_by_a_low_address(pid: int) -> None:
    """The new limit lies where the upper half of its address is null, the lower is not."""
    low = 0x20000000
    mapped = _call(9, low, 4096, 3, 0x32 | 0x100000, 2**64 - 1, 0)  # private, anonymous, at that address
    ctypes.memmove(mapped, (7).to_bytes(8, "little") * 2, 16)
    _call(302, pid, resource.RLIMIT_NOFILE, mapped, 0)


def _set_processors(pid: int) -> None:
    os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))})


def _set_priority(pid: int) -> None:
    os.setpriority(os.PRIO_PROCESS, pid, 7)


def _set_scheduler(pid: int) -> None:
    os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def _state(pid: int) -> tuple[object, ...]:
    scheduling = os.sched_getscheduler(pid), os.sched_getaffinity(pid), os.getpriority(os.PRIO_PROCESS, pid)
    return resource.prlimit(pid, resource.RLIMIT_NOFILE), *scheduling


CHANGING: tuple[Callable[[int], None], ...] = (
    *(_set_limit, _set_limit_by_a_low_address, _set_processors, _set_priority, _set_scheduler),
)


@pytest.mark.parametrize("deed", CHANGING, ids=lambda deed: deed.__name__.strip("_"))
def test_what_changes_another_process_is_refused(confined, victim, deed):
    os.sched_setaffinity(victim.pid, os.sched_getaffinity(0))
    before = _state(victim.pid)
    with pytest.raises(PermissionError):
        confined.schedule(deed, args=(victim.pid,)).result(timeout=60)
    assert _state(victim.pid) == before
    deed(victim.pid)
    assert _state(victim.pid) != before or (deed is _set_processors and len(os.sched_getaffinity(0)) == 1)


def _touch_memory(number: int, pid: int) -> None:
    """Copy 8 bytes from, or to, the first writable mapping of a process."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    address = int(next(line for line in lines if " rw-p" in line).split("-")[0], 16)
    own = ctypes.create_string_buffer(8)
    here, there = (ctypes.c_ulong * 2)(ctypes.addressof(own), 8), (ctypes.c_ulong * 2)(address, 8)
    _call(number, pid, ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)


def _process_vm_readv(pid: int) -> None:
    _touch_memory(310, pid)


def _process_vm_writev(pid: int) -> None:
    _touch_memory(311, pid)


def _ptrace(pid: int) -> None:
    _call(101, 0x4206, pid, 0, 0)  # PTRACE_SEIZE


@pytest.mark.parametrize("deed", [_process_vm_readv, _process_vm_writev, _ptrace], ids=lambda deed: deed.__name__)
def test_the_memory_of_another_process_is_out_of_reach_of_debuggers_calls(confined, victim, deed):
    with pytest.raises(PermissionError):
        confined.schedule(deed, args=(victim.pid,)).result(timeout=60)
    deed(victim.pid)


def _write_to_a_taken_socket(pid: int, number: int) -> None:
    taken = _call(PIDFD_GETFD, _call(PIDFD_OPEN, pid, 0), number, 0)
    os.write(taken, b"taken")
    os.close(taken)


def test_an_open_socket_of_the_parent_can_not_be_taken(confined):
    ours, other = socket.socketpair()
    with ours, other:
        other.setblocking(False)
        with pytest.raises(PermissionError):
            confined.schedule(_write_to_a_taken_socket, args=(os.getpid(), ours.fileno())).result(timeout=60)
        with pytest.raises(BlockingIOError):
            other.recv(16)
        _write_to_a_taken_socket(os.getpid(), ours.fileno())
        assert other.recv(16) == b"taken"


def _fork(_pid: int) -> None:
    if os.fork() == 0:
        os._exit(0)


def test_no_process_is_started_that_nobody_would_limit(confined):
    with pytest.raises(PermissionError):
        confined.schedule(_fork, args=(0,)).result(timeout=60)


REFUSED = {
    "pidfds": {"pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "process_madvise": 440},
    "processes": {"process_mrelease": 448, "kcmp": 312, "move_pages": 279, "migrate_pages": 256, "ioprio_set": 251},
    "more of them": {"sched_setattr": 314, "sched_setparam": 142, "setpgid": 109, "setsid": 112, "vfork": 58},
    "programs": {"execve": 59, "execveat": 322, "memfd_create": 319, "memfd_secret": 447, "personality": 135},
    "queues of calls": {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "io_setup": 206},
    "handles": {"name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300, "inotify_init1": 294},
    "kernel": {"bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "seccomp": 317, "syslog": 103, "acct": 163},
    "modules": {"init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "reboot": 169},
    "keys": {"add_key": 248, "request_key": 249, "keyctl": 250},
    "namespaces": {"unshare": 272, "setns": 308, "chroot": 161, "pivot_root": 155, "sethostname": 170},
    "mounts": {"mount": 165, "umount2": 166, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432},
    "more mounts": {"fsconfig": 431, "fspick": 433, "mount_setattr": 442, "swapon": 167, "quotactl": 179},
    "shared memory": {"shmget": 29, "shmat": 30, "semget": 64, "semop": 65, "msgget": 68, "msgsnd": 69, "mq_open": 240},
    "open files": {"ftruncate": 77, "fallocate": 285, "flock": 73, "pwrite64": 18, "fchmod": 91, "sendfile": 40},
    "pipes to files": {"splice": 275, "tee": 276, "vmsplice": 278, "copy_file_range": 326},
    "messages": {"recvmsg": 47, "sendmsg": 46, "sendto": 44, "setsockopt": 54},
    "clock": {"settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305},
    "rights": {"setuid": 105, "setgid": 106, "setgroups": 116, "capset": 126, "setrlimit": 160, "ioperm": 173},
}


def _errors_of(numbers: list[int]) -> list[int]:
    """What each call fails with where all arguments are wrong for it."""
    found = []
    for number in numbers:
        try:
            _call(number, *[2**64 - 1] * 6)
            found.append(0)
        except OSError as error:
            found.append(error.errno or 0)
    return found


@pytest.mark.parametrize("what", REFUSED)
def test_calls_that_reach_beyond_the_process_are_refused(confined, what):
    numbers = list(REFUSED[what].values())
    found = confined.schedule(_errors_of, args=(numbers,)).result(timeout=60)
    assert dict(zip(REFUSED[what], found, strict=True)) == dict.fromkeys(REFUSED[what], errno.EPERM)


def test_calls_that_are_newer_than_the_filter_or_hide_their_flags_are_as_on_a_kernel_without_them(confined):
    numbers = [
        435,
        437,
        *range(463, 600),
        *(0x40000000 + number for number in range(600)),
    ]  # clone3, openat2, later, x32
    assert set(confined.schedule(_errors_of, args=(numbers,)).result(timeout=60)) == {errno.ENOSYS}


def _type_into_the_terminal() -> None:
    _call(16, 0, 0x5412, 0)


def _outlive_the_parent() -> None:
    _call(157, 1, 0, 0, 0, 0)


def _lift_its_memory_limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("deed", [_type_into_the_terminal, _outlive_the_parent, _lift_its_memory_limit])
def test_a_process_can_not_get_out_of_what_its_parent_has_set(confined, deed):
    # Without root, raising a limit is refused as a ValueError before the filter can be told from the kernel.
    with pytest.raises((PermissionError, ValueError)):
        confined.schedule(deed).result(timeout=60)


def _own_work() -> dict[str, object]:
    """What libraries do inside their own process."""
    found: dict[str, object] = {}
    signal.signal(signal.SIGUSR1, lambda number, _frame: found.setdefault("raised", number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR2, lambda number, _frame: found.setdefault("sent to a thread", number))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
    signal.signal(signal.SIGVTALRM, lambda number, _frame: found.setdefault("sent to itself", number))
    os.kill(os.getpid(), signal.SIGVTALRM)
    threads = [threading.Thread(target=lambda n=n: found.setdefault(f"thread {n}", math.isqrt(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["product"] = float((numpy.ones((300, 300)) @ numpy.ones((300, 300))).sum())
    found["core file"] = resource.getrlimit(resource.RLIMIT_CORE)
    found["folder"] = bool(list(Path("/proc/self").iterdir()))
    time.sleep(0.001)
    reader, writer = os.pipe()
    os.write(writer, random.Random(0).randbytes(3))
    found["pipe"] = len(os.read(reader, 9))
    return found


def test_a_confined_process_does_its_own_work(confined):
    found = confined.schedule(_own_work).result(timeout=60)
    signals = {"raised": signal.SIGUSR1, "sent to a thread": signal.SIGUSR2, "sent to itself": signal.SIGVTALRM}
    threads = {f"thread {n}": math.isqrt(n) for n in range(3)}
    assert found == signals | threads | {"product": 300.0**3, "core file": (0, 0), "folder": True, "pipe": 3}


def test_a_process_that_aborts_ends_by_that_signal(confined):
    with pytest.raises(ProcessExpired) as ended:
        confined.schedule(os.abort).result(timeout=60)
    assert ended.value.exitcode == -signal.SIGABRT
