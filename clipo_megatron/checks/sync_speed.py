"""How fast a weight sync is on this machine: planned copies between two processes, beside the floor and the other path.

All ways take turns in one process, on the same weights: a plain copy of as many bytes, the plan's copies out of another
process's memory, and with a real engine both of its update paths from begin to commit, which is as long as it stalls.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Literal

import torch

from clipo_megatron.checks.sync_speed_result import SyncSpeed, SyncSpeedSettings
from clipo_megatron.checks.sync_trainer import received, serve_parameters, whole_tensors
from clipo_megatron.errors import ClipoError, WorkerError
from clipo_megatron.rollout.environment import engine_environment
from clipo_megatron.rollout.settings import EngineSettings
from clipo_megatron.sync.bucket import pack_buckets
from clipo_megatron.sync.executor import BoundCopies, PlannedCopies
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.sync.shared_parameters import SharedHandles, open_shared, reading
from clipo_megatron.weights.architecture import read_architecture

if TYPE_CHECKING:
    from clipo_megatron.rollout.engine import RolloutEngine

Way = Callable[[], None]
_ENGINE_TIMEOUT_S = 600.0


def measure_sync_speed(settings: SyncSpeedSettings) -> SyncSpeed:
    """Measure in processes of their own: one has an engine's environment, the other is the trainer.

    Raises:
        WorkerError: a process failed or died; the traceback of what is no error of ours is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_measuring_process, args=(writer, settings))
    with _environment(engine_environment(settings.device, settings.engine_tp)):
        process.start()
    writer.close()
    try:
        found = reader.recv()
    except EOFError:
        process.join()
        raise WorkerError(
            f"the measuring process ended early (exit code {process.exitcode}); if it failed, its traceback is above"
        ) from None
    finally:
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()
    if isinstance(found, str):
        raise WorkerError(found)
    return found


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measuring_process(writer: Connection, settings: SyncSpeedSettings) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    arguments = (other, settings.model_path, settings.trainer, settings.dtype, settings.device)
    trainer = context.Process(target=serve_parameters, args=arguments, daemon=True)
    trainer.start()
    other.close()
    try:
        writer.send(_Measurement(settings, pipe).run())
    except ClipoError as error:
        writer.send(str(error))
    finally:
        pipe.close()
        trainer.join(10)


