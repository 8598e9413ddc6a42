"""One training step: generate, judge, batch, score, reward, train, sync. Pure order of events; the math is elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch

from clipo_megatron.algorithms.advantages import group_advantages
from clipo_megatron.algorithms.reward import contrastive_reward
from clipo_megatron.controller.clock import PhaseClock
from clipo_megatron.controller.gate import check_logprobs
from clipo_megatron.controller.protocols import Engines, Policy
from clipo_megatron.data.batch import build_batch
from clipo_megatron.data.packing import least_rows
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import Floats, Prompt, RolloutBatch, RolloutGroup, Sampling, Scores, SyncReport, TrainReport
from clipo_megatron.rewards.pool import Verifiers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """All that happened in one step; `controller.report` turns it into metrics."""

    groups: Sequence[RolloutGroup]
    """Judged."""
    batch: RolloutBatch
    """With old log-probs and advantages."""
    scores: Scores | None
    """None in a step with too few judged rollouts to train on."""
    contrastive: Floats
    """[S] contrastive reward; zeros when the term is off."""
    trained: TrainReport | None
    """None in the steps in which only the head learns."""
    version: int
    """Of the weights after the step."""
    synced: SyncReport | None = None
    """None in a step that leaves the weights as they are."""


class Step:
    """Runs training steps of one recipe on a policy and engines."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        engines: Engines,
        verifiers: Verifiers,
        clock: PhaseClock,
        *,
        while_sampling: Callable[[], AbstractContextManager[None]],
        after_sampling: Callable[[], None],
    ) -> None:
        """Keep what a step needs.

        Args:
            recipe: of the run.
            policy: trained.
            engines: sampled from.
            verifiers: that judge.
            clock: of the step's phases.
            while_sampling: makes a block in which the engines generate; nothing else happens in it.
            after_sampling: called in every step while the policy still idles.
        """
        self._recipe = recipe
        self._policy = policy
        self._engines = engines
        self._verifiers = verifiers
        self._clock = clock
        self._while_sampling = while_sampling
        self._after_sampling = after_sampling
        self._gate_passed = False

    def run(self, prompts: Sequence[Prompt], *, step: int, version: int) -> StepReport:
        """One step on `prompts`.

        Args:
            prompts: the step's prompts.
            step: number of the step, from 1.
            version: of the weights that policy and engines hold.

        Raises:
            CheckError: the step-0 gate trips.
        """
        groups = self.sample(prompts, step=step, version=version)
        self._after_sampling()
        batch = build_batch(groups, group_size=self._recipe.algorithm.group_size)
        layout = self._recipe.layout
        if batch.num_sequences < least_rows(dp=self._recipe.dp, count_multiple=layout.pp if layout.vpp > 1 else 1):
            logger.warning("step %d: too few rollouts to train on; dropped: %s", step, dict(batch.dropped))
            nothing = np.zeros(batch.num_sequences, dtype=np.float32)
            return StepReport(
                groups=groups, batch=batch, scores=None, contrastive=nothing, trained=None, version=version
            )
        with self._clock.phase("score"):
            scores = self._policy.score(batch, step=step, with_reference=self._recipe.algorithm.kl.coefficient > 0)
        if not self._gate_passed:
            check_logprobs(
                batch,
                scores,
                max_difference=self._recipe.run.gate_max_logprob_difference,
                mean_difference=self._recipe.run.gate_mean_logprob_difference,
            )
            self._gate_passed = True
        contrastive = self.contrastive_rewards(batch, scores)
        batch = batch.with_(
            old_logprobs=scores.old_logprobs,
            reference_logprobs=scores.reference_logprobs,
            advantages=self.advantages(batch, contrastive),
        )
        trained = synced = None
        if not self._recipe.contrastive.enabled or step > self._recipe.contrastive.warmup_steps:
            with self._clock.phase("train"):
                trained = self._policy.train(batch, step=step)
            version += 1
            synced = self.sync(version)
        return StepReport(
            groups=groups,
            batch=batch,
            scores=scores,
            contrastive=contrastive,
            trained=trained,
            version=version,
            synced=synced,
        )

    def sample(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[RolloutGroup]:
        """Training rollouts of `prompts`, judged."""
        recipe = self._recipe
        with self._clock.phase("generate"):
            sampling = Sampling(
                samples=recipe.algorithm.group_size,
                temperature=recipe.rollout.temperature,
                top_p=1.0,
                max_tokens=recipe.rollout.max_response_tokens,
                seed=recipe.run.seed,
                step=step,
                routed_experts=recipe.experts.routing_replay,
            )
            with self._while_sampling():
                groups = self._engines.generate(prompts, sampling, version=version)
        with self._clock.phase("judge"):
            return judge(groups, self._verifiers)

    def contrastive_rewards(self, batch: RolloutBatch, scores: Scores) -> Floats:
        """float32 [S]: what the contrastive term pays each row; zeros when it is off."""
        section = self._recipe.contrastive
        if not section.enabled:
            return np.zeros(batch.num_sequences, dtype=np.float32)
        return contrastive_reward(
            torch.tensor(scores.contrastive_loss),
            torch.tensor(batch.is_correct),
            weight=section.reward_weight,
            floor=section.reward_floor,
            constant=section.constant_reward,
        ).numpy()

    def advantages(self, batch: RolloutBatch, contrastive: Floats) -> Floats:
        """float32 [S]: group-relative advantage of outcome plus contrastive reward."""
        return group_advantages(
            torch.tensor(batch.outcome + contrastive),
            torch.tensor(batch.group_id),
            use_std=self._recipe.algorithm.advantage == "group",
        ).numpy()

    def sync(self, version: int) -> SyncReport:
        """Move the policy's weights to the engines as `version`."""
        with self._clock.phase("sync"):
            return self._engines.update_weights(version, self._policy.weight_buckets(version))


def judge(groups: Sequence[RolloutGroup], verifiers: Verifiers) -> list[RolloutGroup]:
    """The same groups with every rollout's verdict."""
    items = [(g.prompt.verifier, g.prompt.answer, rollout.text) for g in groups for rollout in g.rollouts]
    verdicts = iter(verifiers.judge(items))
    return [
        replace(group, rollouts=tuple(replace(rollout, verdict=next(verdicts)) for rollout in group.rollouts))
        for group in groups
    ]
