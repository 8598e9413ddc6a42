"""All logs of one attempt of a job: of the batch script, the doctor, Ray, the driver and the workers, with lines' times."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.job_folder import attempts, read_job
from clipo_megatron.slurm.log_times import line_times

LARGEST_BYTES = 32 << 20
"""Of a log: of a larger one its end is read."""
UNKNOWN_HOST = "?"
CHECKS = "checks"
COMPARISON = "doctor-compare.log"
"""What the doctor says of all nodes together, told on the first one."""
_HOST_OF_WORKER = re.compile(r"\bprocess \d+ on (?P<host>[\w.-]+)")
_ATTEMPT_BEGINS = re.compile(r"\bchecks job \d+, attempt (?P<number>\d+), nodes (?P<nodes>\S+?),? ")
_FIRST_OF_LIST = re.compile(r"^(?P<stem>[^\[,]+)(?:\[(?P<number>\d+))?")


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


def read_logs(job: Path, attempt: Path, *, output: Path | None = None) -> list[Log]:
    """The logs of an attempt; a file that can't be read is left out.

    Args:
        job: folder of the job.
        attempt: folder of the attempt, in it.
        output: SLURM's own output file of the job, which all attempts append to.
    """
    number = int(attempt.name.rpartition("-")[2])
    batch = attempt / "batch.log"
    start, first_host = _beginning(batch)
    logs = [_log(batch, host=first_host, phase="batch")]
    for path in sorted(attempt.glob("*.log")):
        if path != batch:
            host, phase = _host_and_phase(path, first_host)
            logs.append(_log(path, host=host, phase=phase))
    if output is not None:
        logs.append(_of_attempt(_log(output, host=first_host, phase="batch"), number))
    for path in _worker_logs(job, attempt):
        log = _log(path, host=UNKNOWN_HOST, phase=path.stem)
        named = [match["host"] for line in log.lines if (match := _HOST_OF_WORKER.search(line))]
        logs.append(_since(start, _with_host(log, named[-1] if named else UNKNOWN_HOST)))
    return [log for log in logs if log.lines]


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
            f"{job}: {wanted} of a job there, found {numbers}; give a job's number, and set CLIPO_JOBS_DIR as the job had it"
        )
    return found[number]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "n[1-4,7]" or "n1,n2"."""
    match = _FIRST_OF_LIST.match(nodes)
    return f"{match['stem']}{match['number'] or ''}" if match else UNKNOWN_HOST


def _worker_logs(job: Path, attempt: Path) -> Iterator[Path]:
    yield from sorted(path for path in attempt.glob("workers/**/*") if path.is_file())
    try:
        run = Path(read_job(job).run_folder)
    except ConfigError:
        return
    yield from sorted(path for path in (run / "logs").glob("*") if path.is_file())


def _log(path: Path, *, host: str, phase: str) -> Log:
    try:
        size, written = path.stat().st_size, path.stat().st_mtime
        with path.open("rb") as file:
            file.seek(max(0, size - LARGEST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines, written = [], 0.0
    return Log(path=path, host=host, phase=phase, lines=lines, times=line_times(lines, written=written))


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
        first_line=start + 1,
    )


def _since(start: float, log: Log) -> Log:
    """The part of a log that was written since an attempt began; times have whole seconds in some logs."""
    first = next((n for n, moment in enumerate(log.times) if moment >= start - 1), len(log.lines))
    return Log(
        path=log.path,
        host=log.host,
        phase=log.phase,
        lines=log.lines[first:],
        times=log.times[first:],
        first_line=first + 1,
    )


def _with_host(log: Log, host: str) -> Log:
    return Log(path=log.path, host=host, phase=log.phase, lines=log.lines, times=log.times)


def _host_and_phase(path: Path, first: str) -> tuple[str, str]:
    if path.name == COMPARISON:
        return first, CHECKS
    for prefix, phase in (("doctor-", CHECKS), ("fabric-", CHECKS), ("ray-", "ray")):
        if path.name.startswith(prefix):
            return path.name.removeprefix(prefix).removesuffix(".log"), phase
    return first, path.stem
