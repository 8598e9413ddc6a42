"""vLLM's own weight transfer (`vllm.distributed.weight_transfer`), which our syncs are measured against.

The engine's end is called through the workers' methods, whose names and arguments vLLM 0.24 to 0.32 share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from clipo_megatron.rollout.workers import Workers

Backend = Literal["ipc", "nccl"]
NamedTensors = Sequence[tuple[str, Tensor]]


class NativeTransfer:
    """The engine's end; the engine must have been started for the backend. Its version is not kept."""

    def __init__(self, workers: Workers, backend: str) -> None:
        self._workers = workers
        self._backend = backend

    def connect(self, *, address: str = "", port: int = 0) -> None:
        """Once; for nccl it returns when the sender has joined (`NcclSender`).

        Args:
            address: of the sender, nccl only.
            port: of the sender, nccl only.
        """
        info: dict[str, Any] = {}
        if self._backend == "nccl":
            info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": 2}
            info |= _packed("NCCLWeightTransferInitInfo")
        self._call("init_weight_transfer_engine", init_info=info)

    def update(self, info: dict[str, Any]) -> None:
        """Load what the sender gives: from the pause of the engine to its first possible request.

        Args:
            info: of `ipc_update` or `nccl_update`.
        """
        self._call("start_weight_update")
        self._call("update_weights", update_info=info)
        self._call("finish_weight_update")
        self._workers.require().reset_prefix_cache()

    def _call(self, method: str, **arguments: object) -> None:
        self._workers.require().collective_rpc(method, kwargs=arguments)


def ipc_update(tensors: NamedTensors) -> dict[str, Any]:
    """What an engine on the same GPU opens and loads: a handle for each tensor, made anew each time, as vLLM's sender does.

    Args:
        tensors: on the current GPU, contiguous; to be kept until the engine has loaded them.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return _described(tensors) | {"ipc_handles": [{gpu: reduce_tensor(tensor)[1]} for _, tensor in tensors]}


def nccl_update(tensors: NamedTensors) -> dict[str, Any]:
    """What an engine must know of the tensors that `NcclSender.send` will broadcast."""
    return _described(tensors) | _packed("NCCLWeightTransferUpdateInfo")


class NcclSender:
    """The trainer's end of nccl, on the current GPU, which must be another one than the engine's."""

    def __init__(self, *, address: str, port: int) -> None:
        """Listen and wait for the engine."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        group = StatelessProcessGroup.create(host=address, port=port, rank=0, world_size=2)
        self._communicator = PyNcclCommunicator(group, device=torch.cuda.current_device())

    def send(self, tensors: NamedTensors) -> None:
        """Broadcast in packed buffers, as vLLM's sender does by default."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=iter(tensors), group=self._communicator, src=0, post_iter_func=lambda item: item[1]
        )
        torch.cuda.synchronize()


def _described(tensors: NamedTensors) -> dict[str, Any]:
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def _packed(class_name: str) -> dict[str, bool]:
    """With each update vLLM 0.24 is told that buffers are packed, later releases when they connect."""
    from vllm.distributed.weight_transfer import nccl_engine

    known = {field.name for field in dataclasses.fields(getattr(nccl_engine, class_name))}
    return {"packed": True} if "packed" in known else {}
