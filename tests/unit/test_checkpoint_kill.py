"""A process killed at random moments of an asynchronous save leaves complete checkpoints only, and the next one goes on."""

from __future__ import annotations

import multiprocessing as mp
import random
import time
from pathlib import Path

import torch
from support.checkpoints import TwoRanks, make_identity, read_values, values_of, write_checkpoint

from clipo_megatron.checkpoint.manifest import Progress, find_damage, list_checkpoints
from clipo_megatron.checkpoint.retention import Retention
from clipo_megatron.checkpoint.training import find_resume
from clipo_megatron.controller.saving import CheckpointSaver

ELEMENTS = 6_000_000
"""Of each rank: files of 24 MB."""
KILLS = 10


def _train(folder: Path) -> None:
    """Steps without end, a checkpoint begun in each; goes on from the newest checkpoint."""
    torch.set_num_threads(1)
    ranks = TwoRanks(elements=ELEMENTS)
    resume = find_resume(folder / "checkpoints")
    step = 0 if resume is None else resume.progress.step
    saver = CheckpointSaver(
        folder / "checkpoints",
        ranks,
        run=make_identity(folder / "run"),
        retention=Retention(keep=2, keep_every=7),
        asynchronous=True,
    )
    while True:
        step += 1
        ranks.update(step)
        saver.begin(Progress(step=step), sound=step % 3 != 0, accuracy=None)
        for _ in range(4):
            time.sleep(0.01)
            saver.poll()


def test_a_kill_at_any_moment_leaves_complete_checkpoints_only_and_the_newest_has_the_right_bits(tmp_path):
    moments = random.Random(time.time_ns())
    checkpoints = tmp_path / "checkpoints"
    # Whatever is imported late is imported here, so that a process forked from this one is saving within milliseconds.
    write_checkpoint(checkpoints, 1, run=make_identity(tmp_path / "run"), elements=ELEMENTS)
    newest = 1
    for _ in range(KILLS):
        process = mp.get_context("fork").Process(target=_train, args=(tmp_path,))
        process.start()
        time.sleep(moments.uniform(0.05, 1.0))
        assert process.exitcode is None
        process.kill()
        process.join()
        there = list_checkpoints(checkpoints)
        assert {path: damage for path in there if (damage := find_damage(path))} == {}
        for path in there[-2:]:
            assert torch.equal(read_values(path), values_of(int(path.name[5:]), ELEMENTS))
        resume = find_resume(checkpoints)
        assert (resume.checkpoint, resume.progress.step) == (there[-1], int(there[-1].name[5:]))
        assert resume.progress.step >= newest
        newest = resume.progress.step
        assert (checkpoints / "latest").resolve() in there
    assert newest > 1, "no save was ever complete: the disk is too slow for this test"
