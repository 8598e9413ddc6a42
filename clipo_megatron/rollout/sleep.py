"""An engine that shares its devices gives its memory back while others work on them: vLLM's sleep of level 2."""

from __future__ import annotations

from typing import Literal

from clipo_megatron.errors import EngineError
from clipo_megatron.rollout.workers import Workers

Tag = Literal["weights", "kv_cache"]
"""vLLM's names of what can be woken apart from the rest."""


class Sleep:
    """Weights and KV cache are gone while it sleeps.

    Both are woken empty, the weights first, so that they can be filled before the cache takes its room. On a CPU vLLM keeps the weights, packed for its kernels, and only the cache is freed; they count as gone there too.
    """

    def __init__(self, workers: Workers, *, device: str, is_allowed: bool) -> None:
        """Awake.

        Args:
            workers: of the running engine.
            device: "cpu" or "cuda".
            is_allowed: whether the engine was started so that it can sleep.
        """
        self._workers = workers
        self._is_cpu = device == "cpu"
        self._is_allowed = is_allowed
        self._asleep: set[Tag] = set()

    def require_allowed(self) -> None:
        """Pass if the engine was started so that it can sleep.

        Raises:
            EngineError: it was not.
        """
        if not self._is_allowed:
            raise EngineError("the engine can't sleep: start it with sleeps=True (recipes: rollout.colocate)")

    @property
    def asleep(self) -> frozenset[Tag]:
        """What is given back."""
        return frozenset(self._asleep)

    def fall_asleep(self) -> None:
        """Give the memory back; nothing if it all sleeps already.

        Raises:
            EngineError: there is no room for what has to be woken first.
        """
        if "weights" in self._asleep:
            return
        self.wake("kv_cache")  # after a wake that was given up: vLLM takes an engine of which a part sleeps for asleep
        self._workers.require().sleep(level=2)
        if self._is_cpu:
            self._workers.call("clipo_drop_cache")
        self._asleep = {"weights", "kv_cache"}

    def wake(self, tag: Tag) -> None:
        """Get the memory of one of them, empty; nothing if it is there.

        Raises:
            EngineError: there is no room for it.
        """
        if tag not in self._asleep:
            return
        try:
            if self._is_cpu and tag == "kv_cache":
                self._workers.call("clipo_restore_cache")
            self._workers.require().wake_up(tags=[tag])
        except RuntimeError as error:  # of CUDA's allocator
            raise EngineError(
                f"the engine can't wake its {tag}: {error}; the trainer holds too much of the GPU: lower "
                "rollout.gpu_memory_utilization"
            ) from error
        if tag == "weights":
            self._workers.call("clipo_clear_weights")
        self._asleep.discard(tag)
