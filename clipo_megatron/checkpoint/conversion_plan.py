"""What an import writes, from config.json alone: units of work, the files of each rank, their sizes, parameters held.

Pure arithmetic: no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clipo_megatron.checkpoint.dist_archive import archive_frame
from clipo_megatron.checkpoint.import_blocks import Block, blocks_of
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.global_tensors import boxes_of, dist_tensor_shapes
from clipo_megatron.weights.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    find_rule,
    layer_numbers,
    megatron_parameter_names,
    padded_vocab_size,
)
from clipo_megatron.weights.rules import Rule, local_shape

DEGREES = ("tp", "pp", "vpp", "ep", "etp")
"""Degrees that say which rank holds which weights; cp and dp do not matter to them."""
UNIT_BYTES = 2 << 30
BLOCK_ELEMENTS = 8 << 20
"""Of a tensor in memory at once, and of a chunk on disk: larger boxes are cut along their rows."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A part of the work that is done again as a whole when the import is killed in the middle of it."""

    number: int
    stage: int
    """Pipeline stage of all its parameters."""
    parameters: tuple[str, ...]
    """Megatron's names, with the numbers of layer and expert in the whole model."""
    num_bytes: int
    """Of tensors written, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """What one rank writes, and what it holds in memory."""

    rank: int
    stage: int
    num_files: int
    num_bytes: int
    """Of its files, exactly."""
    num_chunks: int
    """Archives in its files, one for each box."""
    parameters: int
    """Held by the rank, those that another rank writes included; the vocabulary's padding as well."""
    expert_parameters: int
    """Those of them that belong to experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportPlan:
    """A model, its layout and the units of its import."""

    arch: Architecture
    layout: ParallelLayout
    padded_vocab: int
    dtypes: Mapping[str, str]
    """Number format of each global tensor, by key."""
    units: tuple[Unit, ...]
    block_elements: int
    """Of a tensor in memory at once, unless a single row has more."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors written."""
        return sum(unit.num_bytes for unit in self.units)

    def blocks(self, unit: Unit) -> Iterator[Block]:
        """The blocks of one unit, in the order in which each rank's file holds them."""
        for name in unit.parameters:
            yield from blocks_of(
                name,
                self.arch,
                self.layout,
                stage=unit.stage,
                padded_vocab=self.padded_vocab,
                max_elements=self.block_elements,
            )

    def file_name(self, unit: Unit, rank: int) -> str:
        """Of a rank's part of a unit."""
        return f"__{rank}_{unit.number}.distcp"

    def shares(self) -> list[RankShare]:
        """Of every rank."""
        ranks = range(self.layout.world_size)
        files: list[set[int]] = [set() for _ in ranks]
        num_bytes, num_chunks = [0 for _ in ranks], [0 for _ in ranks]
        for unit in self.units:
            for block in self.blocks(unit):
                for write in block.writes:
                    files[write.rank].add(unit.number)
                    num_bytes[write.rank] += _archive_bytes(self.dtypes[write.key], write.shape)
                    num_chunks[write.rank] += 1
        held = [_held_parameters(self, stage) for stage in range(self.layout.pp)]
        return [
            RankShare(
                rank=rank,
                stage=(stage := self.layout.pp_rank(rank)),
                num_files=len(files[rank]),
                num_bytes=num_bytes[rank],
                num_chunks=num_chunks[rank],
                parameters=sum(held[stage]),
                expert_parameters=held[stage][1],
            )
            for rank in ranks
        ]


def smallest_layout(degrees: Mapping[str, int]) -> ParallelLayout:
    """The layout with the fewest ranks: replicas of weights are not needed to tell who writes what.

    Args:
        degrees: by name, of DEGREES; 1 where missing.
    """
    of = dict.fromkeys(DEGREES, 1) | dict(degrees)
    stage_size = math.lcm(of["tp"], of["ep"] * of["etp"])
    return ParallelLayout(world_size=stage_size * of["pp"], **of)


def chunk_problems(*, pp: int, vpp: int) -> list[str]:
    """The fault of model chunks without a pipeline; what depends on the model: `weights.folder_check.layout_problems`.

    Args:
        pp: pipeline stages.
        vpp: model chunks of one stage.
    """
    if vpp == 1 or pp > 1:
        return []
    return [f"layout.vpp = {vpp}: only a pipeline stage is cut into model chunks; set pp to 2 or more, or vpp=1"]


