"""What runs inside a verifier process: confinement, memory limit, death with the parent, and the judging of a few pairs."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.records import Verdict
from clipo_megatron.rewards.confinement import confine
from clipo_megatron.rewards.equality import full_verdict

_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = 3

_suspicious_peak_bytes = sys.maxsize
_unconfined_because = "its start is not over"


def start_worker(parent_pid: int, memory_bytes: int) -> None:
    """Prepare this process. Runs once, before its first pair.

    Args:
        parent_pid: process that made the pool; a worker does not outlive it.
        memory_bytes: address space that judging may take on top of what the imports took.
    """
    global _suspicious_peak_bytes, _unconfined_because
    # The pool's own handler is Python code, which never runs while a C call (a huge power) lasts.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off, as we want them
    full_verdict("1", "\\frac{x}{x}")  # imports and caches are not on the first answer's clock
    taken = _peak_address_space()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, taken + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash would write a file, which no filter of calls sees
    _suspicious_peak_bytes = taken + memory_bytes // 4
    _unconfined_because = confine()


def judge_pairs(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Judge (gold, answer) pairs one by one. Ends the process when a pair has run into the memory limit."""
    verdicts = []
    for gold, answer in pairs:
        verdicts.append(full_verdict(gold, answer))
        # math-verify turns a MemoryError into "not equal". Memory grows by doubling before it hits the limit, so a high
        # peak gives such a verdict away.
        if verdicts[-1] is Verdict.WRONG and _peak_address_space() > _suspicious_peak_bytes:
            os._exit(_OUT_OF_MEMORY)
    return verdicts


def why_unconfined() -> str:
    """Why this process may use network and files; empty when it may not."""
    return _unconfined_because


def warm_up() -> None:
    """Does nothing: scheduled once so that a pool starts its processes."""


def _peak_address_space() -> int:
    """Bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    match = re.search(r"^VmPeak:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
