"""How far a job is: out of its folder and its run's metrics. Loads without torch."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

from clipo_megatron.slurm.job_folder import LOST_FILE, PHASE_FILE, Job, attempts

UNKNOWN_STATE = "unknown"
"""Where there is no SLURM, or it has forgotten the job."""
_RECENT = 10
_SCONTROL_S = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class JobProgress:
    """Of one job."""

    state: str
    """SLURM's word, or `UNKNOWN_STATE`."""
    attempt: int
    """From 0; -1 before the first."""
    phase: str
    """Of the batch script; empty before it began."""
    step: int
    """Steps done."""
    steps: int
    """Of the whole run; 0 where the run has not begun."""
    doing: str
    """What the run is at, as "train in step 7"; empty where it has not begun."""
    step_s: float | None
    """Median of the last steps; None before the first."""
    checkpoint: str
    """Name of the newest; empty: none."""
    lost_nodes: str
    """Of the job's nodes, before the attempt began: "n2,n5"; empty: none."""

    @property
    def left_s(self) -> float | None:
        """Until the last step, at the pace of the last ones."""
        return None if self.step_s is None else self.step_s * max(0, self.steps - self.step)


class Slurm:
    """What SLURM tells of jobs. One that has not answered in time is not asked again: there may be many jobs."""

    def __init__(self) -> None:
        self._is_silent = False

    def words(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells of a job: JobState, Reason, StdOut ...; empty where SLURM does not know it."""
        shown = "" if self._is_silent else self._ask(number)
        words: dict[str, str] = {}
        for name, equals, value in (word.partition("=") for word in shown.splitlines()[0].split()) if shown else ():
            if equals:
                words.setdefault(name, value)
        return words

    def state(self, number: str) -> str:
        """State of a job, as RUNNING, or `UNKNOWN_STATE`."""
        return self.words(number).get("JobState", UNKNOWN_STATE)

    def _ask(self, number: str) -> str:
        command = ["scontrol", "--oneliner", "show", "job", number]
        try:
            return subprocess.run(command, text=True, capture_output=True, timeout=_SCONTROL_S, check=False).stdout
        except subprocess.TimeoutExpired:
            self._is_silent = True
        except OSError:  # no SLURM here
            pass
        return ""


def job_progress(folder: Path, job: Job, slurm: Slurm) -> JobProgress:
    """Read a job's folder and the folder of its run.

    Args:
        folder: of the job.
        job: of its job.json.
        slurm: to ask.
    """
    run = Path(job.run_folder)
    found = attempts(folder)
    rows = _rows(run / "metrics.jsonl")
    seconds = [row["seconds/step"] for row in rows[-_RECENT:] if _is_positive(row.get("seconds/step"))]
    at = _text(run / PHASE_FILE).split()
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    return JobProgress(
        state=slurm.state(folder.name),
        attempt=len(found) - 1,
        phase=_text(found[-1] / PHASE_FILE).strip() if found else "",
        step=int(rows[-1]["step"]) if rows else 0,
        steps=_steps(run / "recipe.yaml"),
        doing=f"{at[1]} in step {at[0]}" if len(at) == 2 else "",
        step_s=statistics.median(seconds) if seconds else None,
        checkpoint=checkpoints[-1] if checkpoints else "",
        lost_nodes=_text(found[-1] / LOST_FILE).strip() if found else "",
    )


def slurm_progress(folder: Path, slurm: Slurm) -> tuple[str, JobProgress]:
    """(name, progress) of a job that has no job.json yet, as far as SLURM and what its folder has tell.

    Args:
        folder: of the job, whether it is there or not.
        slurm: to ask.
    """
    words, found = slurm.words(folder.name), attempts(folder)
    reason = words.get("Reason", "None")
    return words.get("JobName", ""), JobProgress(
        state=words.get("JobState", UNKNOWN_STATE) + (f" ({reason})" if reason != "None" else ""),
        attempt=len(found) - 1,
        phase=_text(found[-1] / PHASE_FILE).strip() if found else "",
        step=0,
        steps=0,
        doing="",
        step_s=None,
        checkpoint="",
        lost_nodes="",
    )


def _rows(path: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # being written
        rows += [row] if isinstance(row, dict) and _is_positive(row.get("step")) else []
    return rows


def _is_positive(value: object) -> bool:
    """A number that can be a step, or the seconds of one; a damaged file may have anything."""
    return isinstance(value, int | float) and 0 < value < math.inf


def _steps(path: Path) -> int:
    try:
        return int(yaml.safe_load(_text(path))["run"]["steps"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError):
        return 0  # not there yet, or being written


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
