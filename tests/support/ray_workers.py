"""A Ray of this machine, and an actor that answers, fails or dies on demand, for tests of what waits for actors."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import ray

from clipo_megatron.cluster.actors import reports_failure
from clipo_megatron.cluster.session import _start
from clipo_megatron.cluster.worker_log import LoggedWorker
from clipo_megatron.slurm.ray_node import NO_SPARE_WORKERS


@contextmanager
def local_ray():
    """Within the block this process drives a small Ray, whose workers can import the tests' support."""
    tests = Path(__file__).parents[1]
    os.environ.setdefault(*NO_SPARE_WORKERS)
    _start(
        num_cpus=4,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": f"{tests}:{tests.parent}"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


class Worker(LoggedWorker):
    def __init__(self, name, folder):
        self.open_log(name, folder)

    @reports_failure
    def echo(self, value, delay=0.0):
        time.sleep(delay)
        return value

    @reports_failure
    def fail(self, message, delay=0.0):
        time.sleep(delay)
        raise ValueError(message)

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)
