"""Sync check: after each of some perturbed syncs, do the engines sample from the weights that the policy has?

The policy is perturbed as training does it: one optimizer step, on drawn advantages. Then log-probs of what the engines
sampled before the sync must be off, and those of what they sample after it must agree with the policy's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from clipo_megatron.checks.preflight import device_problems, model_problems
from clipo_megatron.data.batch import build_batch
from clipo_megatron.data.packing import least_rows
from clipo_megatron.errors import CheckError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.sections import PrecisionSection
from clipo_megatron.records import (
    Prompt,
    RolloutBatch,
    RolloutGroup,
    Sampling,
    Scores,
    SyncReport,
    TrainReport,
    Verdict,
)
from clipo_megatron.weights.architecture import read_architecture

_LONGEST_PROMPT = 64
_SHORTEST_PROMPT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Largest differences between an engine's and the policy's log-probs of a prompt's response, in nats."""

    max: float
    """Of any token."""
    mean: float
    """Over the tokens."""


TOLERANCES = {
    "float32": Tolerance(max=1e-3, mean=1e-4),
    "bfloat16": Tolerance(max=1.0, mean=0.1),
    "fp8": Tolerance(max=2.0, mean=0.2),
}
"""By the engines' number format. Bfloat16 kernels of engine and trainer round differently, layer after layer."""
STEP_SIZE = 1e-3
"""Learning rate of the perturbing steps: AdamW moves nearly every weight by as much, enough to show in bfloat16 too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far the log-probs of one response are apart."""

    prompt: int
    """Number in the check."""
    tokens: int
    """Of the response."""
    max: float
    """nats"""
    mean: float
    """nats"""
    worst_token: int
    """Of the response, from 0; where the difference is largest."""

    def is_within(self, tolerance: Tolerance) -> bool:
        """Whether both are small enough; a NaN is not."""
        return self.max <= tolerance.max and self.mean <= tolerance.mean


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSync:
    """One sync and what was compared before and after it."""

    version: int
    seconds: float
    """From the pause of the engines until they can generate again; the first one also settles the transport."""
    synced: SyncReport
    stale: tuple[Difference, ...]
    """Engines before the sync against the policy after its step; none for version 0, which is the start's weights."""
    fresh: tuple[Difference, ...]
    """Engines after the sync against the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncCheckReport:
    """What was run, and how far the engines were from the policy."""

    syncs: tuple[CheckedSync, ...]
    tolerance: Tolerance
    step_size: float

    def past_tolerance(self) -> list[tuple[int, Difference]]:
        """(version, difference) of each response that a sync left too far apart."""
        return [
            (sync.version, difference)
            for sync in self.syncs
            for difference in sync.fresh
            if not difference.is_within(self.tolerance)
        ]

    def blind_versions(self) -> list[int]:
        """Versions that engines without the sync would have passed as well: their agreement says nothing."""
        return [
            sync.version
            for sync in self.syncs
            if sync.stale and all(difference.is_within(self.tolerance) for difference in sync.stale)
        ]

    @property
    def holds(self) -> bool:
        """Whether every sync was seen to work."""
        return not self.past_tolerance() and not self.blind_versions()


class CheckedPolicy(Protocol):
    """What the check needs of a policy."""

    def score(self, batch: RolloutBatch, *, step: int, with_reference: bool) -> Scores:
        """Log-probs of the weights as they are."""
        ...

    def train(self, batch: RolloutBatch, *, step: int) -> TrainReport:
        """One optimizer step."""
        ...


class CheckedEngines(Protocol):
    """What the check needs of the engines."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        """One group a prompt, from the weights of `version`."""
        ...


def recipe_of_check(recipe: Recipe, *, step_size: float) -> Recipe:
    """The recipe with which policy and engines are started: one plain optimizer step, all syncs verified.

    Layout, engines, transport, optimizer sharding and number format are the recipe's.
    """
    return recipe.model_copy(
        update={
            "algorithm": recipe.algorithm.model_copy(
                update={"updates_per_step": 1, "kl": recipe.algorithm.kl.model_copy(update={"coefficient": 0.0})}
            ),
            "contrastive": recipe.contrastive.model_copy(update={"enabled": False}),
            "optimizer": recipe.optimizer.model_copy(update={"learning_rate": step_size, "warmup_updates": 0}),
            # Quantised products of the trainer would be a difference of their own.
            "precision": PrecisionSection(),
            "sync": recipe.sync.model_copy(update={"verify": "always"}),
        }
    )


def sync_check_problems(recipe: Recipe) -> list[str]:
    """Faults of the model folder and the device; the data and the run folder are not used."""
    return [*model_problems(recipe), *device_problems(recipe)]


def draw_prompts(recipe: Recipe, *, count: int) -> list[Prompt]:
    """Prompts of drawn ids; more than `count` where the layout needs more rows than that.

    Args:
        recipe: its seed draws them; they are as long as its longest prompts at most.
        count: prompts wanted, >= 1.
    """
    layout = recipe.layout
    count = max(count, least_rows(dp=layout.dp, count_multiple=layout.pp if layout.vpp > 1 else 1))
    rng = np.random.default_rng(recipe.run.seed)
    vocab_size = read_architecture(Path(recipe.model.path)).vocab_size
    longest = min(_LONGEST_PROMPT, recipe.data.max_prompt_tokens)
    lengths = rng.integers(min(_SHORTEST_PROMPT, longest), longest + 1, count)
    return [
        Prompt(
            index=number,
            token_ids=rng.integers(0, vocab_size, length).astype(np.int32),
            answer="",
            verifier="math",
            source="sync check",
        )
        for number, length in enumerate(lengths)
    ]


def check_sync(
    policy: CheckedPolicy,
    engines: CheckedEngines,
    sync: Callable[[int], SyncReport],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    syncs: int,
    tolerance: Tolerance,
    step_size: float,
    on_stage: Callable[[str], None],
) -> SyncCheckReport:
    """Sync the start's weights, then perturb and sync `syncs` times; compare after each.

    Args:
        policy: of `recipe_of_check`.
        engines: which hold nothing of the policy yet.
        sync: brings the policy's weights to the engines as the given version.
        prompts: of `draw_prompts`.
        sampling: one sample of the whole distribution, at the policy's temperature; its step is set here.
        syncs: perturbed syncs, >= 1.
        tolerance: of the number format.
        step_size: as in `recipe_of_check`.
        on_stage: told what begins.

    Raises:
        CheckError: an optimizer step was skipped, as a loss or gradient was not finite.
        WorkerError: a worker failed or was late.
    """
    done: list[CheckedSync] = []
    stale: tuple[Difference, ...] = ()
    for version in range(syncs + 1):
        on_stage(f"version {version}: sync and compare")
        started = time.perf_counter()
        synced = sync(version)
        seconds = time.perf_counter() - started
        batch = _sample(engines, prompts, sampling, version=version)
        scores = policy.score(batch, step=version + 1, with_reference=False)
        fresh = compare_logprobs(batch, scores)
        done.append(CheckedSync(version=version, seconds=seconds, synced=synced, stale=stale, fresh=fresh))
        if version < syncs:
            on_stage(f"version {version + 1}: perturb the policy")
            _perturb(policy, batch, scores, seed=sampling.seed, step=version + 1)
            stale = compare_logprobs(batch, policy.score(batch, step=version + 1, with_reference=False))
    return SyncCheckReport(syncs=tuple(done), tolerance=tolerance, step_size=step_size)


def compare_logprobs(batch: RolloutBatch, scores: Scores) -> tuple[Difference, ...]:
    """The sampled log-probs of each response against the policy's."""
    differences: list[Difference] = []
    for row in range(batch.num_sequences):
        first = int(batch.cu_seqlens[row] + batch.prompt_lengths[row])
        tokens = slice(first, int(batch.cu_seqlens[row + 1]))
        apart = np.abs(batch.sampled_logprobs[tokens].astype(np.float64) - scores.old_logprobs[tokens])
        differences.append(
            Difference(
                prompt=int(batch.group_id[row]),
                tokens=len(apart),
                max=float(apart.max()),
                mean=float(apart.mean()),
                worst_token=int(apart.argmax()),
            )
        )
    return tuple(differences)


