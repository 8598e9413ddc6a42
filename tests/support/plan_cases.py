"""Random models, layouts and placements to plan weight syncs for, and what the trainer's ranks then hold."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from hypothesis import assume
from hypothesis import strategies as st
from support.architectures import small_architecture
from support.plans import Parameters, trainer_shards

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import Placement
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.holdings import table_name


@dataclass(frozen=True)
class Case:
    arch: Architecture
    trainer: ParallelLayout
    engines: EngineLayout
    placement: Placement
    cut_elements: int

    @property
    def plan(self) -> SyncPlan:
        return plan_sync(
            self.arch,
            self.trainer,
            self.engines,
            self.placement,
            dtype="float32",
            cut_elements=self.cut_elements,
        )

    def engine_ranks(self) -> list[tuple[int, int]]:
        return [(engine, rank) for engine in range(self.engines.engines) for rank in range(self.engines.tp)]


@st.composite
def cases(draw: st.DrawFn, *, max_ranks: int = 16, most_layers: int = 2) -> Case:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    has_experts = FAMILIES[family].has_experts
    tp, engine_tp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    ep = draw(st.sampled_from([1, 2, 4])) if has_experts else 1
    etp = draw(st.sampled_from([1, 2])) if has_experts else 1
    expert_parallel = has_experts and draw(st.booleans())
    cp, pp, vpp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    # The least data parallel degree at which a stage's ranks can be dealt out to ep and etp, and multiples of it.
    dp = ep * etp // math.gcd(ep * etp, tp * cp) * draw(st.integers(1, 3))
    assume(tp * cp * dp * pp <= max_ranks)
    kv_heads = tp * draw(st.integers(1, 2))
    assume(kv_heads % engine_tp == 0 or engine_tp % kv_heads == 0)
    vocab_size = draw(st.integers(1, 600))
    assume(-(-vocab_size // 64) * 64 % engine_tp == 0)
    arch = small_architecture(
        family,
        vocab_size=vocab_size,
        tied=draw(st.booleans()),
        num_kv_heads=kv_heads,
        heads_per_group=draw(st.integers(1, 2)) * engine_tp // math.gcd(engine_tp, kv_heads),
        head_dim=draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 6)),
        ffn_size=draw(st.integers(1, 3)) * math.lcm(tp, engine_tp),
        expert_ffn_size=draw(st.integers(1, 2)) * math.lcm(etp, engine_tp),
        num_experts=draw(st.integers(1, 2)) * math.lcm(ep, engine_tp if expert_parallel else 1),
        num_layers=pp * vpp * draw(st.integers(1, most_layers)),
    )
    trainer = ParallelLayout(world_size=tp * cp * dp * pp, tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp)
    engines = EngineLayout(engines=draw(st.integers(1, 3)), tp=engine_tp, expert_parallel=expert_parallel)
    gpus = list(range(max(trainer.world_size, engines.num_ranks) + draw(st.integers(0, 8))))
    order = random.Random(draw(st.integers(0, 1000)))
    placement = Placement(
        trainer=tuple(order.sample(gpus, trainer.world_size)),
        engines=tuple(order.sample(gpus, engines.num_ranks)),
        gpus_per_node=draw(st.sampled_from([1, 2, 4, 8])),
    )
    return Case(arch, trainer, engines, placement, draw(st.sampled_from([8, 100, 1 << 21])))


def shards_of(case: Case, folder: Path) -> dict[int, Parameters]:
    """Of all trainer ranks; those that hold the same share memory. What a plan must not read is left out."""
    layout = case.trainer
    shards: dict[int, Parameters] = {}
    same: dict[tuple[int, ...], Parameters] = {}
    with HFReader(folder) as reader:
        for rank in range(layout.world_size):
            key = layout.pp_rank(rank), layout.tp_rank(rank), layout.ep_rank(rank), layout.etp_rank(rank)
            if key not in same:
                of_rank = trainer_shards(reader, case.arch, layout, rank)
                same[key] = {
                    known: tensor for name, tensor in of_rank.items() if (known := table_name(name, case.arch))
                }
            shards[rank] = same[key]
    return shards
