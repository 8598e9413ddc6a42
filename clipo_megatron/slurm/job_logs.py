"""All logs of one attempt of a job: of the batch script, the doctor, Ray, the driver and the workers, with lines' times."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.job_folder import attempts, read_job
from clipo_megatron.slurm.log_times import is_dated, line_times

LARGEST_BYTES = 32 << 20
"""Of a log: of a larger one its end is read."""
_CHUNK_BYTES = 1 << 20
UNKNOWN_HOST = "?"
CHECKS = "checks"
COMPARISON = "doctor-compare.log"
"""What the doctor says of all nodes together, told on the first one."""
_HOST_OF_WORKER = re.compile(r"\bprocess \d+ on (?P<host>[\w.-]+)")
_ATTEMPT_BEGINS = re.compile(r"\bchecks job \d+, attempt (?P<number>\d+), nodes (?P<nodes>\S+?),? ")
_FIRST_OF_LIST = re.compile(r"^(?:[^\[\],]|\[[^\]]*\])+")
_NUMBERS = re.compile(r"\[(\d+)[^\]]*\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """One log, or what of it belongs to the attempt."""

    path: Path
    host: str
    phase: str
    lines: Sequence[str]
    times: Sequence[float]
    """Unix time of each line."""
    first_line: int = 1
    """Number of `lines[0]` in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """When an attempt ran, as the batch scripts told."""

    begin: float
    """Unix time; 0 where it is unknown."""
    end: float
    """Of all that can be its own: when the run was started the next time, by this job or another; infinite where it was not."""
    host: str
    """The attempt's first node, or `UNKNOWN_HOST`."""

    def holds(self, moment: float) -> bool:
        """Whether something was written by this attempt; times have whole seconds in some logs."""
        return self.begin - 1 <= moment < self.end


def find_span(job: Path, attempt: Path) -> Span:
    """When an attempt began, and when its run was started the next time.

    Args:
        job: folder of the job, beside those of others.
        attempt: folder of the attempt, in it.
    """
    begin, host = _beginning(attempt / "batch.log")
    found = attempts(job)
    later = found[found.index(attempt) + 1 :] if attempt in found else []
    # The same command, submitted again, goes on in the same run's folder.
    with contextlib.suppress(ConfigError, OSError):
        run = read_job(job).run_folder
        later += [path for folder in job.parent.iterdir() if folder != job for path in _attempts_of_run(folder, run)]
    begins = [_beginning(path / "batch.log")[0] for path in later]
    return Span(begin=begin, end=min((other for other in begins if other > begin > 0), default=math.inf), host=host)


def _attempts_of_run(folder: Path, run: str) -> list[Path]:
    try:
        return attempts(folder) if read_job(folder).run_folder == run else []
    except ConfigError:  # no folder of a job
        return []


def read_logs(job: Path, attempt: Path, span: Span, *, output: Path | None = None) -> list[Log]:
    """The logs of an attempt; a file that can't be read is left out.

    Args:
        job: folder of the job.
        attempt: folder of the attempt, in it.
        span: of the attempt.
        output: SLURM's own output file of the job, which all attempts append to.
    """
    number = int(attempt.name.rpartition("-")[2])
    batch = attempt / "batch.log"
    logs = [_log(batch, host=span.host, phase="batch")]
    for path in sorted(attempt.glob("*.log")):
        if path != batch:
            host, phase = _host_and_phase(path, span.host)
            logs.append(_log(path, host=host, phase=phase))
    if output is not None:
        logs.append(_of_attempt(_log(output, host=span.host, phase="batch"), number))
    for path in _worker_logs(job, attempt):
        log = _within(span, _log(path, host=UNKNOWN_HOST, phase=path.stem))
        named = [match["host"] for line in log.lines if (match := _HOST_OF_WORKER.search(line))]
        logs.append(replace(log, host=named[-1] if named else UNKNOWN_HOST))
    return [log for log in logs if log.lines]


def read_run_log(run: Path, span: Span) -> Log:
    """What the run's driver logged in an attempt: its steps, with their times.

    Args:
        run: folder of the run.
        span: of the attempt.
    """
    return _within(span, _log(run / "driver.log", host=span.host, phase="driver"))


def read_output(output: Path) -> Log:
    """SLURM's own output file of a job, all attempts."""
    return _log(output, host=UNKNOWN_HOST, phase="batch")


