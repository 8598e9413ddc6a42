"""Cost of a weight sync's plan on one CPU thread: making it from config.json, walking one rank's share, dumping, reading.

    python benchmarks/plan.py                        Qwen3-30B-A3B and Qwen3-235B-A22B
    python benchmarks/plan.py --repeats 5

Walking: the transfers of one rank in their order, with the names of all their parameters and their bytes, as an executor
needs them; no data. JSON objects go to standard output, a table to standard error. What was measured: RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import Machine, machine, median_seconds, show_table, write_row

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan, Transfer
from clipo_megatron.sync.plan_json import from_json, to_json
from clipo_megatron.sync.plan_report import bytes_of_links
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture

CPU = torch.device("cpu")
MS = 1e3
_QWEN3_MOE: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
CONFIGS: dict[str, dict[str, object]] = {
    "30B-A3B": _QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "moe_intermediate_size": 768,
    },
    "235B-A22B": _QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
    },
}
CASES = (
    ("30B-A3B", ParallelLayout(world_size=32, tp=4, ep=8), EngineLayout(engines=4, tp=8)),
    ("30B-A3B", ParallelLayout(world_size=32, tp=4, ep=8), EngineLayout(engines=16, tp=2)),
    ("235B-A22B", ParallelLayout(world_size=128, tp=4, pp=2, ep=8), EngineLayout(engines=16, tp=8)),
    ("235B-A22B", ParallelLayout(world_size=128, tp=4, pp=2, ep=8), EngineLayout(engines=8, tp=16)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Medians of one model under one pair of layouts."""

    model: str
    trainer: str
    engines: str
    plan_s: float
    """Reading config.json included."""
    walk_into_ms: float
    """All transfers into the first engine rank."""
    walk_out_ms: float
    """All transfers out of the first trainer rank."""
    walk_listed_ms: float
    """The first of both again, from a list of its transfers."""
    dump_ms: float
    load_ms: float
    json_mb: float
    transfers_into: int
    transfers_out: int
    copies: int
    flows: int
    balance: float
    """Bytes sent by the busiest trainer rank over the mean."""
    machine: Machine


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="timed turns (default 11)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    reports = [_measure(*case, repeats=args.repeats) for case in CASES]
    for report in reports:
        write_row(asdict(report))
    show_table(
        "Sync plans, medians",
        ("model", "engines", "plan s", "walk in ms", "out ms", "listed ms", "dump ms", "load ms", "MB", "max/mean"),
        [
            (
                report.model,
                report.engines,
                report.plan_s,
                report.walk_into_ms,
                report.walk_out_ms,
                report.walk_listed_ms,
                report.dump_ms,
                report.load_ms,
                report.json_mb,
                report.balance,
            )
            for report in reports
        ],
    )
    return 0


def _measure(model: str, trainer: ParallelLayout, engines: EngineLayout, *, repeats: int) -> Report:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
        plan = _plan(folder, trainer, engines)
        text = to_json(plan)
        listed = list(plan.into(0, 0))
        seconds = median_seconds(
            {
                "plan": lambda: _plan(folder, trainer, engines),
                "into": lambda: _walk(plan, plan.into(0, 0)),
                "out": lambda: _walk(plan, plan.out_of(0)),
                "listed": lambda: _walk(plan, listed),
                "dump": lambda: to_json(plan),
                "load": lambda: from_json(text),
            },
            repeats=repeats,
            device=CPU,
        )
    sent: Counter[int] = Counter()
    for (source, _), num_bytes in bytes_of_links(plan).items():
        sent[source] += num_bytes
    return Report(
        model=model,
        trainer=f"{trainer.world_size} ranks, tp={trainer.tp} pp={trainer.pp} ep={trainer.ep}",
        engines=f"{engines.engines} x tp={engines.tp}",
        plan_s=seconds["plan"],
        walk_into_ms=MS * seconds["into"],
        walk_out_ms=MS * seconds["out"],
        walk_listed_ms=MS * seconds["listed"],
        dump_ms=MS * seconds["dump"],
        load_ms=MS * seconds["load"],
        json_mb=len(text) / 1e6,
        transfers_into=len(listed),
        transfers_out=sum(1 for _ in plan.out_of(0)),
        copies=len(plan.copies),
        flows=len(plan.flows),
        balance=max(sent.values()) * trainer.world_size / sum(sent.values()),
        machine=machine(CPU),
    )


def _plan(folder: Path, trainer: ParallelLayout, engines: EngineLayout) -> SyncPlan:
    apart = place_apart(trainer_ranks=trainer.world_size, engine_ranks=engines.num_ranks, gpus_per_node=8)
    return plan_sync(read_architecture(folder), trainer, engines, apart, dtype="bfloat16")


def _walk(plan: SyncPlan, transfers: Iterable[Transfer]) -> int:
    """What an executor asks of each transfer; returns the bytes."""
    num_bytes = 0
    for transfer in transfers:
        names = transfer.source_parameters
        assert names
        assert transfer.parameter
        num_bytes += plan.num_bytes(transfer.copy)
    return num_bytes


if __name__ == "__main__":
    sys.exit(main())
