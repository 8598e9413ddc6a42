"""Evaluation of the weights that the engines hold: pass@1 greedy, mean@n sampled; the same in training and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipo_megatron.controller.protocols import Sampler
from clipo_megatron.controller.step import judge
from clipo_megatron.records import Finish, Prompt, RolloutGroup, Verdict
from clipo_megatron.rewards.pool import Verifiers


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """How answers are sampled and counted."""

    samples: int
    """n of mean@n; 1: greedy only."""
    temperature: float
    """Of the n samples."""
    top_p: float
    """Of the n samples."""
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of one evaluation."""

    measures: dict[str, dict[str, float]]
    """By source: `pass@1`, `mean@n` (with samples > 1), shares of undecided and truncated answers, mean length."""
    greedy: list[RolloutGroup]
    """The judged greedy answers."""


def evaluate(
    prompts: Sequence[Prompt], engines: Sampler, verifiers: Verifiers, spec: EvaluationSpec, *, version: int | None
) -> Evaluation:
    """Answer all prompts greedily, and `spec.samples` times more if that is above 1.

    An undecided answer counts as not right here, and its share is reported, so that results stay comparable.
    """
    greedy = judge(_generate(prompts, engines, spec, version=version, samples=1, temperature=0.0, top_p=1.0), verifiers)
    sampled: list[RolloutGroup] = []
    if spec.samples > 1:
        sampled = judge(
            _generate(
                prompts,
                engines,
                spec,
                version=version,
                samples=spec.samples,
                temperature=spec.temperature,
                top_p=spec.top_p,
            ),
            verifiers,
        )
    results: dict[str, dict[str, float]] = {}
    for source in sorted({prompt.source for prompt in prompts}):
        mine = [group for group in greedy if group.prompt.source == source]
        rollouts = [rollout for group in mine for rollout in group.rollouts]
        results[source] = {
            "pass@1": _accuracy(mine),
            "undecided_share": float(np.mean([rollout.verdict is Verdict.UNDECIDED for rollout in rollouts])),
            "truncated_share": float(np.mean([rollout.finish is Finish.LENGTH for rollout in rollouts])),
            "response_length_mean": float(np.mean([len(rollout.response_ids) for rollout in rollouts])),
        }
        if sampled:
            results[source]["mean@n"] = _accuracy([group for group in sampled if group.prompt.source == source])
    return Evaluation(measures=results, greedy=greedy)


def _generate(
    prompts: Sequence[Prompt],
    engines: Sampler,
    spec: EvaluationSpec,
    *,
    version: int | None,
    samples: int,
    temperature: float,
    top_p: float,
) -> list[RolloutGroup]:
    # Step 0 is never a training step, so evaluation seeds never meet those of training rollouts.
    return engines.generate(
        prompts,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=spec.max_tokens,
        seed=spec.seed,
        step=0,
        version=version,
    )


def _accuracy(groups: Sequence[RolloutGroup]) -> float:
    """Mean over prompts of the share of right answers."""
    return float(np.mean([np.mean([r.verdict is Verdict.CORRECT for r in group.rollouts]) for group in groups]))
