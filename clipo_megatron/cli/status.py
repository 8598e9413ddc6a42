"""`clipo status [JOBID ...]`: state, phase, pace and newest checkpoint of jobs of slurm/train.sbatch; of all without a number."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.job_folder import JOB_FILE, JOBS_VARIABLE, jobs_folder, read_job
from clipo_megatron.slurm.progress import JobProgress, job_progress

_COLUMNS = ("job", "run", "state", "attempt", "phase", "step", "at", "s/step", "left", "checkpoint", "lost nodes")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("status", help="how far jobs of SLURM are", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOBID", help="default: all that have a folder here")
    parser.add_argument("--json", action="store_true", help="one JSON object a job instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line a job.

    Raises:
        ConfigError: a job has no folder here.
    """
    folder = jobs_folder()
    numbers = args.jobs or sorted(
        (path.parent.name for path in folder.glob(f"*/{JOB_FILE}")), key=lambda name: (len(name), name)
    )
    if not numbers:
        raise ConfigError(f"{folder.absolute()}: no job has a folder there; set {JOBS_VARIABLE} as the jobs had it")
    table = Table(*_COLUMNS, box=None)
    for number in numbers:
        job = read_job(folder / number)
        found = job_progress(folder / number, job)
        if args.json:
            print(json.dumps({"job": number, "run_folder": job.run_folder} | dataclasses.asdict(found)))
        else:
            table.add_row(number, Path(job.run_folder).name, *_cells(found))
    if not args.json:
        Console().print(table)
    return 0


def _cells(found: JobProgress) -> tuple[str, ...]:
    pace = "" if found.step_s is None else f"{found.step_s:.1f}"
    left = "" if found.left_s is None else f"{int(found.left_s // 3600)}:{int(found.left_s % 3600 // 60):02d} h"
    step = f"{found.step}/{found.steps}" if found.steps else ""
    attempt = str(found.attempt) if found.attempt >= 0 else ""
    return found.state, attempt, found.phase, step, found.doing, pace, left, found.checkpoint, found.lost_nodes
