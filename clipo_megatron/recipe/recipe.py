"""The recipe: all sections together, its fingerprint, its YAML form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

import yaml

from clipo_megatron.recipe.sections import (
    AlgorithmSection,
    CheckpointSection,
    ContrastiveSection,
    DataSection,
    EvaluationSection,
    ExpertsSection,
    LayoutSection,
    ModelSection,
    OptimizerSection,
    PrecisionSection,
    RewardSection,
    RolloutSection,
    RunSection,
    Section,
    SyncSection,
)


class Recipe(Section):
    """The whole configuration of a run; validated once, before anything starts."""

    run: RunSection
    model: ModelSection
    data: DataSection
    layout: LayoutSection = LayoutSection()
    precision: PrecisionSection = PrecisionSection()
    experts: ExpertsSection = ExpertsSection()
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    contrastive: ContrastiveSection = ContrastiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    rewards: RewardSection = RewardSection()
    sync: SyncSection = SyncSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()

    @property
    def dp(self) -> int:
        """Data parallel degree of the trainer."""
        return self.layout.dp

    @property
    def degrees(self) -> str:
        """The trainer's degrees above 1 in words, e.g. "tp=2 dp=4"; empty on one rank."""
        return self.layout.degrees

    @property
    def slots(self) -> int:
        """GPUs that the workers take; on a CPU run as many CPUs."""
        ranks = self.layout.world_size
        return ranks if self.rollout.colocate else ranks + self.rollout.engines * self.rollout.tp

    @property
    def fingerprint(self) -> str:
        """16 hex digits over every key that changes a step's numbers by more than rounding; a resumed run has the same."""
        content = run_defining_keys(self.model_dump(mode="json"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe, defaults written out; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def run_defining_keys(sections: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Values of a recipe's sections by dotted key, without those that change no number of a step.

    A key of an earlier version that this one does not know counts as one that does.
    """
    return {
        key: value
        for key, value in _flat(sections).items()
        if not any(
            key == f"{section}.{name}" or (not name and key.startswith(f"{section}."))
            for section, name in _NOT_IN_FINGERPRINT
        )
    }


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, object]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


_NOT_IN_FINGERPRINT: tuple[tuple[str, str], ...] = (
    # How the work is split and where it runs: numbers change by rounding only.
    ("layout", ""),
    ("sync", ""),
    ("optimizer", "cpu_offload"),
    ("rollout", "engines"),
    ("rollout", "colocate"),
    ("rollout", "max_restarts"),
    ("rollout", "tp"),
    ("rollout", "max_num_seqs"),
    ("rollout", "gpu_memory_utilization"),
    ("rollout", "kv_cache_mib"),
    ("rollout", "enforce_eager"),
    ("rollout", "prefix_caching"),
    ("rewards", "workers"),
    ("run", "device"),
    ("run", "worker_timeout_s"),
    ("run", "start_timeout_s"),
    # What is kept and shown of a run.
    ("checkpoint", ""),
    ("evaluation", ""),
    ("data", "evaluation"),
    ("run", "tensorboard"),
    # How far a run goes, where it lies, what stops it.
    ("run", "name"),
    ("run", "folder"),
    ("run", "steps"),
    ("run", "resume"),
    ("run", "accept"),
    ("run", "max_unsound_steps"),
    ("run", "gate_max_logprob_difference"),
    ("run", "gate_mean_logprob_difference"),
    # The hash of the prompts themselves says more than the names of their files.
    ("data", "train"),
)
