"""An actor that answers, fails or dies on demand, for tests of what waits for actors."""

import os
import signal
import time

from clipo_megatron.cluster.actors import reports_failure
from clipo_megatron.cluster.worker_log import LoggedWorker


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
