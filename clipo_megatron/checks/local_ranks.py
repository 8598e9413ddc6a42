"""Runs one function on several ranks of this machine; the first failure, or the deadline, ends all of them.

Ranks are forked from a server process that has imported what they need and nothing else has run in: they start in a
moment, and inherit neither threads nor a CUDA context from the caller.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from clipo_megatron.errors import ConfigError, WorkerError

_GRACE_S = 15.0
_LAST_WORDS_S = 1.0
_SHOWN_LINES, _SHOWN_CALLS = 40, 12
_LATE = "Timeout ("  # faulthandler's first line


def start_server(preload: Sequence[str]) -> None:
    """Begin importing the modules that ranks need, in the background; optional, and only the first call counts."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    multiprocessing.forkserver.ensure_running()


def run_local_ranks(
    fn: Callable[..., Any], *args: object, world_size: int, device: Literal["cpu", "cuda"], timeout_s: float
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks and return the results in the order of the ranks.

    Collectives: `fn` runs with the default process group initialised (gloo, or nccl with one visible GPU a rank).

    Args:
        fn: a function of a module; it, `args` and its results are pickled.
        args: the same on all ranks.
        world_size: number of ranks.
        device: what the ranks run on; "cuda" needs as many visible GPUs.
        timeout_s: deadline, counted from the start of the ranks.

    Raises:
        ConfigError: the one that a rank raised.
        WorkerError: a rank failed or was late, with its traceback. No rank is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="clipo-ranks-") as name:
        folder, readers, processes = Path(name), [], []
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                arguments = (writer, fn, args, rank, world_size, folder, device, timeout_s)
                process = context.Process(target=_run_rank, args=arguments, daemon=True)
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            return _collect(readers, processes, folder, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(
    readers: Sequence[Connection], processes: Sequence[BaseProcess], folder: Path, timeout_s: float
) -> list[Any]:
    results: dict[int, Any] = {}
    # A rank that is late shows where it hangs and ends itself; the caller waits a little longer.
    deadline = time.monotonic() + timeout_s + _GRACE_S
    while len(results) < len(readers):
        waiting = [rank for rank in range(len(readers)) if rank not in results]
        ready = wait([readers[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerError(f"ranks {waiting} of {len(readers)} gave no result within {timeout_s:g} s")
        dead = []
        for rank in waiting:
            if readers[rank] not in ready:
                continue
            try:
                results[rank] = readers[rank].recv()
            except EOFError:
                dead.append(rank)
                continue
            if isinstance(results[rank], ConfigError):
                raise results[rank]
        if dead:
            raise WorkerError(_obituary(dead, processes, folder))
    return [results[rank] for rank in range(len(readers))]


def _obituary(dead: Sequence[int], processes: Sequence[BaseProcess], folder: Path) -> str:
    """Why the first of the dead ranks failed: the others lost their connection to it, and wrote after it."""
    rank = min(dead, key=lambda rank: _log_file(folder, rank).stat().st_mtime_ns)
    processes[rank].join(_GRACE_S)
    lines = _read_log(folder, rank)
    if not any(line.startswith(_LATE) for line in lines):
        code = processes[rank].exitcode
        return "\n".join([f"rank {rank} of {len(processes)} failed (exit code {code}):", *lines[-_SHOWN_LINES:]])
    told = [f"rank {rank} of {len(processes)} was late; where the ranks were, innermost call first:"]
    for other, process in enumerate(processes):
        process.join(_LAST_WORDS_S)
        of_rank = _read_log(folder, other)
        # One that lost its connection to a late rank just before its own deadline has a traceback in place of its calls.
        start = next((number + 1 for number, line in enumerate(of_rank) if line.startswith(_LATE)), None)
        calls = of_rank[-_SHOWN_LINES:] if start is None else of_rank[start : start + _SHOWN_CALLS]
        told += [f"rank {other}:", *calls]
    return "\n".join(told)


def _run_rank(
    writer: Connection,
    fn: Callable[..., Any],
    args: tuple[object, ...],
    rank: int,
    world_size: int,
    folder: Path,
    device: Literal["cpu", "cuda"],
    timeout_s: float,
) -> None:
    log = _log_file(folder, rank).open("w")
    # Also what libraries written in C say: a crash in one of them leaves its last words there.
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.enable(log)
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=log)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=(folder / "store").as_uri(),  # a file, not a port: none is guessed
        rank=rank,
        world_size=world_size,
        # Later than the deadline, so that a rank that hangs shows its own calls, not a collective that gave up.
        timeout=datetime.timedelta(seconds=timeout_s + _GRACE_S),
    )
    try:
        result = fn(*args)
    except ConfigError as error:
        writer.send(error)
        raise
    dist.barrier()  # nobody leaves while another still talks to it
    writer.send(result)


def _log_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def _read_log(folder: Path, rank: int) -> list[str]:
    return _log_file(folder, rank).read_text(errors="replace").splitlines()
