"""What a check of the doctor says, and the report of one host. Loads without torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from clipo_megatron.errors import ConfigError

REPORT_FORMAT = 1


class Status(StrEnum):
    """How a check ended."""

    OK = "OK"
    WARN = "WARN"
    """The run may go on and may suffer."""
    FAIL = "FAIL"
    """The run would end, or give wrong numbers."""
    SKIP = "SKIP"
    """Not looked at; the cause says why."""


_SEVERITY = (Status.OK, Status.SKIP, Status.WARN, Status.FAIL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of a report."""

    check: str
    """Name of the check, e.g. "model folder"."""
    status: Status
    cause: str
    """The key, place or device, and the value found there, in one line."""
    remedy: str = ""
    """What to do, in one line; empty where nothing is to be done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReport:
    """All findings of one host."""

    host: str
    level: str
    recipe: str
    """Path of the recipe."""
    moment: float
    """Unix time by this host's clock."""
    findings: tuple[Finding, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    """What must be equal on all hosts of a run (versions, fingerprints), by name."""

    @property
    def worst(self) -> Status:
        """The most severe status; OK of an empty report."""
        return worst_status(finding.status for finding in self.findings)


def worst_status(found: Iterable[Status]) -> Status:
    """The most severe of some: FAIL, then WARN, then SKIP."""
    return max(found, key=_SEVERITY.index, default=Status.OK)


def ok(check: str, cause: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(check=check, status=Status.OK, cause=cause)


def warn(check: str, cause: str, remedy: str) -> Finding:
    """A check that found something doubtful."""
    return Finding(check=check, status=Status.WARN, cause=cause, remedy=remedy)


def fail(check: str, cause: str, remedy: str) -> Finding:
    """A check that found what would end the run."""
    return Finding(check=check, status=Status.FAIL, cause=cause, remedy=remedy)


def skip(check: str, cause: str) -> Finding:
    """A check that could not look, and why."""
    return Finding(check=check, status=Status.SKIP, cause=cause)


def of_problems(check: str, problems: Sequence[str], *, otherwise: str) -> list[Finding]:
    """One FAIL a problem of the form "what was found; what to do"; OK with the text `otherwise` where there is none."""
    findings = []
    for problem in problems:
        cause, semicolon, remedy = " ".join(problem.split()).rpartition("; ")
        findings.append(fail(check, cause if semicolon else remedy, remedy if semicolon else "correct it"))
    return findings or [ok(check, otherwise)]


def host_name() -> str:
    """This host's name as SLURM knows it, else its own, without the domain."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def error_lines(host: str, findings: Iterable[Finding], *, phase: str = "checks") -> list[str]:
    """`clipo: error: HOST: PHASE: cause; remedy` of each finding that failed."""
    return [
        # The last semicolon parts cause and remedy.
        f"clipo: error: {host}: {phase}: {finding.cause}; {finding.remedy.replace('; ', ', ')}"
        for finding in findings
        if finding.status is Status.FAIL
    ]


def report_text(report: HostReport) -> str:
    """The report as JSON."""
    return json.dumps({"format": REPORT_FORMAT, "worst": report.worst} | asdict(report), indent=1) + "\n"


def write_report(report: HostReport, path: Path) -> None:
    """Write a report beside its place, then put it there: a reader sees a whole one or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(report_text(report))
    partial.replace(path)


def read_report(path: Path) -> HostReport:
    """Read a report that `write_report` wrote.

    Raises:
        ConfigError: it is none.
    """
    try:
        content = json.loads(path.read_text())
        return HostReport(
            host=str(content["host"]),
            level=str(content["level"]),
            recipe=str(content["recipe"]),
            moment=float(content["moment"]),
            findings=tuple(
                Finding(
                    check=str(found["check"]),
                    status=Status(found["status"]),
                    cause=str(found["cause"]),
                    remedy=str(found["remedy"]),
                )
                for found in content["findings"]
            ),
            facts={str(name): str(value) for name, value in content["facts"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is no report of `clipo doctor` ({error}); run it again on that host") from error