def plan_import(
    arch: Architecture,
    layout: ParallelLayout,
    *,
    dtypes: Mapping[str, str],
    unit_bytes: int = UNIT_BYTES,
    block_elements: int = BLOCK_ELEMENTS,
) -> ImportPlan:
    """Cut the import of a model into units.

    Args:
        arch: of the model.
        layout: as `smallest_layout` gives it, free of faults.
        dtypes: number format of each global tensor, by key; see `same_dtype`.
        unit_bytes: a unit writes no more, unless a single parameter is larger.
        block_elements: largest part of a tensor that is in memory at once.
    """
    padded_vocab = padded_vocab_size(arch.vocab_size, layout.tp)
    stages = _stages(arch, layout)
    units: list[Unit] = []
    for stage, names in enumerate(stages):
        taken: list[str] = []
        taken_bytes = 0
        for name in names:
            num_bytes = _global_bytes(name, arch, padded_vocab, dtypes)
            if taken and taken_bytes + num_bytes > unit_bytes:
                units.append(_unit(len(units), stage, taken, taken_bytes))
                taken, taken_bytes = [], 0
            taken.append(name)
            taken_bytes += num_bytes
        units.append(_unit(len(units), stage, taken, taken_bytes))
    return ImportPlan(
        arch=arch,
        layout=layout,
        padded_vocab=padded_vocab,
        dtypes=dtypes,
        units=tuple(units),
        block_elements=block_elements,
    )


def same_dtype(arch: Architecture, dtype: str) -> dict[str, str]:
    """Key -> dtype of a model whose tensors all have the same."""
    return dict.fromkeys(dist_tensor_shapes(arch, padded_vocab=arch.vocab_size), dtype)


def _unit(number: int, stage: int, names: list[str], num_bytes: int) -> Unit:
    return Unit(number=number, stage=stage, parameters=tuple(names), num_bytes=num_bytes)


def _stages(arch: Architecture, layout: ParallelLayout) -> list[list[str]]:
    """Names of the parameters of each stage, in the order of its chunks."""
    stage_of_layer = {
        layer: stage
        for stage in range(layout.pp)
        for chunk in range(layout.vpp)
        for layer in layer_numbers(arch.num_layers, pp=layout.pp, pp_rank=stage, vpp=layout.vpp, vpp_rank=chunk)
    }
    stages: list[list[str]] = [[] for _ in range(layout.pp)]
    for name in megatron_parameter_names(arch):
        rule, where = find_rule(name, arch)
        end = 0 if name == EMBEDDING else layout.pp - 1
        stages[stage_of_layer[where.layer] if rule.is_of_layer else end].append(name)
    return stages


def _global_bytes(name: str, arch: Architecture, padded_vocab: int, dtypes: Mapping[str, str]) -> int:
    """Of one parameter over all ranks."""
    boxes = boxes_of(name, arch, tp=1, tp_rank=0, padded_vocab=padded_vocab)
    return sum(math.prod(box.shape) for box in boxes) * ITEM_BYTES[dtypes[boxes[0].key]]


def _held_parameters(plan: ImportPlan, stage: int) -> tuple[int, int]:
    """(not of experts, of experts): parameters in the memory of each rank of a stage."""
    arch, layout = plan.arch, plan.layout
    common = of_experts = 0
    for name in _stages(arch, layout)[stage]:
        rule, _ = find_rule(name, arch)
        if rule.is_of_expert:
            of_experts += _local_size(plan, rule)
        else:
            common += _local_size(plan, rule)
    if arch.tied and layout.pp > 1 and stage == layout.pp - 1:
        # The last stage has a copy of the embedding as its output layer, which is in no file.
        common += _local_size(plan, find_rule(OUTPUT_LAYER, arch)[0])
    return common, of_experts // layout.ep


def _archive_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    return num_bytes + sum(len(part) for part in archive_frame(dtype, shape, num_bytes=num_bytes, checksum=0))


def _local_size(plan: ImportPlan, rule: Rule) -> int:
    degree = plan.layout.etp if rule.is_of_expert else plan.layout.tp
    return math.prod(local_shape(rule, plan.arch.sizes, degree=degree, padded_vocab=plan.padded_vocab))
