"""What the end-to-end tests share: a prepared run, and running `clipo` as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.prepared_run import prepared, write_recipe

__all__ = ["prepared", "run_clipo", "start_clipo", "write_recipe"]

ROOT = Path(__file__).parents[2]


def start_clipo(*arguments):
    """Start `clipo` in a process group of its own, so that a test can kill all of it."""
    return subprocess.Popen(
        [sys.executable, "-m", "clipo_megatron.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run_clipo(*arguments, timeout=600):
    """Run `clipo` to its end, which must be a success; returns its standard output."""
    process = start_clipo(*arguments)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, f"{out}\n{err}"
    return out
