"""Laws of a job on a real SLURM: over two nodes, told to stop, out of time, or with a node lost, the run is the same run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, metrics, told
from support.prepared_run import ROOT

STEPS = "run.steps=4"
DEATHS = 5
OF_ONE_RANK = ("layout.world_size=1", "rollout.engines=1")
ONE_ENGINE = "rollout.engines=1"
"""Which engine makes a rollout does not matter for it."""
HANDED_ON = (
    *("PATH", "CLIPO_HOME", "CLIPO_PYTHON", "CLIPO_JOBS_DIR", "CLIPO_RAY_CPUS", "CLIPO_RAY_OBJECT_STORE_BYTES"),
    *("RAY_memory_monitor_refresh_ms", "CLIPO_FABRIC", "CLIPO_DOCTOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, object]:
    """What the first test's run came to."""
    return {}


def _finish(lab, job: str, folder: Path, *, timeout_s: float = 900) -> None:
    state = lab.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)["JobState"]
    assert state == "COMPLETED", told(job, folder)


def _go_on(lab, job: str, folder: Path, *, without: str = "") -> None:
    """See that SLURM has the job in its queue again, and let it start without a pause, on other nodes than `without`."""
    if without:  # SLURM itself waits for its answer for minutes, before it lets the job go
        _wait_for_text(folder / "attempt-0" / "phase", "requeue\n")
        lab.run("scontrol", "update", f"nodename={without}", "state=down", "reason=test")
    found = lab.wait(job, "PENDING", "COMPLETED", "FAILED", timeout_s=240)
    assert (found["JobState"], found["Restarts"]) == ("PENDING", "1"), told(job, folder)
    if without:  # what is left of the old steps would cancel the new ones, which have the same numbers
        lab.wait_until_idle("n1")
    lab.restart_soon(job)
    _finish(lab, job, folder)
    assert (folder / "attempt-1" / "phase").read_text() == "done\n"


def _wait_for_phase(run: Path, step: int, phase: str) -> None:
    """Until the run is at a phase of a step, or of a later one."""
    deadline = time.monotonic() + 600
    while True:
        words = (run / "phase").read_text().split() if (run / "phase").exists() else []
        if len(words) == 2 and int(words[0]) >= step and words[1] == phase:
            return
        assert time.monotonic() < deadline, f"{run} never came to {phase} of step {step}: {words}"
        time.sleep(0.002)


def _wait_for_text(path: Path, text: str) -> None:
    """Until a file ends with a text."""
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text().endswith(text)):
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.05)


def _trained_on(run: Path) -> dict[str, list[object]]:
    """The rollouts of each step, in order."""
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run / "rollouts").glob("step_*.jsonl"))
    }


def _assert_same_run(run: Path, uninterrupted: dict[str, object]) -> None:
    assert metrics(run) == uninterrupted["metrics"]
    assert _trained_on(run) == uninterrupted["rollouts"]


def test_a_run_over_two_nodes_has_a_policy_rank_and_an_engine_on_each(lab, submit_run, tmp_path, uninterrupted):
    job, folder = submit_run("two", STEPS, CLIPO_FABRIC="on")
    _finish(lab, job, folder)
    run = tmp_path / "two"
    links = (folder / "attempt-0" / "fabric-n1.log").read_text()
    assert re.search(r"n1 +point to point dp +OK +between nodes: 1 measured", links), links
    assert re.search(r"n1 +collectives +OK +gloo of torch [\d.+a-z]+ on 2 ranks", links), links
    assert {path.name for path in (folder / "attempt-0" / "fabric").glob("*.json")} == {
        "doctor-n1.json",
        "doctor-n2.json",
    }
    assert "weight sync: planned copies (gloo)" in (run / "driver.log").read_text()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert (folder / "attempt-0" / "phase").read_text() == "done\n"
    assert json.loads((folder / "job.json").read_text())["run_folder"] == str(run)
    hosts = {
        name: (run / "logs" / f"{name}.log").read_text() for name in ("policy_0", "policy_1", "engine_0", "engine_1")
    }
    for name, host in {"policy_0": "n1", "policy_1": "n2", "engine_0": "n1", "engine_1": "n2"}.items():
        assert f"on {host}" in hosts[name].splitlines()[0], hosts[name]
    assert (run / "hf" / "final" / "model.safetensors").exists()
    shown = lab.run(
        *(sys.executable, "-m", "clipo_megatron.cli", "status", job, "--json"),
        CLIPO_JOBS_DIR=str(folder.parent),
        PYTHONPATH=str(ROOT),
    )
    status = json.loads(shown)
    assert (status["state"], status["phase"], status["step"], status["steps"]) == ("COMPLETED", "done", 4, 4)
    assert status["checkpoint"] == "step_00000004"
    uninterrupted |= {"metrics": metrics(run), "rollouts": _trained_on(run)}


