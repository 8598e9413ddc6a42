"""A Ray of this machine, and an actor that answers, fails or dies on demand, for tests of what waits for actors.

Workers import this file: what it imports, each of them does.
"""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import ray

from clipo_megatron.cluster.actors import reports_failure
from clipo_megatron.cluster.ray_start import start_ray
from clipo_megatron.cluster.worker_log import LoggedWorker
from clipo_megatron.errors import EngineLostError


@contextmanager
def local_ray():
    """Within the block this process drives a small Ray, whose workers can import the tests' support."""
    tests = Path(__file__).parents[1]
    start_ray(
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

    @reports_failure
    def lose(self, message, delay=0.0):
        time.sleep(delay)
        raise EngineLostError(message)

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)
