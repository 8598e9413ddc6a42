"""What is added to vLLM's worker processes: the receiving end of a weight update, and on CPUs the recorder of routes.

vLLM mixes the class into its Worker; `rollout.workers.Workers` calls its methods on all workers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from clipo_megatron.errors import ClipoError, EngineError
from clipo_megatron.records import Routes, TensorSpec, WeightBucket
from clipo_megatron.rollout.shared_names import drop_names
from clipo_megatron.rollout.workers import Reply, mark_done
from clipo_megatron.sync.bucket import unpack
from clipo_megatron.sync.shared_memory import attach

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from clipo_megatron.rollout.cpu_cache import CacheMemory
    from clipo_megatron.rollout.cpu_routes import RouteRecorder
    from clipo_megatron.rollout.linked_reload import LinkedReload
    from clipo_megatron.rollout.planned_reload import PlannedReload
    from clipo_megatron.rollout.reload import LayerwiseReload
    from clipo_megatron.sync.meeting import Meeting

# What vLLM's loaders raise for tensors that do not fit the model.
_EXPECTED = (ClipoError, RuntimeError, ValueError, KeyError, AttributeError, AssertionError, OSError)


class WeightReceiver:
    """Methods added to vLLM's Worker; `self` is the worker."""

    # Set by vLLM's Worker. Declared only: vLLM refuses an extension with an attribute that the worker has too.
    rank: int
    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: GPUModelRunner
    clipo_reload: LayerwiseReload
    clipo_planned: PlannedReload | LinkedReload
    clipo_routes: RouteRecorder
    clipo_cache: CacheMemory
    clipo_stacks: TextIO

    def clipo_call(self, board: str, call: int, method: str, arguments: Sequence[Any]) -> Reply:
        """Call one of the methods below; what it raises becomes the reply, and the board tells that it has come to its end.

        Args:
            board: of `rollout.workers.ProgressBoard`.
            call: number of the call.
            method: name of the method.
            arguments: for it.
        """
        from vllm.config import set_current_vllm_config

        try:
            with set_current_vllm_config(self.vllm_config), torch.no_grad():
                reply = ("", "", getattr(self, method)(*arguments))
        except _EXPECTED as error:
            reply = (type(error).__name__, str(error), None)
        mark_done(board, self.rank, call)
        return reply

    def clipo_begin_update(self) -> None:
        """Get ready for the tensors of a whole model."""
        _reload_of(self).begin()

    def clipo_load_bucket(
        self,
        path: str,
        num_bytes: int,
        version: int,
        index: int,
        checksum: int,
        specs: Sequence[tuple[str, Sequence[int], str, int, int]],
    ) -> None:
        """Load one bucket whose payload is published under `path`.

        The arguments are a WeightBucket's fields, and each spec a TensorSpec's, as plain values: they cross processes.
        """
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
        _reload_of(self).load(unpack(bucket))

    def clipo_open_plan(self, plan: str, engine: int, handles: Sequence[str]) -> tuple[int, float]:
        """Lay out all copies of planned syncs; an earlier plan is closed if this one can be used.

        Args:
            plan: as JSON.
            engine: number of this engine in it.
            handles: of all trainer ranks, in their order, as JSON.

        Returns:
            Bytes of a sync into this worker, and the seconds that they take at least.
        """
        from clipo_megatron.rollout.planned_reload import PlannedReload
        from clipo_megatron.sync.plan_json import from_json
        from clipo_megatron.sync.shared_parameters import SharedHandles

        _reload_of(self).abandon()
        opened = PlannedReload(
            self.model_runner.get_model(),  # pyright: ignore[reportArgumentType]
            from_json(plan),
            [SharedHandles.from_json(of_rank) for of_rank in handles],
            engine=engine,
            rank=self.rank,
        )
        if "clipo_planned" in vars(self):
            self.clipo_planned.close()
        self.clipo_planned = opened
        return self.clipo_planned.num_bytes, self.clipo_planned.floor_seconds

    def clipo_open_links(self, plan: str, engine: int, meeting: Meeting) -> tuple[int, float]:
        """Meet the trainer and lay out what is received in planned syncs; an earlier plan is closed if this one can be used.

        Args:
            plan: as JSON.
            engine: number of this engine in it.
            meeting: of all ranks.

        Returns:
            Bytes of a sync into this worker, and the seconds that copying them takes at least.
        """
        from clipo_megatron.rollout.linked_reload import LinkedReload
        from clipo_megatron.sync.plan_json import from_json

        of_all = from_json(plan)
        if "clipo_planned" in vars(self):  # its connections may be to engines that are gone
            self.clipo_planned.close()
            del self.clipo_planned
        _reload_of(self).abandon()
        self.clipo_planned = LinkedReload(
            self.model_runner.get_model(),  # pyright: ignore[reportArgumentType]
            of_all,
            meeting.join(of_all.trainer.world_size + engine * of_all.engines.tp + self.rank),
            engine=engine,
            rank=self.rank,
            bucket_bytes=meeting.bucket_bytes,
        )
        return self.clipo_planned.num_bytes, self.clipo_planned.floor_seconds

    def clipo_write_stacks(self, signal_number: int, stem: str) -> None:
        """Write this worker's stacks to STEM.workerRANK.log whenever the signal comes."""
        import faulthandler

        path = Path(f"{stem}.worker{self.rank}.log")
        self.clipo_stacks = path.open("a")  # for as long as the process lives
        faulthandler.register(signal_number, file=self.clipo_stacks, all_threads=True)

    def clipo_fp8_kernels(self) -> list[str]:
        """See `fp8_kernels` of rollout/quantization.py."""
        from clipo_megatron.rollout.quantization import fp8_kernels

        return fp8_kernels(self.model_runner.get_model())  # pyright: ignore[reportArgumentType]

    def clipo_expert_backends(self) -> list[str]:
        """See `expert_backends` of rollout/expert_backends.py."""
        from clipo_megatron.rollout.expert_backends import expert_backends

        return expert_backends(self.model_runner.get_model())  # pyright: ignore[reportArgumentType]

    def clipo_begin_pull(self) -> None:
        """Get ready for a pull."""
        if "clipo_planned" not in vars(self):
            raise EngineError("asked to pull weights, but no plan is open: open it first")
        self.clipo_planned.begin(_reload_of(self))

    def clipo_pull(self, version: int, verify: bool) -> None:
        """Copy the weights of `version` out of the trainer's memory, or receive them, by the plan."""
        self.clipo_planned.fill(_reload_of(self), version, verify=verify)

    def clipo_finish_pull(self) -> None:
        """Make the pulled weights the ones that are used."""
        self.clipo_planned.finish(_reload_of(self))

    def clipo_finish_update(self) -> None:
        """Make the loaded weights the ones that are used."""
        _reload_of(self).finish()

    def clipo_abandon_update(self) -> None:
        """Drop a half-done update."""
        _reload_of(self).abandon()

    def clipo_drop_cache(self) -> None:
        """Free the KV cache, on a CPU."""
        from clipo_megatron.rollout.cpu_cache import CacheMemory

        if "clipo_cache" not in vars(self):
            self.clipo_cache = CacheMemory(self.model_runner)
        self.clipo_cache.drop()

    def clipo_restore_cache(self) -> None:
        """Make the freed KV cache again, empty."""
        self.clipo_cache.restore()

    def clipo_clear_weights(self) -> None:
        """Zeros for weights that were woken with any content: what no update writes, as padding, must be finite.

        On a CPU weights are never given back.
        """
        if self.vllm_config.device_config.device_type != "cpu":
            for parameter in self.model_runner.get_model().parameters():
                parameter.zero_()

    def clipo_drop_names(self) -> int:
        """See rollout/shared_names.py."""
        return drop_names()

    def clipo_record_routes(self) -> None:
        """Record from here on which experts each token is sent to. On CPUs; vLLM itself does it on GPUs."""
        from clipo_megatron.rollout.cpu_routes import RouteRecorder

        self.clipo_routes = RouteRecorder(self.model_runner, self.vllm_config)

    def clipo_take_routes(self) -> dict[str, Routes]:
        """The routes recorded since the last call, by request; all of them on each worker."""
        return self.clipo_routes.take()


def _reload_of(worker: WeightReceiver) -> LayerwiseReload:
    from clipo_megatron.rollout.reload import LayerwiseReload

    if "clipo_reload" not in vars(worker):  # kept over updates: it knows whether one was left half-done
        worker.clipo_reload = LayerwiseReload(worker.model_runner.get_model(), worker.model_config)  # pyright: ignore
    return worker.clipo_reload
