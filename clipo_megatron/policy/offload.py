"""What only training needs, given back while engines use the device.

Gradient buffers are dropped, the optimizer's state is kept in host memory. Parameters stay where they are, so engines that
have opened them go on reading them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.errors import CheckError
from clipo_megatron.policy.optimizer import PolicyOptimizer
from clipo_megatron.policy.stage import Stage


class Offload:
    """Storages are emptied and filled again in place: all tensors that lie in them stay what they are.

    On a CPU the state moves within the same memory; gradient buffers are freed there too.
    """

    def __init__(self, stage: Stage, optimizer: PolicyOptimizer, *, device: torch.device) -> None:
        """Nothing is moved yet.

        Args:
            stage: of this rank, with its gradient buffers.
            optimizer: over it.
            device: of both.
        """
        self._stage = stage
        self._optimizer = optimizer
        self._device = device
        self._copies: dict[int, Tensor] = {}
        """By storage: its bytes on the host, page-locked for a GPU and kept for the next time."""
        self._moved: dict[int, torch.UntypedStorage] = {}
        self.is_offloaded = False
        """Whether training is impossible now."""

    def offload(self) -> int:
        """Give the memory back; twice is once.

        Returns:
            Bytes of the device that are free now.
        """
        if self.is_offloaded:
            return 0
        freed = 0
        self._finish()
        for chunk in self._stage.wrapped:
            buffers: list[Any] = [*chunk.buffers, *chunk.expert_parallel_buffers]  # pyright: ignore  a list over a method
            freed += sum(buffer.grad_data.nbytes for buffer in buffers)
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        self._moved = {storage._cdata: storage for storage in self._state_storages()}
        for key, storage in self._moved.items():
            self._copy_of(key, storage).copy_(_bytes_of(storage, self._device), non_blocking=True)
        self._finish()
        for storage in self._moved.values():
            freed += storage.nbytes()
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.is_offloaded = True
        return freed

    def onload(self) -> None:
        """Bring everything back, gradients as zeros; twice is once."""
        if not self.is_offloaded:
            return
        for chunk in self._stage.wrapped:
            chunk.restore_grad_buffers(synchronize=False)
        for key, storage in self._moved.items():
            copy = self._copies[key]
            storage.resize_(copy.nbytes)
            _bytes_of(storage, self._device).copy_(copy, non_blocking=True)
        self._finish()
        if self._device.type != "cuda":
            self._copies.clear()
        self._moved = {}
        self.is_offloaded = False

    def require_onload(self, what: str) -> None:
        """Pass if everything is on the device.

        Raises:
            CheckError: it is not.
        """
        if self.is_offloaded:
            raise CheckError(f"{what}: gradients and optimizer state are offloaded; onload them first")

    def readable(self, tensor: Tensor) -> Tensor:
        """The tensor, or its copy on the host as long as it is offloaded."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._moved:
            return tensor
        # Not `as_strided` of the tensor itself: its storage is empty.
        copy = self._copies[storage._cdata].view(tensor.dtype)
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _state_storages(self) -> Iterator[torch.UntypedStorage]:
        """Of masters and moments on the device that are no parameters themselves, each once."""
        seen = {parameter.untyped_storage()._cdata for parameter in self._stage.parameters()}
        for optimizer in self._optimizer.inner:
            stepped = [tensor for group in optimizer.param_groups for tensor in group["params"]]
            state = [value for values in optimizer.state.values() for value in values.values()]
            for tensor in (*stepped, *state):
                if not isinstance(tensor, Tensor) or tensor.device.type != self._device.type or not tensor.dim():
                    continue
                storage = tensor.untyped_storage()
                # Host memory that torch did not allocate can't be given back.
                if storage._cdata not in seen and storage.resizable() and storage.nbytes():
                    seen.add(storage._cdata)
                    yield storage

    def _copy_of(self, key: int, storage: torch.UntypedStorage) -> Tensor:
        copy = self._copies.get(key)
        if copy is None or copy.nbytes != storage.nbytes():
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8)
            if self._device.type == "cuda":
                # Not torch's page-locked memory, which comes in powers of two: of tens of GB half could be wasted. Where it
                # can't be locked, copies take longer.
                torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0)  # pyright: ignore
            self._copies[key] = copy
        return copy

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # pyright: ignore[reportCallIssue]