def _sample(engines: CheckedEngines, prompts: Sequence[Prompt], sampling: Sampling, *, version: int) -> RolloutBatch:
    groups = engines.generate(prompts, replace(sampling, step=version + 1), version=version)
    judged = [
        replace(group, rollouts=tuple(replace(rollout, verdict=Verdict.CORRECT) for rollout in group.rollouts))
        for group in groups
    ]
    batch = build_batch(judged, group_size=sampling.samples)
    if batch.dropped:
        raise CheckError(
            f"version {version}: the engines gave nothing to compare for {sum(batch.dropped.values())} prompts "
            f"({dict(batch.dropped)}); look at their logs"
        )
    return batch


def _perturb(policy: CheckedPolicy, batch: RolloutBatch, scores: Scores, *, seed: int, step: int) -> None:
    """One optimizer step on drawn advantages of either sign."""
    advantages = np.random.default_rng((seed, step)).standard_normal(batch.num_sequences).astype(np.float32)
    report = policy.train(batch.with_(old_logprobs=scores.old_logprobs, advantages=advantages), step=step)
    losses = [value for key, value in report.metrics.items() if key == "loss"]
    if report.skipped or not all(map(math.isfinite, losses)):
        raise CheckError(
            f"step {step}: the perturbing optimizer step was skipped, as its loss or gradient is not finite; check the "
            "model's weights, or give a smaller --step-size"
        )
