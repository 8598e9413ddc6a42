"""Trainer and engines on the same devices: one of them at a time holds the memory that it works with."""

from __future__ import annotations

import time

from clipo_megatron.cluster.engines import RayEngines
from clipo_megatron.cluster.memory_use import in_mib
from clipo_megatron.cluster.policy import RayPolicy


class DeviceTurns:
    """Hands the devices over whenever the other side is to work.

    The engines' turn: they hold weights and cache, the trainer its weights alone. The trainer's turn: engines sleep. In a
    sync both hold their weights; it begins the engines' turn.
    """

    def __init__(self, policy: RayPolicy, engines: RayEngines) -> None:
        """It is the engines' turn: the trainer is offloaded, the engines have been started beside it."""
        self._policy = policy
        self._engines = engines
        self._is_trainers = False
        self._metrics: dict[str, float] = {}
        policy.turns = engines.turns = self

    def to_trainer(self) -> None:
        """Put the engines to sleep, then bring the trainer's gradients and optimizer state back."""
        if self._is_trainers:
            return
        started = time.perf_counter()
        self._note_memory("generate")
        self._engines.sleep()
        self._note_memory("idle")
        self._policy.onload()
        self._is_trainers = True
        self._note_seconds(started)

    def to_engines(self) -> None:
        """Move the trainer's gradients and optimizer state away; the update that follows wakes the engines."""
        if not self._is_trainers:
            return
        started = time.perf_counter()
        self._note_memory("train")
        self._policy.offload()
        self._is_trainers = False
        self._note_seconds(started)

    def take_metrics(self) -> dict[str, float]:
        """What was measured since the last call."""
        found, self._metrics = self._metrics, {}
        return found

    def _note_memory(self, phase: str) -> None:
        self._metrics[f"colocation/{phase}_mib"] = in_mib([*self._policy.memory(), *self._engines.memory()])

    def _note_seconds(self, started: float) -> None:
        self._metrics["colocation/turn_seconds"] = (
            self._metrics.get("colocation/turn_seconds", 0.0) + time.perf_counter() - started
        )
