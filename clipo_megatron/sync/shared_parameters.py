"""A trainer's parameters, read by the engines of its node where they lie: shared once, opened once, kept.

CPU: the memory of each storage is moved into an anonymous shared segment, under all tensors that lie in it. CUDA: it stays
where it is, and IPC handles are given out. Nothing is left behind when a process is killed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipo_megatron.errors import EngineError
from clipo_megatron.sync.cpu_segments import identity, map_segment, move_to_segment, room_kept
from clipo_megatron.sync.cuda_ipc import OpenedSegment, segment_of
from clipo_megatron.sync.version_stamp import StampReader, VersionStamp


class SharedMemory(NamedTuple):
    """One storage on a CPU, one allocated segment on a GPU."""

    where: str
    """CPU: a path that leads to it as long as its owner lives. CUDA: the IPC handle, in hex."""
    num_bytes: int
    identity: str
    """CPU: device and inode of the segment, since process ids and descriptors are used again. CUDA: empty."""


class SharedTensor(NamedTuple):
    """Where one tensor lies."""

    memory: int
    """Number in `SharedHandles.memories`."""
    offset: int
    """Bytes."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Elements."""
    dtype: str
    """Torch's name without the prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedHandles:
    """What another process of the node needs to open the parameters of one trainer rank. Holds no memory."""

    owner: str
    """For messages, say "trainer rank 3"."""
    node: str
    device: str
    """"cpu" or "cuda"."""
    stamp: str
    memories: tuple[SharedMemory, ...]
    tensors: dict[str, SharedTensor]

    def to_json(self) -> str:
        """As text: it crosses processes by any way."""
        fields = {name: getattr(self, name) for name in ("owner", "node", "device", "stamp", "memories", "tensors")}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SharedHandles:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(
            owner=fields["owner"],
            node=fields["node"],
            device=fields["device"],
            stamp=fields["stamp"],
            memories=tuple(SharedMemory(*memory) for memory in fields["memories"]),
            tensors={
                name: SharedTensor(memory, offset, tuple(shape), tuple(stride), dtype)
                for name, (memory, offset, shape, stride, dtype) in fields["tensors"].items()
            },
        )


class SharedParameters:
    """The owner's end: `begin_change` before the weights move, `end_change` when they are those of a version."""

    def __init__(self, tensors: Mapping[str, Tensor], handles: SharedHandles, stamp: VersionStamp) -> None:
        """See `share`."""
        self.handles = handles
        """For `open_shared` in the engines' processes."""
        self._tensors = dict(tensors)
        self._places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self._stamp = stamp

    def begin_change(self) -> None:
        """To be called before the first weight is changed; readers are refused until `end_change`."""
        self._stamp.begin()

    def end_change(self, version: int) -> None:
        """To be called when all weights are those of `version`; waits for the GPU.

        Raises:
            EngineError: a tensor lies elsewhere by now, so that readers would get old weights.
        """
        for name, tensor in self._tensors.items():
            if tensor.data_ptr() != self._places[name]:
                raise EngineError(
                    f"{self.handles.owner}: {name} was moved after it was shared, so that engines would read old weights: "
                    "change parameters in place, or share them again"
                )
        if self.handles.device == "cuda":
            torch.cuda.synchronize()
        self._stamp.end(version)

    def close(self) -> None:
        """Refuse readers from now on. The memory goes with the tensors; closing twice is fine."""
        self._stamp.close()
        self._tensors.clear()
        self._places.clear()


