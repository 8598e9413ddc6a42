"""The KV cache of an engine on a CPU, freed and made again in place; on GPUs vLLM's own sleep does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clipo_megatron.rollout.cpu_release import require_checked_release

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class CacheMemory:
    """The storages of a worker's cache: emptied and filled again, under all views of them."""

    def __init__(self, runner: GPUModelRunner) -> None:
        """Nothing is freed yet.

        Raises:
            EngineError: another vLLM release than this is known to work for.
        """
        require_checked_release("an engine can sleep")
        storages = {cache.untyped_storage()._cdata: cache.untyped_storage() for cache in runner.kv_caches}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]

    def drop(self) -> None:
        """Free the memory; what was cached is lost."""
        for storage, _ in self._storages:
            storage.resize_(0)

    def restore(self) -> None:
        """Zeros, as at the start."""
        for storage, num_bytes in self._storages:
            storage.resize_(num_bytes)
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()  # pyright: ignore[reportCallIssue]
