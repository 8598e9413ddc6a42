"""`clipo why JOBID`: the first cause of a job's failure, out of the logs of all its nodes and ranks."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.fatal_lines import FatalError
from clipo_megatron.slurm.job_folder import JOBS_VARIABLE, attempts, jobs_folder, read_job
from clipo_megatron.slurm.job_logs import choose_attempt
from clipo_megatron.slurm.progress import UNKNOWN_STATE, Slurm, slurm_progress
from clipo_megatron.slurm.why import Explanation, explain, explain_output

_SHOWN = 10


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("why", help="why a job of SLURM ended", description=__doc__)
    parser.add_argument("job", metavar="JOBID", help="number of the job, or its folder")
    parser.add_argument("--attempt", type=int, metavar="N", help="of a job that was requeued (default: the newest)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print node, cause and remedy of the first failure, then what followed; 1 where no log tells a cause.

    Raises:
        ConfigError: neither a folder nor SLURM tells of the job.
    """
    job = Path(args.job) if "/" in args.job else jobs_folder() / args.job
    output = _output(job)
    if job.is_dir():
        return _print(explain(job, choose_attempt(job, args.attempt), output=output), job)
    if output is not None:
        return _print(explain_output(output), job)
    state = slurm_progress(job, Slurm())[1].state
    if state == UNKNOWN_STATE:
        raise ConfigError(
            f"{job}: no folder of a job there, and SLURM does not tell of it: it has not begun, or its folder is elsewhere; "
            f"give a job's number, and set {JOBS_VARIABLE} as the job had it, here or in slurm/site.env"
        )
    print(f"job {job.name} has no folder {job} and no output: SLURM tells of it as {state}")
    return 1


def _output(job: Path) -> Path | None:
    """SLURM's own output file of a job: as SLURM tells while it remembers the job, else where it lies by default."""
    number, folders = job.name, [Path.cwd(), job.parent, job.parent.parent]
    if (told := Slurm().words(number).get("StdOut")) and Path(told).is_file():
        return Path(told)
    with contextlib.suppress(ConfigError):  # it may have failed before job.json was written
        folders.insert(0, Path(read_job(job).folder))
    names = (folder / f"slurm-{number}.out" for folder in folders)
    return next((path for path in names if path.is_file()), None)


def _print(explanation: Explanation, job: Path) -> int:
    first = explanation.first
    if first is None:
        after = " after its last step" if explanation.outlived else ""
        print(
            f"no fatal line in the logs of {explanation.attempt}{after}; its last phase: {explanation.phase or 'none'}"
        )
        print(_state(explanation, job))
        _print_errors("what the run went on after, in order of time:", explanation.outlived)
        return 1
    print(f"node:   {first.host}, in phase {first.phase}, {_clock(first)}")
    print(f"cause:  {first.cause}")
    print(f"remedy: {first.remedy}")
    print(f"log:    {first.file}:{first.line}")
    _print_errors("the others, in order of time:", explanation.others)
    return 0


def _print_errors(title: str, errors: Sequence[FatalError]) -> None:
    if errors:
        print(title)
    for error in errors[:_SHOWN]:
        print(f"  {_clock(error)} {error.host} {error.phase}: {error.cause[:200]} ({error.file.name}:{error.line})")
    if len(errors) > _SHOWN:
        print(f"  and {len(errors) - _SHOWN} more")


def _state(explanation: Explanation, job: Path) -> str:
    """Of an attempt without a cause: what became of it, as far as its folder and SLURM tell."""
    if explanation.last_words:
        return f"the batch script's last words: {explanation.phase}: {explanation.last_words}"
    found = attempts(job)
    if explanation.attempt in found[:-1]:
        return f"{found[found.index(explanation.attempt) + 1].name} followed it"
    state = Slurm().state(job.name)
    if state == UNKNOWN_STATE:
        return "SLURM does not tell its state (any more): running, or killed from outside; look at `squeue` and `sacct`"
    return f"the job's state: {state}, as SLURM tells it"


def _clock(error: FatalError) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error.moment))
