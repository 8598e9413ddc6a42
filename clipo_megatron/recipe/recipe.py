"""The recipe: all sections together, its fingerprint, its YAML form."""

from __future__ import annotations

import hashlib
import json

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
        return self.layout.world_size // (self.layout.tp * self.layout.cp * self.layout.pp)

    @property
    def degrees(self) -> str:
        """The trainer's degrees above 1 in words, e.g. "tp=2 dp=4"; empty on one rank."""
        layout = self.layout
        found = {
            "tp": layout.tp,
            "pp": layout.pp,
            "vpp": layout.vpp,
            "cp": layout.cp,
            "ep": layout.ep,
            "etp": layout.etp,
        }
        return " ".join(f"{key}={degree}" for key, degree in (found | {"dp": self.dp}).items() if degree > 1)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that changes a step's numbers; a resumed run must have the same."""
        content = self.run_defining_keys()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def run_defining_keys(self) -> dict[str, dict[str, object]]:
        """Values by section and key, without those that change no number of a step."""
        content = self.model_dump(mode="json")
        for section, key in _NOT_IN_FINGERPRINT:
            content[section].pop(key, None) if key else content.pop(section)
        return content

    def to_yaml(self) -> str:
        """The resolved recipe, defaults written out; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_NOT_IN_FINGERPRINT: tuple[tuple[str, str], ...] = (
    ("checkpoint", ""),
    ("evaluation", ""),
    ("sync", ""),
    ("data", "evaluation"),
    ("run", "name"),
    ("run", "folder"),
    ("run", "steps"),
    ("run", "resume"),
    ("run", "device"),
    ("run", "tensorboard"),
    ("run", "worker_timeout_s"),
    ("run", "gate_max_logprob_difference"),
    ("run", "gate_mean_logprob_difference"),
    ("rewards", "workers"),
)
