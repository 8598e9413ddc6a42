"""`clipo check parity RECIPE.yaml [key=value ...] --layout tp=2,pp=2`: does a layout give what one rank gives?

Runs the recipe's model, cut to a few layers, under the layout and on one rank, both on this machine. `clipo check sync`
and `clipo check step` are declared here as well; see cli/check_sync.py and cli/check_step.py.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from clipo_megatron.cli import check_step, check_sync
from clipo_megatron.cli.devices import local_device
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe.load import read_recipe

if TYPE_CHECKING:
    from clipo_megatron.checks.parity import ParityReport

_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
_LABELS = {
    "log_probs": "log-probs",
    "reference_log_probs": "reference log-probs",
    "entropy": "entropy",
    "pooled_states": "pooled states",
    "contrastive_loss": "contrastive loss",
    "head_gradient": "head gradient",
    "gradient_norm": "policy gradient: norm",
    "policy_gradient": "policy gradient",
    "parameters": "parameters after two steps",
    "head_parameters": "head after two steps",
}
_BY_KIND = ("policy_gradient", "parameters")
_NAMED = 5
_WIDTH = 120
_TERMINATED = 128 + signal.SIGTERM


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check", help="check a recipe's layout, its weight syncs, or a step of full length", description=__doc__
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    parity = actions.add_parser(
        "parity",
        help="compare log-probs, losses, gradients and updates of a layout with those of one rank",
        description="Exit code 0: all errors are within the tolerance; 1: some are not, or a rank failed; 2: bad input.",
    )
    parity.add_argument("recipe", type=Path, help="YAML file; its data is not read")
    parity.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. layout.recompute=full run.device=cpu")
    parity.add_argument(
        "--layout", metavar="K=N,...", help=f"degrees of {', '.join(_DEGREES)}, 1 where missing (default: the recipe's)"
    )
    parity.add_argument(
        "--layers", type=int, metavar="N", help="layers to run (default: the fewest from 4 on that fit)"
    )
    parity.add_argument(
        "--weights", choices=("real", "random"), help="default: real where the model folder has safetensors"
    )
    parity.add_argument(
        "--shrink", action="store_true", help="run a small random model of the same family and head ratio"
    )
    parity.add_argument(
        "--tolerance", type=float, metavar="X", help="largest relative error (default: 1e-5 on CPUs, 5e-2 on GPUs)"
    )
    parity.add_argument("--timeout", type=float, default=600.0, metavar="S", help="deadline of each of the two runs")
    parity.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parity.set_defaults(run=run)
    sync = actions.add_parser(
        "sync",
        help="compare log-probs of the engines with the policy's after syncs of perturbed weights",
        description="Exit code 0: engines agree with the policy after every sync, and would not without it; 1: they do not, "
        "or a worker failed; 2: bad input.",
    )
    check_sync.add_arguments(sync)
    step = actions.add_parser(
        "step",
        help="train on micro-batches of full length, save, kill the ranks in a save, load, compare",
        description="Exit code 0: the step fits, and what was loaded is what was saved; 1: not so, or a rank failed; 2: bad "
        "input.",
    )
    check_step.add_arguments(step)


def run(args: argparse.Namespace) -> int:
    """Check one layout and print the errors.

    Raises:
        ConfigError: all faults of the recipe, the layout, the model folder and the options.
    """
    # Without it the signal ends the process at once: models in temporary folders would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    degrees, problems = parse_layout(args.layout)
    problems += _option_problems(args)
    recipe, recipe_problems = read_recipe(args.recipe, [*args.overrides, *_layout_overrides(degrees)])
    problems += recipe_problems
    if recipe is None:
        raise ConfigError(problems)
    # Imported late: nothing above needs torch.
    from clipo_megatron.checks.parity import check_parity, prepare_ranks
    from clipo_megatron.checks.parity_model import choose_model
    from clipo_megatron.checks.preflight import expert_problems
    from clipo_megatron.cluster.settings import policy_settings

    device, device_problems = local_device(recipe)
    model, model_problems = choose_model(
        Path(recipe.model.path),
        recipe.layout,
        num_layers=args.layers,
        weights=args.weights,
        is_shrunk=args.shrink,
    )
    problems += [*device_problems, *model_problems, *expert_problems(recipe)]
    if problems or model is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    prepare_ranks()
    console = Console(stderr=True)
    with console.status("starting") as status:

        def on_stage(stage: str) -> None:
            status.update(f"running: {stage}")
            console.print(f"parity: {stage}", highlight=False, soft_wrap=True)

        report = check_parity(
            policy_settings(recipe, device=device),
            model,
            tolerance=args.tolerance,
            timeout_s=args.timeout,
            on_stage=on_stage,
        )
    if args.json:
        print(json.dumps(report_json(report), indent=1))
    else:
        _print_table(report)
    return _verdict(report)


def parse_layout(text: str | None, known: Sequence[str] = _DEGREES) -> tuple[dict[str, int], list[str]]:
    """The degrees of `--layout`, those that are missing as 1; empty when it was not given or has faults.

    Args:
        text: "tp=2,pp=2".
        known: keys that it may have.

    Returns:
        (degree by key, all faults).
    """
    if text is None:
        return {}, []
    degrees: dict[str, int] = {}
    problems: list[str] = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            problems.append(f"--layout: '{part}' must read KEY=NUMBER, e.g. tp=2,pp=2")
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            problems.append(f"--layout: {key}: unknown key; {hint}")
        elif key in degrees:
            problems.append(f"--layout: {key}: given twice; give it once")
        elif not value.isdecimal() or int(value) < 1:
            problems.append(f"--layout: {key} = {value}: must be a whole number >= 1")
        else:
            degrees[key] = int(value)
    return ({}, problems) if problems else (dict.fromkeys(known, 1) | degrees, [])


def _layout_overrides(degrees: dict[str, int]) -> list[str]:
    if not degrees:
        return []
    world_size = math.prod(degrees[key] for key in ("tp", "cp", "pp", "dp"))
    return [f"layout.world_size={world_size}", *(f"layout.{key}={degrees[key]}" for key in _DEGREES if key != "dp")]


def _option_problems(args: argparse.Namespace) -> list[str]:
    problems: list[str] = []
    if args.layers is not None and args.layers < 1:
        problems.append(f"--layers {args.layers}: must be >= 1")
    if args.tolerance is not None and not 0 < args.tolerance < math.inf:
        problems.append(f"--tolerance {args.tolerance:g}: must be a number > 0, e.g. 1e-5")
    if not 0 < args.timeout < math.inf:
        problems.append(f"--timeout {args.timeout:g}: must be a number of seconds > 0")
    return problems


def report_json(report: ParityReport) -> dict[str, object]:
    """The report as JSON types; an error that is not finite is null."""
    settings, model = report.settings, report.model
    degrees = asdict(settings.layout) | {"dp": settings.layout.dp}
    errors: dict[str, object] = {}
    for quantity in _LABELS:
        kinds = report.errors.get(quantity, {})
        if quantity in _BY_KIND:
            errors[quantity] = {kind: _finite(error) for kind, error in kinds.items()}
        else:
            errors[quantity] = _finite(max(kinds.values())) if kinds else None
    past = report.past_tolerance()
    return {
        "holds": not past,
        "tolerance": report.tolerance,
        "tolerance_of_contrastive_loss": report.tolerance_of("contrastive_loss"),
        "errors": errors,
        "past_tolerance": [f"{quantity}: {kind}" for quantity, kind, _ in past],
        "not_measured": [quantity for quantity in _LABELS if quantity not in report.errors],
        "layout": degrees,
        "model": str(model.source),
        "layers": model.num_layers,
        "weights": model.weights,
        "shrunk": model.is_shrunk,
        "device": settings.device,
        "dtype": settings.dtype,
        "precision": settings.precision.recipe,
        "batch": asdict(report.shape) | {"steps": 2},
    }


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _print_table(report: ParityReport) -> None:
    # A narrow terminal, or a pipe, must not cut the names.
    console = Console(width=max(Console().width, _WIDTH))
    settings, model, shape = report.settings, report.model, report.shape
    degrees = {key: getattr(settings.layout, key) for key in _DEGREES}
    layout = " ".join(f"{key}={degree}" for key, degree in degrees.items() if degree > 1) or "one rank"
    lines = [
        f"model    {model.source}: {model.num_layers} layers, {model.weights} weights"
        + (", shrunk to a small model of its family" if model.is_shrunk else ""),
        f"layout   {layout}, {settings.layout.world_size} ranks, against one rank; {settings.device}, {settings.dtype}, "
        "no FP8 whatever the recipe says",
        f"batch    2 steps of {shape.num_rows} sequences of up to {shape.longest} tokens, in micro-batches of up to "
        f"{shape.micro_batch_tokens}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    table = Table("quantity", "relative error", box=None)
    for quantity, kinds in report.errors.items():
        if quantity == "policy_gradient":
            for kind, error in kinds.items():
                table.add_row(f"policy gradient: {kind}", _cell(error, quantity, report))
        elif quantity in _BY_KIND:
            worst = max(kinds, key=lambda kind: kinds[kind])
            table.add_row(f"{_LABELS[quantity]}: worst, {worst}", _cell(kinds[worst], quantity, report))
        else:
            table.add_row(_LABELS[quantity], _cell(max(kinds.values()), quantity, report))
    console.print(table)


def _cell(error: float, quantity: str, report: ParityReport) -> str:
    return f"{error:.1e}" if error <= report.tolerance_of(quantity) else f"[red]{error:.1e} too large[/red]"


def _verdict(report: ParityReport) -> int:
    past = report.past_tolerance()
    if not past:
        print(f"parity holds: every relative error is at most {report.tolerance:g}", file=sys.stderr)
        return 0
    named = [_LABELS[q] + ("" if kind == q else f" of {kind}") + f" {error:.1e}" for q, kind, error in past[:_NAMED]]
    more = f", and {len(past) - _NAMED} more" if len(past) > _NAMED else ""
    print(f"clipo: parity: past the tolerance of {report.tolerance:g}: {', '.join(named)}{more}", file=sys.stderr)
    return 1
