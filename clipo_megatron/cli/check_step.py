"""`clipo check step RECIPE.yaml [key=value ...]`: does a step of full length fit, and does a save outlive a kill?"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.cli.devices import local_device
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe.load import read_recipe

_TERMINATED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and the options."""
    parser.add_argument("recipe", type=Path, help="YAML file; its data is not read")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. layout.micro_batch_tokens=8192")
    parser.add_argument(
        "--timeout", type=float, default=1200.0, metavar="S", help="deadline of each start of the ranks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, and print what was measured.

    Raises:
        ConfigError: all faults of the recipe, the model folder and the options.
        CheckError: the update was skipped, or the state that was loaded is not the one that was saved.
        WorkerError: a rank failed, or was late.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    recipe, problems = read_recipe(args.recipe, args.overrides)
    if not 0 < args.timeout < math.inf:
        problems.append(f"--timeout {args.timeout:g}: must be a number of seconds > 0")
    if recipe is None:
        raise ConfigError(problems)
    # Imported late: nothing above needs torch.
    from clipo_megatron.checks.preflight import folder_use_problems, model_problems
    from clipo_megatron.checks.step import Longest, check_step, prepare_ranks
    from clipo_megatron.cluster.settings import policy_settings

    device, device_problems = local_device(recipe)
    problems += [*device_problems, *model_problems(recipe), *folder_use_problems(recipe)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    prepare_ranks()
    console = Console(stderr=True)
    with console.status("starting") as status:

        def on_stage(stage: str) -> None:
            status.update(f"running: {stage}")
            console.print(f"step: {stage}", highlight=False, soft_wrap=True)

        report = check_step(
            policy_settings(recipe, device=device),
            Longest(
                prompt_tokens=recipe.data.max_prompt_tokens,
                response_tokens=recipe.rollout.max_response_tokens,
                group_size=recipe.algorithm.group_size,
            ),
            Path(recipe.run.folder),
            timeout_s=args.timeout,
            on_stage=on_stage,
        )
    if args.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        print(
            f"{report.micro_batches} micro-batches of up to {report.tokens} tokens in {report.train_s:.1f} s, peak "
            f"{size_text(report.peak_bytes, is_binary=True)}; {size_text(report.saved_bytes)} saved in {report.save_s:.1f} s, "
            f"whole after a kill, loaded bit for bit in {report.load_s:.1f} s"
        )
    return 0
