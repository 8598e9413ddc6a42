"""Makes the plan of a weight sync: pure arithmetic on shapes.

Layers are alike: what a layer's copies are is found once, which rank gives each of them is chosen for every stage, since the
nearest rank depends on where the stage runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import Placement
from clipo_megatron.sync.plan import ITEM_BYTES, NO_LAYER, Copy, EngineLayout, Flow, Shape, SyncPlan
from clipo_megatron.sync.strided import cut, join, overlap
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.engine_parameters import engine_parameters
from clipo_megatron.weights.fp8_parameters import (
    FP8_DTYPE,
    SCALE_DTYPE,
    Fp8,
    engine_scales,
    is_quantized,
    trainer_scales,
)
from clipo_megatron.weights.holdings import HeldParameter, Holding, is_bottom, is_top, trainer_parameters
from clipo_megatron.weights.names import layer_numbers, padded_vocab_size

DTYPES = ("float32", "bfloat16", "float16")
_CUT_ELEMENTS = 2 << 20

_Given = dict[str, list[tuple[Holding, tuple[int, ...]]]]
"""Refined tensor -> its boxes, each with the places in a stage of the ranks that hold it."""


class _Route(NamedTuple):
    """A copy into one rank of every engine, and who can give it."""

    copy: Copy
    run: int
    """Of a tensor below the layers, of a layer's, of one above them: 0, 1, 2."""
    givers: tuple[int, ...]
    """Places in the stage of the trainer ranks that hold the same elements."""
    engine_rank: int


class _Demand(NamedTuple):
    """What one rank of one engine needs of a stage."""

    copy: int
    """Number in the plan."""
    num_elements: int
    run: int
    engine: int
    engine_rank: int
    nearest: tuple[int, ...]
    """Trainer ranks that can give it, all equally near."""


def plan_sync(
    arch: Architecture,
    trainer: ParallelLayout,
    engines: EngineLayout,
    placement: Placement,
    *,
    dtype: str,
    fp8: Fp8 = "none",
    cut_elements: int = _CUT_ELEMENTS,
) -> SyncPlan:
    """Plan the copies from a trainer's parameters into those of all engines.

    Where several ranks hold the same elements, the nearest to the engine rank gives them; among equally near ones the layers
    are dealt out evenly, and a large tensor of no layer is cut in parts.

    Args:
        arch: of the model; no weight is needed.
        trainer: layout of the trainer's ranks.
        engines: layout of the engines.
        placement: GPUs of both.
        dtype: of the parameters on both sides: "float32", "bfloat16" or "float16".
        fp8: of FP8 engines, the scales: the trainer gives FP8 copies of its matrices and their scales, see sync/fp8.py.
        cut_elements: size below which a tensor of no layer is not cut in parts, and least size of a part.

    Raises:
        ConfigError: the model can't be split so, blocks of FP8 engines are not blocks of Hugging Face tensors, or the
            placement is one of other layouts.
    """
    _check(trainer, engines, placement, dtype)
    given, trainer_shapes, dtypes = _given(arch, trainer, fp8)
    routes: list[_Route] = []
    engine_shapes: dict[str, Shape] = {}
    for rank in range(engines.tp):
        held = engine_parameters(arch, tp=engines.tp, tp_rank=rank, expert_parallel=engines.expert_parallel)
        if fp8 != "none":
            scales = engine_scales(held, arch, fp8)
            dtypes |= _fp8_dtypes(held, scales)
            held += scales
        routes += [route for parameter in held for route in _routes(parameter, arch, given, rank)]
        engine_shapes |= {parameter.names[0]: parameter.shape for parameter in held}
    copies: dict[Copy, int] = {}
    flows: list[Flow] = []
    for stage in range(trainer.pp):
        demands = _demands(routes, copies, trainer, placement, engines, stage=stage, cut_elements=cut_elements)
        flows += _flows(demands, _layers(arch, trainer, stage))
    return SyncPlan(
        trainer=trainer,
        engines=engines,
        placement=placement,
        dtype=dtype,
        item_bytes=ITEM_BYTES[dtype],
        trainer_shapes=trainer_shapes,
        engine_shapes=engine_shapes,
        copies=tuple(copies),
        flows=tuple(flows),
        dtypes=dtypes,
    )


def _check(trainer: ParallelLayout, engines: EngineLayout, placement: Placement, dtype: str) -> None:
    problems = [
        f"placement of the {whose}: {len(gpus)} GPUs for {ranks} ranks; give one GPU a rank"
        for whose, gpus, ranks in (
            ("trainer", placement.trainer, trainer.world_size),
            ("engines", placement.engines, engines.num_ranks),
        )
        if len(gpus) != ranks
    ]
    if dtype not in DTYPES:
        problems.append(f"dtype = {dtype}: must be one of {', '.join(DTYPES)}")
    if problems:
        raise ConfigError(problems)


