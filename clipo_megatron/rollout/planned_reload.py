"""A running vLLM model filled straight from the trainer's parameters, by the plan of a sync.

What is in use in loading format is written in place (see in_place.py). Of the rest each module goes through vLLM's layerwise
reload, as whole Hugging Face tensors do: the bits in use are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_megatron.errors import EngineError
from clipo_megatron.rollout.in_place import LiveParameters
from clipo_megatron.rollout.reload import LayerwiseReload, by_module
from clipo_megatron.sync.copy_rate import measure_copy_rate
from clipo_megatron.sync.executor import BoundCopies, PlannedCopies
from clipo_megatron.sync.plan import SyncPlan
from clipo_megatron.sync.shared_parameters import OpenedParameters, SharedHandles, open_shared, reading

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModuleCopies:
    """What is copied for one module that is reloaded."""

    module: torch.nn.Module
    tensors: dict[str, Tensor]
    """Name in the module -> memory in loading format, which other modules use as well."""
    copies: BoundCopies


class PlannedReload:
    """One worker's end of all planned syncs: trainer ranks opened once, copies laid out once."""

    def __init__(
        self, model: torch.nn.Module, plan: SyncPlan, handles: Sequence[SharedHandles], *, engine: int, rank: int
    ) -> None:
        """Open what the trainer shares; the model is not touched.

        Args:
            model: the worker's.
            plan: of the whole sync.
            handles: of all trainer ranks, in their order.
            engine: number of the engine in the plan.
            rank: of the worker in its engine.

        Raises:
            EngineError: the plan does not fit the model or the trainer, or the memory can't be opened from here.
        """
        givers = {transfer.source for transfer in plan.into(engine, rank)}
        self._opened: dict[int, OpenedParameters] = {giver: open_shared(handles[giver]) for giver in sorted(givers)}
        sources = {giver: opened.tensors for giver, opened in self._opened.items()}
        planned = PlannedCopies(plan, sources, engine=engine, engine_rank=rank)
        live = LiveParameters(model, plan)
        if not live.in_place and not live.reloaded:
            raise EngineError("the plan fills no parameter of this engine; set sync.transport to stream")
        self._in_place = planned.bind(live.in_place)
        self._modules: list[_ModuleCopies] = []
        if live.reloaded:
            self._modules = _by_module(model, planned, live.reloaded, getattr(torch, plan.dtype))
        self.num_bytes = planned.num_bytes
        """Copied by each sync."""
        self.floor_seconds = planned.num_bytes / measure_copy_rate(live.device)
        """What the copies alone take at least on this machine, were it to do nothing else."""

    def begin(self, reload: LayerwiseReload) -> None:
        """Get ready; what an unfinished update left behind is dropped first."""
        if self._modules:
            reload.begin()
        else:
            reload.abandon()

    def fill(self, reload: LayerwiseReload, version: int, *, verify: bool) -> None:
        """Copy all weights of `version`.

        Args:
            reload: begun, of this model.
            version: that all trainer ranks must hold before, during and after the copies.
            verify: compare the checksum of each slice with that of the trainer's.

        Raises:
            EngineError: a trainer rank holds other weights or changed them meanwhile. The model is good for another
                whole update only.
            CheckError: a slice differs from the trainer's; the same holds.
        """
        with reading(self._opened.values(), version):
            _copy(self._in_place, verify=verify)
            for of in self._modules:
                _copy(of.copies, verify=verify)
                reload.take(of.module, of.tensors)

    def finish(self, reload: LayerwiseReload) -> None:
        """Make the copied weights the ones that are used."""
        if self._modules:
            reload.finish()

    def close(self) -> None:
        """Let go of the trainer's memory."""
        for opened in self._opened.values():
            opened.close()


def _copy(copies: BoundCopies, *, verify: bool) -> None:
    copies.run()
    copies.wait()
    if verify:
        copies.verify()


def _by_module(
    model: torch.nn.Module, planned: PlannedCopies, names: dict[str, str], dtype: torch.dtype
) -> list[_ModuleCopies]:
    """Modules in the plan's order. One memory, as large as the largest module, serves them all in turn."""
    of_module = by_module(names)
    shapes = {path: [planned.parameters[name] for name in parts.values()] for path, parts in of_module.items()}
    shared = torch.empty(max(_offsets(of, dtype)[-1] for of in shapes.values()), dtype=torch.uint8)
    modules: list[_ModuleCopies] = []
    for path, parts in of_module.items():
        own = dict(zip(parts.values(), _laid_out(shared, shapes[path], dtype), strict=True))
        copies = planned.bind(own)
        if copies.num_bytes < sum(tensor.nbytes for tensor in own.values()):
            # Padding is zeroed once, by `bind`: it needs memory that no other module writes.
            memory = torch.empty(_offsets(shapes[path], dtype)[-1], dtype=torch.uint8)
            own = dict(zip(parts.values(), _laid_out(memory, shapes[path], dtype), strict=True))
            copies = planned.bind(own)
        tensors = {attribute: own[name] for attribute, name in parts.items()}
        modules.append(_ModuleCopies(module=model.get_submodule(path), tensors=tensors, copies=copies))
    return modules


def _offsets(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[int]:
    """Bytes before each tensor, and of all together."""
    offsets = [0]
    for shape in shapes:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        offsets.append(offsets[-1] + -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
    return offsets


def _laid_out(memory: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [
        memory[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
        for shape, offset in zip(shapes, _offsets(shapes, dtype), strict=False)
    ]
