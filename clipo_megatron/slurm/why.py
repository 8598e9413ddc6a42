"""The first cause of a job's failure, out of all logs of its folder: `clipo why JOBID`. Loads without torch.

A fatal line is dated by itself or its neighbours; the earliest one is the cause, unless it only tells that another failed.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.job_folder import read_job
from clipo_megatron.slurm.job_logs import CHECKS, UNKNOWN_HOST, Log, read_logs, read_output
from clipo_megatron.slurm.known_errors import find_known
from clipo_megatron.slurm.late_workers import LATE, suspects
from clipo_megatron.slurm.log_times import line_time

_OWN = re.compile(r"clipo: error: (?P<host>[^:\s]+): (?P<phase>[^:]+): (?P<text>.*)")
_OWN_SHORT = re.compile(r"^clipo: (?!error: )(?P<text>.+)")
_FAILED_IN = re.compile(r"\bfailed in (?P<phase>\w+)$")
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(
    r"^(?:[\w.]+: )?(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Failure|Timeout|Full|Empty))\b(?P<text>.*)"
)
_RAY_PREFIX = re.compile(r"^(?:\x1b\[\d+m)*\((?:\w+ )?pid=\d+[^)]*\)(?:\x1b\[\d+m)* ?")
_WORKER = re.compile(r"\b(?:policy|engine)_\d+\b")
_BATCH_ENDS = re.compile(r"^\S+ (?:done|requeue|retry) ")
_PROGRESS = re.compile(r"\bstep \d+(?:/\d+)?\b.*\b(?:accuracy|reward|s) ")
_NODE_NAMED = re.compile(
    r"(?:Node failure on |slurmstepd: error: .* ON |srun: error: (?=\S+: task))(?P<host>[A-Za-z][\w.-]*)"
)
_OF_ANOTHER = re.compile(
    r"\b(?:policy_\d+|engine_\d+|rank \d+)\S* (?:died|failed)\b|: not done after \d+ s|, see (?:above|/)|a node does not answer"
)
_NEWS = re.compile(r"A worker died or was killed while executing")
"""Of Ray, on the driver's screen: of a worker that has told its own cause, or that the run killed itself because it hung."""
_LOST = "the node was lost: "
"""Of the batch script, after all others have told of it what they saw."""
_OTHER = "read the log from there"


@dataclass(frozen=True, kw_only=True, slots=True)
class FatalError:
    """One fatal line of a log."""

    host: str
    """"?" where no log tells it."""
    phase: str
    cause: str
    remedy: str
    file: Path
    line: int
    """From 1."""
    moment: float
    """Unix time."""
    is_follower: bool
    """It only tells that another failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a job ended."""

    attempt: Path
    phase: str
    """The last one that the batch script was in; empty where it wrote none."""
    first: FatalError | None
    """None: no fatal line is in any log."""
    others: tuple[FatalError, ...]
    """In order of time, each cause once."""


def explain(job: Path, attempt: Path, *, output: Path | None = None) -> Explanation:
    """Read all logs of an attempt and find its first cause.

    Args:
        job: folder of the job.
        attempt: folder of the attempt, in it.
        output: SLURM's own output file of the job.
    """
    logs = read_logs(job, attempt, output=output)
    hosts = {log.phase: log.host for log in logs if log.host != UNKNOWN_HOST}
    by_name = {log.phase: log for log in logs}
    errors = [_of_late(_at_its_worker(error, hosts), by_name) for log in logs for error in scan_log(log)]
    phase_file = attempt / "phase"
    phase = phase_file.read_text(errors="replace").strip() if phase_file.is_file() else ""
    if phase == "done":
        errors = []  # whatever happened, the run outlived it
    ended = _that_ended_it(errors, progress=_last_step(job, logs), stopped=_stopped(logs))
    ended = [error for error in ended if not _NEWS.search(error.cause)] or ended
    ended = _once(sorted(ended, key=lambda error: (error.moment, error.is_follower)))
    causes = [error for error in ended if error.cause.startswith(_LOST)] or [e for e in ended if not e.is_follower]
    first = next(iter([*causes, *ended]), None)
    return Explanation(
        attempt=attempt,
        phase=phase,
        first=first,
        others=tuple(error for error in ended if error is not first),
    )


def _that_ended_it(errors: Sequence[FatalError], *, progress: float, stopped: float) -> list[FatalError]:
    """Without what the run went on after, and without what the batch script's own stopping of all steps brought about."""
    errors = [error for error in errors if error.moment <= stopped]
    last = [error for error in errors if error.moment >= progress]
    # A worker may have failed before the last step's row was written, and its death be noticed after.
    named = {match[0] for error in last if error.is_follower and (match := _WORKER.search(error.cause))}
    return [error for error in errors if error.moment >= progress or error.file.stem in named] or errors


def _last_step(job: Path, logs: Sequence[Log]) -> float:
    """When the run last told of a step: in a line with a time, or by a row of its metrics."""
    year = time.localtime().tm_year
    lines = (line for log in logs for line in log.lines if _PROGRESS.search(line))
    told = [moment for line in lines if (moment := line_time(line, year=year)) is not None]
    with contextlib.suppress(ConfigError, OSError):  # no step was ever done
        told.append((Path(read_job(job).run_folder) / "metrics.jsonl").stat().st_mtime)
    return max(told, default=0.0)


