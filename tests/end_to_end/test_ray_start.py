"""Laws of a Ray of this machine: one that does not come up is tried again, and if it never does the run ends with the reason."""

from __future__ import annotations

import pytest
import ray

from clipo_megatron.cluster.ray_start import start_ray
from clipo_megatron.errors import WorkerError

ROOM = 100 << 20


def test_a_ray_that_does_not_come_up_in_its_half_minute_is_tried_again(monkeypatch):
    start, tries = ray.init, []

    def late_once(**options):
        tries.append(options)
        if len(tries) == 1:
            raise Exception("The current node timed out during startup.")
        return start(**options)

    monkeypatch.setattr(ray, "init", late_once)
    try:
        start_ray(num_cpus=1, object_store_memory=ROOM)
        assert ray.cluster_resources()["CPU"] == 1
    finally:
        ray.shutdown()
    assert len(tries) == 2
    assert tries[0] == tries[1]


def test_a_ray_that_never_comes_up_ends_the_run_with_the_reason():
    with pytest.raises(
        WorkerError, match=r"^Ray can't be started on this machine, tried 3 times \(.*object store memory"
    ):
        start_ray(num_cpus=1, object_store_memory=1)
    assert not ray.is_initialized()
