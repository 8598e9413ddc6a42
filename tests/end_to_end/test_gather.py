"""Laws of waiting for Ray actors, on a real Ray cluster: the first cause is told, the dead and the late are named."""

import time

import pytest
import ray
from support.ray_workers import Worker, local_ray

from clipo_megatron.cluster.gather import gather
from clipo_megatron.errors import WorkerError


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


@pytest.fixture
def workers(cluster, tmp_path):
    actor = ray.remote(Worker)
    names = ["policy_0", "policy_1", "engine_0"]
    return {name: actor.remote(name, str(tmp_path)) for name in names}


def test_results_come_back_under_the_workers_names(workers):
    refs = {name: worker.echo.remote(name * 2, 0.1 * number) for number, (name, worker) in enumerate(workers.items())}
    assert gather(refs, phase="echo", timeout_s=30) == {name: name * 2 for name in workers}


def test_the_earliest_exception_is_the_cause_and_its_traceback_is_in_the_log(workers, tmp_path):
    refs = {
        "policy_0": workers["policy_0"].fail.remote("connection closed by peer", 0.6),
        "policy_1": workers["policy_1"].fail.remote("loss is nan", 0.2),
        "engine_0": workers["engine_0"].echo.remote(1),
    }
    with pytest.raises(WorkerError, match=r"^policy_1 failed in fail: ValueError: loss is nan$"):
        gather(refs, phase="train", timeout_s=30)
    log = (tmp_path / "policy_1.log").read_text()
    assert "Traceback" in log
    assert "loss is nan" in log


def test_a_death_is_the_cause_of_the_others_failures(workers):
    refs = {
        "policy_0": workers["policy_0"].fail.remote("connection closed by peer"),
        "policy_1": workers["policy_1"].die.remote(),
        "engine_0": workers["engine_0"].echo.remote(1),
    }
    with pytest.raises(WorkerError, match=r"^policy_1 died in train: its process ended"):
        gather(refs, phase="train", timeout_s=30)


def test_the_late_are_named_after_the_deadline(workers):
    refs = {name: worker.echo.remote(1, 20 if name == "policy_1" else 0) for name, worker in workers.items()}
    gather({"engine_0": workers["engine_0"].echo.remote(1)}, phase="warm", timeout_s=30)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"score: not done after 3 s: policy_1;"):
        gather(refs, phase="score", timeout_s=3)
    assert time.monotonic() - start < 10
