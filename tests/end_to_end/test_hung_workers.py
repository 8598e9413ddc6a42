"""Laws of a worker that hangs: it is named with the phase, all workers' stacks are on disk, and the run ends soon."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from conftest import start_clipo
from support.ray_workers import Worker, local_ray

from clipo_megatron.cluster.gather import WorkersLate, gather
from clipo_megatron.cluster.stack_dumps import dump_all, telling_stacks

DEADLINE_S = 25


@pytest.fixture
def cluster():
    with local_ray():
        yield


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_who_sleeps_is_told_with_the_call_and_who_is_stopped_as_such_and_only_they_are_killed(cluster, tmp_path):
    sleeper = ray.remote(Worker).options(name="policy_0").remote("policy_0", str(tmp_path))
    stopped = ray.remote(Worker).options(name="policy_1").remote("policy_1", str(tmp_path))
    healthy = ray.remote(Worker).options(name="engine_0.0").remote("engine_0", str(tmp_path))
    pids = {
        name: ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
        for name, actor in (("policy_0", sleeper), ("policy_1", stopped), ("engine_0", healthy))
    }
    os.kill(pids["policy_1"], signal.SIGSTOP)
    refs = {
        "policy_0": sleeper.echo.remote(0, 600),
        "policy_1": stopped.echo.remote(1),
        "engine_0": healthy.echo.remote(2),
    }
    with pytest.raises(WorkersLate) as late, telling_stacks():
        gather(refs, phase="score", timeout_s=3)
    text = str(late.value)
    assert text.startswith("score: not done after 3 s: policy_0, policy_1; the others are.")
    assert re.search(r"policy_0 is in echo \(.*ray_workers\.py:\d+\)", text)
    assert "policy_1 is stopped" in text
    for name in ("policy_0", "engine_0"):
        assert str(tmp_path / f"{name}.log") in text
        assert "Current thread" in (tmp_path / f"{name}.log").read_text()
    deadline = time.monotonic() + 60
    while (_is_alive(pids["policy_0"]) or _is_alive(pids["policy_1"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [_is_alive(pids[name]) for name in ("policy_0", "policy_1", "engine_0")] == [False, False, True]
    assert ray.get(healthy.echo.remote(3)) == 3
    assert [dump.worker for dump in dump_all()] == ["engine_0"]


def test_a_stopped_rank_ends_the_run_in_bounded_time_with_its_name_and_phase_and_nothing_is_left(
    write_recipe, tmp_path
):
    process = start_clipo("train", write_recipe(tmp_path, "run", steps=1000, worker_timeout_s=DEADLINE_S))
    run = tmp_path / "run"
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    rank = int(re.search(r"rank 1 is process (\d+)", (run / "logs" / "policy_1.log").read_text())[1])
    os.kill(rank, signal.SIGSTOP)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=DEADLINE_S + 180)
    assert time.monotonic() - stopped < DEADLINE_S + 120
    assert process.returncode == 1
    assert re.search(rf"(score|train|sync begin|sync transfer): not done after {DEADLINE_S} s: .*policy_1", err), err
    assert "policy_1 is stopped" in err
    for name in ("policy_0", "engine_0"):
        assert str(run / "logs" / f"{name}.log") in err
        assert "most recent call first" in (run / "logs" / f"{name}.log").read_text()
    deadline = time.monotonic() + 60
    while (left := [pid for pid in family if _is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert not Path(f"/proc/{rank}").exists()
