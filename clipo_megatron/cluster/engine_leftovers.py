"""What an engine's process leaves behind when it is killed, and its removal by the process that takes its place.

vLLM's worker processes, sockets, rendezvous files. All of an engine's children carry a mark in their environment, and all of
its temporary files lie in one folder inside Ray's.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import ray

logger = logging.getLogger(__name__)

MARK = "CLIPO_ENGINE"
"""Environment variable of an engine's process and its children."""
_PATIENCE_S = 5.0
"""For children to notice that their parent is gone, and for Python's resource tracker to free shared memory."""


def claim(run: str, number: int, generation: int) -> None:
    """Mark this process, move its temporary files to a folder of its own, and remove what the one before it left.

    To be called before vLLM is imported.

    Args:
        run: unique name of the run.
        number: of the engine.
        generation: 0 for the first process, one more for each that takes its place.
    """
    folders = Path(_ray_folder())
    if generation:
        before = f"{run}.{number}.{generation - 1}"
        end_processes(before)
        shutil.rmtree(folders / f"engine.{before}", ignore_errors=True)
    mark = f"{run}.{number}.{generation}"
    own = folders / f"engine.{mark}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ[MARK] = mark
    os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(own)
    tempfile.tempdir = None  # what was cached of the environment before


def end_processes(mark: str) -> int:
    """End all processes of this machine that carry `mark`; those that go by themselves are let go.

    Returns:
        How many had to be killed.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        logger.warning("killing process %d, left by a dead engine", pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(left)


def _marked(mark: str) -> list[int]:
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:  # it ended, or is another user's
            continue
        if wanted in environment and not is_dead and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def _ray_folder() -> str:
    """Ray's temporary folder of this node, which goes when Ray does; its path is short enough for sockets."""
    node = ray._private.worker._global_node  # pyright: ignore
    return node.get_temp_dir_path() if node is not None else tempfile.gettempdir()