def _stopped(logs: Sequence[Log]) -> float:
    """When the batch script took the attempt for ended and stopped what still ran; never, where it did not."""
    for batch in (log for log in logs if log.path.name == "batch.log"):
        for line, moment in zip(batch.lines, batch.times, strict=True):
            if _BATCH_ENDS.match(line):
                return moment
    return math.inf


def explain_output(output: Path) -> Explanation:
    """The first cause as far as SLURM's own output file tells it: of a job that could make no folder."""
    log = read_output(output)
    errors = _once(sorted(scan_log(log), key=lambda error: (error.moment, error.is_follower)))
    first = next((error for error in errors if not error.is_follower), errors[0] if errors else None)
    others = tuple(error for error in errors if error is not first)
    return Explanation(attempt=output, phase="", first=first, others=others)


def scan_log(log: Log) -> list[FatalError]:
    """The fatal lines of a log, in its order."""
    errors: list[FatalError] = []
    number = 0
    # The doctor's table says the same as its lines, cut to columns.
    is_told = log.phase == CHECKS and any(_OWN.search(line) for line in log.lines)
    while number < len(log.lines):
        line, start = _RAY_PREFIX.sub("", log.lines[number]), number
        if is_told and not _OWN.search(line):
            number += 1
            continue
        found = _of_line(line)
        if line.rstrip().endswith(_TRACEBACK):
            number, found = _of_traceback(log.lines, number)
        if found is not None:
            errors.append(
                FatalError(
                    host=found.host or log.host,
                    phase=found.phase or _phase_before(log.lines, start) or log.phase,
                    cause=found.cause,
                    remedy=found.remedy,
                    file=log.path,
                    line=log.first_line + number,
                    moment=log.times[number],
                    is_follower=found.is_follower,
                )
            )
        number += 1
    return errors


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    cause: str
    remedy: str
    is_follower: bool = False
    host: str = ""
    phase: str = ""


def _of_line(line: str) -> _Found | None:
    if match := _OWN.search(line):
        cause, remedy = _split(match["text"])
        return _Found(
            cause=cause, remedy=remedy, host=match["host"], phase=match["phase"], is_follower=_tells_of_another(cause)
        )
    if match := _OWN_SHORT.match(line):
        cause, remedy = _split(match["text"])
        if (worker := _WORKER.search(cause)) and (known := find_known(line)):
            cause, remedy = f"{worker[0]} failed: {known[0]}", known[1]
        return _Found(cause=cause, remedy=remedy, is_follower=_tells_of_another(cause))
    known = find_known(line)
    if known is None:
        return None
    named = _NODE_NAMED.search(line)
    return _Found(
        cause=known[0],
        remedy=known[1],
        is_follower=known[2],
        host=named["host"] if named else "",
    )


def _tells_of_another(cause: str) -> bool:
    """Of a worker, whose own log has the cause, or nothing when it was killed; or of another log altogether."""
    return bool(_OF_ANOTHER.search(cause))


def _split(text: str) -> tuple[str, str]:
    cause, semicolon, remedy = text.rpartition("; ")
    return (cause, remedy) if semicolon else (text, _OTHER)


def _of_traceback(lines: Sequence[str], start: int) -> tuple[int, _Found | None]:
    """(number of the traceback's last line, what it tells). Of a chain of tracebacks the last one counts."""
    number, place, found = start + 1, "", (start, None)
    while number < len(lines):
        line = _RAY_PREFIX.sub("", lines[number])
        if match := re.match(r'\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in ', line):
            place = f"{Path(match['file']).name}:{match['line']}"
        elif line and not line[0].isspace() and not line.rstrip().endswith(_TRACEBACK):
            if not (exception := _EXCEPTION.match(line)) and not re.match(r"^[A-Za-z_][\w.]*(?::|$)", line):
                break
            name = exception["name"] if exception else line.partition(":")[0]
            found = number, _of_exception(line, name, place)
            if not _chain_goes_on(lines, number):
                break
            number = _chain_goes_on(lines, number)
        number += 1
    return found


def _of_exception(line: str, name: str, place: str) -> _Found | None:
    if name in ("KeyboardInterrupt", "SystemExit"):
        return None
    if known := find_known(line, is_exception=True):
        return _Found(cause=known[0], remedy=known[1], is_follower=known[2])
    cause, remedy = _split(" ".join(line.split()))
    return _Found(
        cause=f"{cause} (at {place})" if place else cause, remedy=remedy, is_follower=_tells_of_another(cause)
    )


def _chain_goes_on(lines: Sequence[str], number: int) -> int:
    """Number of the next traceback of the chain that follows line `number`, 0 where there is none."""
    for following in range(number + 1, min(number + 6, len(lines))):
        if re.search(
            r"The above exception was the direct cause|During handling of the above exception", lines[following]
        ):
            return following
    return 0


def _phase_before(lines: Sequence[str], number: int) -> str:
    """A worker logs "failed in METHOD" before its traceback."""
    match = _FAILED_IN.search(lines[number - 1].rstrip()) if number else None
    return match["phase"] if match else ""


def _once(errors: Iterable[FatalError]) -> list[FatalError]:
    """Without repetitions of the same cause of the same host."""
    first: dict[tuple[str, str], FatalError] = {}
    for error in errors:
        first.setdefault((error.host, error.cause), error)
    return list(first.values())


def _at_its_worker(error: FatalError, hosts: Mapping[str, str]) -> FatalError:
    """The driver tells of a worker by its name: the error belongs to the worker's host, where its log tells that."""
    named = _WORKER.search(error.cause)
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