class _Measurement:
    """What takes turns, and on what."""

    def __init__(self, settings: SyncSpeedSettings, trainer: Connection) -> None:
        self._settings = settings
        self._trainer = trainer
        self._arch = read_architecture(settings.model_path)
        self._plan = self._make_plan()
        self._version = 0
        self._engine: RolloutEngine | None = None
        self._handles = [SharedHandles.from_json(text) for text in received(trainer)]
        start = time.perf_counter()
        self._opened = [open_shared(handles) for handles in self._handles]
        self._open_s = time.perf_counter() - start
        self._bind_s = 0.0
        self._bound = [self._bind(rank) for rank in range(settings.engine_tp)]
        self.num_bytes = sum(bound.num_bytes for bound in self._bound)

    def run(self) -> SyncSpeed:
        """Measure everything."""
        source = torch.ones(self.num_bytes, dtype=torch.uint8, device=self._settings.device)
        target = torch.zeros_like(source)
        ways: dict[str, Way] = {
            "memory_copy_s": lambda: self._finished(target.copy_(source)),
            "planned_s": self._copy_planned,
            "verify_s": self._verify,
        }
        problems = self._native_problems()
        if self._settings.with_engine:
            ways |= self._engine_ways(with_ipc="ipc" not in problems)
        seconds = self._medians(ways)
        self._close_engine()
        if "nccl" not in problems:
            seconds["vllm_nccl_s"] = self._native_nccl()
        return SyncSpeed(
            num_bytes=self.num_bytes,
            copies=sum(bound.num_copies for bound in self._bound),
            memory_copy_s=seconds["memory_copy_s"],
            planned_s=seconds["planned_s"],
            verify_s=seconds["verify_s"],
            open_s=self._open_s,
            bind_s=self._bind_s,
            engine_planned_s=seconds.get("engine_planned_s"),
            engine_whole_s=seconds.get("engine_whole_s"),
            vllm_ipc_s=seconds.get("vllm_ipc_s"),
            vllm_nccl_s=seconds.get("vllm_nccl_s"),
            not_measured=problems,
        )

    def _make_plan(self) -> SyncPlan:
        engines = EngineLayout(engines=1, tp=self._settings.engine_tp)
        trainer = self._settings.trainer
        apart = place_apart(trainer_ranks=trainer.world_size, engine_ranks=engines.tp, gpus_per_node=1 << 10)
        return plan_sync(self._arch, trainer, engines, apart, dtype=self._settings.dtype)

    def _bind(self, rank: int) -> BoundCopies:
        start = time.perf_counter()
        sources = {owner: parameters.tensors for owner, parameters in enumerate(self._opened)}
        copies = PlannedCopies(self._plan, sources, engine=0, engine_rank=rank)
        self._bind_s += time.perf_counter() - start
        dtype = getattr(torch, self._settings.dtype)
        targets = {
            name: torch.zeros(shape, dtype=dtype, device=self._settings.device)
            for name, shape in copies.parameters.items()
        }
        start = time.perf_counter()
        bound = copies.bind(targets)
        self._bind_s += time.perf_counter() - start
        return bound

    def _medians(self, ways: Mapping[str, Way]) -> dict[str, float]:
        """In turns, so that a busy moment meets all. Every turn has weights of a new version."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(self._settings.repeats + 1):
            for name, way in ways.items():
                self._next_version()
                start = time.perf_counter()
                way()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(times) for name, times in seconds.items()}

    def _next_version(self) -> None:
        self._version += 1
        self._trainer.send(self._version)
        received(self._trainer)

    def _copy_planned(self) -> None:
        with reading(self._opened, self._version):
            for bound in self._bound:
                bound.run()
                bound.wait()

    def _verify(self) -> None:
        """What was copied is of an older version: the sums are taken of both sides, and not compared."""
        for bound in self._bound:
            bound.source_checksums()
            bound.target_checksums()

    def _native_problems(self) -> dict[str, str]:
        settings = self._settings
        if not settings.with_engine:
            return dict.fromkeys(("ipc", "nccl"), "no engine was asked for")
        from clipo_megatron.checks.sync_native import native_problem

        found = {b: native_problem(b, device=settings.device, engine_tp=settings.engine_tp) for b in ("ipc", "nccl")}
        return {backend: problem for backend, problem in found.items() if problem}

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _native_nccl(self) -> float:
        from clipo_megatron.checks.sync_native import median_seconds, nccl_way
        from clipo_megatron.rollout.engine import RolloutEngine

        settings = self._settings
        self._engine = RolloutEngine(_engine_settings(settings, native_transfer="nccl"))
        try:
            with nccl_way(self._engine, settings.model_path, settings.trainer, settings.dtype) as way:
                return median_seconds(way, repeats=settings.repeats)
        finally:
            self._close_engine()

    def _engine_ways(self, *, with_ipc: bool) -> dict[str, Way]:
        from clipo_megatron.checks.sync_native import ipc_way
        from clipo_megatron.rollout.engine import RolloutEngine

        engine = RolloutEngine(_engine_settings(self._settings, native_transfer="ipc" if with_ipc else ""))
        self._engine = engine
        ways: dict[str, Way] = {"vllm_ipc_s": ipc_way(engine, self._trainer)} if with_ipc else {}
        bucket_bytes = self._settings.bucket_mib << 20

        def whole() -> None:
            engine.begin_update(self._version)
            tensors = 0
            sent = whole_tensors([opened.tensors for opened in self._opened], self._arch, self._settings.trainer)
            for bucket in pack_buckets(sent, version=self._version, bucket_bytes=bucket_bytes):
                engine.load_bucket(bucket)
                tensors += len(bucket.specs)
            engine.commit_update(self._version, tensors)

        def planned() -> None:
            engine.begin_pull(self._version, timeout_s=_ENGINE_TIMEOUT_S)
            engine.pull(self._version, verify=False, timeout_s=_ENGINE_TIMEOUT_S)
            engine.commit_pull(self._version, timeout_s=_ENGINE_TIMEOUT_S)

        ways["engine_whole_s"] = whole
        if not engine.planned_sync_problem(is_asked_for=True):
            engine.open_plan(to_json(self._plan), 0, [handles.to_json() for handles in self._handles])
            ways["engine_planned_s"] = planned
        return ways

    def _finished(self, _: object) -> None:
        if self._settings.device == "cuda":
            torch.cuda.synchronize()


def _engine_settings(settings: SyncSpeedSettings, *, native_transfer: Literal["", "ipc", "nccl"]) -> EngineSettings:
    return EngineSettings(
        model_path=str(settings.model_path),
        dtype=settings.dtype,
        device=settings.device,
        tp=settings.engine_tp,
        max_model_len=256,
        max_num_seqs=2,
        kv_cache_mib=64,
        gpu_memory_utilization=0.4,
        enforce_eager=settings.device == "cpu",
        prefix_caching=True,
        seed=0,
        native_transfer=native_transfer,
    )
