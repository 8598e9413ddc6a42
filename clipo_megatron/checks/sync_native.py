"""vLLM's own weight transfer in the sync benchmark: on the same model, in the same run."""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from clipo_megatron.checks.sync_trainer import received, serve_parameters
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.rollout.engine import RolloutEngine

Way = Callable[[], None]
_ADDRESS = "127.0.0.1"


def native_problem(backend: Literal["ipc", "nccl"], *, device: str, engine_tp: int) -> str:
    """Why vLLM's own transfer can't be measured here; empty if it can."""
    if device != "cuda":
        return f"vLLM's {backend} engine moves CUDA tensors only, and this is a CPU run"
    if engine_tp > 1:
        return f"measured for engines of tp 1; this one has tp {engine_tp}"
    if backend == "nccl" and torch.cuda.device_count() < 2:
        return "NCCL needs a GPU of its own at each end, and this machine has one"
    return ""


def ipc_way(engine: RolloutEngine, trainer: Connection) -> Way:
    """An update of an engine that was started for ipc, out of the trainer of the benchmark's other ways."""
    engine.native.connect()

    def way() -> None:
        trainer.send("ipc")
        engine.native.update(received(trainer))

    return way


@contextmanager
def nccl_way(engine: RolloutEngine, model_path: Path, layout: ParallelLayout, dtype: str) -> Generator[Way]:
    """An update of an engine that was started for nccl, out of a trainer of its own on the second GPU."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=serve_parameters, args=(other, model_path, layout, dtype, "cuda:1"), daemon=True)
    process.start()
    other.close()
    received(pipe)  # its handles: nobody opens them
    port = _free_port()
    pipe.send(("nccl", _ADDRESS, port))
    engine.native.connect(address=_ADDRESS, port=port)
    received(pipe)

    def way() -> None:
        pipe.send("nccl")
        engine.native.update(received(pipe))
        received(pipe)

    try:
        yield way
    finally:
        pipe.close()
        process.join(10)


def median_seconds(way: Way, *, repeats: int) -> float:
    """Of `repeats` timed runs, after one that is not timed."""
    seconds: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        way()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _free_port() -> int:
    with socket.create_server((_ADDRESS, 0)) as listener:
        return int(listener.getsockname()[1])
