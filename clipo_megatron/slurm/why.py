"""The first cause of a job's failure, out of all logs of its folder: `clipo why JOBID`. Loads without torch.

A fatal line is dated by itself or its neighbours; the earliest one is the cause, unless it only tells that another failed.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.fatal_lines import LOST, WORKER, FatalError, scan_log
from clipo_megatron.slurm.job_folder import read_job
from clipo_megatron.slurm.job_logs import UNKNOWN_HOST, Log, Span, find_span, read_logs, read_output, read_run_log
from clipo_megatron.slurm.late_workers import LATE, suspects
from clipo_megatron.slurm.log_times import is_dated

_BATCH_ENDS = re.compile(r"^\S+ (?:done|requeue|retry) (?P<text>.*)")
_SAVED = re.compile(r"^(?:the run was saved|asked to stop)\b")
"""Of the batch script, on an attempt that was put back and had not failed."""
_PROGRESS = re.compile(r"\bstep \d+(?:/\d+)?\b.*\b(?:accuracy|reward|s) ")
_NEWS = re.compile(r"A worker died or was killed while executing")
"""Of Ray, on the driver's screen: of a worker that has told its own cause, or that the run killed itself because it hung."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a job ended."""

    attempt: Path
    phase: str
    """The last one that the batch script was in; empty where it wrote none."""
    first: FatalError | None
    """None: no log has a fatal line that the run did not go on after."""
    others: tuple[FatalError, ...]
    """In order of time, each cause once."""
    outlived: tuple[FatalError, ...] = ()
    """What the run went on after, in order of time, each cause once."""
    last_words: str = ""
    """Of the batch script, where it took the attempt for ended: that it is complete, or put back and why; empty else."""


def explain(job: Path, attempt: Path, *, output: Path | None = None) -> Explanation:
    """Read all logs of an attempt and find its first cause.

    Args:
        job: folder of the job.
        attempt: folder of the attempt, in it.
        output: SLURM's own output file of the job.
    """
    span = find_span(job, attempt)
    logs = read_logs(job, attempt, span, output=output)
    hosts = {log.phase: log.host for log in logs if log.host != UNKNOWN_HOST}
    by_name = {log.phase: log for log in logs}
    phase_file = attempt / "phase"
    phase = phase_file.read_text(errors="replace").strip() if phase_file.is_file() else ""
    stopped, last_words = _stopped(logs)
    found = [_of_late(_at_its_worker(error, hosts), by_name) for log in logs for error in scan_log(log)]
    # What comes after that is brought about by the batch script's own stopping of all steps.
    if phase == "failed":  # after these words: the job could not be put back
        stopped, last_words = math.inf, ""
    errors = sorted((error for error in found if error.moment <= stopped), key=_order)
    is_well = phase == "done" or bool(_SAVED.match(last_words))
    ended = [] if is_well else _that_ended_it(errors, logs, progress=_last_step(job, span, logs))
    if phase == "failed":  # by the clocks of several machines, all may look as if the run had gone on after it
        ended = ended or errors
    outlived = _once(error for error in errors if error not in ended)
    ended = _once([error for error in ended if not _NEWS.search(error.cause)] or ended)
    causes = [error for error in ended if error.cause.startswith(LOST)] or [e for e in ended if not e.is_follower]
    first = next(iter([*causes, *ended]), None)
    return Explanation(
        attempt=attempt,
        phase=phase,
        first=first,
        others=tuple(error for error in ended if error is not first),
        outlived=tuple(outlived),
        last_words=last_words,
    )


def _order(error: FatalError) -> tuple[float, bool]:
    return error.moment, error.is_follower


def _that_ended_it(errors: Sequence[FatalError], logs: Sequence[Log], *, progress: float) -> list[FatalError]:
    """Without what the run went on after: told before a later step, by its time or in the same file."""
    steps = {log.path: log.first_line + n for log in logs for n, line in enumerate(log.lines) if _PROGRESS.search(line)}
    last = [
        error
        for error in errors
        if error.is_end or (error.moment >= progress and error.line > steps.get(error.file, 0))
    ]
    if any(error.is_end for error in last):
        return last
    # A worker may have failed before the last step's row was written, and its death be noticed after.
    named = {match[0] for error in last if error.is_follower and (match := WORKER.search(error.cause))}
    newest = {error.file.stem: error for error in errors if error.file.stem in named}
    return [error for error in errors if error in last or newest.get(error.file.stem) is error]


def _last_step(job: Path, span: Span, logs: Sequence[Log]) -> float:
    """When the attempt last told of a step: in a line with a time, or in the last line of a file."""
    logs, moments = list(logs), []
    with contextlib.suppress(ConfigError):  # the recipe was refused
        logs.append(read_run_log(Path(read_job(job).run_folder), span))
    for log in logs:
        last = len(log.lines) - 1
        moments += [
            log.times[number]
            for number, line in enumerate(log.lines)
            if _PROGRESS.search(line) and (number == last or is_dated(line))
        ]
    return max((moment for moment in moments if span.holds(moment)), default=0.0)


def _stopped(logs: Sequence[Log]) -> tuple[float, str]:
    """When the batch script took the attempt for ended and stopped what still ran, and its words; never, where it did not."""
    for batch in (log for log in logs if log.path.name == "batch.log"):
        for line, moment in zip(batch.lines, batch.times, strict=True):
            if match := _BATCH_ENDS.match(line):
                return moment, match["text"]
    return math.inf, ""


def explain_output(output: Path) -> Explanation:
    """The first cause as far as SLURM's own output file tells it: of a job that could make no folder."""
    log = read_output(output)
    errors = _once(sorted(scan_log(log), key=_order))
    first = next((error for error in errors if not error.is_follower), errors[0] if errors else None)
    others = tuple(error for error in errors if error is not first)
    return Explanation(attempt=output, phase="", first=first, others=others)


def _once(errors: Iterable[FatalError]) -> list[FatalError]:
    """Without repetitions of the same cause of the same host."""
    first: dict[tuple[str, str], FatalError] = {}
    for error in errors:
        first.setdefault((error.host, error.cause), error)
    return list(first.values())


def _at_its_worker(error: FatalError, hosts: Mapping[str, str]) -> FatalError:
    """The driver tells of a worker by its name: the error belongs to the worker's host, where its log tells that."""
    named = WORKER.search(error.cause)
    if named is None or not error.is_follower or named[0] not in hosts:
        return error
    return replace(error, host=hosts[named[0]])


def _of_late(error: FatalError, logs: Mapping[str, Log]) -> FatalError:
    """Of a phase that was not done in time: the workers that the others waited for, and their hosts."""
    if not (late := LATE.search(error.cause)):
        return error
    names = late["names"].split(", ")
    found = suspects(names, logs)
    hosts = dict.fromkeys(logs[name].host if name in logs else UNKNOWN_HOST for name in found)
    where = ", ".join(f"{name} on {logs[name].host if name in logs else UNKNOWN_HOST}" for name in found)
    others = f", and others waited: {', '.join(names)}" if len(found) < len(names) else ""
    files = ", ".join(str(logs[name].path) for name in found if name in logs)
    return replace(
        error,
        host=", ".join(hosts),
        phase=late["phase"],
        cause=f"{late['phase']} was not done after {late['seconds']} s: {where} did not answer{others}",
        remedy=f"see what it did last in {files or 'its log'}; exclude its node if it hangs there again",
    )