def test_usr1_in_the_middle_of_a_step_saves_requeues_and_goes_on_from_there(lab, submit_run, tmp_path, uninterrupted):
    # Steps must have what the script exports, whatever sbatch was told to hand on.
    options = (f"--export={','.join(HANDED_ON)}",)
    job, folder = submit_run("told", STEPS, ONE_ENGINE, "checkpoint.every=10", options=options, CLIPO_DOCTOR="off")
    _wait_for_phase(tmp_path / "told", 2, "train")
    for _ in range(2):  # told twice is told once
        lab.run("scancel", "--batch", "--signal=USR1", job)
    _go_on(lab, job, folder)
    assert "the run was saved before its end" in (folder / "attempt-0" / "batch.log").read_text()
    _assert_same_run(tmp_path / "told", uninterrupted)
    assert "on n2" in (tmp_path / "told" / "logs" / "engine_0.log").read_text()


def test_usr1_before_the_driver_is_there_ends_the_attempt_and_a_job_that_may_not_go_on_says_so(
    lab, submit_run, tmp_path
):
    slow = tmp_path / "bin" / "srun"  # the driver's step takes its time, as in a container
    slow.parent.mkdir()
    there, begins = tmp_path / "there", tmp_path / "begins"
    wait = f"echo driver >{there}; until [[ -e {begins} ]]; do sleep 0.2; done"
    slow.write_text(f'#!/bin/bash\nif [[ "$*" == *driver.log* ]]; then {wait}; fi\nexec {shutil.which("srun")} "$@"\n')
    slow.chmod(0o755)
    path = f"{slow.parent}:{os.environ['PATH']}"
    job, folder = submit_run("early", STEPS, options=("--no-requeue",), CLIPO_DOCTOR="off", PATH=path)
    _wait_for_text(there, "driver\n")
    lab.run("scancel", "--batch", "--signal=USR1", job)
    _wait_for_text(folder / "attempt-0" / "batch.log", "asking the driver to save and stop\n")
    assert not (folder / "attempt-0" / "driver.pid").exists()
    begins.touch()
    found = lab.wait(job, "PENDING", "COMPLETED", "FAILED", timeout_s=240)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), told(job, folder)
    why = lab.run(sys.executable, "-m", "clipo_megatron.cli", "why", str(folder), PYTHONPATH=str(ROOT)).splitlines()
    assert "asked to stop while the run started, and the job may not be put back" in why[1], why
    assert "submit it again" in why[2], why


