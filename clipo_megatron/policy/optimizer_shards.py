"""Which values of AdamW belong to which elements of which parameter, whichever of Megatron's optimizers holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

MASTER, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")
"""Names of AdamW's values in Megatron's distributed checkpoints."""
_OWN_MASTER = "master_param"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OptimizerShard:
    """The elements of one parameter that this rank's AdamW steps: a flat range of it."""

    name: str
    """Of the parameter, in the whole model."""
    start: int
    """First element in the flattened parameter."""
    stepped: Tensor
    """What AdamW steps, and the key of its state: a float32 master, or the parameter's own elements."""
    optimizer: torch.optim.Optimizer

    @property
    def stop(self) -> int:
        """End of the range."""
        return self.start + self.stepped.numel()

    def values(self) -> dict[str, Tensor]:
        """References to the float32 values of AdamW: `MASTER`, and `MOMENTS` once it has stepped."""
        state = self.optimizer.state.get(self.stepped, {})
        return {MASTER: state.get(_OWN_MASTER, self.stepped).detach()} | {
            name: state[name].detach() for name in MOMENTS if name in state
        }

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor], *, steps: int) -> None:
        """The inverse of `values`, for flat tensors on any device.

        Args:
            values: of `values`, float32. Without moments AdamW starts afresh.
            steps: that AdamW has taken.
        """
        shape, device = self.stepped.shape, self.stepped.device
        state: dict[str, Any] = self.optimizer.state.get(self.stepped, {})
        if MASTER in values:
            state.get(_OWN_MASTER, self.stepped).copy_(values[MASTER].reshape(shape))
        moments = {name: value.reshape(shape).to(device) for name, value in values.items() if name != MASTER}
        if not moments:
            # AdamW makes its moments when it finds no state at all.
            if _OWN_MASTER not in state:
                self.optimizer.state.pop(self.stepped, None)
            return
        if _counts_each(self.optimizer):
            # On the host: torch's AdamW reads it there.
            moments["step"] = torch.tensor(float(steps), dtype=torch.float32)
        self.optimizer.state[self.stepped] = {**state, **moments}


def optimizer_shards(
    optimizers: Sequence[object], named_parameters: Iterator[tuple[str, torch.nn.Parameter]]
) -> list[OptimizerShard]:
    """All shards of this rank, in the order of the network.

    Args:
        optimizers: Megatron's, each over some of the parameters.
        named_parameters: all of this rank, with their names in the whole model.
    """
    parameters = list(named_parameters)
    place = {id(parameter): number for number, (_, parameter) in enumerate(parameters)}
    found: list[tuple[int, OptimizerShard]] = []
    for optimizer in optimizers:
        inner: torch.optim.Optimizer = optimizer.optimizer  # pyright: ignore[reportAttributeAccessIssue]
        for parameter, start, stepped in _stepped(optimizer, inner):
            number = place[id(parameter)]
            name = parameters[number][0]
            found.append((number, OptimizerShard(name=name, start=start, stepped=stepped, optimizer=inner)))
    return [shard for _, shard in sorted(found, key=lambda item: (item[0], item[1].start))]


def finish_restore(optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """To be called once all shards of an optimizer are restored."""
    if not _counts_each(optimizer):
        for group in optimizer.param_groups:
            group["step"] = steps
    if isinstance(optimizer, HybridDeviceOptimizer):
        # Its state is a view of those of the optimizers that it deals its parameters to.
        optimizer._sync_hdo_state_to_sub_optimizers()


def _counts_each(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are counted by parameter, as torch does; Transformer Engine's and apex's AdamW count by group."""
    return isinstance(optimizer, torch.optim.AdamW | HybridDeviceOptimizer)


def _stepped(optimizer: object, inner: torch.optim.Optimizer) -> Iterator[tuple[Any, int, Tensor]]:
    """(parameter, first element, what is stepped in its place)."""
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, number) in optimizer.model_param_group_index_map.items():
            range_map: dict[str, Any] = optimizer._get_model_param_range_map(parameter)
            yield parameter, range_map["param"].start, inner.param_groups[group]["params"][number]
        return
    masters: dict[int, Tensor] = {}
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for of_model, of_optimizer in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            masters |= {id(master): parameter for parameter, master in zip(of_model, of_optimizer, strict=True)}
    for group in inner.param_groups:
        for stepped in group["params"]:
            yield masters.get(id(stepped), stepped), 0, stepped
