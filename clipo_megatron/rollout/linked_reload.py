"""A running vLLM model filled by slices that trainer ranks send straight to it, by the plan of a sync.

As `planned_reload`, but the slices come over links: those of modules that are reloaded are all gathered first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.rollout.in_place import LiveParameters
from clipo_megatron.rollout.reload import LayerwiseReload, by_module
from clipo_megatron.sync.copy_rate import measure_copy_rate
from clipo_megatron.sync.link_group import Group
from clipo_megatron.sync.plan import SyncPlan
from clipo_megatron.sync.process_group_transport import PlannedReceives
from clipo_megatron.sync.slices import engine_tensors


class LinkedReload:
    """One worker's end of all planned syncs over links."""

    def __init__(
        self, model: torch.nn.Module, plan: SyncPlan, group: Group, *, engine: int, rank: int, bucket_bytes: int
    ) -> None:
        """Lay out what is received; of the model only the padding of its vocabulary is written, with zeros.

        Args:
            model: the worker's.
            plan: of the whole sync.
            group: of all trainer and engine ranks, see `process_group_transport.join`.
            engine: number of the engine in the plan.
            rank: of the worker in its engine.
            bucket_bytes: as the senders have it.

        Raises:
            EngineError: the plan does not fit the model.
        """
        live = LiveParameters(model, plan)
        gathered = {
            name: torch.zeros(shape, dtype=dtype)
            for name, (shape, dtype) in engine_tensors(plan).items()
            if name in live.reloaded
        }
        self._modules: list[tuple[torch.nn.Module, dict[str, Tensor]]] = [
            (model.get_submodule(path), {attribute: gathered[name] for attribute, name in own.items()})
            for path, own in by_module(live.reloaded).items()
        ]
        targets = live.in_place | gathered
        self._receives = PlannedReceives(plan, engine, rank, targets, group, bucket_bytes=bucket_bytes)
        self.num_bytes = sum(plan.num_bytes(transfer.copy) for transfer in plan.into(engine, rank))
        """Received in each sync."""
        self.floor_seconds = self.num_bytes / measure_copy_rate(live.device)
        """What copying as much takes within this machine; links are slower."""

    def begin(self, reload: LayerwiseReload) -> None:
        """Get ready; what an unfinished update left behind is dropped first."""
        if self._modules:
            reload.begin()
        else:
            reload.abandon()

    def fill(self, reload: LayerwiseReload, version: int, *, verify: bool) -> None:
        """Receive all weights of `version`.

        Args:
            reload: begun, of this model.
            version: that all trainer ranks must send.
            verify: compare the checksum of each slice with the trainer's; the senders must do so too.

        Raises:
            EngineError: a trainer rank sends another version, is late or gone. The group is of no use any more then.
            CheckError: a slice differs from the trainer's.
        """
        self._receives.receive(version, verify=verify)
        for module, tensors in self._modules:
            reload.take(module, tensors)

    def finish(self, reload: LayerwiseReload) -> None:
        """Make the received weights the ones that are used."""
        if self._modules:
            reload.finish()

    def close(self) -> None:
        """Let go of the group's connections with the last reference to them."""
        self._modules.clear()
