"""Laws of a run whose engines die: it completes every step, and its numbers are those of a run whose engines live."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
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


def _rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _worker_of(engine: int) -> int:
    """The second of an engine's worker processes."""
    return [child.pid for child in psutil.Process(engine).children() if "Worker" in " ".join(child.cmdline())][1]


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


def _stop(run: Path, process: subprocess.Popen[str], log: str, *, seen: str, caught: str) -> int:
    """Stop an engine in phase `seen` so that it hangs in `caught` of the same step; its process.

    One that was quicker than the signal goes on, and is caught in a later step.
    """
    while True:
        assert process.poll() is None, process.communicate()
        step, _, phase = _phase(run).partition(" ")
        if phase != seen or int(step) < 3:  # the first sync is not survived
            time.sleep(0.002)
            continue
        pid = _processes(run)[log]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5)  # what else there is to do needs a fraction of it
        if _phase(run) == f"{step} {caught}":
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


def test_engines_that_hang_are_killed_and_started_again_with_their_stacks_told(write_recipe, tmp_path, undisturbed):
    """One in generation, and later the other in a weight sync."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, "run", worker_timeout_s=20)
    process = start_clipo("train", recipe, *OVERRIDES, "sync.timeout_s=20")
    hung = [
        _stop(run, process, "engine_1.log", seen="generate", caught="generate"),
        _stop(run, process, "engine_0.log", seen="train", caught="sync"),
    ]
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}\n{err}"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["rollout/engine_restarts"] == 2
    told = (run / "driver.log").read_text()
    assert "generate: not done after 20 s: engine_1; the others are" in told, told
    assert "engine_1 is stopped" in told
    assert "sync begin: not done after 20 s: engine_0; the others are" in told, told
    assert "engine_0 is stopped" in told
    assert "most recent call first" in (run / "logs" / "policy_0.log").read_text()
    assert not [pid for pid in hung if _is_alive(pid)]
    assert _metrics(run) == _metrics(undisturbed)


def test_an_engine_that_loses_one_of_its_workers_is_started_again_with_all(write_recipe, tmp_path):
    """Its own process lives on, and tells of the worker: one is killed in a generation, and later one is stopped in a sync."""
    run = tmp_path / "run"
    recipe, overrides = write_recipe(tmp_path, "run"), ("layout.world_size=1", "layout.tp=1", "rollout.tp=2")
    process = start_clipo("train", recipe, *overrides, f"run.steps={STEPS}", "checkpoint.every=0", "sync.timeout_s=20")
    lost = []
    for restarts, (phase, number) in enumerate((("generate", signal.SIGKILL), ("train", signal.SIGSTOP))):
        first = len(_rows(run)) + 2  # the first sync is not survived, and each engine is to answer before it dies
        while not (_phase(run).endswith(f" {phase}") and int(_phase(run).split()[0]) >= first):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        log = f"engine_0.restart{restarts}.log" if restarts else "engine_0.log"
        lost.append(_worker_of(_processes(run)[log]))
        os.kill(lost[-1], number)
        while f"engine_0.restart{restarts + 1}.log" not in _processes(run):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}\n{err}"
    rows = _rows(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["rollout/engine_restarts"] == 2
    told = (run / "driver.log").read_text()
    assert "an engine worker of 2 died, failed or is late in generate" in told, told
    assert re.search(r"engine worker [01] of 2: clipo_\w+: not done after 2\d s", told), told
    assert not [pid for pid in (*lost, *_processes(run).values()) if _is_alive(pid)]


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
