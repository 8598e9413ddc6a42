"""Level node: whether the time that is left of a job holds steps as long as those of earlier attempts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.doctor.finding import Finding, fail, ok, skip, warn

_LAST_ROWS = 50
"""Of the metrics that are looked at: pace changes over a run, as responses grow longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """The slowest of an earlier attempt's last steps and saves, in seconds."""

    step_s: float
    save_s: float
    """0 where none was measured."""


def check_time(environment: Mapping[str, str], pace: Pace | None, *, now: float | None = None) -> Finding:
    """The time that is left of the job against the slowest step of an earlier attempt and a save after it.

    One step an attempt is progress, though slow: only where no step fits does the run end without any.
    """
    name, end = "job time", environment.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        return skip(name, "no job of SLURM that tells its end")
    left = int(end) - (time.time() if now is None else now)
    if pace is None:
        return ok(name, f"{left / 60:.0f} minutes left; no step was measured yet")
    cause = (
        f"{left / 60:.0f} minutes left, the slowest step so far took {pace.step_s / 60:.1f} minutes and the slowest save "
        f"{pace.save_s / 60:.1f}"
    )
    if left < pace.step_s + pace.save_s:
        return fail(name, cause, "ask for more time (--time): no step and its save would end")
    if left < 2 * pace.step_s + pace.save_s:
        return warn(name, cause, "ask for more time (--time): one step would end, and each attempt begins with loading")
    return ok(name, cause)


def read_pace(metrics: Path) -> Pace | None:
    """Of a run's metrics; None: no step is in them."""
    if not metrics.is_file():
        return None
    rows = [_row(line) for line in metrics.read_text(errors="replace").splitlines()[-_LAST_ROWS:]]
    steps = [row["seconds/step"] for row in rows if "seconds/step" in row]
    saves = [row.get("checkpoint/snapshot_seconds", 0.0) + row.get("checkpoint/write_seconds", 0.0) for row in rows]
    return Pace(step_s=max(steps), save_s=max(saves)) if steps else None


def _row(line: str) -> dict[str, float]:
    """Its numbers; none of a line that a killed run has not ended."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return {k: v for k, v in content.items() if isinstance(v, int | float)} if isinstance(content, dict) else {}
