"""Laws of waiting for Ray actors, on a real Ray cluster: the first cause is told, the dead and the late are named."""

import time

import pytest
import ray
from support.ray_workers import Worker, local_ray

from clipo_megatron.cluster.gather import WorkersLate, gather, gather_from, gather_in_time
from clipo_megatron.errors import WorkerError

WAIT_S = 240
"""For what happens in a moment, but on a machine that others keep busy."""


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


@pytest.fixture
def workers(cluster, tmp_path):
    actor = ray.remote(Worker)
    found = {name: actor.remote(name, str(tmp_path)) for name in ["policy_0", "policy_1", "engine_0"]}
    gather({name: worker.echo.remote(1) for name, worker in found.items()}, phase="start", timeout_s=WAIT_S)
    return found


def test_results_come_back_under_the_workers_names(workers):
    refs = {name: worker.echo.remote(name * 2, 0.1 * number) for number, (name, worker) in enumerate(workers.items())}
    assert gather(refs, phase="echo", timeout_s=WAIT_S) == {name: name * 2 for name in workers}


def test_the_earliest_exception_is_the_cause_and_its_traceback_is_in_the_log(workers, tmp_path):
    refs = {
        "policy_0": workers["policy_0"].fail.remote("connection closed by peer", 0.6),
        "policy_1": workers["policy_1"].fail.remote("loss is nan", 0.2),
        "engine_0": workers["engine_0"].echo.remote(1),
    }
    with pytest.raises(WorkerError, match=r"^policy_1 failed in fail: ValueError: loss is nan$"):
        gather(refs, phase="train", timeout_s=WAIT_S)
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
        gather(refs, phase="train", timeout_s=WAIT_S)


def test_an_engine_that_lost_its_own_workers_is_the_cause_and_to_be_replaced(workers):
    refs = {
        "policy_0": workers["policy_0"].fail.remote("connection closed by peer"),
        "engine_0": workers["engine_0"].lose.remote("engine worker 1 of 2: died", 0.5),
    }
    with pytest.raises(
        WorkersLate, match=r"^engine_0 failed in lose: EngineLostError: engine worker 1 of 2: died$"
    ) as late:
        gather(refs, phase="sync transfer", timeout_s=WAIT_S)
    assert late.value.workers == ("engine_0",)


def test_an_engine_that_lost_its_own_workers_does_not_end_what_the_others_do(workers):
    refs = {
        "policy_0": workers["policy_0"].lose.remote("engine worker 1 of 2: died"),
        "policy_1": workers["policy_1"].echo.remote(7, 6.0),
        "engine_0": workers["engine_0"].die.remote(),
    }
    found, died, late = gather_in_time(refs, phase="generate", timeout_s=WAIT_S)
    assert found == {"policy_1": 7}
    assert died.workers == ("engine_0",)  # the other is found in the next call
    assert late is None
    refs = {name: workers[name].lose.remote("a worker died") for name in ("policy_0", "policy_1")}
    found, died, late = gather_in_time(refs, phase="generate", timeout_s=WAIT_S)
    assert (found, died, set(late.workers)) == ({}, None, {"policy_0", "policy_1"})


def test_the_late_are_named_after_the_deadline(workers):
    refs = {name: worker.echo.remote(1, 20 if name == "policy_1" else 0) for name, worker in workers.items()}
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"score: not done after 5 s: policy_1;"):
        gather(refs, phase="score", timeout_s=5)
    assert time.monotonic() - start < 15


def test_a_failure_in_time_is_the_cause_and_those_that_wait_for_it_are_not_blamed(workers):
    refs = {
        "policy_0": workers["policy_0"].fail.remote("no room for a bucket"),
        "policy_1": workers["policy_1"].echo.remote(1, 20),
    }
    with pytest.raises(WorkerError, match=r"^policy_0 failed in fail: ValueError: no room for a bucket$"):
        gather_from("policy_0", refs, phase="sync transfer", timeout_s=WAIT_S)


def test_of_workers_that_wait_for_one_another_the_one_that_says_nothing_is_blamed(workers):
    refs = {
        "policy_0": workers["policy_0"].fail.remote("timed out waiting for policy_1", 2.0),
        "policy_1": workers["policy_1"].echo.remote(1, 20),
    }
    with pytest.raises(WorkerError, match=r"^sync transfer: not done after 1 s: policy_1;"):
        gather_from("policy_0", refs, phase="sync transfer", timeout_s=1, margin_s=10)


def test_one_result_is_waited_for_and_the_death_of_another_is_seen_meanwhile(workers):
    others = {"policy_1": workers["policy_1"].echo.remote(1, 20)}
    first = {"policy_0": workers["policy_0"].echo.remote(7)}
    assert gather_from("policy_0", first | others, phase="sync transfer", timeout_s=WAIT_S) == 7
    then = {
        "policy_0": workers["policy_0"].echo.remote(8, 20),
        "engine_0": workers["engine_0"].die.remote(),
    }
    with pytest.raises(WorkerError, match=r"^engine_0 died in sync transfer: its process ended"):
        gather_from("policy_0", then | others, phase="sync transfer", timeout_s=WAIT_S)


def test_a_phase_that_began_before_has_the_rest_of_its_time_only(workers):
    done = {"policy_0": workers["policy_0"].echo.remote(3)}
    ray.wait(list(done.values()), timeout=WAIT_S)
    began = time.monotonic() - 600
    assert gather(done, phase="sync transfer", timeout_s=600, since=began) == {"policy_0": 3}
    late = {"policy_1": workers["policy_1"].echo.remote(1, 20)}
    with pytest.raises(WorkerError, match=r"^sync transfer: not done after 600 s: policy_1;"):
        gather(late, phase="sync transfer", timeout_s=600, since=began)
