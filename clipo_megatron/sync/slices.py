"""Slices of a plan as views of living tensors, checked against it: what all ways of carrying out a plan build on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipo_megatron.errors import EngineError
from clipo_megatron.sync.plan import NO_LAYER, Copy, Shape, SyncPlan


def check_parameter(whose: str, tensor: Tensor, shape: Shape, dtype: torch.dtype) -> None:
    """Pass if a parameter is what the plan says, and contiguous.

    Raises:
        EngineError: names it, what was found and what the plan says.
    """
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise EngineError(
            f"{whose} is {tensor.dtype} {list(tensor.shape)}, the plan says {dtype} {list(shape)}: plan, trainer and "
            "engine must be of one model, layout and dtype"
        )
    if not tensor.is_contiguous():
        raise EngineError(f"{whose} has strides {list(tensor.stride())}: plans copy between contiguous parameters")


def source_views(copy: Copy, wholes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The trainer's end of a copy: one view for each parameter that the first dim runs over."""
    first = 1 if copy.is_stacked else 0
    return tuple(_view(whole, copy.shape[first:], copy.source_strides[first:], copy.source_offset) for whole in wholes)


def target_views(copy: Copy, whole: Tensor) -> tuple[Tensor, ...]:
    """The engine's end of a copy, in as many views as the trainer's."""
    if not copy.is_stacked:
        return (_view(whole, copy.shape, copy.strides, copy.offset),)
    return tuple(
        _view(whole, copy.shape[1:], copy.strides[1:], copy.offset + number * copy.strides[0])
        for number in range(len(copy.source_parameters))
    )


def zero_padding(target: Tensor, copies: Sequence[Copy]) -> None:
    """Set to zero what none of the copies into an engine's parameter writes.

    Every element is written by one copy at most; those of a padded parameter are runs.
    """
    if sum(copy.num_elements for copy in copies) == target.numel():
        return
    flat = target.detach().view(-1)
    if any(len(copy.shape) > 1 for copy in copies):
        flat.zero_()
        return
    reached = 0
    for copy in sorted(copies, key=lambda copy: copy.offset):
        flat[reached : copy.offset].zero_()
        reached = copy.offset + copy.num_elements
    flat[reached:].zero_()


def filled(template: str, layers: Sequence[int]) -> list[str]:
    """The name in every layer, or as it is if it has none."""
    return [template.replace("{layer}", str(layer)) for layer in (layers if "{layer}" in template else NO_LAYER)]


def engine_tensors(plan: SyncPlan) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and dtype of everything that an engine rank holds, by its name in the plan with the layer filled in."""
    layers = sorted({layer for flow in plan.flows for layer in flow.layers})
    return {
        name: (shape, dtype_of(plan, template))
        for template, shape in plan.engine_shapes.items()
        for name in filled(template, layers)
    }


def dtype_of(plan: SyncPlan, template: str) -> torch.dtype:
    """Of a parameter of either side, by its name in the plan's shapes."""
    return getattr(torch, plan.dtypes.get(template, plan.dtype))


def _view(whole: Tensor, shape: Shape, strides: Shape, offset: int) -> Tensor:
    return whole.detach().as_strided(shape, strides, int(whole.storage_offset()) + offset)
