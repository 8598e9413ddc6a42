"""`clipo status [JOBID ...]`: state, phase, pace and newest checkpoint of jobs of slurm/train.sbatch; of all without a number."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.job_folder import JOB_FILE, JOBS_VARIABLE, jobs_folder, read_job
from clipo_megatron.slurm.progress import UNKNOWN_STATE, JobProgress, Slurm, job_progress, slurm_progress

_COLUMNS = ("job", "run", "state", "attempt", "phase", "step", "at", "s/step", "left", "checkpoint", "lost nodes")
_WIDTH = 200


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("status", help="how far jobs of SLURM are", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOBID", help="default: all that have a folder here")
    parser.add_argument("--json", action="store_true", help="one JSON object a job instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line a job.

    Raises:
        ConfigError: of all jobs that can't be told of, after the others' lines.
    """
    folder = jobs_folder()
    numbers = args.jobs or sorted(
        (path.parent.name for path in folder.glob(f"*/{JOB_FILE}")), key=lambda name: (len(name), name)
    )
    if not numbers:
        raise ConfigError(
            f"{folder.absolute()}: no job has a folder there; set {JOBS_VARIABLE} as the jobs had it, here or in slurm/site.env"
        )
    table = Table(*_COLUMNS, box=None, pad_edge=False)
    problems: list[str] = []
    slurm = Slurm()
    for number in numbers:
        try:
            run_folder, name, found = _look_at(folder / number, slurm)
        except ConfigError as error:
            problems += error.problems
            continue
        except OSError as error:
            problems.append(f"job {number}: the folder of its run can't be read ({error}); see who owns it")
            continue
        if args.json:
            print(json.dumps({"job": number, "run_folder": run_folder} | dataclasses.asdict(found)))
        else:
            table.add_row(*map(escape, (number, name, *_cells(found))))
    if table.row_count:
        # A narrow terminal, or a pipe, must not cut names.
        Console(width=max(Console().width, _WIDTH)).print(table)
    if problems:
        raise ConfigError(problems)
    return 0


def _look_at(folder: Path, slurm: Slurm) -> tuple[str, str, JobProgress]:
    """(folder of its run, name, progress) of a job: out of its folder, or out of SLURM where it has none yet."""
    if (folder / JOB_FILE).exists():
        job = read_job(folder)
        return job.run_folder, Path(job.run_folder).name, job_progress(folder, job, slurm)
    name, found = slurm_progress(folder, slurm)
    if found.state == UNKNOWN_STATE:
        raise ConfigError(
            f"job {folder.name}: no {folder.absolute() / JOB_FILE}, and SLURM does not tell of the job: it has not begun, or its "
            f"folder is elsewhere; set {JOBS_VARIABLE} as the job had it, here or in slurm/site.env"
        )
    return "", name, found


def _cells(found: JobProgress) -> tuple[str, ...]:
    pace = "" if found.step_s is None else f"{found.step_s:.1f}"
    left = "" if found.left_s is None else f"{int(found.left_s // 3600)}:{int(found.left_s % 3600 // 60):02d} h"
    step = f"{found.step}/{found.steps}" if found.steps else ""
    attempt = str(found.attempt) if found.attempt >= 0 else ""
    return found.state, attempt, found.phase, step, found.doing, pace, left, found.checkpoint, found.lost_nodes