def _given(arch: Architecture, trainer: ParallelLayout, fp8: Fp8) -> tuple[_Given, dict[str, Shape], dict[str, str]]:
    """What the places of a stage hold; the shapes of all trainer parameters; the number formats of some."""
    dtypes: dict[str, str] = {}
    padded_vocab = padded_vocab_size(arch.vocab_size, trainer.tp)
    places: dict[tuple[int, int, int], list[HeldParameter]] = {}
    givers: dict[Holding, list[int]] = {}
    for place in range(trainer.stage_size):
        tp_rank, ep_rank, etp_rank = key = trainer.tp_rank(place), trainer.ep_rank(place), trainer.etp_rank(place)
        if key not in places:
            places[key] = trainer_parameters(
                arch,
                tp=trainer.tp,
                tp_rank=tp_rank,
                padded_vocab=padded_vocab,
                ep=trainer.ep,
                ep_rank=ep_rank,
                etp=trainer.etp,
                etp_rank=etp_rank,
            )
            if fp8 != "none":
                scales = trainer_scales(places[key], arch, fp8)
                dtypes |= _fp8_dtypes(places[key], scales)
                places[key] += scales
        for parameter in places[key]:
            for holding in parameter.holdings:
                givers.setdefault(holding, []).append(place)
    given: _Given = {}
    for holding, ranks in givers.items():
        given.setdefault(holding.tensor, []).append((holding, tuple(ranks)))
    held = (parameter for parameters in places.values() for parameter in parameters)
    return given, {name: parameter.shape for parameter in held for name in parameter.names}, dtypes


def _fp8_dtypes(held: Sequence[HeldParameter], scales: Sequence[HeldParameter]) -> dict[str, str]:
    quantized = (parameter for parameter in held if is_quantized(parameter.rule))
    found = {name: FP8_DTYPE for parameter in quantized for name in parameter.names}
    return found | {name: SCALE_DTYPE for parameter in scales for name in parameter.names}


def _routes(parameter: HeldParameter, arch: Architecture, given: _Given, engine_rank: int) -> Iterator[_Route]:
    run = 0 if is_bottom(parameter.rule, arch) else 2 if is_top(parameter.rule, arch) else 1
    by_givers: dict[tuple[int, ...], list[Copy]] = {}
    for target in parameter.holdings:
        for source, givers in given[target.tensor]:
            copy = overlap(source, target)
            if copy is not None:
                by_givers.setdefault(givers, []).append(copy)
    for givers, copies in by_givers.items():
        for copy in join(copies):
            yield _Route(copy, run, givers, engine_rank)


def _demands(
    routes: Sequence[_Route],
    copies: dict[Copy, int],
    trainer: ParallelLayout,
    placement: Placement,
    engines: EngineLayout,
    *,
    stage: int,
    cut_elements: int,
) -> list[_Demand]:
    """What all engines need of a stage; `copies` gets what is not in it."""
    runs = [run for run in (0, 1, 2) if run == 1 or stage == (0 if run == 0 else trainer.pp - 1)]
    nearest: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
    demands: list[_Demand] = []
    for engine in range(engines.engines):
        for route in routes:
            if route.run not in runs:
                continue
            to = engine * engines.tp + route.engine_rank
            key = (route.givers, to)
            if key not in nearest:
                nearest[key] = placement.nearest([stage * trainer.stage_size + place for place in route.givers], to)
            parts = [route.copy]
            if route.run != 1:
                parts = cut(route.copy, max(1, min(len(nearest[key]), route.copy.num_elements // cut_elements)))
            for part in parts:
                number = copies.setdefault(part, len(copies))
                demands.append(_Demand(number, part.num_elements, route.run, engine, route.engine_rank, nearest[key]))
    return demands


def _flows(demands: Sequence[_Demand], layers: tuple[int, ...]) -> list[Flow]:
    """Choose the givers: large copies first, so that small ones even out what is left."""
    elements: Counter[int] = Counter()
    of_first_layer: Counter[int] = Counter()
    flows: list[tuple[int, Flow]] = []
    for demand in sorted(demands, key=lambda demand: -demand.num_elements):
        of_demand = layers if demand.run == 1 else NO_LAYER
        sources = _sources(demand, len(of_demand), elements, of_first_layer)
        flow = Flow(demand.copy, demand.engine, demand.engine_rank, of_demand, sources)
        flows.append((demand.run, flow))
    return [flow for _, flow in sorted(flows)]


def _sources(demand: _Demand, num_layers: int, elements: Counter[int], of_first_layer: Counter[int]) -> tuple[int, ...]:
    """The giver of each layer. All take turns as long as there is a layer for each; the least loaded take the rest."""
    givers, size = demand.nearest, demand.num_elements
    turns, rest = divmod(num_layers, len(givers))
    rotation: tuple[int, ...] = ()
    if turns:
        # Engines that need the same start at different givers: in each layer all of these are busy.
        first = givers.index(min(givers, key=of_first_layer.__getitem__))
        rotation = givers[first:] + givers[:first]
        of_first_layer[rotation[0]] += size
        for giver in givers:
            elements[giver] += turns * size
        if not rest:
            return rotation
    last: list[int] = []
    for _ in range(rest):
        giver = min(givers, key=elements.__getitem__)
        elements[giver] += size
        last.append(giver)
    return rotation * turns + tuple(last)


def _layers(arch: Architecture, trainer: ParallelLayout, stage: int) -> tuple[int, ...]:
    chunks = (
        layer_numbers(arch.num_layers, pp=trainer.pp, pp_rank=stage, vpp=trainer.vpp, vpp_rank=chunk)
        for chunk in range(trainer.vpp)
    )
    return tuple(layer for chunk in chunks for layer in chunk)
