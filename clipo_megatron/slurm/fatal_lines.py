"""The fatal lines of one log: what each tells, when, of which host. Which one ended the job is chosen in `slurm.why`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.slurm.job_logs import CHECKS, Log
from clipo_megatron.slurm.known_errors import Meaning, find_known
from clipo_megatron.slurm.log_times import is_dated

WORKER = re.compile(r"\b(?:policy|engine)_\d+\b")
LOST = "the node was lost: "
"""Of the batch script, after all others have told of it what they saw."""
_OWN = re.compile(r"clipo: error: (?P<host>[^:\s]+): (?P<phase>[^:]+): (?P<text>.*)")
_OWN_SHORT = re.compile(r"^clipo: (?!error: )(?P<text>.+)")
_OWN_END = re.compile(rf"^{LOST}|\bSLURM ended the attempt on ")
_FAILED_IN = re.compile(r"\bfailed in (?P<phase>\w+)$")
_TRACEBACK = "Traceback (most recent call last):"
_OPENS_TRACEBACK = re.compile(r"\b(?:WARNING|ERROR|CRITICAL)\b")
_EXCEPTION = re.compile(
    r"^(?:[\w.]+: )?(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Failure|Timeout|Full|Empty))\b(?P<text>.*)"
)
_RAY_PREFIX = re.compile(r"^(?:\x1b\[\d+m)*\((?:\w+ )?pid=\d+[^)]*\)(?:\x1b\[\d+m)* ?")
_NODE_NAMED = re.compile(
    r"(?:Node failure on |slurmstepd(?:-\S+)?: error: .* ON |srun: error: (?=\S+: task))(?P<host>[A-Za-z][\w.-]*)"
)
_OF_ANOTHER = re.compile(
    r"\b(?:policy_\d+|engine_\d+|rank \d+)\S* (?:died|failed)\b|: not done after \d+ s|, see (?:above|/)|a node does not answer"
)
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
    is_end: bool = False
    """It tells of the end of the attempt itself: nothing of the run went on after it."""


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
                    moment=_moment(log, start, number),
                    is_follower=found.is_follower,
                    is_end=found.is_end,
                )
            )
        number += 1
    return errors


def _moment(log: Log, start: int, number: int) -> float:
    """When the fatal line `number` was written: of a traceback that begins at `start`, as the record that opens it tells."""
    before = log.lines[start - 1] if start < number and start else ""
    opens = not is_dated(log.lines[number]) and is_dated(before) and _OPENS_TRACEBACK.search(before)
    return log.times[start - 1] if opens else log.times[number]


def _of_line(line: str) -> Meaning | None:
    if match := _OWN.search(line):
        cause, remedy = _split(match["text"])
        return Meaning(
            cause=cause,
            remedy=remedy,
            host=match["host"],
            phase=match["phase"],
            is_follower=_tells_of_another(cause),
            is_end=bool(_OWN_END.search(cause)),
        )
    if match := _OWN_SHORT.match(line):
        cause, remedy = _split(match["text"])
        if (worker := WORKER.search(cause)) and (known := find_known(line)):
            cause, remedy = f"{worker[0]} failed: {known.cause}", known.remedy
        return Meaning(cause=cause, remedy=remedy, is_follower=_tells_of_another(cause))
    known, named = find_known(line), _NODE_NAMED.search(line)
    return replace(known, host=named["host"]) if known and named else known


def _tells_of_another(cause: str) -> bool:
    """Of a worker, whose own log has the cause, or nothing when it was killed; or of another log altogether."""
    return bool(_OF_ANOTHER.search(cause))


def _split(text: str) -> tuple[str, str]:
    cause, semicolon, remedy = text.rpartition("; ")
    return (cause, remedy) if semicolon else (text, _OTHER)


def _of_traceback(lines: Sequence[str], start: int) -> tuple[int, Meaning | None]:
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


def _of_exception(line: str, name: str, place: str) -> Meaning | None:
    if name in ("KeyboardInterrupt", "SystemExit"):
        return None
    if known := find_known(line, is_exception=True):
        return known
    cause, remedy = _split(" ".join(line.split()))
    return Meaning(
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
