"""Trainer ranks with real Megatron policies in forked processes, which live on and do what a test asks of them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.policy_cases import make_worker

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.weight_io import load_hf_weights
from clipo_megatron.policy.worker import PolicyWorker

TIMEOUT_S = 120.0


class PolicyRanks:
    """All ranks of one policy."""

    def __init__(self, processes: list[Any], pipes: list[Connection]) -> None:
        self.processes = processes
        self._pipes = pipes

    def call(self, work: Callable[..., Any], *arguments: object) -> list[Any]:
        """What `work(worker, *arguments)` returns on each rank; it must be a function of a module."""
        for pipe in self._pipes:
            pipe.send((work, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} is late"
            is_ok, result = pipe.recv()
            assert is_ok, f"rank {rank}: {result}"
            results.append(result)
        return results

    def handles(self) -> list[str]:
        """Share the parameters of all ranks."""
        return self.call(share_weights)

    def hold(self, folder: Path, version: int) -> None:
        """Take the weights of a Hugging Face folder, in place, and offer them as `version`."""
        self.call(hold_weights, folder, version)


@contextmanager
def policy_ranks(
    folder: Path, layout: ParallelLayout, *, dtype: str = "float32", engine_fp8: str = "none"
) -> Iterator[PolicyRanks]:
    """The policy of a Hugging Face folder; killed at the end."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="policy-") as meeting:
        processes, pipes = [], []
        for rank in range(layout.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, folder, layout, dtype, engine_fp8, rank, meeting), daemon=True
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            yield PolicyRanks(processes, pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def share_weights(worker: PolicyWorker) -> str:
    return worker.sharing.share()


def offer_weights(worker: PolicyWorker, version: int) -> None:
    worker.sharing.offer(version)


def hold_weights(worker: PolicyWorker, folder: Path, version: int) -> None:
    worker.sharing.withdraw()
    load_hf_weights(worker._stage, folder, worker._architecture, worker._layout, rank=worker._rank)
    worker.sharing.offer(version)


def _serve(
    pipe: Connection, folder: Path, layout: ParallelLayout, dtype: str, engine_fp8: str, rank: int, meeting: str
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(layout.world_size))
    try:
        dist.init_process_group(
            "gloo", init_method=Path(meeting, "store").as_uri(), rank=rank, world_size=layout.world_size
        )
        worker = make_worker(folder, layout, dtype=dtype, contrastive=None, engine_fp8=engine_fp8)
        while True:
            work, arguments = pipe.recv()
            pipe.send((True, work(worker, *arguments)))
    except EOFError:
        os._exit(0)
    except BaseException:  # noqa: BLE001  the parent raises it
        pipe.send((False, traceback.format_exc()))
        os._exit(1)
