"""Laws of a run that fails while a checkpoint is being written: the checkpoint is completed first, the failure is told."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.checkpoints import TwoRanks, make_identity, read_values, values_of, write_checkpoint
from support.idle_run import IdlePolicy, SamplingEngines, Undecided

from clipo_megatron.checkpoint.manifest import Progress, find_damage, list_checkpoints
from clipo_megatron.checkpoint.retention import Retention
from clipo_megatron.controller.loop import TrainingLoop
from clipo_megatron.controller.saving import CheckpointSaver
from clipo_megatron.controller.stop import StopRequest
from clipo_megatron.data.prompts import PromptSet
from clipo_megatron.errors import CheckError, EngineError, WorkerError
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import Prompt, RolloutGroup, Sampling


class FailingEngines(SamplingEngines):
    """Sample in the first step and fail in the second one, while the ranks still write."""

    def __init__(self, may_write: threading.Event) -> None:
        self._may_write = may_write

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        if sampling.step == 2:
            threading.Timer(0.1, self._may_write.set).start()
            raise EngineError("engine_0 is gone")
        return super().generate(prompts, sampling, version=version)


def test_a_run_that_fails_while_a_checkpoint_is_written_completes_it_and_tells_its_own_failure(tmp_path):
    model = make_identity(tmp_path / "run").model_path
    recipe = Recipe.model_validate(
        {
            "run": {"name": "try", "folder": str(tmp_path), "steps": 3},
            "model": {"path": str(model)},
            "data": {"train": ["train.parquet"]},
            "algorithm": {"prompts_per_step": 2, "group_size": 2, "kl": {"coefficient": 0.0}},
            "checkpoint": {"every": 1},
        }
    )
    (tmp_path / "try").mkdir()
    prompt = Prompt(index=0, token_ids=np.zeros(1, np.int32), answer="1", verifier="math", source="s")
    may_write = threading.Event()
    policy = IdlePolicy(before_writing=lambda _rank: may_write.wait(10))
    policy.update(7)
    loop = TrainingLoop(
        recipe,
        policy=policy,
        engines=FailingEngines(may_write),
        verifiers=Undecided(),
        train=PromptSet(prompts=(prompt, prompt), num_overlong=0),
        evaluation=None,
        resume=None,
        on_row=lambda _row: None,
        stop=StopRequest(),
    )
    with pytest.raises(EngineError, match="engine_0 is gone"):
        loop.run()
    [checkpoint] = list_checkpoints(tmp_path / "try" / "checkpoints")
    assert find_damage(checkpoint) == []
    assert torch.equal(read_values(checkpoint), values_of(7))


def test_steps_that_are_not_finite_end_a_run_only_if_they_come_in_a_row_and_the_last_good_checkpoint_is_named(tmp_path):
    run = make_identity(tmp_path / "run")
    recipe = Recipe.model_validate(
        {
            "run": {"name": "try", "folder": str(tmp_path), "max_unsound_steps": 3},
            "model": {"path": str(run.model_path)},
            "data": {"train": ["train.parquet"]},
            "algorithm": {"prompts_per_step": 1, "group_size": 2, "kl": {"coefficient": 0.0}},
        }
    )
    prompt = Prompt(index=0, token_ids=np.zeros(1, np.int32), answer="1", verifier="math", source="s")
    loop = TrainingLoop(
        recipe,
        policy=IdlePolicy(),
        engines=FailingEngines(threading.Event()),
        verifiers=Undecided(),
        train=PromptSet(prompts=(prompt,), num_overlong=0),
        evaluation=None,
        resume=None,
        on_row=lambda _row: None,
        stop=StopRequest(),
    )
    for step, sound in ((2, True), (4, False)):
        write_checkpoint(tmp_path / "try" / "checkpoints", step, run=run, sound=sound)
    good, bad = {"policy/loss": 1.0}, {"policy/loss": 1.0, "policy/skipped_updates": 2.0}
    for step, row in enumerate((bad, bad, good, bad, bad), 1):
        loop._count_unsound(row, Progress(step=step))
    with pytest.raises(
        CheckError, match=r"steps 4 to 6: .* 3 steps in a row .*last good checkpoint is .*/step_00000002\."
    ):
        loop._count_unsound(bad, Progress(step=6))


def test_what_can_not_be_completed_is_logged_and_not_raised_and_nothing_is_left(tmp_path, caplog):
    def dies(_rank: int) -> None:
        raise WorkerError("policy_1 died")

    folder, run = tmp_path / "checkpoints", make_identity(tmp_path / "run")
    saver = CheckpointSaver(
        folder, TwoRanks(before_writing=dies), run=run, retention=Retention(keep=5), asynchronous=True
    )
    saver.rescue()  # nothing is under way
    saver.begin(Progress(step=1), sound=True, accuracy=None)
    saver.rescue()
    assert "checkpoint of step 1 can't be written: policy_1 died" in caplog.text
    assert not list(folder.iterdir())