def test_a_run_that_nobody_warns_of_its_time_limit_ends_itself_in_time_and_goes_on_until_it_is_cancelled(
    lab, submit_run, tmp_path
):
    # SIGCONT, one second before the end, is no warning.
    options = ("--nodes=1", "--time=1", "--signal=B:CONT@1")
    overrides = ("run.steps=1000", "checkpoint.every=1000", *OF_ONE_RANK)
    job, folder = submit_run("limit", *overrides, options=options, CLIPO_DOCTOR="off")
    found = lab.wait(job, "PENDING", "TIMEOUT", "FAILED", "COMPLETED", timeout_s=120)
    found = lab.wait(job, "RUNNING", timeout_s=120)
    found = lab.wait(job, "PENDING", "TIMEOUT", "FAILED", "COMPLETED", timeout_s=240)
    assert found["JobState"] == "PENDING", told(job, folder)
    came_to_steps = (tmp_path / "limit" / "metrics.jsonl").exists()
    steps = [row["step"] for row in metrics(tmp_path / "limit")] if came_to_steps else []
    saved = [path.name for path in (tmp_path / "limit" / "checkpoints").glob("step_*")]
    # A busy machine may take the one minute to start again.
    lab.run("scontrol", "update", f"jobid={job}", "TimeLimit=10")
    lab.restart_soon(job)
    _wait_for_phase(tmp_path / "limit", len(steps) + 1, "train")
    lab.run("scancel", job)  # and so it stays, though the run saves and would go on
    lab.wait(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING", timeout_s=240)
    lab.wait_until_idle("n1")  # all of it has ended, the batch script too
    found = lab.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "1"), told(job, folder)
    assert (folder / "attempt-1" / "phase").read_text() == "driver\n"
    assert steps == list(range(1, len(steps) + 1))
    if not steps:  # limits are whole minutes, and a slow machine takes one to start: the end came in time anyway
        assert "time was too short for a checkpoint" in (folder / "attempt-0" / "driver.log").read_text()
    assert saved == ([f"step_{len(steps):08d}"] if steps else [])


# The first node runs the batch script; where the job has a spare one, SLURM keeps it without its script.
# Where nobody tells SLURM of a loss, the script finds out itself.
@pytest.mark.parametrize(
    ("phase", "node", "spare", "is_told"),
    [("train", "n2", 0, False), ("generate", "n1", 1, True)],
)
def test_a_job_whose_node_dies_comes_back_and_is_the_same_run(
    lab, submit_run, tmp_path, uninterrupted, phase, node, spare, is_told
):
    # With the doctor, which the run over two nodes has, each start would take ten seconds more.
    overrides = (STEPS, ONE_ENGINE, "checkpoint.every=1", "checkpoint.asynchronous=false")
    options = ("--nodes=3", "--no-kill") if spare else ()
    job, folder = submit_run("lost", *overrides, options=options, CLIPO_SPARE_NODES=str(spare), CLIPO_DOCTOR="off")
    _wait_for_phase(tmp_path / "lost", 2, phase)
    lab.kill_node(node)
    try:
        if is_told:
            lab.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        _go_on(lab, job, folder, without="" if is_told else node)
    finally:
        lab.start_node(node)
        lab.wait_until_idle(node)
    _assert_same_run(tmp_path / "lost", uninterrupted)
    why = (sys.executable, "-m", "clipo_megatron.cli", "why", job, "--attempt", "0")
    told_first = lab.run(*why, CLIPO_JOBS_DIR=str(folder.parent), PYTHONPATH=str(ROOT)).splitlines()[:3]
    assert re.match(rf"node: +{node}, in phase driver,", told_first[0]), told_first
    lost = "SLURM ended the attempt on n[1-" if is_told else "it does not answer"
    assert f"the node was lost: {lost}" in told_first[1]
    assert "attempt 1 goes on" in told_first[2]


