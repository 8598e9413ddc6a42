"""The table of all metrics, and the writer of metrics.jsonl (one object a step) and TensorBoard files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from clipo_megatron.errors import CheckError

METRICS: dict[str, str] = {
    "step": "training step, from 1; 0 is the evaluation before the first",
    "version": "version of the weights after this step",
    "epoch": "passes over the training prompts so far, with fraction",
    "reward/accuracy": "share of judged rollouts that are right",
    "reward/verifier_mean": "mean outcome reward of the rows trained on",
    "reward/contrastive_mean": "mean contrastive reward of the rows trained on",
    "reward/contrastive_std_in_group": "standard deviation of the contrastive reward inside a prompt's right rows, mean over prompts",
    "reward/total_mean": "mean of outcome plus contrastive reward",
    "reward/contrastive_length_correlation": "correlation of contrastive reward and response length over anchors",
    "contrastive/loss": "nats, mean over anchors, of the head before its step",
    "contrastive/loss_mean": "nats, mean of the losses that rewards are made of; differs from loss in reference numerics",
    "contrastive/loss_min": "nats, over anchors",
    "contrastive/loss_max": "nats, over anchors",
    "contrastive/num_anchors": "rows with a contrastive loss",
    "contrastive/anchor_share": "anchors / right rows",
    "contrastive/trivial_share": "share of right rows without another right or without a wrong row in their set",
    "contrastive/clamped_share": "share of anchors whose reward is at the floor",
    **{
        f"contrastive/cosine_{pair}_{measure}": f"{words}, pairs inside a group"
        for pair in ("right_right", "right_wrong", "wrong_wrong")
        for measure, words in {
            "mean": "mean cosine of embeddings",
            "min": "smallest cosine of embeddings",
            "max": "largest cosine of embeddings",
            "count": "number",
        }.items()
    },
    "contrastive/head_grad_norm": "norm of the head's gradient",
    "contrastive/head_steps_skipped": "steps of the run so far in which the head had no anchor or no finite loss",
    "policy/loss": "clipped policy loss without the KL loss, mean over the step's updates",
    "policy/kl": "KL estimate against the reference policy, nats a token",
    "policy/clip_share": "share of response tokens whose ratio is clipped",
    "policy/ratio_mean": "mean ratio of new to old probability of a response token",
    "policy/ratio_max": "largest ratio of new to old probability of a response token",
    "policy/entropy": "nats, mean over response tokens, before the update",
    "policy/grad_norm": "global gradient norm before clipping, mean over updates",
    "policy/learning_rate": "of the last update",
    "policy/route_agreement": "share of (token, layer) pairs whose router would have chosen the experts replayed to it",
    "policy/padding_share": "padding among the tokens that the updates run through the policy",
    "policy/imbalance": "work of the dearest data parallel rank over their mean, minus 1, mean over updates",
    "policy/updates": "optimizer steps taken",
    "policy/skipped_step": "1 when too few judged rollouts were left to train on, so that nothing was learnt",
    "policy/skipped_updates": "optimizer steps refused because loss or gradient was not finite",
    "mismatch/logprob_max": "nats, largest |sampled - scored log-prob| of a response token",
    "mismatch/logprob_mean": "nats, mean |sampled - scored log-prob|",
    "mismatch/probability_error": "mean of exp |sampled - scored log-prob|; 1.05 and more means a fault",
    "rollout/response_length_mean": "tokens",
    "rollout/response_length_max": "tokens",
    "rollout/prompt_length_mean": "tokens",
    "rollout/truncated_share": "share of rollouts that ended at the length limit",
    "rollout/undecided_share": "share of rollouts that the verifier could not decide",
    "rollout/dropped": "rollouts left out of the batch: undecided, empty or aborted",
    "rollout/mixed_group_share": "share of prompts with right and wrong rollouts",
    "rollout/duplicate_share": "share of rollouts that repeat an earlier one of their group token by token",
    "rollout/tokens_per_s": "response tokens generated a second, over all engines",
    "rollout/engine_restarts": "engines started again because their processes ended, since this start of the run",
    "checkpoint/snapshot_seconds": "training stood still while all ranks copied their state, since the last line",
    "checkpoint/write_seconds": "of the slowest rank, until its files were on the disk, and to complete the checkpoint",
    "checkpoint/wait_seconds": "training stood still because the checkpoint before was still being written",
    "checkpoint/bytes": "of the checkpoints completed since the last line",
    "sync/bytes": "written into all engines' parameters by planned copies, or sent to all of them in buckets",
    "sync/planned": "1 for planned copies, 0 for buckets",
    "sync/floor_seconds": "the busiest engine rank's copies alone at its measured copy rate; planned copies only",
    "colocation/generate_mib": "memory in use as engines have generated: on the fullest GPU; on CPUs, of all workers together",
    "colocation/idle_mib": "the same while engines sleep and the trainer is offloaded",
    "colocation/train_mib": "the same as the trainer has trained",
    "colocation/turn_seconds": "handing the devices over and back; part of seconds/score and seconds/sync",
    "seconds/generate": "sampling the rollouts",
    "seconds/judge": "verifying the answers",
    "seconds/score": "log-probs, pooled states, contrastive head",
    "seconds/train": "optimizer steps",
    "seconds/sync": "moving the weights to the engines",
    "seconds/evaluate": "evaluation after this step",
    "seconds/save": "stalls of checkpoints, and exports, since the last line",
    "seconds/other": "all the rest",
    "seconds/step": "since the last line; the sum of the above",
}
EVALUATION = ("pass@1", "mean@n", "undecided_share", "truncated_share", "response_length_mean")
"""Measures of an evaluation; each stands as `evaluation/SOURCE/MEASURE`."""


class MetricsWriter:
    """Appends one JSON object a step; refuses keys that the table does not declare."""

    def __init__(self, folder: Path, *, tensorboard: bool, resume_step: int | None) -> None:
        """Open `folder`/metrics.jsonl.

        Args:
            folder: the run's folder.
            tensorboard: also write event files to `folder`/tensorboard.
            resume_step: keep lines up to this step and drop later ones (they are run again); None: start anew.
        """
        self._path = folder / "metrics.jsonl"
        kept = (
            ""
            if resume_step is None
            else "".join(json.dumps(row) + "\n" for row in read_metrics(self._path) if row["step"] <= resume_step)
        )
        beside = self._path.with_suffix(".tmp")
        beside.write_text(kept)
        beside.replace(self._path)
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # only on demand: an optional dependency

            self._events = SummaryWriter(
                str(folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1
            )

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; it is on disk when this returns.

        Raises:
            CheckError: a key is not declared.
        """
        unknown = [key for key in row if key not in METRICS and not is_evaluation(key)]
        if unknown:
            raise CheckError(f"metrics {unknown}: not declared in controller/metrics.py; declare them with their unit")
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._events is not None:
            for key, value in row.items():
                self._events.add_scalar(key, value, int(row["step"]))
            self._events.flush()

    def close(self) -> None:
        """End the event file, if any."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All rows of a metrics.jsonl; none when there is no file. A last line that a kill cut off is left out.

    Raises:
        CheckError: an earlier line is damaged.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise CheckError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from error
    return rows


def is_evaluation(key: str) -> bool:
    """Whether a metric is a measure of an evaluation."""
    return key.startswith("evaluation/") and key.rsplit("/", 1)[-1] in EVALUATION
