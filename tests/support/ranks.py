"""Runs one function on several gloo ranks: forked processes, a file as rendezvous, all killed at the first failure."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankFailure(AssertionError):
    """A rank raised, died or was late. The message holds the first failing rank's traceback."""


def run_ranks(fn: Callable[..., Any], *args: object, world_size: int, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` gloo ranks and return the results in the order of the ranks.

    Fork, not spawn: what the parent has imported is shared, so 4 ranks start in well under a second; the parent must
    not have touched CUDA. The rendezvous is a fresh file, not a port: tests run side by side and no port is guessed.

    Args:
        fn: called on each rank with the default process group initialised; `torch.save` must take its result.
        args: passed as they are (forked, never pickled).
        world_size: number of ranks.
        timeout_s: all ranks are killed when this many seconds have passed.

    Raises:
        RankFailure: with the first failing rank's traceback, or who was late. No rank is left behind.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_entry, args=(writer, fn, args, rank, world_size, folder, timeout_s))
            process.start()
            writer.close()
            pipes.append(reader)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[multiprocessing.connection.Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(set(range(len(pipes))) - set(results))
            raise RankFailure(f"ranks {late} of {len(pipes)} gave no result within {timeout_s} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                is_ok, payload = pipe.recv()
            except EOFError:
                raise RankFailure(f"rank {rank} of {len(pipes)} died without a word") from None
            if not is_ok:
                raise RankFailure(f"rank {rank} of {len(pipes)} failed:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _entry(
    writer: multiprocessing.connection.Connection,
    fn: Callable[..., Any],
    args: tuple[object, ...],
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
) -> None:
    # A child that a test runner forked would run the runner's exit hooks, so it leaves by os._exit.
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            init_method=Path(folder, "store").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        payload = io.BytesIO()
        torch.save(fn(*args), payload)  # through bytes: sharing tensors between processes needs file descriptors
        dist.barrier()  # nobody leaves while another still talks to it
        writer.send((True, payload.getvalue()))
    except BaseException:  # noqa: BLE001  the parent raises it
        writer.send((False, traceback.format_exc()))
        os._exit(1)
    os._exit(0)
