"""Laws of saving while training goes on: what is written is the state at the snapshot; one save at a time; all or nothing."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from support.checkpoints import TwoRanks, make_identity, read_values, values_of

from clipo_megatron.checkpoint.manifest import Progress, find_damage, list_checkpoints, read_manifest
from clipo_megatron.checkpoint.retention import Retention
from clipo_megatron.checkpoint.training import find_resume
from clipo_megatron.controller.metrics import METRICS
from clipo_megatron.controller.saving import CheckpointSaver
from clipo_megatron.errors import CheckpointError, WorkerError


class Gate:
    """Writers wait in it until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def __call__(self, _rank: int) -> None:
        assert self._opened.wait(10)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def make_saver(tmp_path):
    def make(ranks, *, keep=5, asynchronous=True):
        return CheckpointSaver(
            tmp_path / "checkpoints",
            ranks,
            run=make_identity(tmp_path / "run"),
            retention=Retention(keep=keep),
            asynchronous=asynchronous,
        )

    return make


def _steps(tmp_path):
    return [int(path.name[5:]) for path in list_checkpoints(tmp_path / "checkpoints")]


def _wait_until_complete(saver, tmp_path, steps):
    deadline = time.monotonic() + 10
    while _steps(tmp_path) != steps:
        assert time.monotonic() < deadline
        saver.poll()
        time.sleep(0.005)


def test_what_is_written_is_the_state_at_the_snapshot_though_training_goes_on(tmp_path, make_saver):
    gate = Gate()
    ranks = TwoRanks(before_writing=gate)
    saver = make_saver(ranks)
    ranks.update(1)
    saver.begin(Progress(step=1), sound=True, accuracy=None)
    for step in (2, 3):
        ranks.update(step)
        saver.poll()
        assert _steps(tmp_path) == []
    gate.open()
    _wait_until_complete(saver, tmp_path, [1])
    assert torch.equal(read_values(tmp_path / "checkpoints" / "step_00000001"), values_of(1))
    assert find_damage(tmp_path / "checkpoints" / "step_00000001") == []


def test_a_save_that_is_not_asynchronous_is_complete_when_it_returns(tmp_path, make_saver):
    ranks = TwoRanks()
    saver = make_saver(ranks, asynchronous=False)
    ranks.update(4)
    saver.begin(Progress(step=4, version=3, prompts_taken=7), sound=False, accuracy=0.5)
    assert _steps(tmp_path) == [4]
    manifest = read_manifest(tmp_path / "checkpoints" / "step_00000004")
    assert (manifest.progress, manifest.sound, manifest.accuracy) == (
        Progress(step=4, version=3, prompts_taken=7), False, 0.5,
    )  # fmt: skip


def test_a_save_that_falls_due_while_one_is_going_waits_for_it(tmp_path, make_saver, caplog):
    gate = Gate()
    ranks = TwoRanks(before_writing=gate)
    saver = make_saver(ranks)
    ranks.update(1)
    saver.begin(Progress(step=1), sound=True, accuracy=None)
    ranks.update(2)
    timer = threading.Timer(0.2, gate.open)
    timer.start()
    saver.begin(Progress(step=2), sound=True, accuracy=None)
    assert _steps(tmp_path) == [1]
    assert "step 2: waited 0." in caplog.text
    saver.finish()
    for step in (1, 2):
        assert torch.equal(read_values(tmp_path / "checkpoints" / f"step_{step:08d}"), values_of(step))
    measured = saver.take_metrics()
    assert measured["checkpoint/wait_seconds"] >= 0.15
    assert measured.keys() == {key for key in METRICS if key.startswith("checkpoint/")}
    files = [file for path in list_checkpoints(tmp_path / "checkpoints") for file in path.rglob("*") if file.is_file()]
    assert measured["checkpoint/bytes"] == sum(file.stat().st_size for file in files)
    assert saver.take_metrics() == {}


def test_a_rank_that_can_not_write_is_named_with_its_file_and_older_checkpoints_stay(
    tmp_path, make_saver, file_size_limit
):
    ranks = TwoRanks(elements=50_000)
    saver = make_saver(ranks)
    saver.begin(Progress(step=1), sound=True, accuracy=None)
    saver.finish()
    ranks.update(2)
    with file_size_limit(100_000):
        saver.begin(Progress(step=2), sound=True, accuracy=None)
        with pytest.raises(CheckpointError, match=r"\.step_00000002\.tmp/__[01]_0\.distcp"):
            saver.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert torch.equal(read_values(find_resume(tmp_path / "checkpoints").checkpoint), torch.zeros(2, 50_000))
    saver.begin(Progress(step=3), sound=True, accuracy=None)  # there is room again
    saver.finish()
    assert _steps(tmp_path) == [1, 3]


def test_a_worker_that_fails_in_a_save_is_named_in_an_error_of_the_checkpoint(tmp_path, make_saver):
    def dies(rank: int) -> None:
        if rank == 1:
            raise WorkerError("policy_1 died in save: its process ended")

    saver = make_saver(TwoRanks(before_writing=dies))
    saver.begin(Progress(step=1), sound=True, accuracy=None)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 can't be written: policy_1 died .* untouched"):
        saver.finish()
    assert _steps(tmp_path) == []


def test_retention_follows_each_save(tmp_path, make_saver, caplog):
    ranks = TwoRanks()
    saver = make_saver(ranks, keep=1)
    with caplog.at_level(logging.INFO):
        for step in range(1, 5):
            saver.begin(Progress(step=step), sound=step == 2, accuracy=None)
    saver.finish()
    assert _steps(tmp_path) == [2, 4]
    assert "step_00000002 stays: the newest in which all losses and gradients were finite" in caplog.text
