"""Laws of a run whose engines die: it completes every step, and its numbers are those of a run whose engines live."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import run_clipo, start_clipo

STEPS = 16
OVERRIDES = ("layout.world_size=1", "layout.tp=1", "rollout.engines=2", f"run.steps={STEPS}", "checkpoint.every=3")
VOLATILE = ("seconds/", "checkpoint/", "sync/")


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in row.items()
            if not key.startswith(VOLATILE) and not key.endswith("_per_s") and key != "rollout/engine_restarts"
        }
        for row in rows
    ]


def _processes(run: Path) -> dict[str, int]:
    """Process of each log of an engine, those of earlier processes included."""
    found = {}
    for log in sorted((run / "logs").glob("engine_*.log")):
        if told := re.search(r"engine \d is process (\d+)", log.read_text()):
            found[log.name] = int(told[1])
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _stop_in_generation(run: Path, process: subprocess.Popen[str], log: str) -> int:
    """Stop an engine while it owes an answer; its process. One that was quicker goes on and is caught in a later step."""
    while True:
        assert process.poll() is None, process.communicate()
        phase = _phase(run)
        if not phase.endswith(" generate") or int(phase.split()[0]) < 3:  # the first steps wait for much else
            time.sleep(0.002)
            continue
        pid = _processes(run)[log]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5)  # the other engine's answer needs a fraction of it
        if _phase(run) == phase:
            return pid
        os.kill(pid, signal.SIGCONT)


def _phase(run: Path) -> str:
    return (run / "phase").read_text().strip() if (run / "phase").exists() else ""


@pytest.fixture(scope="module")
def undisturbed(write_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    # Which engine makes a rollout does not matter for it.
    run_clipo("train", write_recipe(folder, "run"), *OVERRIDES, "rollout.engines=1")
    return folder / "run"


def test_an_engine_that_dies_while_another_is_started_again_is_started_again_as_well(
    write_recipe, tmp_path, undisturbed
):
    """Here slices are sent to the engines, so after each restart all meet anew."""
    run = tmp_path / "run"
    process = start_clipo("train", write_recipe(tmp_path, "run"), *OVERRIDES, "sync.transport=gloo")
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(_processes(run)["engine_0.log"], signal.SIGKILL)
    while "engine_0.restart1.log" not in _processes(run):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(_processes(run)["engine_1.log"], signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}\n{err}"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["rollout/engine_restarts"] == 2
    assert _metrics(run) == _metrics(undisturbed)
    # Nothing of the dead is left.
    assert not [pid for pid in _processes(run).values() if _is_alive(pid)]


def test_an_engine_that_hangs_is_killed_and_started_again_with_its_stacks_told(write_recipe, tmp_path, undisturbed):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, "run", worker_timeout_s=20)
    process = start_clipo("train", recipe, *OVERRIDES)
    hung = _stop_in_generation(run, process, "engine_1.log")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}\n{err}"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["rollout/engine_restarts"] == 1
    told = (run / "driver.log").read_text()
    assert "generate: not done after 20 s: engine_1; the others are" in told, told
    assert "engine_1 is stopped" in told
    assert "most recent call first" in (run / "logs" / "policy_0.log").read_text()
    assert not _is_alive(hung)
    assert _metrics(run) == _metrics(undisturbed)


def test_an_engine_that_dies_at_once_again_and_again_ends_the_run_with_its_name_and_log(write_recipe, tmp_path):
    run = tmp_path / "run"
    process = start_clipo("train", write_recipe(tmp_path, "run"), *OVERRIDES, "rollout.engines=1")
    killed: set[int] = set()
    while process.poll() is None:
        # Of the first start no engine comes back: what ends it there is the recipe's or the machine's fault.
        started = (run / "metrics.jsonl").exists()
        for log, pid in _processes(run).items():
            if started and log.startswith("engine_0") and pid not in killed and _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.1)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "engine_0" in err
    assert f"{run}/logs" in err
    assert "death 3 of engine_0 in a row" in err
    assert len(killed) == 3
