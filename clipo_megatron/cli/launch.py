"""`clipo launch RECIPE.yaml [key=value ...] --nodes N`: check a recipe, then submit it to SLURM, or only show the script.

Partition and account come from SBATCH_PARTITION and SBATCH_ACCOUNT, as for any sbatch, or from --sbatch=--partition=gpu.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.recipe.load import read_recipe
from clipo_megatron.slurm.job_folder import jobs_folder
from clipo_megatron.slurm.render import needs_of, render
from clipo_megatron.slurm.site_file import HOME, HOME_VARIABLE

_SBATCH_S = 60
_OF_JOB = ("CLIPO_ATTEMPT", "CLIPO_END_TIME", "CLIPO_LOST_NODES", "CLIPO_NODES", "CLIPO_REQUEUE", "CLIPO_SPARE_NODES")
_OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("launch", help="submit a run to SLURM", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, on a file system that all nodes share")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. layout.tp=4 run.steps=10")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: as many as the recipe's workers need")
    parser.add_argument(
        "--spare-nodes",
        type=int,
        default=0,
        metavar="N",
        help="more nodes, idle until one is lost: the job goes on with them in place of waiting in the queue (default: 0)",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--time", default="04:00:00", metavar="T", help="limit of the job (default: %(default)s)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="for sbatch, e.g. --sbatch=-pgpu"
    )
    parser.add_argument("--render", action="store_true", help="print the script, submit nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Submit, and print the job's number and the commands to follow it with.

    Raises:
        ConfigError: all faults of the recipe and of what was asked for.
        WorkerError: sbatch refuses the job, or does not answer.
    """
    recipe, problems = read_recipe(args.recipe, args.overrides)
    if problems or recipe is None:
        raise ConfigError(problems)
    needs = needs_of(
        recipe, nodes=args.nodes, gpus_per_node=args.gpus_per_node, time=args.time, spare_nodes=args.spare_nodes
    )
    script = render(str(args.recipe), args.overrides, name=recipe.run.name, needs=needs)
    if args.render:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: run this on a login node of the cluster, or print the script with --render"
        )
    jobs = jobs_folder()  # where the site's file is at fault, before anything is submitted
    job = _submit(script, args.sbatch)
    print(
        f"job {job}: {needs.nodes + needs.spare_nodes} nodes x {needs.gpus_per_node} GPUs, {needs.time}; its folder will be {jobs / job}"
    )
    print(
        f"  clipo status {job}\n  clipo why {job}\n  scancel --batch --signal=USR1 {job}   # save, and go on in a new attempt"
    )
    return 0


def _own_environment() -> dict[str, str]:
    """The environment without what belongs to a job that this may be called from: its steps would take it for their own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_JOB and (name in _OF_CLUSTER or not name.startswith("SLURM"))
    }


def _submit(script: str, options: Sequence[str]) -> str:
    """Number of the new job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options],
            input=script,
            text=True,
            capture_output=True,
            env={HOME_VARIABLE: str(HOME), **_own_environment()},
            timeout=_SBATCH_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(
            f"sbatch did not end within {_SBATCH_S} s: the job may have been submitted or not; look at `squeue --me` before "
            "submitting it again, a second one would go on in the same run's folder"
        ) from error
    if done.returncode:
        raise WorkerError(f"sbatch refuses the job: {done.stderr.strip() or done.stdout.strip()}")
    sys.stderr.write(done.stderr)
    return done.stdout.strip().split(";")[0]
