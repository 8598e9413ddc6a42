"""`clipo check sync RECIPE.yaml [key=value ...]`: do weight syncs bring the engines the policy's weights?"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.load import read_recipe

if TYPE_CHECKING:
    from clipo_megatron.checks.sync import Difference, SyncCheckReport

_NAMED = 5
_WIDTH = 120
_TERMINATED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and the options."""
    parser.add_argument("recipe", type=Path, help="YAML file; its data is not read")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. sync.transport=stream run.device=cpu")
    parser.add_argument("--syncs", type=int, default=2, metavar="N", help="perturbed syncs (default 2)")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts compared (default 8)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="longest response (default 32)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference of a token's log-prob in nats, a tenth of it on average over a response (default: 1e-3 "
        "for float32, 1 for bfloat16)",
    )
    parser.add_argument(
        "--step-size",
        type=float,
        metavar="X",
        help="learning rate of the perturbing steps (default 1e-3)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the recipe's syncs and print the differences.

    Raises:
        ConfigError: all faults of the recipe, the model folder and the options.
        WorkerError: a worker failed or was late; the message says where the logs are.
    """
    # Without it the signal ends the process at once, and the workers a while later.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    problems = _option_problems(args)
    recipe, recipe_problems = read_recipe(args.recipe, args.overrides)
    problems += recipe_problems
    if recipe is None:
        raise ConfigError(problems)
    # Imported late: nothing above needs torch.
    from clipo_megatron.checks.sync import sync_check_problems

    if problems := [*problems, *sync_check_problems(recipe)]:
        raise ConfigError(problems)
    # Which transport was settled on, and why.
    logging.getLogger("clipo_megatron.cluster").setLevel(logging.INFO)
    logging.getLogger("clipo_megatron.cluster").addHandler(logging.StreamHandler())
    logs = Path(tempfile.mkdtemp(prefix="clipo-sync-"))
    try:
        report = _check(recipe, args, logs)
    except WorkerError as error:
        raise WorkerError(f"{error} (logs in {logs})") from error
    shutil.rmtree(logs, ignore_errors=True)
    if args.json:
        print(json.dumps(report_json(report, recipe), indent=1))
    else:
        _print_table(report, recipe)
    return _verdict(report)


def _check(recipe: Recipe, args: argparse.Namespace, logs: Path) -> SyncCheckReport:
    import torch

    from clipo_megatron.checks.sync import (
        STEP_SIZE,
        TOLERANCES,
        Tolerance,
        check_sync,
        draw_prompts,
        recipe_of_check,
    )
    from clipo_megatron.cluster.loopback import keep_to_this_machine

    keep_to_this_machine()
    from clipo_megatron.cluster.session import place, ray_session
    from clipo_megatron.records import Sampling

    device = "cuda" if torch.cuda.is_available() and recipe.run.device != "cpu" else "cpu"
    step_size = STEP_SIZE if args.step_size is None else args.step_size
    tolerance = TOLERANCES[recipe.model.dtype if recipe.rollout.quantization == "none" else "fp8"]
    if args.tolerance is not None:
        tolerance = Tolerance(max=args.tolerance, mean=args.tolerance / 10)
    checked = recipe_of_check(recipe, step_size=step_size)
    sampling = Sampling(
        samples=1,
        temperature=recipe.rollout.temperature,
        top_p=1.0,
        max_tokens=min(args.tokens, recipe.rollout.max_response_tokens),
        seed=recipe.run.seed,
        step=1,
        routed_experts=recipe.experts.routing_replay,
    )
    console = Console(stderr=True)
    with console.status("starting policy and engines") as status, ray_session(checked, device=device):
        policy, engines = place(checked, device=device, log_folder=logs)

        def on_stage(stage: str) -> None:
            status.update(stage)
            console.print(f"sync: {stage}", highlight=False, soft_wrap=True)

        return check_sync(
            policy,
            engines,
            lambda version: engines.update_weights(version, policy.weight_buckets(version)),
            draw_prompts(checked, count=args.prompts),
            sampling,
            syncs=args.syncs,
            tolerance=tolerance,
            step_size=step_size,
            on_stage=on_stage,
        )


def _option_problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name} {getattr(args, name)}: must be >= 1"
        for name in ("syncs", "prompts", "tokens")
        if getattr(args, name) < 1
    ]
    problems += [
        f"--{name.replace('_', '-')} {value:g}: must be a number > 0, e.g. 1e-3"
        for name in ("tolerance", "step_size")
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf
    ]
    return problems


def report_json(report: SyncCheckReport, recipe: Recipe) -> dict[str, object]:
    """The report as JSON types; a difference that is not finite is null."""
    return {
        "holds": report.holds,
        "tolerance": asdict(report.tolerance),
        "step_size": report.step_size,
        "syncs": [
            {
                "version": sync.version,
                "seconds": sync.seconds,
                **asdict(sync.synced),
                "stale": [_difference_json(difference) for difference in sync.stale],
                "fresh": [_difference_json(difference) for difference in sync.fresh],
            }
            for sync in report.syncs
        ],
        "past_tolerance": [
            {"version": version, "prompt": difference.prompt} for version, difference in report.past_tolerance()
        ],
        "blind_versions": report.blind_versions(),
        "model": recipe.model.path,
        "dtype": recipe.model.dtype,
        "layout": recipe.degrees,
        "engines": recipe.rollout.engines,
        "engine_tp": recipe.rollout.tp,
    }


def _difference_json(difference: Difference) -> dict[str, object]:
    return {key: value if math.isfinite(value) else None for key, value in asdict(difference).items()}


def _print_table(report: SyncCheckReport, recipe: Recipe) -> None:
    # A narrow terminal, or a pipe, must not cut the names.
    console = Console(width=max(Console().width, _WIDTH))
    prompts = len(report.syncs[0].fresh)
    for line in (
        f"model    {recipe.model.path}, {recipe.model.dtype}",
        f"layout   {recipe.degrees or 'one rank'} into {recipe.rollout.engines} engines of tp={recipe.rollout.tp}",
        f"batch    {prompts} prompts of drawn ids; log-probs of the engines' samples against the policy's, in nats; "
        f"allowed {report.tolerance.max:g} for a token, {report.tolerance.mean:g} on average over a response",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    table = Table("version", "by", "seconds", "MB", box=None)
    for column in ("without sync: max", "mean", "after sync: max", "mean"):
        table.add_column(column, justify="right")
    for sync in report.syncs:
        table.add_row(
            str(sync.version),
            sync.synced.transport,
            f"{sync.seconds:.3f}",
            f"{sync.synced.num_bytes / 1e6:,.1f}",
            *_worst(sync.stale),
            *_worst(sync.fresh),
        )
    console.print(table)


def _worst(differences: tuple[Difference, ...]) -> tuple[str, str]:
    if not differences:
        return "-", "-"
    # max() of a list with a NaN depends on its order.
    found = [max((getattr(d, name) for d in differences), key=_not_finite_last) for name in ("max", "mean")]
    return f"{found[0]:.1e}", f"{found[1]:.1e}"


def _not_finite_last(value: float) -> tuple[bool, float]:
    return (not math.isfinite(value), value)


def _verdict(report: SyncCheckReport) -> int:
    if report.holds:
        print(f"sync holds: {len(report.syncs)} versions arrived as the policy has them", file=sys.stderr)
        return 0
    if blind := report.blind_versions():
        print(
            f"clipo: sync: versions {', '.join(map(str, blind))}: engines without the sync agree with the policy as well, so "
            "this check could not have failed; give a larger --step-size or a smaller --tolerance",
            file=sys.stderr,
        )
    past = report.past_tolerance()
    if past:
        named = [
            f"version {version} prompt {difference.prompt}: max {difference.max:.2g} at token {difference.worst_token} of "
            f"{difference.tokens}, mean {difference.mean:.2g}"
            for version, difference in past[:_NAMED]
        ]
        more = f"; and {len(past) - _NAMED} more" if len(past) > _NAMED else ""
        print(
            f"clipo: sync: engines and policy differ by more than {report.tolerance.max:g} (mean "
            f"{report.tolerance.mean:g}) nats after a sync: {'; '.join(named)}{more}",
            file=sys.stderr,
        )
    return 1
