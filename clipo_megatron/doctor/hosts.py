"""The reports of several hosts against each other: what must be equal and is not, whose clock is off, who is missing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipo_megatron.doctor.finding import Finding, HostReport, fail, ok, read_report, warn
from clipo_megatron.errors import ConfigError

CLOCK_FACT = "clock ahead"
_CLOCK_WARN_S, _CLOCK_FAIL_S = 2.0, 60.0
_ABSENT = "none"
_REMEDIES = {
    "package": "install the same version on all nodes, or use the container",
    "python": "use the same environment on all nodes",
    "clipo_megatron code": "run the same checkout on all nodes, best from a file system that they share",
    "model weights": "put the same model folder under the same path on all nodes, best on a file system that they share",
    "model files": "put the same model folder under the same path on all nodes, best on a file system that they share",
    "data": "put the same data files under the same path on all nodes, best on a file system that they share",
    "run.": "start all nodes with the same recipe and the same overrides",
    "recipe": "start all nodes with the same recipe and the same overrides",
    "GPU driver": "ask the site for nodes with the same driver (--constraint), or exclude that one (--exclude)",
    "GPUs": "ask the site for nodes of one kind (--constraint), or exclude that one (--exclude)",
}


def read_reports(folder: Path) -> list[HostReport]:
    """The reports `doctor-HOST.json` of a folder, by host.

    Raises:
        ConfigError: there is none, or one is damaged.
    """
    paths = sorted(folder.glob("doctor-*.json"))
    if not paths:
        raise ConfigError(
            f"{folder}: no doctor-HOST.json there; let each node write one: clipo doctor RECIPE --report DIR"
        )
    return sorted((read_report(path) for path in paths), key=lambda report: report.host)


def compare_hosts(reports: Sequence[HostReport], *, expected: Sequence[str] = ()) -> dict[str, list[Finding]]:
    """Differences between hosts, each told of the host that differs from most of the others.

    Args:
        reports: one a host.
        expected: all hosts of the job; one without a report has failed. Empty: those that reported.

    Returns:
        Findings by host; the key "all hosts" holds what agrees.
    """
    found: dict[str, list[Finding]] = {}
    here = {report.host for report in reports}
    for host in expected:
        if host not in here:
            cause = "no report of this host: `clipo doctor` did not end there"
            remedy = f"look at doctor-{host}.log and the job's own output, and whether that host finds Python and this project"
            found.setdefault(host, []).append(fail("report", cause, remedy))
    names = sorted({name for report in reports for name in report.facts} - {CLOCK_FACT})
    equal = 0
    for name in names:
        values = {report.host: report.facts.get(name, _ABSENT) for report in reports}
        odd = _odd_hosts(values)
        equal += not odd
        for host, usual, example in odd:
            cause = f"{name}: {values[host]} on this host, {usual} on {example}"
            remedy = _remedy(name)
            found.setdefault(host, []).append(fail("same on all hosts", cause, remedy))
    for host, finding in _clock_findings(reports):
        found.setdefault(host, []).append(finding)
    if not found:
        found["all hosts"] = [ok("same on all hosts", f"{equal} facts agree on {len(reports)} hosts")]
    return found


def _odd_hosts(values: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(host, usual value, a host that has it) of each host with another value than most; of a tie, the first host's counts."""
    counts = Counter(values.values())
    most = max(counts.values())
    example = next(host for host in sorted(values) if counts[values[host]] == most)
    usual = values[example]
    return [(host, usual, example) for host, value in sorted(values.items()) if value != usual]


def _clock_findings(reports: Sequence[HostReport]) -> list[tuple[str, Finding]]:
    ahead = {report.host: float(report.facts[CLOCK_FACT]) for report in reports if CLOCK_FACT in report.facts}
    if len(ahead) < 2:
        return []
    middle = statistics.median_low(ahead.values())
    findings = []
    for host, seconds in ahead.items():
        off = seconds - middle
        if abs(off) < _CLOCK_WARN_S:
            continue
        cause = f"clock: {off:+.1f} s against the other hosts'"
        make = fail if abs(off) >= _CLOCK_FAIL_S else warn
        remedy = "let chrony or ntpd set it: logs of several nodes are put in order by time"
        findings.append((host, make("clock", cause, remedy)))
    return findings


def _remedy(name: str) -> str:
    return next(
        (remedy for prefix, remedy in _REMEDIES.items() if name.startswith(prefix)), "make it equal on all nodes"
    )
