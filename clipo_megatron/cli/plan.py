"""`clipo plan ACTION RECIPE.yaml [key=value ...]`: what a run will need, from its recipe and the model's config.json.

memory: GPU memory of the trainer's ranks, estimated before a GPU is rented. sync: what a weight sync copies, and its floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clipo_megatron.checks.memory import ASSUMPTIONS, GIB, MemoryEstimate, RankMemory, estimate_memory
from clipo_megatron.checks.preflight import layout_faults
from clipo_megatron.cli import plan_sync
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.load import read_recipe
from clipo_megatron.weights.architecture import CONFIG_FILE, Architecture, read_architecture

_WARN_SHARE = 0.9
_WIDTH = 120
_TERMS = tuple(field.name for field in dataclasses.fields(RankMemory))


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("plan", help="estimate what a recipe needs", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    memory = actions.add_parser("memory", help="GPU memory of a trainer rank, by pipeline stage and term")
    _add_recipe_arguments(memory)
    memory.add_argument("--gpu-gib", type=float, default=80.0, metavar="N", help="memory of one GPU (default 80)")
    memory.add_argument("--json", action="store_true", help="bytes as JSON instead of the table")
    memory.set_defaults(run=run)
    sync = actions.add_parser("sync", help="copies of a weight sync: bytes by link and rank, least time")
    _add_recipe_arguments(sync)
    plan_sync.add_arguments(sync)
    sync.set_defaults(run=run_sync)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; a warning when the worst rank is above 90 % of the GPU.

    Raises:
        ConfigError: all faults of the recipe and of its layout against the model, or no config.json.
    """
    problems = [] if 0 < args.gpu_gib < math.inf else [f"--gpu-gib = {args.gpu_gib}: must be > 0"]
    recipe, arch = _read(args, problems)
    estimate = estimate_memory(recipe, arch)
    if args.json:
        print(json.dumps(_as_json(estimate, recipe, args.gpu_gib), indent=1))
    else:
        _print(estimate, recipe, args.gpu_gib)
    return 0


def run_sync(args: argparse.Namespace) -> int:
    """Print what a weight sync copies; write the plan if asked to.

    Raises:
        ConfigError: as for `run`, or the engines can't be split so.
    """
    recipe, arch = _read(args, plan_sync.option_problems(args))
    plan_sync.show_plan(recipe, arch, args)
    return 0


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file, e.g. examples/math_qwen3_32b/recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. layout.tp=4 layout.recompute=full")
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="config.json, where model.path is not on this machine"
    )


def _read(args: argparse.Namespace, option_problems: list[str]) -> tuple[Recipe, Architecture]:
    """The recipe and its model; all faults together."""
    recipe, problems = read_recipe(args.recipe, args.overrides)
    problems += option_problems
    arch = None
    if recipe is not None:
        try:
            arch = _read_architecture(recipe, args.config)
            problems += layout_faults(recipe, arch)
        except ConfigError as error:
            problems += error.problems
    if problems or recipe is None or arch is None:
        raise ConfigError(problems)
    return recipe, arch


def _read_architecture(recipe: Recipe, config: Path | None) -> Architecture:
    if config is None:
        folder = Path(recipe.model.path)
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(
                f"model.path = {folder}: no {CONFIG_FILE} there; put the model's {CONFIG_FILE} into that folder (it is all "
                "that is read), or give its place with --config PATH"
            )
        return read_architecture(folder)
    folder = config if config.is_dir() else config.parent
    if not (folder / CONFIG_FILE).is_file() or (config.is_file() and config.name != CONFIG_FILE):
        raise ConfigError(f"--config = {config}: no {CONFIG_FILE}; give that file of the model, or its folder")
    return read_architecture(folder)


def _is_over(estimate: MemoryEstimate, gpu_gib: float) -> bool:
    return estimate.stages[estimate.worst_stage].total > _WARN_SHARE * gpu_gib * GIB


def _colocated(estimate: MemoryEstimate, recipe: Recipe, gpu_gib: float) -> dict[str, object] | None:
    """What trainer and engine hold of one GPU while engines generate; None where they have GPUs of their own."""
    if not recipe.rollout.colocate:
        return None
    trainer = max(stage.while_engines_generate for stage in estimate.stages)
    engine = int(recipe.rollout.gpu_memory_utilization * gpu_gib * GIB)
    return {"trainer": trainer, "engine": engine, "over": trainer + engine > gpu_gib * GIB}


def _as_json(estimate: MemoryEstimate, recipe: Recipe, gpu_gib: float) -> dict[str, object]:
    return {
        "colocated": _colocated(estimate, recipe, gpu_gib),
        "kind": "estimate",
        "unit": "bytes",
        "gpu_gib": gpu_gib,
        "worst_stage": estimate.worst_stage,
        "over": _is_over(estimate, gpu_gib),
        "stages": [dataclasses.asdict(stage) | {"total": stage.total} for stage in estimate.stages],
        "host": estimate.host_bytes,
        "assumptions": list(ASSUMPTIONS),
    }


def _print(estimate: MemoryEstimate, recipe: Recipe, gpu_gib: float) -> None:
    layout = recipe.layout
    # A narrow terminal, or a pipe, must not cut the names.
    console = Console(width=max(Console().width, _WIDTH), soft_wrap=True, highlight=False)
    table = Table(
        title=f"ESTIMATE, not measured: GiB on a GPU of each pipeline stage ({layout.world_size} ranks, "
        f"{recipe.degrees or 'nothing split'}, {layout.micro_batch_tokens} tokens a micro-batch, recompute={layout.recompute})",
        title_justify="left",
    )
    table.add_column("stage", justify="right")
    for term in (*_TERMS, "total"):
        table.add_column(term.replace("fp8_weights", "fp8 copies"), justify="right")
    for number, stage in enumerate(estimate.stages):
        row = [f"{getattr(stage, term) / GIB:.1f}" for term in (*_TERMS, "total")]
        table.add_row(str(number), *row, style="bold" if number == estimate.worst_stage else "")
    console.print(table)
    worst = estimate.stages[estimate.worst_stage].total / GIB
    console.print(
        f"worst: stage {estimate.worst_stage}, {worst:.1f} GiB, {100 * worst / gpu_gib:.0f} % of {gpu_gib:g} GiB; host "
        f"memory of one rank {estimate.host_bytes / GIB:.1f} GiB"
    )
    if shared := _colocated(estimate, recipe, gpu_gib):
        trainer, engine = (float(str(shared[who])) / GIB for who in ("trainer", "engine"))
        console.print(
            f"while engines generate: trainer {trainer:.1f} GiB, engine {engine:.1f} GiB "
            f"(rollout.gpu_memory_utilization = {recipe.rollout.gpu_memory_utilization:g}) of {gpu_gib:g} GiB"
        )
        if shared["over"]:
            console.print(
                "WARN: more than the GPU has; lower rollout.gpu_memory_utilization, or share the weights out more"
            )
    for assumption in ASSUMPTIONS:
        console.print(f"  assumed: {assumption}")
    if _is_over(estimate, gpu_gib):
        console.print(
            f"WARN: above {100 * _WARN_SHARE:.0f} % of {gpu_gib:g} GiB, where fragmentation alone can end a run; lower "
            "layout.micro_batch_tokens, recompute more, or share out more (tp, pp, ep)"
        )
