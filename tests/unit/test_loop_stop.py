"""Laws of a run that is stopped, or out of time, at an evaluation or an export: it saves at once, and makes them later."""

from __future__ import annotations

import numpy as np
import pytest
from support.checkpoints import make_identity
from support.idle_run import IdlePolicy, SamplingEngines, Undecided

from clipo_megatron.checkpoint.manifest import list_checkpoints
from clipo_megatron.checkpoint.training import find_resume
from clipo_megatron.controller.loop import TrainingLoop
from clipo_megatron.controller.metrics import is_evaluation, read_metrics
from clipo_megatron.controller.stop import StopRequest
from clipo_megatron.data.prompts import PromptSet
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import Prompt

STEPS = 3


class StoppingEngines(SamplingEngines):
    """Ask for a stop in the middle of one evaluation."""

    def __init__(self, stop: StopRequest, at_evaluation: int) -> None:
        self._stop, self._left = stop, at_evaluation

    def generate(self, prompts, sampling, *, version):
        if sampling.step == 0:
            self._left -= 1
            if self._left == 0:
                self._stop.ask()
        return super().generate(prompts, sampling, version=version)


@pytest.fixture
def make_loop(tmp_path):
    model = make_identity(tmp_path / "run").model_path
    prompt = Prompt(index=0, token_ids=np.zeros(1, np.int32), answer="1", verifier="math", source="s")
    prompts = PromptSet(prompts=(prompt, prompt), num_overlong=0)

    def make(name, *, engines=None, stop=None):
        recipe = Recipe.model_validate(
            {
                "run": {"name": name, "folder": str(tmp_path), "steps": STEPS},
                "model": {"path": str(model)},
                "data": {"train": ["train.parquet"], "evaluation": ["train.parquet"]},
                "algorithm": {"prompts_per_step": 2, "group_size": 2, "kl": {"coefficient": 0.0}},
                "checkpoint": {"every": 0, "asynchronous": False},
                "evaluation": {"every": 1, "at_start": True},
            }
        )
        (tmp_path / name).mkdir(exist_ok=True)
        return TrainingLoop(
            recipe,
            policy=IdlePolicy(),
            engines=engines or SamplingEngines(),
            verifiers=Undecided(),
            train=prompts,
            evaluation=prompts,
            resume=find_resume(tmp_path / name / "checkpoints"),
            on_row=lambda _row: None,
            stop=stop or StopRequest(),
        )

    return make


def _evaluations(folder) -> list[tuple[float, dict[str, float]]]:
    rows = read_metrics(folder / "metrics.jsonl")
    found = [(row["step"], {key: row[key] for key in row if is_evaluation(key)}) for row in rows]
    return [(step, measures) for step, measures in found if measures]


@pytest.mark.parametrize("at_evaluation", range(1, STEPS + 2))
def test_an_evaluation_is_given_up_for_a_stop_and_made_when_the_run_goes_on(tmp_path, make_loop, at_evaluation):
    make_loop("whole").run()
    stop = StopRequest()
    outcome = make_loop("cut", engines=StoppingEngines(stop, at_evaluation), stop=stop).run()
    done = at_evaluation - 1
    assert (outcome.stopped, outcome.progress.step, outcome.exported) == (True, done, None)
    assert [path.name for path in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [f"step_{done:08d}"]
    assert [step for step, _ in _evaluations(tmp_path / "cut")] == list(range(done))
    outcome = make_loop("cut").run()
    assert (outcome.stopped, outcome.progress.step) == (False, STEPS)
    assert outcome.exported is not None
    assert _evaluations(tmp_path / "cut") == _evaluations(tmp_path / "whole")
    assert [step for step, _ in _evaluations(tmp_path / "whole")] == list(range(STEPS + 1))


def test_no_export_begins_that_would_outlast_the_time_given_by_the_saves_of_earlier_starts(tmp_path, make_loop):
    stop = StopRequest()
    make_loop("late", engines=StoppingEngines(stop, STEPS + 1), stop=stop).run()
    metrics = tmp_path / "late" / "metrics.jsonl"
    row = '{"step": 0.0, "checkpoint/snapshot_seconds": 10.0, "checkpoint/write_seconds": 90.0}\n'
    metrics.write_text(row + metrics.read_text())
    for left_s, is_exported in ((149.0, False), (151.0, True)):
        outcome = make_loop("late", stop=StopRequest(end_time=1000.0 + left_s, now=lambda: 1000.0)).run()
        assert (outcome.exported is not None, outcome.stopped) == (is_exported, not is_exported), left_s
