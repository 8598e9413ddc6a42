"""Evaluation of the weights that the engines hold: pass@1 greedy, mean@n sampled; the same in training and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clipo_megatron.controller.protocols import Sampler
from clipo_megatron.controller.step import judge
from clipo_megatron.records import Finish, Prompt, RolloutGroup, Sampling, Verdict
from clipo_megatron.rewards.pool import Verifiers


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of one evaluation."""

    measures: dict[str, dict[str, float]]
    """By source: `pass@1`, `mean@n` (with samples > 1), shares of undecided and truncated answers, mean length."""
    greedy: list[RolloutGroup]
    """The judged greedy answers."""


def evaluate(
    prompts: Sequence[Prompt], engines: Sampler, verifiers: Verifiers, sampling: Sampling, *, version: int | None
) -> Evaluation:
    """Answer all prompts greedily, and `sampling.samples` times more, drawn as it says, if that is above 1.

    An undecided answer counts as not right here, and its share is reported, so that results stay comparable.
    """
    one = replace(sampling, samples=1, temperature=0.0, top_p=1.0)
    greedy = judge(engines.generate(prompts, one, version=version), verifiers)
    sampled: list[RolloutGroup] = []
    if sampling.samples > 1:
        sampled = judge(engines.generate(prompts, sampling, version=version), verifiers)
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


def _accuracy(groups: Sequence[RolloutGroup]) -> float:
    """Mean over prompts of the share of right answers."""
    return float(np.mean([np.mean([r.verdict is Verdict.CORRECT for r in group.rollouts]) for group in groups]))
