"""Laws of the sync check, on a policy that is one vector of logits: what it lets pass, and each way in which it fails."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from clipo_megatron.checks.sync import CheckedSync, SyncCheckReport, Tolerance, check_sync, compare_logprobs
from clipo_megatron.cli.check_sync import report_json
from clipo_megatron.errors import CheckError
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import (
    Finish,
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    Sampling,
    Scores,
    SyncReport,
    TrainReport,
)

VOCAB_SIZE = 7
TOLERANCE = Tolerance(max=1e-3, mean=1e-4)
SAMPLING = Sampling(samples=1, temperature=1.0, top_p=1.0, max_tokens=5, seed=3, step=1)
PROMPTS = [
    Prompt(index=n, token_ids=np.arange(n + 1, dtype=np.int32), answer="", verifier="math", source="") for n in range(3)
]


def _logprobs(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return logits - np.log(np.exp(logits).sum())


class Vector:
    """A policy whose every token is drawn from the same logits; its step adds what the seed says."""

    def __init__(self, *, step_size: float, skipped: int = 0) -> None:
        self.logits = np.zeros(VOCAB_SIZE)
        self._step_size, self._skipped = step_size, skipped

    def score(self, batch: RolloutBatch, *, step: int, with_reference: bool) -> Scores:
        of_tokens = np.where(batch.response_mask, _logprobs(self.logits)[batch.input_ids], 0).astype(np.float32)
        nothing = np.zeros(batch.num_sequences, dtype=np.float32)
        return Scores(
            old_logprobs=of_tokens, entropy=of_tokens, reference_logprobs=None, contrastive_loss=nothing,
            is_anchor=nothing.astype(bool), contrastive_metrics={},
        )  # fmt: skip

    def train(self, batch: RolloutBatch, *, step: int) -> TrainReport:
        assert batch.advantages is not None
        assert {*np.sign(batch.advantages)} <= {-1.0, 1.0}
        np.testing.assert_array_equal(
            batch.old_logprobs, self.score(batch, step=step, with_reference=False).old_logprobs
        )
        self.logits = self.logits + self._step_size * np.random.default_rng(step).standard_normal(VOCAB_SIZE)
        return TrainReport(metrics={"loss": 0.0}, updates=1 - self._skipped, skipped=self._skipped)


class Drawn:
    """Engines that sample from their own copy of the logits."""

    def __init__(self) -> None:
        self.logits = np.zeros(VOCAB_SIZE)
        self.version = -1

    def generate(self, prompts, sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        assert version == self.version
        logprobs = _logprobs(self.logits)
        groups = []
        for prompt in prompts:
            rng = np.random.default_rng((sampling.seed, sampling.step, prompt.index))
            ids = rng.choice(VOCAB_SIZE, sampling.max_tokens, p=np.exp(logprobs)).astype(np.int32)
            rollout = Rollout(
                response_ids=ids, sampled_logprobs=logprobs[ids].astype(np.float32), finish=Finish.LENGTH,
                policy_versions=(), text="",
            )  # fmt: skip
            groups.append(RolloutGroup(prompt=prompt, rollouts=(rollout,)))
        return groups


def _run(policy: Vector, *, copies: bool = True, error: float = 0.0, syncs: int = 2) -> SyncCheckReport:
    engines = Drawn()

    def sync(version: int) -> SyncReport:
        engines.version = version
        if copies:
            engines.logits = policy.logits.copy()
            engines.logits[0] += error
        return SyncReport(transport="shm", num_bytes=8 * VOCAB_SIZE, floor_seconds=None)

    return check_sync(
        policy, engines, sync, PROMPTS, SAMPLING, syncs=syncs, tolerance=TOLERANCE, step_size=1.0,
        on_stage=lambda _: None,
    )  # fmt: skip


def test_syncs_that_copy_hold_and_the_engines_before_them_did_not() -> None:
    report = _run(Vector(step_size=1.0))
    assert report.holds
    assert [sync.version for sync in report.syncs] == [0, 1, 2]
    assert report.syncs[0].stale == ()
    for sync in report.syncs[1:]:
        assert max(difference.max for difference in sync.stale) > TOLERANCE.max
        assert all(difference.max < 1e-6 for difference in sync.fresh)


def test_syncs_that_copy_nothing_are_found_with_every_prompt_from_the_first_perturbed_one_on() -> None:
    report = _run(Vector(step_size=1.0), copies=False)
    assert not report.holds
    named = [(version, difference.prompt) for version, difference in report.past_tolerance()]
    assert named == [(version, prompt) for version in (1, 2) for prompt in range(len(PROMPTS))]
    assert report.blind_versions() == []


def test_one_wrong_weight_is_found() -> None:
    report = _run(Vector(step_size=1.0), error=0.1)
    assert not report.holds
    assert {version for version, _ in report.past_tolerance()} == {0, 1, 2}


def test_a_perturbation_too_small_to_be_missed_does_not_count_as_a_success() -> None:
    report = _run(Vector(step_size=1e-6))
    assert report.past_tolerance() == []
    assert report.blind_versions() == [1, 2]
    assert not report.holds


def test_a_skipped_step_is_an_error() -> None:
    with pytest.raises(CheckError, match=r"step 1: .* skipped"):
        _run(Vector(step_size=1.0, skipped=1))


def _batch(sampled: list[float]) -> RolloutBatch:
    """Two rows: one token of prompt and two of response each."""
    return RolloutBatch(
        input_ids=np.zeros(6, np.int32),
        cu_seqlens=np.array([0, 3, 6]),
        prompt_lengths=np.array([1, 1]),
        sampled_logprobs=np.array(sampled, np.float32),
        group_id=np.array([0, 1]),
        row_key=np.array([0, 1]),
        is_correct=np.ones(2, bool),
        outcome=np.ones(2, np.float32),
        truncated=np.zeros(2, bool),
    )


def _scores(logprobs: list[float]) -> Scores:
    nothing = np.zeros(2, np.float32)
    return Scores(
        old_logprobs=np.array(logprobs, np.float32), entropy=np.zeros(6, np.float32), reference_logprobs=None,
        contrastive_loss=nothing, is_anchor=nothing.astype(bool), contrastive_metrics={},
    )  # fmt: skip


def test_differences_are_those_of_response_tokens_row_by_row() -> None:
    first, second = compare_logprobs(_batch([9, -1, -2, 9, -4, -3]), _scores([0, -1, -2.5, 0, -1, -2]))
    assert (first.prompt, first.tokens, first.max, first.mean, first.worst_token) == (0, 2, 0.5, 0.25, 1)
    assert (second.prompt, second.tokens, second.max, second.mean, second.worst_token) == (1, 2, 3.0, 2.0, 0)


def test_a_value_that_is_not_a_number_is_past_every_tolerance_and_null_in_json() -> None:
    fresh = compare_logprobs(_batch([0, -1, np.nan, 0, -1, -1]), _scores([0, -1, -1, 0, -1, -1]))
    synced = SyncReport(transport="stream", num_bytes=1, floor_seconds=None)
    report = SyncCheckReport(
        syncs=(CheckedSync(version=0, seconds=0.5, synced=synced, stale=(), fresh=fresh),),
        tolerance=Tolerance(max=1e9, mean=1e9),
        step_size=1.0,
    )
    assert [difference.prompt for _, difference in report.past_tolerance()] == [0]
    recipe = Recipe.model_validate({"run": {"name": "x"}, "model": {"path": "m"}, "data": {"train": ["d"]}})
    body = report_json(report, recipe)
    assert body["holds"] is False
    assert body["past_tolerance"] == [{"version": 0, "prompt": 0}]
    (sync,) = body["syncs"]
    assert [difference["max"] for difference in sync["fresh"]] == [None, 0.0]
    assert sync["transport"] == "stream"
