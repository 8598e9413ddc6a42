"""A stand-in for the trainer of a sync benchmark: a process that holds all ranks' parameters, and lays them open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipo_megatron.errors import WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.shared_parameters import share
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.holdings import table_name
from clipo_megatron.weights.mapping import hf_tensors_of, local_parameter
from clipo_megatron.weights.names import (
    EMBEDDING,
    find_rule,
    layer_numbers,
    megatron_parameter_names,
    padded_vocab_size,
)

if TYPE_CHECKING:
    from clipo_megatron.rollout.native_transfer import NcclSender

Parameters = Mapping[str, Tensor]


def serve_parameters(pipe: Connection, model_path: Path, layout: ParallelLayout, dtype: str, device: str) -> None:
    """The process's main function: sends the handles of all ranks, as JSON; then each number received is a new version.

    For every version all weights are moved a little, and "" is sent when they are there. Other messages ask for vLLM's own
    transfer: see `_Native`. Ends with the pipe.

    Args:
        pipe: to the benchmark.
        model_path: Hugging Face folder.
        layout: of the trainer; a stage's data parallel copies are held as well.
        dtype: torch's name.
        device: "cpu" or "cuda", all ranks on the first GPU; "cuda:1": on the second.
    """
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    arch = read_architecture(model_path)
    shared = []
    parameters: list[dict[str, Tensor]] = []
    with HFReader(model_path) as reader:
        for rank in range(layout.world_size):
            of_rank = rank_parameters(reader, arch, layout, rank, getattr(torch, dtype), device)
            parameters.append(of_rank)
            shared.append(share(of_rank, owner=f"trainer rank {rank}"))
    for of_rank in shared:
        of_rank.end_change(0)
    pipe.send([of_rank.handles.to_json() for of_rank in shared])
    native = _Native(pipe, lambda: whole_tensors(parameters, arch, layout))
    for version in _messages(pipe):
        if not isinstance(version, int):
            native.answer(version)
            continue
        for of_rank in shared:
            of_rank.begin_change()
        for of_rank in parameters:
            for tensor in of_rank.values():
                tensor.mul_(1.01)
        for of_rank in shared:
            of_rank.end_change(version)
        pipe.send("")


def _messages(pipe: Connection) -> Iterator[object]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def received(pipe: Connection) -> Any:  # noqa: ANN401 (what the other end sends)
    """The next message of the trainer's process.

    Raises:
        WorkerError: it died.
    """
    try:
        return pipe.recv()
    except EOFError:
        raise WorkerError("the trainer's process died; its traceback is above") from None


class _Native:
    """The sending end of vLLM's own transfer: whole tensors are gathered for each update, as a trainer does."""

    def __init__(self, pipe: Connection, gathered: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        self._pipe = pipe
        self._gathered = gathered
        self._kept: list[tuple[str, Tensor]] = []
        self._sender: NcclSender | None = None

    def answer(self, message: object) -> None:
        """("nccl", address, port): meet the engine. "nccl", "ipc": one update, told of first."""
        from clipo_megatron.rollout.native_transfer import NcclSender, ipc_update, nccl_update

        if isinstance(message, tuple):
            _, address, port = message
            self._sender = NcclSender(address=address, port=port)
            self._pipe.send("")
            return
        self._kept = [(name, tensor.contiguous()) for name, tensor in self._gathered()]
        if message == "ipc":
            torch.cuda.synchronize()
            self._pipe.send(ipc_update(self._kept))
            return
        assert self._sender is not None
        self._pipe.send(nccl_update(self._kept))
        self._sender.send(self._kept)
        self._pipe.send("")


def whole_tensors(
    opened: Sequence[Parameters], arch: Architecture, layout: ParallelLayout
) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors out of the ranks' shards, as the trainer gathers them for engines that get whole tensors.

    Args:
        opened: parameters of each trainer rank, by the plan's names.
        arch: of the model.
        layout: of the trainer.
    """
    for name in _planned_names(arch):
        rule, _ = find_rule(name, arch)
        shards: dict[int, Tensor] = {}
        for rank, parameters in enumerate(opened):
            if _holds(arch, layout, rank, name):
                place = layout.etp_rank(rank) if rule.is_of_expert else layout.tp_rank(rank)
                shards.setdefault(place, parameters[table_name(name, arch)])
        yield from hf_tensors_of(name, [shards[place] for place in sorted(shards)], arch)


def _planned_names(arch: Architecture) -> list[str]:
    """A tied output layer is a copy that is not sent."""
    return [name for name in megatron_parameter_names(arch) if table_name(name, arch)]


def _holds(arch: Architecture, layout: ParallelLayout, rank: int, name: str) -> bool:
    rule, where = find_rule(name, arch)
    stage = layout.pp_rank(rank)
    if not rule.is_of_layer:
        return stage == (0 if name == EMBEDDING else layout.pp - 1)
    if rule.is_of_expert:
        assert arch.experts is not None
        if where.expert // (arch.experts.num_experts // layout.ep) != layout.ep_rank(rank):
            return False
    return any(
        where.layer in layer_numbers(arch.num_layers, pp=layout.pp, pp_rank=stage, vpp=layout.vpp, vpp_rank=chunk)
        for chunk in range(layout.vpp)
    )


def rank_parameters(
    reader: HFReader, arch: Architecture, layout: ParallelLayout, rank: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """A rank's parameters as views of one buffer, as Megatron's distributed optimizer lays them out."""
    found = {
        table_name(name, arch): local_parameter(
            reader,
            name,
            arch,
            tp=layout.tp,
            tp_rank=layout.tp_rank(rank),
            padded_vocab=padded_vocab_size(arch.vocab_size, layout.tp),
            etp=layout.etp,
            etp_rank=layout.etp_rank(rank),
        ).to(dtype)
        for name in _planned_names(arch)
        if _holds(arch, layout, rank, name)
    }
    buffer = torch.empty(sum(_padded(tensor.numel()) for tensor in found.values()), dtype=dtype, device=device)
    views: dict[str, Tensor] = {}
    reached = 0
    for name, tensor in found.items():
        views[name] = buffer[reached : reached + tensor.numel()].view(tensor.shape).copy_(tensor)
        reached += _padded(tensor.numel())
    return views


def _padded(count: int) -> int:
    return -(-count // 64) * 64
