"""Laws of the metrics file, the clock and the step-0 gate."""

import json
import time

import numpy as np
import pytest

from clipo_megatron.controller.clock import PhaseClock
from clipo_megatron.controller.gate import check_logprobs, measure_mismatch
from clipo_megatron.controller.metrics import MetricsWriter, read_metrics
from clipo_megatron.errors import CheckError
from clipo_megatron.records import RolloutBatch, Scores


def test_phases_and_other_add_up_to_the_step():
    clock = PhaseClock()
    for _ in range(3):
        with clock.phase("score"):
            time.sleep(0.003)
        with clock.phase("train"):
            time.sleep(0.002)
        seconds = clock.take()
        step = seconds.pop("step")
        assert sum(seconds.values()) == pytest.approx(step)
        assert seconds["score"] >= 0.003
        assert seconds["train"] >= 0.002


def test_a_resumed_file_has_each_step_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    for step in range(5):
        writer.write({"step": step, "reward/accuracy": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=2)
    writer.write({"step": 3, "reward/accuracy": 0.9})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["reward/accuracy"] == 0.9


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckError, match="line 2"):
        read_metrics(path)


def test_an_undeclared_metric_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    with pytest.raises(CheckError, match="reward/acuracy"):
        writer.write({"step": 1, "reward/acuracy": 1.0})
    writer.write({"step": 1, "evaluation/a/b/pass@1": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "evaluation/a/b/pass@1": 1.0}]


def test_event_files_hold_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    rows = [{"step": step, "policy/loss": 0.5 * step} for step in range(1, 4)]
    for row in rows:
        writer.write(row)
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    resumed = MetricsWriter(tmp_path, tensorboard=True, resume_step=3)
    resumed.write({"step": 4, "policy/loss": 2.0})
    resumed.close()
    rows.append({"step": 4, "policy/loss": 2.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("policy/loss")] == [1, 2, 3, 4]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows


def _batch_and_scores(difference):
    lengths, prompts = np.array([4, 5]), np.array([2, 1])
    sampled = np.array([0, 0, -1.0, -2.0, 0, -0.5, -0.1, -3.0, -1.0], dtype=np.float32)
    batch = RolloutBatch(
        input_ids=np.arange(9, dtype=np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=prompts,
        sampled_logprobs=sampled,
        group_id=np.zeros(2, dtype=np.int64),
        row_key=np.arange(2),
        is_correct=np.array([True, False]),
        outcome=np.array([1, 0], dtype=np.float32),
        truncated=np.zeros(2, dtype=bool),
    )
    scores = Scores(
        old_logprobs=sampled + np.asarray(difference, dtype=np.float32),
        entropy=np.zeros(9, dtype=np.float32),
        reference_logprobs=None,
        contrastive_loss=np.zeros(2, dtype=np.float32),
        is_anchor=np.zeros(2, dtype=bool),
        contrastive_metrics={},
    )
    return batch, scores


def test_the_gate_names_the_worst_response_token():
    # Token 0 and 4 are prompt tokens: whatever stands there does not count.
    batch, scores = _batch_and_scores([9, 0, 0, 0.01, 9, 0, 0, -0.25, 0])
    found = measure_mismatch(batch, scores)
    assert found.max == pytest.approx(0.25)
    assert found.mean == pytest.approx(0.26 / 6, rel=1e-5)
    assert found.probability_error == pytest.approx((4 + np.exp(0.01) + np.exp(0.25)) / 6, rel=1e-5)
    assert (found.worst_sequence, found.worst_position) == (1, 3)
    check_logprobs(batch, scores, max_difference=0.3, mean_difference=0.1)
    with pytest.raises(CheckError, match=r"sequence 1, token 3 \(id 7\)"):
        check_logprobs(batch, scores, max_difference=0.2, mean_difference=0.1)
    with pytest.raises(CheckError, match="on average"):
        check_logprobs(batch, scores, max_difference=0.3, mean_difference=0.01)


def test_a_nan_trips_the_gate():
    batch, scores = _batch_and_scores([0, 0, 0, 0, 0, 0, np.nan, 0, 0])
    with pytest.raises(CheckError, match="step-0 gate"):
        check_logprobs(batch, scores, max_difference=1.0, mean_difference=1.0)
