"""When a worker hangs: every worker of the run writes its stacks into its log, and those that hang are killed.

The signal is sent by a small task on each node, for an actor that hangs answers no call. A stopped process writes nothing.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipo_megatron.cluster.gather import WorkersLate
from clipo_megatron.cluster.worker_log import DUMP_SIGNAL

logger = logging.getLogger(__name__)

_WRITING_S = 5.0
"""For a process to write its stacks."""
_NODES_S = 30.0
"""For all nodes together; a node that does not answer is left out."""
_HEAD = re.compile(
    r"^Current thread .*\n +File \"(?P<file>[^\"]+)\", line (?P<line>\d+) in (?P<function>\S+)", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """What one process did when it was asked."""

    worker: str
    log: str
    """Where its stacks are; empty if it has written none."""
    doing: str
    """In words: its innermost call, or why there is none."""


@contextmanager
def telling_stacks() -> Generator[None]:
    """Add to a `WorkersLate` what its workers do and where all workers' stacks are; the late ones are dead then."""
    try:
        yield
    except WorkersLate as late:
        raise WorkersLate(kill_late(late), late.workers) from late


def kill_late(late: WorkersLate) -> str:
    """Have all workers write their stacks, and kill the late ones; the message with what they did and where the stacks are."""
    dumps = dump_all(kill=late.workers)
    doing = ", ".join(f"{dump.worker} {dump.doing}" for dump in dumps if dump.worker.partition(" ")[0] in late.workers)
    files = ", ".join(dump.log for dump in dumps if dump.log)
    return f"{late}. There: {doing or 'no process was found'}; stacks of all workers: {files or 'none'}"


def dump_all(*, kill: Sequence[str] = ()) -> list[Dump]:
    """Have all living workers of this run write their stacks.

    Args:
        kill: workers whose processes are killed afterwards.

    Returns:
        One of each process that lives on a node that answers, in the order of names.
    """
    processes: dict[str, dict[str, int]] = {}
    for actor in _living_actors():
        name = actor["Name"].partition(".")[0]  # an engine's has a counter of its processes
        processes.setdefault(actor["Address"]["NodeID"], {})[name] = actor["Pid"]
    task = ray.remote(num_cpus=0, max_retries=0)(_dump_on_this_node)
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            pids, [name for name in pids if name in kill]
        )
        for node, pids in processes.items()
    ]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=_NODES_S) if refs else ([], [])
    found: list[Dump] = []
    for ref in done:
        try:
            found += ray.get(ref, timeout=1.0)
        except (RayError, GetTimeoutError) as error:
            logger.warning("no stack dumps from a node: %s", error)
    return sorted(found, key=lambda dump: dump.worker)


def _living_actors() -> list[dict[str, Any]]:
    from ray._private.state import actors  # the public list of actors needs Ray's dashboard

    job = ray.get_runtime_context().get_job_id()
    return [actor for actor in actors().values() if actor["State"] == "ALIVE" and actor["JobID"] == job]


def _dump_on_this_node(pids: dict[str, int], kill: Sequence[str]) -> list[Dump]:
    pids = pids | {
        f"{name} worker {rank}": child
        for name, pid in pids.items()
        for child in _descendants(pid)
        if (log := _log_of(child)) is not None and (rank := log.stem.rpartition(".worker")[2]).isdigit()
    }
    # Ray may not know yet that a process is gone; a number that another program has by now must get no signal of ours.
    pids = {name: pid for name, pid in pids.items() if _state(pid) not in "ZX"}
    logs = {name: _log_of(pid) for name, pid in pids.items()}
    before = {name: log.stat().st_size for name, log in logs.items() if log is not None}
    states = {name: _state(pid) for name, pid in pids.items()}
    for name in before:
        _send(pids[name], DUMP_SIGNAL)
    deadline, silent = time.monotonic() + _WRITING_S, set(before)
    while silent and time.monotonic() < deadline:
        time.sleep(0.1)
        silent -= {name for name in silent if _is_written(logs[name], before[name])}
    for name in before.keys() & set(kill):
        _send(pids[name], signal.SIGKILL)
    return [_dump(name, logs[name], before.get(name, 0), states[name]) for name in pids]


def _dump(name: str, log: Path | None, start: int, state: str) -> Dump:
    text = "" if log is None else _since(log, start)
    if head := _HEAD.search(text):
        return Dump(worker=name, log=str(log), doing=f"is in {head['function']} ({head['file']}:{head['line']})")
    why = {"T": "is stopped (by a signal or a debugger)", "t": "is stopped by a debugger", "D": "waits in the kernel"}
    return Dump(worker=name, log="", doing=f"{why.get(state, 'runs')} and writes no stack")


def _descendants(pid: int) -> Iterator[int]:
    """Processes that a worker has started: an engine's workers, where it has several."""
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in tasks.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in children:
            yield child
            yield from _descendants(child)


def _log_of(pid: int) -> Path | None:
    """The worker's own log: the one file that it has open and that `LoggedWorker` names after it."""
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if re.search(r"/(policy|engine)_\d+[^/]*\.log$", target) and Path(target).is_file():
            return Path(target)
    return None


def _is_written(log: Path | None, start: int) -> bool:
    """Whether the dump is there and whole: a file that grows is given another look."""
    if log is None or log.stat().st_size == start:
        return False
    size = log.stat().st_size
    time.sleep(0.1)
    return _HEAD.search(_since(log, start)) is not None and log.stat().st_size == size


def _since(log: Path, start: int) -> str:
    with log.open(errors="replace") as file:
        file.seek(start)
        return file.read()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        logger.info("process %d is gone", pid)