def choose_attempt(job: Path, number: int | None) -> Path:
    """Folder of an attempt of a job, the newest one by default.

    Raises:
        ConfigError: there is none.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in attempts(job)}
    if number is None and found:
        return found[max(found)]
    if number is None or number not in found:
        wanted = "no attempt" if number is None else f"no attempt {number}"
        numbers = ", ".join(map(str, sorted(found))) or "none"
        raise ConfigError(
            f"{job}: {wanted} of a job there, found {numbers}; give a job's number, and set CLIPO_JOBS_DIR as the job had it, "
            "here or in slurm/site.env"
        )
    return found[number]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "n[1-4,7]", "n1,n2" or "r[1-2]n[3-4]-ib"."""
    match = _FIRST_OF_LIST.match(nodes)
    return _NUMBERS.sub(r"\1", match[0]) if match else UNKNOWN_HOST


def _worker_logs(job: Path, attempt: Path) -> Iterator[Path]:
    yield from sorted(path for path in attempt.glob("workers/**/*") if path.is_file())
    try:
        run = Path(read_job(job).run_folder)
    except ConfigError:
        return
    yield from sorted(path for path in (run / "logs").glob("*") if path.is_file())


def _log(path: Path, *, host: str, phase: str) -> Log:
    lines, written, passed_over = [], 0.0, 0
    with contextlib.suppress(OSError), path.open("rb") as file:
        size, written = path.stat().st_size, path.stat().st_mtime
        while (left := size - LARGEST_BYTES - file.tell()) > 0:
            passed_over += file.read(min(left, _CHUNK_BYTES)).count(b"\n")
        # Of what a bar has written over itself on a line, its last state; and no other character ends a line, as for grep.
        text = file.read().decode(errors="replace").removesuffix("\n")
        lines = [line.removesuffix("\r").rpartition("\r")[2] for line in text.split("\n")] if text else []
    times = line_times(lines, written=written)
    return Log(path=path, host=host, phase=phase, lines=lines, times=times, first_line=passed_over + 1)


def _beginning(batch: Path) -> tuple[float, str]:
    """(when an attempt began, its first node) as the batch script told."""
    log = _log(batch, host=UNKNOWN_HOST, phase="batch")
    for line, moment in zip(log.lines, log.times, strict=True):
        if match := _ATTEMPT_BEGINS.search(line + " "):
            return moment, first_host(match["nodes"])
    return (log.times[0] if log.times else 0.0), UNKNOWN_HOST


def _of_attempt(log: Log, number: int) -> Log:
    """The part of SLURM's output file that an attempt wrote."""
    begins = {int(m["number"]): n for n, line in enumerate(log.lines) if (m := _ATTEMPT_BEGINS.search(line + " "))}
    # What stands before the first attempt's words belongs to it.
    start = begins.get(number, 0) if number else 0
    stop = next((begins[later] for later in sorted(begins) if later > number), len(log.lines))
    return Log(
        path=log.path,
        host=log.host,
        phase=log.phase,
        lines=log.lines[start:stop],
        times=log.times[start:stop],
        first_line=log.first_line + start,
    )


def _within(span: Span, log: Log) -> Log:
    """The part of a log that an attempt wrote: a line without a time belongs to the record before it.

    The first lines belong to the record after them; a file without any times is all of its last writing's.
    """
    dated = [number for number, line in enumerate(log.lines) if is_dated(line)]
    inside = [number for number in dated if span.holds(log.times[number])]
    first, stop = 0, len(log.lines)
    if inside:
        first = 0 if inside[0] == dated[0] else inside[0]
        stop = next((number for number in dated if number > inside[-1]), stop)
    elif dated or not log.times or not span.holds(log.times[-1]):
        stop = 0
    # The last lines have the time of a record that is the next attempt's.
    times = [min(moment, span.end) for moment in log.times[first:stop]]
    return replace(log, lines=log.lines[first:stop], times=times, first_line=log.first_line + first)


def _host_and_phase(path: Path, first: str) -> tuple[str, str]:
    if path.name == COMPARISON:
        return first, CHECKS
    for prefix, phase in (("doctor-", CHECKS), ("fabric-", CHECKS), ("ray-", "ray")):
        if path.name.startswith(prefix):
            return path.name.removeprefix(prefix).removesuffix(".log"), phase
    return first, path.stem
