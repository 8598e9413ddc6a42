"""The plan of a weight sync: which slice of which trainer parameter goes into which slice of which engine parameter.

Compact: a copy is written once for all layers and all engines, a flow says whose it is and which rank gives it in each layer.
How it is found: planner.py. No tensors in here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import Placement

Shape = tuple[int, ...]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
NO_LAYER = (0,)
"""Layers of a flow whose copy belongs to no layer; its names hold no {layer}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One strided copy between contiguous parameters, for every layer alike: names hold {layer} where there is one.

    Offsets and strides are in elements. Dims that lie behind one another on both sides are one; dims of size 1 are left
    out.
    """

    tensors: tuple[str, ...]
    """Refined Hugging Face tensors that the elements belong to, each in whole or in part."""
    source_parameters: tuple[str, ...]
    """Of the trainer. More than one: the first dim runs over them, and the offset is the same in each."""
    source_offset: int
    source_strides: Shape
    """0 for the first dim where it runs over several parameters."""
    parameter: str
    """Of the engine."""
    offset: int
    strides: Shape
    shape: Shape

    @property
    def is_stacked(self) -> bool:
        """Whether the first dim runs over source parameters."""
        return len(self.source_parameters) > 1

    @property
    def num_elements(self) -> int:
        """Elements copied."""
        return math.prod(self.shape)


class Flow(NamedTuple):
    """One copy into one engine rank, in some layers."""

    copy: int
    """Number in `SyncPlan.copies`."""
    engine: int
    engine_rank: int
    """In its engine."""
    layers: tuple[int, ...]
    """Numbers in the whole model; `NO_LAYER` for a tensor of no layer."""
    sources: tuple[int, ...]
    """Trainer rank of the first layer, of the second, ..., and from the start again."""

    def source(self, step: int) -> int:
        """The trainer rank that gives layer number `step` of the flow."""
        return self.sources[step % len(self.sources)]


class Transfer(NamedTuple):
    """One copy of one layer into one engine rank."""

    source: int
    """Trainer rank."""
    engine: int
    engine_rank: int
    layer: int
    copy: Copy

    @property
    def source_parameters(self) -> list[str]:
        """Names in the trainer, see `table_name` of weights/holdings.py."""
        layer = str(self.layer)
        return [name.replace("{layer}", layer) for name in self.copy.source_parameters]

    @property
    def parameter(self) -> str:
        """Name in the engine, see `live_name` of weights/engine_parameters.py."""
        return self.copy.parameter.replace("{layer}", str(self.layer))


_Steps = dict[tuple[int, int], list[Flow]]
"""Place of a layer in its run, number of the run -> flows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """The engines, all alike."""

    engines: int
    tp: int
    """Tensor parallel degree of each."""
    expert_parallel: bool = False
    """Whole experts are dealt to an engine's ranks."""

    @property
    def num_ranks(self) -> int:
        """Of all engines."""
        return self.engines * self.tp


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncPlan:
    """Everything that a sync copies. Every element of an engine's parameters is written once, but for the padding.

    All ranks go through their transfers in the same order, so that the two ends of a link agree on what comes next: the
    first layer of every stage, then the second of every stage, ..., so that all stages give at the same time.
    """

    trainer: ParallelLayout
    engines: EngineLayout
    placement: Placement
    dtype: str
    """Torch's name without the prefix; the same on both sides. Of all parameters but those of `dtypes`."""
    item_bytes: int
    """Of `dtype`."""
    trainer_shapes: dict[str, Shape]
    """Shape of each trainer parameter of `copies`, the same on all ranks; to be checked against the living ones."""
    engine_shapes: dict[str, Shape]
    """Shape of each engine parameter, the same on all ranks."""
    copies: tuple[Copy, ...]
    flows: tuple[Flow, ...]
    """Those of tensors of the first stage below the layers, of each stage's layers, of the last stage's above them."""
    dtypes: dict[str, str] = field(default_factory=dict[str, str])
    """Parameters of either side with another number format, as in the shapes: FP8 matrices and their scales."""

    def into(self, engine: int, engine_rank: int) -> Iterator[Transfer]:
        """All transfers into one engine rank, in the order of the plan. To be listed once and kept."""
        place = (engine, engine_rank)
        steps: _Steps = {}
        for flow, run in zip(self.flows, _run_numbers(self.flows), strict=True):
            if (flow.engine, flow.engine_rank) == place:
                for step in range(len(flow.layers)):
                    steps.setdefault((step, run), []).append(flow)
        return self._in_order(steps)

    def out_of(self, trainer_rank: int) -> Iterator[Transfer]:
        """All transfers from one trainer rank, in the order of the plan. To be listed once and kept."""
        steps: _Steps = {}
        for flow, run in zip(self.flows, _run_numbers(self.flows), strict=True):
            if trainer_rank in flow.sources:
                for step in range(len(flow.layers)):
                    if flow.source(step) == trainer_rank:
                        steps.setdefault((step, run), []).append(flow)
        return self._in_order(steps)

    def dtype_of(self, copy: Copy) -> str:
        """The number format of a copy's parameters, on both sides."""
        return self.dtypes.get(copy.parameter, self.dtype)

    def num_bytes(self, copy: Copy) -> int:
        """Bytes of a copy in one layer."""
        return copy.num_elements * ITEM_BYTES[self.dtype_of(copy)]

    def _in_order(self, steps: _Steps) -> Iterator[Transfer]:
        for step, run in sorted(steps):
            for flow in steps[step, run]:
                yield Transfer(
                    flow.source(step), flow.engine, flow.engine_rank, flow.layers[step], self.copies[flow.copy]
                )


def _run_numbers(flows: Sequence[Flow]) -> Iterator[int]:
    """Counts runs of neighbours of the same layers."""
    number, layers = 0, flows[0].layers if flows else NO_LAYER
    for flow in flows:
        if flow.layers != layers:
            number, layers = number + 1, flow.layers
        yield number
