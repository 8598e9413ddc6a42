"""`clipo ckpt import SRC DST --layout tp=2,pp=2`: a Hugging Face folder as a distributed checkpoint for the trainer."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.cli.check import parse_layout
from clipo_megatron.cli.transfer_bar import transfer_bar
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe.load import read_recipe
from clipo_megatron.recipe.sections import LayoutSection
from clipo_megatron.weights.architecture import DTYPES, read_architecture
from clipo_megatron.weights.layout_check import layout_problems

if TYPE_CHECKING:
    from clipo_megatron.checkpoint.conversion_plan import ImportPlan, RankShare

_WIDTH = 120
_WEIGHT_BYTES, _GRADIENT_BYTES, _OPTIMIZER_BYTES = 2, 4, 12
"""Of a parameter: bfloat16 itself, its float32 gradient, its float32 master and two moments."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on the GPU of one rank."""

    weights: int
    training: int
    """Weights, gradients and the rank's share of the optimizer."""


def add_import_parser(actions: argparse._SubParsersAction) -> None:
    """Declare the action."""
    parser = actions.add_parser(
        "import",
        help="write a Hugging Face folder as a distributed checkpoint that the trainer loads under any layout",
        description="A command that was killed goes on where it was when it is repeated. Exit code 0: done; 1: the disk is "
        "full, a weight is not finite, or SRC changed meanwhile; 2: bad input, nothing was written.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="Hugging Face model folder; a dry run needs its config.json"
    )
    parser.add_argument("target", type=Path, nargs="?", metavar="DST", help="folder to write; must not exist")
    parser.add_argument(
        "--layout",
        metavar="K=N,...",
        help="that the chunks are cut by: tp, pp, vpp, ep, etp, 1 where missing, e.g. tp=2,pp=2; not with --recipe",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="RECIPE", help="take the layout of this recipe; not with --layout"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format to write (default: each tensor's own)")
    parser.add_argument(
        "--unit-mib",
        type=int,
        metavar="N",
        default=2048,
        help="MiB of weights in a part of the work; a command that is repeated keeps the finished parts (default 2048)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print files, sizes and memory of each rank; write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """Import, with progress on stderr, or tell what an import would write.

    Raises:
        ConfigError: all faults of the options, and of the model or its config.json.
        CheckpointError: the disk is full, or the source changed meanwhile.
    """
    from clipo_megatron.checkpoint.conversion_plan import DEGREES

    layout, problems = _layout_section(args, DEGREES)
    if args.unit_mib < 1:
        problems.append(f"--unit-mib = {args.unit_mib}: must be >= 1")
    if args.target is None and not args.dry_run:
        problems.append("DST is missing; name the folder to write, or add --dry-run")
    if args.dry_run:
        return _dry_run(args, layout, problems)
    if problems or layout is None:
        raise ConfigError(problems)
    return _import(args, {name: getattr(layout, name) for name in DEGREES})


def _layout_section(args: argparse.Namespace, degrees: tuple[str, ...]) -> tuple[LayoutSection | None, list[str]]:
    """The layout that was asked for; with `--layout`, of as few ranks as it can have."""
    from clipo_megatron.checkpoint.conversion_plan import smallest_layout

    if args.layout is not None and args.recipe is not None:
        both = f"--layout {args.layout} and --recipe {args.recipe}"
        return None, [f"{both}: both tell the layout; leave one of them out"]
    if args.layout is None and args.recipe is None:
        return None, ["no layout is told: add --layout, e.g. --layout tp=2,pp=2, or --recipe RECIPE.yaml"]
    if args.recipe is not None:
        recipe, problems = read_recipe(args.recipe)
        return None if recipe is None else recipe.layout, problems
    found, problems = parse_layout(args.layout, degrees)
    if problems:
        return None, problems
    return LayoutSection.model_validate(found | {"world_size": smallest_layout(found).world_size}), []


def _import(args: argparse.Namespace, degrees: dict[str, int]) -> int:
    from clipo_megatron.checkpoint.conversion_plan import smallest_layout
    from clipo_megatron.checkpoint.model_import import import_model

    logging.basicConfig(level=logging.INFO, format="clipo: %(message)s")
    with transfer_bar("import") as on_progress:
        report = import_model(
            args.source,
            args.target,
            layout=smallest_layout(degrees),
            dtype=args.dtype,
            unit_bytes=args.unit_mib << 20,
            on_progress=on_progress,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report) | {"folder": str(report.folder)}, indent=1))
        return 0
    kept = f"; {report.num_kept} of {report.num_units} parts were kept from a run before" if report.num_kept else ""
    print(f"{report.folder}: {size_text(report.num_bytes)} in {report.seconds:.1f} s{kept}")
    return 0


def _dry_run(args: argparse.Namespace, layout: LayoutSection | None, problems: list[str]) -> int:
    from clipo_megatron.checkpoint.conversion_plan import (
        DEGREES,
        chunk_problems,
        plan_import,
        same_dtype,
        smallest_layout,
    )
    from clipo_megatron.checkpoint.import_state import folder_problems

    if args.target is not None:
        problems += folder_problems(args.target, source=args.source)
    arch = None
    try:
        arch = read_architecture(args.source)
    except ConfigError as error:
        problems += error.problems
    degrees = {} if layout is None else {name: getattr(layout, name) for name in DEGREES}
    if arch is not None and layout is not None:
        problems += layout_problems(arch, **degrees, rollout_tp=1)
        problems += chunk_problems(pp=layout.pp, vpp=layout.vpp)
    if problems or arch is None or layout is None:
        raise ConfigError(problems)
    dtype = arch.dtype if args.dtype is None else args.dtype
    plan = plan_import(arch, smallest_layout(degrees), dtypes=same_dtype(arch, dtype), unit_bytes=args.unit_mib << 20)
    shares = plan.shares()
    if args.json:
        print(json.dumps(_as_json(plan, shares, layout, dtype), indent=1))
    else:
        _print_table(plan, shares, layout, dtype)
    return 0


def rank_memory(share: RankShare, layout: LayoutSection) -> RankMemory:
    """GPU memory of a rank's weights, and of what training keeps of each of them; no activations.

    Args:
        share: of the rank.
        layout: its world size tells how many ranks share out the optimizer.
    """
    copies = copies_of_experts = 1
    if layout.distributed_optimizer:
        copies = layout.world_size // (layout.tp * layout.pp)
        copies_of_experts = layout.world_size // layout.pp // (layout.ep * layout.etp)
    updated = -(-(share.parameters - share.expert_parameters) // copies)
    updated += -(-share.expert_parameters // copies_of_experts)
    weights = _WEIGHT_BYTES * share.parameters
    training = weights + _GRADIENT_BYTES * share.parameters + _OPTIMIZER_BYTES * updated
    return RankMemory(weights=weights, training=training)


def _as_json(plan: ImportPlan, shares: list[RankShare], layout: LayoutSection, dtype: str) -> dict[str, object]:
    return {
        "unit": "bytes",
        "layout": dataclasses.asdict(plan.layout),
        "trainer_ranks": layout.world_size,
        "dtype": dtype,
        "padded_vocab": plan.padded_vocab,
        "num_units": len(plan.units),
        "num_files": sum(share.num_files for share in shares),
        "num_bytes": sum(share.num_bytes for share in shares),
        "ranks": [
            dataclasses.asdict(share) | {"memory": dataclasses.asdict(rank_memory(share, layout))} for share in shares
        ],
    }


def _print_table(plan: ImportPlan, shares: list[RankShare], layout: LayoutSection, dtype: str) -> None:
    # A narrow terminal, or a pipe, must not cut the names.
    console = Console(width=max(Console().width, _WIDTH), soft_wrap=True, highlight=False)
    degrees = ", ".join(
        f"{name} {value}" for name in ("tp", "pp", "vpp", "ep", "etp") if (value := getattr(layout, name)) > 1
    )
    table = Table(title=f"Import, {degrees or 'nothing split'}: nothing was written", title_justify="left")
    for name in ("ranks", "stage", "files", "bytes", "parameters held", "weights", "training"):
        table.add_column(name, justify="left" if name == "ranks" else "right")
    for ranks, share in _alike(shares):
        memory = rank_memory(share, layout)
        table.add_row(
            ranks,
            str(share.stage),
            str(share.num_files),
            size_text(share.num_bytes),
            f"{share.parameters:,}",
            size_text(memory.weights, is_binary=True),
            size_text(memory.training, is_binary=True),
        )
    console.print(table)
    padding = plan.padded_vocab - plan.arch.vocab_size
    console.print(
        f"total: {sum(share.num_files for share in shares)} files, {size_text(sum(share.num_bytes for share in shares))} as "
        f"{dtype}, in {len(plan.units)} units; vocabulary padded by {padding} rows to {plan.padded_vocab}"
    )
    console.print(
        "  files and bytes: of one rank, those that it writes; copies of the same weights are written once (GB = 1e9 bytes)"
    )
    console.print(
        f"  memory: of one rank's GPU; weights {_WEIGHT_BYTES} bytes a parameter (bfloat16); training: + {_GRADIENT_BYTES} "
        f"(float32 gradients) + {_OPTIMIZER_BYTES} (float32 masters and two moments) / ranks with the same parameters, of "
        f"{layout.world_size} ranks"
    )
    console.print("  not in it: activations, contrastive head, workspaces: see `clipo plan memory RECIPE`")


def _alike(shares: list[RankShare]) -> list[tuple[str, RankShare]]:
    """Neighbouring ranks with the same numbers: ("4-7", one of them)."""
    groups = [
        list(group) for _, group in itertools.groupby(shares, key=lambda share: dataclasses.replace(share, rank=0))
    ]
    return [
        (str(group[0].rank) if len(group) == 1 else f"{group[0].rank}-{group[-1].rank}", group[0]) for group in groups
    ]
