"""Memory of CPU tensors moved into anonymous shared segments, under all tensors that lie in it, and mapped elsewhere."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from clipo_megatron.errors import EngineError

SHARED_FOLDER = "/dev/shm"
"""Where torch makes its segments; their names are gone before they hold anything."""
_SPARE_DESCRIPTORS = 64
_LOCK_TIMEOUT_S, _LOCK_POLL_S = 120.0, 0.02


def bytes_to_share(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of shared memory that `share` takes for tensors on a CPU: their whole storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    return sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())


def shared_room() -> int:
    """Bytes that are free for shared memory on this node."""
    found = os.statvfs(SHARED_FOLDER)
    return found.f_bavail * found.f_frsize


def move_to_segment(tensor: Tensor) -> tuple[int, int]:
    """Share the tensor's storage, within `room_kept`.

    Returns:
        Descriptor and bytes of the segment; torch keeps it open as long as the storage lives.
    """
    # What torch's own sharing between processes calls; a storage that is shared already stays as it is.
    descriptor, num_bytes = tensor.untyped_storage()._share_fd_cpu_()  # pyright: ignore
    return int(descriptor), int(num_bytes)  # pyright: ignore[reportUnknownArgumentType]


@contextmanager
def room_kept(tensors: Mapping[str, Tensor]) -> Generator[None]:
    """Checks that there is room for the tensors' storages, and keeps others of the node from taking it meanwhile.

    A page that finds no room would end the process without a word.

    Raises:
        EngineError: no room, too few file descriptors, or another process does not come to its end.
    """
    _need_descriptors(len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}))
    folder = os.open(SHARED_FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(folder)
        needed, room = bytes_to_share(tensors), shared_room()
        if needed > room:
            raise EngineError(
                f"{SHARED_FOLDER} has {room / 2**20:,.1f} MiB free, sharing the weights takes {needed / 2**20:,.1f} MiB: "
                "give it more (containers: --shm-size), or set sync.transport to stream"
            )
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
        os.close(folder)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{SHARED_FOLDER} is locked by another process for {_LOCK_TIMEOUT_S:g} s: a trainer rank of this node "
                    "hangs while it shares its weights; end it (`lslocks` names it), or set sync.transport to stream"
                ) from None
            time.sleep(_LOCK_POLL_S)


def _need_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + _SPARE_DESCRIPTORS
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if needed > hard and hard != resource.RLIM_INFINITY:
        raise EngineError(
            f"sharing the weights takes {count} file descriptors, this process may open {hard}: raise `ulimit -Hn` to "
            f"{needed}, or set sync.transport to stream"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def map_segment(path: str, num_bytes: int, known: str, owner: str) -> Tensor:
    """A segment of another process, read-only; mapped as long as the tensor or a view of it lives.

    Args:
        path: that leads to it as long as its owner has it open.
        num_bytes: of the segment.
        known: its `identity`.
        owner: for messages.

    Returns:
        uint8 [num_bytes].

    Raises:
        EngineError: the owner is gone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise EngineError(f"the weights of {owner} are not shared any more: {error}; share them again") from None
    try:
        if identity(descriptor) != known:
            raise EngineError(f"the weights of {owner} are not shared any more: {path} is another file by now")
        # Populated: the first sync should not pay for the page faults.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        mapping = mmap.mmap(descriptor, num_bytes, flags=flags, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def identity(descriptor: int) -> str:
    """Of an open segment: process ids and descriptors are used again, this is not."""
    found = os.fstat(descriptor)
    return f"{found.st_dev}:{found.st_ino}"
