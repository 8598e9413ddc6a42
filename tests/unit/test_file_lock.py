"""Laws of the lock of a folder: one process has it, and a file system without locks is told with what to do about it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest
import yaml

from clipo_megatron.checkpoint.file_lock import NO_LOCKS_REMEDY, take_lock
from clipo_megatron.checkpoint.import_state import PartialImport
from clipo_megatron.cli.train import _prepare_folder
from clipo_megatron.doctor.finding import Status
from clipo_megatron.doctor.node import NodeCase, check_writable, run_node
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import load_recipe

LACKING = {"Lustre without flock": errno.ENOSYS, "NFS without lockd": errno.ENOLCK, "others": errno.EOPNOTSUPP}


@pytest.fixture
def recipe(tmp_path):
    path, run = tmp_path / "recipe.yaml", {"name": "r", "folder": str(tmp_path / "runs"), "steps": 5, "device": "cpu"}
    path.write_text(yaml.safe_dump({"run": run, "model": {"path": "/m"}, "data": {"train": ["/t.jsonl"]}}))
    return load_recipe(path)


@pytest.fixture(params=LACKING)
def no_locks(request, monkeypatch):
    """The kernel's answer on such a file system; its words."""
    number = LACKING[request.param]

    def flock(_descriptor, _operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    return os.strerror(number)


def test_a_folder_that_another_process_has_is_not_taken(tmp_path):
    holder = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); input()"
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", holder, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with path.open("w") as file:
            assert not take_lock(file.fileno(), tmp_path, otherwise="")
            other.communicate("\n", timeout=60)
            assert take_lock(file.fileno(), tmp_path, otherwise="")


def test_other_errors_stay_what_they_are(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        number = os.dup(file.fileno())
    os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        take_lock(number, tmp_path, otherwise="")


def test_a_run_on_a_file_system_without_locks_is_refused_with_the_remedy(no_locks, recipe, tmp_path):
    folder = tmp_path / "runs" / "r"
    with pytest.raises(ConfigError) as refused:
        _prepare_folder(folder, recipe)
    (told,) = refused.value.problems
    assert all(part in told for part in (str(folder), no_locks, NO_LOCKS_REMEDY, "choose a run.folder on another"))
    assert not (folder / "recipe.yaml").exists()


def test_an_import_into_a_file_system_without_locks_is_refused_with_the_remedy(no_locks, tmp_path):
    with pytest.raises(ConfigError, match="-o flock"):
        PartialImport(tmp_path / "model", source=tmp_path, state={}).__enter__()


def test_the_doctor_finds_a_run_folder_without_locks(no_locks, recipe, tmp_path):
    findings, _ = run_node(NodeCase(recipe=recipe, needs_torch=False))
    (told,) = [finding for finding in findings if finding.check == "run folder"]
    assert told.status is Status.FAIL
    assert no_locks in told.cause
    assert NO_LOCKS_REMEDY in told.remedy
    assert "run.folder" in told.remedy
    assert check_writable("log folder", tmp_path).status is Status.OK  # nothing is locked there


def test_the_doctor_leaves_nothing_locked(recipe, tmp_path):
    assert check_writable("run folder", tmp_path / "runs" / "r", needs_lock=True).status is Status.OK
    _prepare_folder(tmp_path / "runs" / "r", recipe).close()
