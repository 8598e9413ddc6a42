"""The sides of a run in which no step trains: engines that answer nothing, a verifier that can't decide, a policy that idles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from support.checkpoints import TwoRanks

from clipo_megatron.records import Finish, Prompt, Rollout, RolloutGroup, Sampling, Verdict, VersionSpan


class SamplingEngines:
    """Give one token for every sample."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        rollout = Rollout(
            response_ids=np.zeros(1, np.int32),
            sampled_logprobs=np.zeros(1, np.float32),
            finish=Finish.STOP,
            policy_versions=(VersionSpan(version=0, start=0, end=1),),
            text="",
        )
        return [RolloutGroup(prompt=prompt, rollouts=(rollout,) * sampling.samples) for prompt in prompts]

    def update_weights(self, version: int, buckets: Iterable[object]) -> None:
        pass

    def take_metrics(self) -> dict[str, float]:
        return {}


class Undecided:
    """A verifier that can't decide, so that no step trains."""

    def judge(self, items: Sequence[object]) -> list[Verdict]:
        return [Verdict.UNDECIDED for _ in items]


class IdlePolicy(TwoRanks):
    """Saves what `update` made of it."""

    def weight_buckets(self, version: int) -> list[object]:
        return []

    def load(self, folder: Path, *, with_optimizer: bool) -> list[str]:
        return []

    def export_hf(self, folder: Path) -> None:
        folder.mkdir(parents=True)
