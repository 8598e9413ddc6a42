"""What is added to vLLM's worker processes: the receiving end of a weight update, and on CPUs the recorder of routes.

vLLM mixes the class into its Worker, and the engine calls its methods on all its workers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from clipo_megatron.errors import ClipoError
from clipo_megatron.records import Routes, TensorSpec, WeightBucket
from clipo_megatron.sync.bucket import unpack
from clipo_megatron.sync.shared_memory import attach

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from clipo_megatron.rollout.cpu_routes import RouteRecorder
    from clipo_megatron.rollout.reload import LayerwiseReload

Reply = tuple[str, str]
"""Name and message of the error, both empty when all went well.

An error is returned, not raised: vLLM stops reading the workers' replies at the first that raised, and would take the
others for replies to its next call.
"""

# What vLLM's loaders raise for tensors that do not fit the model.
_EXPECTED = (ClipoError, RuntimeError, ValueError, KeyError, AttributeError, AssertionError, OSError)


class WeightReceiver:
    """Methods added to vLLM's Worker; `self` is the worker."""

    # Set by vLLM's Worker. Declared only: vLLM refuses an extension with an attribute that the worker has too.
    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: GPUModelRunner
    clipo_reload: LayerwiseReload
    clipo_routes: RouteRecorder

    def clipo_begin_update(self) -> Reply:
        """Get ready for the tensors of a whole model."""
        return _answer(self, lambda reload: reload.begin())

    def clipo_load_bucket(
        self,
        path: str,
        num_bytes: int,
        version: int,
        index: int,
        checksum: int,
        specs: Sequence[tuple[str, Sequence[int], str, int, int]],
    ) -> Reply:
        """Load one bucket whose payload is published under `path`.

        The arguments are a WeightBucket's fields, and each spec a TensorSpec's, as plain values: they cross processes.
        """

        def load(reload: LayerwiseReload) -> None:
            bucket = WeightBucket(
                version=version,
                index=index,
                specs=tuple(
                    TensorSpec(name=name, shape=tuple(shape), dtype=dtype, offset=offset, num_bytes=size)
                    for name, shape, dtype, offset, size in specs
                ),
                payload=attach(path, num_bytes),
                checksum=checksum,
            )
            reload.load(unpack(bucket))

        return _answer(self, load)

    def clipo_finish_update(self) -> Reply:
        """Make the loaded weights the ones that are used."""
        return _answer(self, lambda reload: reload.finish())

    def clipo_abandon_update(self) -> Reply:
        """Drop a half-done update."""
        return _answer(self, lambda reload: reload.abandon())

    def clipo_record_routes(self) -> Reply:
        """Record from here on which experts each token is sent to. On CPUs; vLLM itself does it on GPUs."""
        from clipo_megatron.rollout.cpu_routes import RouteRecorder

        try:
            self.clipo_routes = RouteRecorder(self.model_runner, self.vllm_config)
        except _EXPECTED as error:
            return type(error).__name__, str(error)
        return "", ""

    def clipo_take_routes(self) -> dict[str, Routes]:
        """The routes recorded since the last call, by request; all of them on each worker."""
        return self.clipo_routes.take()


def _answer(worker: WeightReceiver, work: Callable[[LayerwiseReload], None]) -> Reply:
    from vllm.config import set_current_vllm_config

    try:
        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            work(_reload_of(worker))
    except _EXPECTED as error:
        return type(error).__name__, str(error)
    return "", ""


def _reload_of(worker: WeightReceiver) -> LayerwiseReload:
    from clipo_megatron.rollout.reload import LayerwiseReload

    if "clipo_reload" not in vars(worker):  # kept over updates: it knows whether one was left half-done
        worker.clipo_reload = LayerwiseReload(worker.model_runner.get_model(), worker.model_config)
    return worker.clipo_reload
