"""What the controller needs of a policy and of engines. The cluster package implements both over Ray actors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from clipo_megatron.checkpoint.dist_index import WrittenFile
from clipo_megatron.records import Prompt, RolloutBatch, RolloutGroup, Sampling, Scores, SyncReport, TrainReport


class SavesState(Protocol):
    """Something of several ranks that writes its state while it goes on working."""

    def begin_save(self, folder: Path) -> Mapping[str, object]:
        """Every rank copies its part of the state and starts to write it into `folder`, which exists.

        Returns when all have their copy: what of the state is no tensor, as JSON types.
        """
        ...

    def is_saving(self) -> bool:
        """Whether any rank is still writing; returns at once."""
        ...

    def finish_save(self) -> Sequence[WrittenFile]:
        """Wait until all ranks have written and synced their files."""
        ...


class Policy(SavesState, Protocol):
    """The trainer's side: one Megatron model over all trainer ranks."""

    def score(self, batch: RolloutBatch, *, step: int, with_reference: bool) -> Scores:
        """Log-probs before the update, contrastive losses; the contrastive head takes its step."""
        ...

    def train(self, batch: RolloutBatch, *, step: int) -> TrainReport:
        """The optimizer steps of one training step."""
        ...

    def load(self, folder: Path, *, with_optimizer: bool) -> list[str]:
        """Every rank restores its part of a checkpoint; returns what could not be restored, in words."""
        ...

    def export_hf(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder."""
        ...

    def weight_buckets(self, version: int) -> object:
        """The weights of `version`; only engines look inside: handles of buckets, or a way to the parameters themselves."""
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

    def take_metrics(self) -> dict[str, float]:
        """What happened to the engines since the last call: restarts, and whose turn it was on shared devices."""
        ...

    def update_weights(self, version: int, weights: object) -> SyncReport:
        """Bring all weights to every engine and commit them as `version`."""
        ...