def test_a_job_that_loses_a_node_in_a_sync_goes_on_with_a_spare_one_and_is_the_same_run(
    lab, submit_run, tmp_path, uninterrupted
):
    overrides = (STEPS, ONE_ENGINE, "checkpoint.every=1", "checkpoint.asynchronous=false")
    options = ("--nodes=3", "--no-kill")
    job, folder = submit_run("spare", *overrides, options=options, CLIPO_SPARE_NODES="1", CLIPO_DOCTOR="off")
    _wait_for_phase(tmp_path / "spare", 2, "sync")
    lab.kill_node("n2")
    try:
        lab.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
        _finish(lab, job, folder)
    finally:
        lab.start_node("n2")
        lab.wait_until_idle("n2")
    assert lab.job(job)["Restarts"] == "0"
    phases = [path.read_text() for path in sorted(folder.glob("attempt-*/phase"))]
    assert phases == ["retry\n", "done\n"], told(job, folder)
    assert sorted(path.name for path in (folder / "attempt-1").glob("ray-*.log")) == ["ray-n1.log", "ray-n3.log"]
    _assert_same_run(tmp_path / "spare", uninterrupted)
    why = (sys.executable, "-m", "clipo_megatron.cli", "why", job, "--attempt", "0")
    told_first = lab.run(*why, CLIPO_JOBS_DIR=str(folder.parent), PYTHONPATH=str(ROOT)).splitlines()[:3]
    assert re.match(r"node: +n2, in phase driver,", told_first[0]), told_first
    assert "the node was lost: it does not answer" in told_first[1]
    assert "attempt 1 goes on" in told_first[2]
    show = (sys.executable, "-m", "clipo_megatron.cli", "status", job, "--json")
    status = json.loads(lab.run(*show, CLIPO_JOBS_DIR=str(folder.parent), PYTHONPATH=str(ROOT)))
    assert (status["attempt"], status["lost_nodes"]) == (1, "n2")


def test_a_job_whose_engines_are_killed_five_times_completes_every_step_and_is_the_same_run(
    lab, submit_run, tmp_path, uninterrupted
):
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments of seed {seed}")
    moments, run = random.Random(seed), tmp_path / "killed"
    job, folder = submit_run("killed", f"run.steps={DEATHS + 2}", "checkpoint.every=2", CLIPO_DOCTOR="off")
    killed: list[tuple[str, str]] = []
    for step in range(1, DEATHS + 1):  # all engines have answered since the death before
        _wait_for_phase(run, step, "generate" if step == 1 else moments.choice(("generate", "train", "sync")))
        time.sleep(moments.uniform(0.0, 0.3))
        host, pid = moments.choice([place for place in _engines(run) if place not in killed])
        lab.on_node(host, "kill", "-KILL", pid)
        killed.append((host, pid))
        _wait_for_restarts(run, len(killed))
    _finish(lab, job, folder)
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, DEATHS + 3))
    assert rows[-1]["rollout/engine_restarts"] == DEATHS
    as_before = [{key: value for key, value in row.items() if key != "rollout/engine_restarts"} for row in rows]
    of_four = uninterrupted["metrics"]
    assert as_before[:4] == [{k: v for k, v in row.items() if k != "rollout/engine_restarts"} for row in of_four]
    assert {name: rows for name, rows in _trained_on(run).items() if name in uninterrupted["rollouts"]} == (
        uninterrupted["rollouts"]
    )


def _engines(run: Path) -> list[tuple[str, str]]:
    """(node, process there) of every engine that was started."""
    logs = [log.read_text() for log in sorted((run / "logs").glob("engine_*.log"))]
    return [(told[2], told[1]) for log in logs if (told := re.search(r"engine \d is process (\d+) on (\S+)", log))]


def _wait_for_restarts(run: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(_engines(run)) < 2 + count:
        assert time.monotonic() < deadline, f"engine {count} was not started again: {_engines(run)}"
        time.sleep(0.1)


def test_the_script_as_shipped_is_accepted_by_a_cluster_of_eight_h100_a_node(lab, tmp_path):
    said = lab.run("sbatch", "--test-only", "--nodes=4", "--gpus-per-node=8", str(SCRIPT), "recipe.yaml", check=False)
    assert "to start at" in said
    refused = lab.run("sbatch", "--test-only", "--gpus-per-node=9", str(SCRIPT), "recipe.yaml", check=False)
    assert "to start at" not in refused
