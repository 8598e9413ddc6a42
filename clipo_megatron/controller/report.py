"""From a step's report to the row of metrics.jsonl and the lines of its rollout file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.controller.gate import measure_mismatch
from clipo_megatron.controller.step import StepReport
from clipo_megatron.records import Finish, RolloutBatch, RolloutGroup, Scores, SyncReport, Verdict

_FINITE = ("policy/loss", "policy/kl", "policy/grad_norm", "contrastive/loss", "contrastive/head_grad_norm")


def step_metrics(report: StepReport, *, reward_floor: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """All metrics of one training step, keys as declared in `controller.metrics`."""
    row = {"version": float(report.version)}
    row |= _rollout_metrics(report.groups, report.batch, seconds)
    if report.synced is not None:
        row |= _sync_metrics(report.synced)
    seconds_row = {f"seconds/{key}": value for key, value in seconds.items()}
    if report.scores is None:
        return row | {"policy/skipped_step": 1.0} | seconds_row
    return row | _learning_metrics(report, report.scores, reward_floor) | seconds_row


def _sync_metrics(synced: SyncReport) -> dict[str, float]:
    row = {"sync/bytes": float(synced.num_bytes), "sync/planned": float(synced.transport != "stream")}
    return row if synced.floor_seconds is None else row | {"sync/floor_seconds": synced.floor_seconds}


def _learning_metrics(report: StepReport, scores: Scores, reward_floor: float) -> dict[str, float]:
    row = _reward_metrics(report, scores, reward_floor)
    row |= {f"contrastive/{key}": value for key, value in scores.contrastive_metrics.items()}
    if not scores.contrastive_metrics.get("num_anchors"):
        row.pop("contrastive/loss", None)  # a mean over nothing
    tokens = max(int(report.batch.response_mask.sum()), 1)
    row |= {f"policy/{key}": value for key, value in scores.policy_metrics.items()}
    row["policy/entropy"] = float(scores.entropy.sum() / tokens)
    if report.trained is not None:
        row |= {f"policy/{key}": value for key, value in report.trained.metrics.items()}
        row["policy/updates"] = float(report.trained.updates)
        row["policy/skipped_updates"] = float(report.trained.skipped)
    if scores.reference_logprobs is None:
        row.pop("policy/kl", None)
    mismatch = measure_mismatch(report.batch, scores)
    row["mismatch/logprob_max"] = mismatch.max
    row["mismatch/logprob_mean"] = mismatch.mean
    row["mismatch/probability_error"] = mismatch.probability_error
    return row


def _rollout_metrics(
    groups: Sequence[RolloutGroup], batch: RolloutBatch, seconds: Mapping[str, float]
) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verdicts = [rollout.verdict for rollout in rollouts]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    judged = len(verdicts) - verdicts.count(Verdict.UNDECIDED)
    mixed = [{rollout.verdict for rollout in group.rollouts} >= {Verdict.CORRECT, Verdict.WRONG} for group in groups]
    distinct = sum(len({rollout.response_ids.tobytes() for rollout in group.rollouts}) for group in groups)
    return {
        "reward/accuracy": verdicts.count(Verdict.CORRECT) / max(judged, 1),
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/prompt_length_mean": float(np.mean([len(group.prompt.token_ids) for group in groups])),
        "rollout/truncated_share": float(np.mean([rollout.finish is Finish.LENGTH for rollout in rollouts])),
        "rollout/undecided_share": 1.0 - judged / len(verdicts),
        "rollout/dropped": float(sum(batch.dropped.values())),
        "rollout/mixed_group_share": float(np.mean(mixed)),
        "rollout/duplicate_share": 1.0 - distinct / len(rollouts),
        "rollout/tokens_per_s": float(lengths.sum()) / max(seconds.get("generate", 0.0), 1e-9),
    }


def _reward_metrics(report: StepReport, scores: Scores, reward_floor: float) -> dict[str, float]:
    batch, contrastive, is_anchor = report.batch, report.contrastive, scores.is_anchor
    row = {
        "reward/verifier_mean": float(batch.outcome.mean()),
        "reward/contrastive_mean": float(contrastive.mean()),
        "reward/total_mean": float((batch.outcome + contrastive).mean()),
    }
    if not scores.contrastive_metrics:
        return row
    right = batch.is_correct
    row["contrastive/anchor_share"] = float((is_anchor & right).sum() / max(right.sum(), 1))
    row["contrastive/clamped_share"] = (
        float((contrastive[is_anchor] <= reward_floor).mean()) if is_anchor.any() else 0.0
    )
    spread = [
        contrastive[rows].std()
        for group in np.unique(batch.group_id)
        if (rows := (batch.group_id == group) & right).any()
    ]
    row["reward/contrastive_std_in_group"] = float(np.mean(spread)) if spread else 0.0
    row["reward/contrastive_length_correlation"] = _correlation(
        contrastive[is_anchor], batch.response_lengths[is_anchor].astype(np.float32)
    )
    return row


def _correlation(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Pearson's; 0 where it is not defined."""
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def is_sound(row: Mapping[str, float]) -> bool:
    """Whether all losses and gradients of a step were finite."""
    return not row.get("policy/skipped_updates") and all(math.isfinite(row[key]) for key in _FINITE if key in row)


def mean_accuracy(row: Mapping[str, float]) -> float | None:
    """The row's evaluation in one number: pass@1, mean over the sources; None without one."""
    found = [value for key, value in row.items() if key.startswith("evaluation/") and key.endswith("/pass@1")]
    return sum(found) / len(found) if found else None


def write_rollouts(path: Path, report: StepReport) -> None:
    """Write a step's rollouts as JSONL, one object a rollout, written beside and renamed.

    A rollout that the batch left out has `advantage` and `contrastive_reward` null.
    """
    batch, group_size = report.batch, max(len(group.rollouts) for group in report.groups)
    row_of = {int(key): row for row, key in enumerate(batch.row_key)}
    lines = []
    for group in report.groups:
        for sample, line in enumerate(_group_lines(group)):
            row = row_of.get(group.prompt.index * group_size + sample)
            paid = None if row is None else float(report.contrastive[row])
            advantage = None if row is None or batch.advantages is None else float(batch.advantages[row])
            lines.append({"contrastive_reward": paid, "advantage": advantage} | line)
    _write_lines(path, lines)


def write_answers(path: Path, groups: Sequence[RolloutGroup]) -> None:
    """Write the answers of an evaluation as JSONL, one object an answer, written beside and renamed."""
    _write_lines(path, [line for group in groups for line in _group_lines(group)])


def _group_lines(group: RolloutGroup) -> list[dict[str, object]]:
    return [
        {
            "prompt": group.prompt.index,
            "sample": sample,
            "source": group.prompt.source,
            "verdict": rollout.verdict,
            "finish": rollout.finish,
            "response_tokens": len(rollout.response_ids),
            "policy_versions": [[span.version, span.start, span.end] for span in rollout.policy_versions],
            "answer": group.prompt.answer,
            "text": rollout.text,
            "prompt_ids": group.prompt.token_ids.tolist(),
            "response_ids": rollout.response_ids.tolist(),
        }
        for sample, rollout in enumerate(group.rollouts)
    ]


def _write_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    beside.replace(path)
