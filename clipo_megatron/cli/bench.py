"""`clipo bench sync RECIPE.yaml [key=value ...]`: how fast this machine brings new weights into an engine.

Measured on the recipe's model, layout and dtype, in two processes; other GPUs and nodes are not used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.load import read_recipe

_WIDTH = 120


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("bench", help="measure a part of the training step", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    sync = actions.add_parser("sync", help="new weights into an engine: planned copies, whole tensors, the floor")
    sync.add_argument("recipe", type=Path, help="YAML file; model.path must hold weights")
    sync.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. rollout.tp=2 layout.tp=4")
    sync.add_argument("--repeats", type=int, default=7, metavar="N", help="timed turns (default 7)")
    sync.add_argument("--no-engine", action="store_true", help="planned copies and the floor only; starts no vLLM")
    sync.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    sync.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        ConfigError: all faults of the recipe and the options.
    """
    recipe, problems = read_recipe(args.recipe, args.overrides)
    if args.repeats < 1:
        problems.append(f"--repeats = {args.repeats}: must be >= 1")
    if recipe is not None and recipe.rollout.quantization != "none":
        problems.append(
            f"rollout.quantization = {recipe.rollout.quantization}: the benchmark measures engines with the trainer's weights as "
            "they are; add rollout.quantization=none"
        )
    if problems or recipe is None:
        raise ConfigError(problems)
    # Torch, and vLLM with an engine: imported once the recipe is known to be one.
    import torch

    from clipo_megatron.checks.sync_speed import SyncSpeedSettings, measure_sync_speed
    from clipo_megatron.checks.trainer_layout import parallel_layout
    from clipo_megatron.weights.reduced import has_weights

    folder = Path(recipe.model.path)
    if not folder.is_dir() or not has_weights(folder):
        raise ConfigError(f"model.path = {folder}: no safetensors there; the benchmark copies real weights")
    found = measure_sync_speed(
        SyncSpeedSettings(
            model_path=folder,
            dtype=recipe.model.dtype,
            device="cuda" if torch.cuda.is_available() and recipe.run.device != "cpu" else "cpu",
            trainer=parallel_layout(recipe),
            engine_tp=recipe.rollout.tp,
            repeats=args.repeats,
            bucket_mib=recipe.sync.bucket_mib,
            with_engine=not args.no_engine,
        )
    ).as_dict()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, recipe)
    return 0


def _print(found: dict[str, Any], recipe: Recipe) -> None:
    num_bytes = found["num_bytes"] or 0
    table = Table(
        title=f"{num_bytes / 1e9:,.3f} GB of {recipe.model.dtype} weights into one engine of tp={recipe.rollout.tp}, medians",
        title_justify="left",
    )
    for column in ("way", "ms", "GB/s", "of the floor"):
        table.add_column(column, justify="left" if column == "way" else "right")
    floor = found["memory_copy_s"] or 0.0
    for name, text in (
        ("memory_copy_s", "plain copy within a process (floor)"),
        ("planned_s", "planned copies out of the trainer's process"),
        ("verify_s", "checksums of both sides"),
        ("engine_planned_s", "engine stall, planned (CPU: with repacking)"),
        ("engine_whole_s", "engine stall, whole tensors"),
        ("vllm_ipc_s", "engine stall, vLLM's own ipc transfer"),
        ("vllm_nccl_s", "engine stall, vLLM's own nccl transfer"),
    ):
        seconds = found[name]
        cells = ("not measured", "", "")
        if seconds is not None:
            cells = (f"{1e3 * seconds:,.1f}", f"{num_bytes / 1e9 / seconds:,.2f}", f"{floor / seconds:.2f}")
        table.add_row(text, *cells)
    console = Console(width=max(Console().width, _WIDTH), soft_wrap=True, highlight=False)
    console.print(table)
    for backend, reason in found["not_measured"].items():
        console.print(f"vLLM's own {backend} transfer was not measured: {reason}")
    console.print(
        f"once: opening the trainer's memory {1e3 * (found['open_s'] or 0):,.1f} ms, laying out "
        f"{found['copies']:,} copies {1e3 * (found['bind_s'] or 0):,.1f} ms"
    )
