"""A pool of verifier processes: kills what overruns, replaces what died, starts anew when the pool itself breaks."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, CancelledError, TimeoutError

from pebble import ProcessPool

from clipo_megatron.errors import WorkerError
from clipo_megatron.records import Verdict
from clipo_megatron.rewards.worker import judge_pairs, start_worker, warm_up, why_unconfined

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

WORKER_MEMORY_BYTES = 2 << 30

# math-verify's and sympy's caches grow; a fresh process now and then keeps memory flat.
_TASKS_PER_PROCESS = 200
_START_SECONDS = 120.0
_KILL_SECONDS = 10.0
_MAX_FRUITLESS = 3


class WorkerPool:
    """`workers` spawned processes. They die with the thread that made the pool, so make it in one that lasts."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = self._start()

    def close(self) -> None:
        """Kill the processes. Further calls do nothing."""
        self._pool.stop()
        self._pool.join()

    def run(self, chunks: Sequence[Sequence[Pair]], *, timeout_s: float) -> list[list[Verdict] | None]:
        """Judge chunks of (gold, answer) pairs.

        Args:
            chunks: each runs in one process, without a break.
            timeout_s: seconds that one chunk may take; its process is killed then.

        Returns:
            The verdicts of each chunk; None for a chunk whose process was killed, died, or raised an error.

        Raises:
            WorkerError: the pool broke again and again with no chunk to blame.
        """
        results: list[list[Verdict] | None] = [None] * len(chunks)
        waiting = list(range(len(chunks)))
        fruitless = 0
        while waiting:
            left = self._attempt(chunks, waiting, results, timeout_s)
            if not left:
                break
            fruitless = fruitless + 1 if len(left) == len(waiting) else 0
            waiting = left
            if fruitless > _MAX_FRUITLESS:
                raise WorkerError(
                    f"rewards: the verifier processes broke {fruitless} times in a row, {len(left)} chunks waiting; "
                    "check that `import math_verify` works here and that memory is not exhausted"
                )
            logger.warning("verifier pool broke with %d chunks waiting; starting a new one", len(left))
            self.close()
            self._pool = self._start()
        return results

    def why_unconfined(self) -> str:
        """Why a process of the pool may use network and files; empty when it may not.

        Raises:
            WorkerError: no process can be started.
        """
        try:
            return self._pool.schedule(why_unconfined).result(timeout=_START_SECONDS)
        except (RuntimeError, BrokenExecutor, TimeoutError) as error:
            raise WorkerError(
                f"rewards: no verifier process answers ({error!r}); check that `import math_verify` works here"
            ) from error

    def _attempt(
        self,
        chunks: Sequence[Sequence[Pair]],
        numbers: list[int],
        results: list[list[Verdict] | None],
        timeout_s: float,
    ) -> list[int]:
        """Fill in `results` and return the chunks that no process got to."""
        try:
            futures = [self._pool.schedule(judge_pairs, args=(chunks[n],), timeout=timeout_s) for n in numbers]
        except RuntimeError as error:  # pebble's way to say that the pool is broken
            logger.warning("verifier pool: %s", error)
            return numbers
        waiting = []
        # Chunks start in order, so the first one unfinished is running, or waits for a process to start.
        patience = _START_SECONDS + timeout_s + _KILL_SECONDS
        for number, future in zip(numbers, futures, strict=True):
            try:
                error = future.exception(timeout=0 if waiting and not future.done() else patience)
            except (TimeoutError, CancelledError):
                waiting.append(number)
                continue
            if isinstance(error, BrokenExecutor):
                waiting.append(number)
            elif error is not None:
                logger.info("verifier process: %r on a chunk of %d", error, len(chunks[number]))
            else:
                results[number] = future.result()
        return waiting

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._workers,
            max_tasks=_TASKS_PER_PROCESS,
            initializer=start_worker,
            initargs=(os.getpid(), WORKER_MEMORY_BYTES),
            # Not fork: the parent may have threads, CUDA and megabytes that a worker must not inherit.
            context=multiprocessing.get_context("spawn"),
        )
        pool.schedule(warm_up)
        return pool
