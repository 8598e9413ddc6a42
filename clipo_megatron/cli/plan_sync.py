"""The table of `clipo plan sync`: what a weight sync copies over which link, and how long that takes at least."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clipo_megatron.checks.trainer_layout import parallel_layout
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.parallel.placement import Node, place_colocated, place_workers
from clipo_megatron.recipe import Recipe
from clipo_megatron.sync.placement import Link, Placement, number_devices
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.plan_report import Bandwidths, LinkTraffic, bytes_of_links, floor_seconds, traffic
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.fp8_parameters import FP8_OF_QUANTIZATION

_GB = 1e9
_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the recipe."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every copy of the plan, and bytes by link and rank"
    )
    for name, default, text in (
        ("nvlink", 450.0, "between two GPUs of a node"),
        ("network", 50.0, "of a GPU's share of the network"),
        ("memory", 3350.0, "of a GPU's memory"),
    ):
        parser.add_argument(
            f"--{name}-gbs",
            type=float,
            default=default,
            metavar="N",
            help=f"GB/s {text}, each way (default {default:g})",
        )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--colocated",
        action="store_true",
        help="as if the engines ran on the trainer's GPUs, from the first on (default: as rollout.colocate says)",
    )
    parser.add_argument(
        "--expert-parallel", action="store_true", help="as if an engine's ranks shared out whole experts"
    )
    parser.add_argument(
        "--fp8",
        choices=("none", "block", "tensor"),
        help="as if the engines held the matrices of the layers in FP8, with a scale a 128 x 128 block or a matrix (default: as "
        "rollout.quantization says)",
    )


def option_problems(args: argparse.Namespace) -> list[str]:
    """Faults of the options."""
    problems = [
        f"--{name}-gbs = {value}: must be > 0"
        for name in ("nvlink", "network", "memory")
        if not 0 < (value := getattr(args, f"{name}_gbs")) < math.inf
    ]
    if args.gpus_per_node < 1:
        problems.append(f"--gpus-per-node = {args.gpus_per_node}: must be >= 1")
    return problems


def show_plan(recipe: Recipe, arch: Architecture, args: argparse.Namespace) -> None:
    """Plan the recipe's sync; print the table, write the file that was asked for.

    Raises:
        ConfigError: the engines can't be split so, or the file can't be written.
    """
    trainer = parallel_layout(recipe)
    engines = EngineLayout(engines=recipe.rollout.engines, tp=recipe.rollout.tp, expert_parallel=args.expert_parallel)
    is_shared = args.colocated or recipe.rollout.colocate
    placement = _placement(trainer, engines, gpus_per_node=args.gpus_per_node, is_shared=is_shared)
    fp8 = args.fp8 or FP8_OF_QUANTIZATION[recipe.rollout.quantization]
    plan = plan_sync(arch, trainer, engines, placement, dtype=recipe.model.dtype, fp8=fp8)
    bandwidths = Bandwidths(same_node=args.nvlink_gbs, network=args.network_gbs, memory=args.memory_gbs)
    _print(plan, bandwidths, degrees=recipe.layout.degrees)
    if args.json is not None:
        try:
            args.json.write_text(_as_json(plan, bandwidths) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--json = {args.json}: can't be written ({error.strerror}); give another file"
            ) from error
        print(f"plan written to {args.json}")


def _placement(trainer: ParallelLayout, engines: EngineLayout, *, gpus_per_node: int, is_shared: bool) -> Placement:
    """Of a run on as few nodes as hold all workers."""
    count = trainer.world_size + (0 if is_shared else engines.num_ranks)
    nodes = [
        Node(name=str(number), address=f"node {number}", slots=gpus_per_node)
        for number in range(-(-count // gpus_per_node))
    ]
    place = place_colocated if is_shared else place_workers
    placed = place(
        nodes,
        ranks=trainer.world_size,
        ranks_together=trainer.tp * trainer.cp,
        engines=engines.engines,
        engine_ranks=engines.tp,
    )
    return number_devices(placed, engine_ranks=engines.tp)


def _as_json(plan: SyncPlan, bandwidths: Bandwidths) -> str:
    """The plan, which `from_json` reads, and beside it what the table sums up."""
    body = json.loads(to_json(plan))
    body["report"] = {
        "gb_per_s": asdict(bandwidths),
        "links": [
            {"kind": link.value, **asdict(found), "floor_seconds": floor_seconds(found, link, bandwidths)}
            for link, found in traffic(plan).items()
        ],
        "bytes_fields": ("trainer_rank", "engine", "engine_rank", "bytes"),
        "bytes": [
            (source, *divmod(target, plan.engines.tp), num_bytes)
            for (source, target), num_bytes in sorted(bytes_of_links(plan).items())
        ],
    }
    return json.dumps(body, separators=(",", ":"))


def _print(plan: SyncPlan, bandwidths: Bandwidths, *, degrees: str) -> None:
    of_link = traffic(plan)
    # A narrow terminal, or a pipe, must not cut the names.
    console = Console(width=max(Console().width, _WIDTH), soft_wrap=True, highlight=False)
    trainer, engines = plan.trainer, plan.engines
    table = Table(
        title=f"PLAN, not measured: {plan.dtype} weights{', matrices in FP8,' if plan.dtypes else ''} of {trainer.world_size} trainer ranks "
        f"({degrees or 'nothing split'}) into {engines.engines} engines of tp={engines.tp}"
        f"{', expert parallel' if engines.expert_parallel else ''}; {plan.placement.gpus_per_node} GPUs of a node are used",
        title_justify="left",
    )
    for column in ("link", "entries", "copies", "GB", "sent max", "mean", "received max", "mean", "floor ms"):
        table.add_column(column, justify="left" if column == "link" else "right")
    floors = {link: floor_seconds(found, link, bandwidths) for link, found in of_link.items()}
    for link, found in of_link.items():
        table.add_row(
            link.value,
            f"{found.transfers:,}",
            f"{found.copies:,}",
            f"{found.num_bytes / _GB:,.2f}",
            *_max_and_mean(found.sent.values(), trainer.world_size),
            *_max_and_mean(found.received.values(), engines.num_ranks),
            f"{1e3 * floors[link]:,.1f}",
        )
    console.print(table)
    busiest = max(floors, key=floors.__getitem__)
    local, moved = _local_and_moved(of_link)
    console.print(
        f"floor {1e3 * floors[busiest]:,.1f} ms ({busiest.value}); {local / _GB:,.2f} GB stay on their GPU, "
        f"{moved / _GB:,.2f} GB move; GB of a rank: max and mean over all {trainer.world_size} trainer and "
        f"{engines.num_ranks} engine ranks"
    )


def _max_and_mean(of_ranks: Collection[int], num_ranks: int) -> tuple[str, str]:
    return f"{max(of_ranks, default=0) / _GB:,.2f}", f"{sum(of_ranks) / num_ranks / _GB:,.2f}"


def _local_and_moved(of_link: dict[Link, LinkTraffic]) -> tuple[int, int]:
    local = of_link[Link.SAME_GPU].num_bytes
    return local, sum(found.num_bytes for found in of_link.values()) - local
