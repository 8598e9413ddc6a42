"""Laws of what a killed engine leaves behind: the process that takes its place ends and removes that, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipo_megatron.cluster import engine_leftovers
from clipo_megatron.cluster.engine_leftovers import MARK, end_processes


@pytest.fixture
def sleep_with_mark():
    started = []

    def start(mark: str) -> subprocess.Popen:
        process = subprocess.Popen(["sleep", "600"], env=os.environ | {MARK: mark})
        started.append(process)
        # The kernel shows the new program's environment a moment after its start has succeeded.
        deadline = time.monotonic() + 10
        while mark.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_children_of_a_dead_engine_are_ended_and_those_of_other_engines_and_runs_live(monkeypatch, sleep_with_mark):
    monkeypatch.setattr(engine_leftovers, "_PATIENCE_S", 0.3)
    orphan, of_next, of_other_run = (sleep_with_mark(mark) for mark in ("run.1.0", "run.1.0.1", "other.1.0"))
    assert end_processes("run.1.0") == 1
    assert orphan.wait(timeout=10) == -9
    assert of_next.poll() is None
    assert of_other_run.poll() is None


def test_children_that_end_by_themselves_are_let_go(monkeypatch, sleep_with_mark):
    monkeypatch.setattr(engine_leftovers, "_PATIENCE_S", 30.0)
    child = sleep_with_mark("run.2.0")
    child.terminate()
    assert end_processes("run.2.0") == 0


def test_temporary_files_go_to_a_folder_of_the_process_and_those_of_the_one_before_are_removed(tmp_path):
    old, other = tmp_path / "engine.run.0.0", tmp_path / "engine.run.1.0"
    for folder in (old, other):
        folder.mkdir()
        (folder / "socket").touch()
    code = (
        "import os, tempfile; from clipo_megatron.cluster.engine_leftovers import claim; claim('run', 0, 1); "
        "print(tempfile.gettempdir(), os.environ['VLLM_RPC_BASE_PATH'], os.environ['CLIPO_ENGINE'])"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    own = tmp_path / "engine.run.0.1"
    assert told.stdout.split()[-3:] == [str(own), str(own), "run.0.1"]
    assert Path(own).stat().st_mode & 0o777 == 0o700
    assert not old.exists()
    assert (other / "socket").exists()
