"""GPU memory of one process opened in another, through the CUDA driver itself.

Not torch's sharing: it keeps counters in a named file, which a killed process leaves in shared memory.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from clipo_megatron.errors import EngineError

_LAZY_PEER_ACCESS = 1
_HANDLE_BYTES = 64


class _Handle(ctypes.Structure):
    _fields_ = (("content", ctypes.c_char * _HANDLE_BYTES),)


class Segment(NamedTuple):
    """A whole allocation of the driver, which holds one tensor or many."""

    start: int
    """Address in the owner's process."""
    num_bytes: int
    handle: bytes
    """For `OpenedSegment`."""


class OpenedSegment:
    """An allocation of another process of this node, readable from the current GPU."""

    def __init__(self, handle: bytes, num_bytes: int) -> None:
        """Open it; one process opens one handle once.

        Args:
            handle: of `Segment`.
            num_bytes: of the whole allocation.

        Raises:
            EngineError: the owner is gone, or the GPUs can't read each other's memory.
        """
        torch.cuda.current_stream()  # makes torch's context of the GPU the current one
        self._address = ctypes.c_uint64()
        _call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(self._address),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        device = torch.device("cuda", torch.cuda.current_device())
        storage = torch._C._construct_storage_from_data_pointer(  # pyright: ignore  not public; a view of the address
            self._address.value, device, num_bytes
        )
        self.content = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        """uint8 [num_bytes]; not to be touched after `close`."""

    def close(self) -> None:
        """Close it for this process; copies out of it must have ended. Closing twice is fine."""
        if self._address.value:
            torch.cuda.synchronize()
            self.content = self.content.new_empty(0)
            _call("cuIpcCloseMemHandle", self._address)
            self._address = ctypes.c_uint64()


def segment_of(tensor: Tensor) -> Segment:
    """The allocation that a CUDA tensor lies in.

    Raises:
        EngineError: its memory can't be shared.
    """
    with torch.cuda.device(tensor.device):
        torch.cuda.current_stream()
        start, num_bytes, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        address = ctypes.c_uint64(tensor.data_ptr())
        _call("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(num_bytes), address)
        _call("cuIpcGetMemHandle", ctypes.byref(handle), start)
    return Segment(start.value, num_bytes.value, bytes(handle))


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise EngineError(
            f"{name}: {reason} ({status}): GPU memory can't be shared between processes here; take "
            "expandable_segments out of PYTORCH_CUDA_ALLOC_CONF, let containers share the IPC namespace, or set "
            "sync.transport to stream"
        )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
