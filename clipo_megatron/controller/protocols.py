"""What the controller needs of a policy and of engines. The cluster package implements both over Ray actors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from clipo_megatron.records import Prompt, RolloutBatch, RolloutGroup, Sampling, Scores, TrainReport


class Policy(Protocol):
    """The trainer's side: one Megatron model over all trainer ranks."""

    def score(self, batch: RolloutBatch, *, step: int, with_reference: bool) -> Scores:
        """Log-probs before the update, contrastive losses; the contrastive head takes its step."""
        ...

    def train(self, batch: RolloutBatch, *, step: int) -> TrainReport:
        """The optimizer steps of one training step."""
        ...

    def save(self, folder: Path) -> dict[str, str]:
        """Every rank writes its share of the training state into `folder`; returns `file_checksum` of each file name."""
        ...

    def load(self, folder: Path) -> None:
        """Every rank restores what `save` wrote."""
        ...

    def export_hf(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder."""
        ...

    def weight_buckets(self, version: int) -> Iterable[object]:
        """Handles of the weight buckets of `version`, whole Hugging Face tensors; only engines look inside."""
        ...


class Sampler(Protocol):
    """Something that samples rollouts: one engine or many."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        """One group a prompt, in the order of `prompts`.

        `version` must be the one that the engine holds; None asks an engine that serves its model folder.
        """
        ...


class Engines(Sampler, Protocol):
    """The rollout side of a run: all engines as one, kept at the policy's version."""

    def update_weights(self, version: int, buckets: Iterable[object]) -> None:
        """Load all buckets on every engine and commit them as `version`."""
        ...