class OpenedParameters:
    """A reader's end: the tensors of one owner, in its memory. On a CPU writing to them ends the process."""

    def __init__(self, handles: SharedHandles) -> None:
        """See `open_shared`."""
        self.owner = handles.owner
        if handles.node != _node():
            raise EngineError(
                f"the weights of {handles.owner} are on another node ({handles.node.partition(' ')[0]}), this is "
                f"{socket.gethostname()}: memory is shared within a node only; set sync.transport to stream"
            )
        self._stamp = StampReader(handles.stamp, handles.owner)
        self._segments: list[OpenedSegment] = []
        memories = [self._open(memory, handles.device) for memory in handles.memories]
        self.tensors: dict[str, Tensor] = {}
        """Name -> tensor; they change whenever the owner changes them."""
        for name, shared in handles.tensors.items():
            dtype = getattr(torch, shared.dtype)
            # Bytes up to the last element, so that a view with gaps or a short tail is one as well.
            last = sum((size - 1) * step for size, step in zip(shared.shape, shared.stride, strict=True))
            span = memories[shared.memory].narrow(0, shared.offset, (last + 1) * dtype.itemsize)
            self.tensors[name] = span.view(dtype).as_strided(shared.shape, shared.stride)

    def require(self, version: int) -> int:
        """A number that is another one after every change of the weights.

        Raises:
            EngineError: the weights are in change, given up, or of another version.
        """
        return self._stamp.require(version)

    def close(self) -> None:
        """Let go of the memory; on a CPU it is unmapped when the last tensor of it is gone. Closing twice is fine."""
        self.tensors.clear()
        for segment in self._segments:
            segment.close()
        self._segments.clear()

    def _open(self, memory: SharedMemory, device: str) -> Tensor:
        if device == "cpu":
            return map_segment(memory.where, memory.num_bytes, memory.identity, self.owner)
        self._segments.append(OpenedSegment(bytes.fromhex(memory.where), memory.num_bytes))
        return self._segments[-1].content


def share(tensors: Mapping[str, Tensor], *, owner: str) -> SharedParameters:
    """Let other processes of this node read tensors where they lie; to be called once, and again only for other tensors.

    On a CPU the storage of each tensor is replaced in place, so that all views of it (gradient buffers' parameters, the
    optimizer's shards) stay what they are. For a moment the largest storage is there twice.

    Args:
        tensors: all on CPUs or all on one GPU, not empty.
        owner: for messages, say "trainer rank 3".

    Returns:
        In change: readers are refused until `end_change`.

    Raises:
        EngineError: no room for shared memory or too few file descriptors; nothing has been moved then. On a GPU, memory
            that can't be shared.
    """
    devices = {tensor.device.type for tensor in tensors.values()}
    if len(devices) != 1 or not devices <= {"cpu", "cuda"}:
        raise EngineError(f"{owner}: can't share tensors on {sorted(devices)}; all must be on CPUs or all on one GPU")
    (device,) = devices
    memories: dict[str | int, int] = {}
    described: list[SharedMemory] = []
    places: dict[str, SharedTensor] = {}
    for name, (key, memory, offset) in (_shared_on_cpu if device == "cpu" else _shared_on_gpu)(tensors):
        if key not in memories:
            memories[key] = len(described)
            described.append(memory)
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        places[name] = SharedTensor(memories[key], offset, tuple(tensor.shape), tensor.stride(), dtype)
    stamp = VersionStamp()
    handles = SharedHandles(
        owner=owner, node=_node(), device=device, stamp=stamp.path, memories=tuple(described), tensors=places
    )
    return SharedParameters(tensors, handles, stamp)


def open_shared(handles: SharedHandles) -> OpenedParameters:
    """Open what another process of this node shares; to be kept open over all syncs.

    Raises:
        EngineError: the owner is gone or runs on another node, or its memory can't be opened from here.
    """
    return OpenedParameters(handles)


@contextmanager
def reading(opened: Iterable[OpenedParameters], version: int) -> Generator[None]:
    """Holds what is copied meanwhile to one version: checks all stamps before and after.

    GPUs must have finished the copies at the end of the context.

    Raises:
        EngineError: other weights than `version`, or they were changed meanwhile: what was copied is of no use.
    """
    owners = list(opened)
    before = [parameters.require(version) for parameters in owners]
    yield
    for parameters, changes in zip(owners, before, strict=True):
        if parameters.require(version) != changes:
            raise EngineError(
                f"the weights of {parameters.owner} were changed while version {version} was copied: sync again"
            )


_Place = tuple[str | int, SharedMemory, int]
"""What tells one memory from another, the memory, the tensor's offset in bytes."""


def _shared_on_cpu(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, _Place]]:
    with room_kept(tensors):
        for name, tensor in tensors.items():
            descriptor, num_bytes = move_to_segment(tensor)
            memory = SharedMemory(f"/proc/{os.getpid()}/fd/{descriptor}", num_bytes, identity(descriptor))
            yield name, (descriptor, memory, int(tensor.storage_offset()) * tensor.element_size())


def _shared_on_gpu(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, _Place]]:
    for name, tensor in tensors.items():
        segment = segment_of(tensor)
        memory = SharedMemory(segment.handle.hex(), segment.num_bytes, "")
        yield name, (segment.start, memory, tensor.data_ptr() - segment.start)


def _node() -> str:
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
