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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from clipo_megatron.checks.sync_trainer import serve_parameters, whole_tensors
from clipo_megatron.errors import ClipoError, WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
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

Way = Callable[[], None]
_GB = 1e9
_ENGINE_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSpeedSettings:
    """What is measured."""

    model_path: Path
    """Hugging Face folder with weights; with a tokenizer if an engine is started."""
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    trainer: ParallelLayout
    """All of its ranks in one process; on a GPU all on the same one."""
    engine_tp: int
    """All ranks of the engine in turn; a real engine runs them at the same time."""
    repeats: int
    """Timed turns; one more is run before, untimed."""
    bucket_mib: int
    """Of the path with whole tensors."""
    with_engine: bool
    """Start a real engine; it takes 10 s or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSpeed:
    """Medians, in seconds; None where it was not measured."""

    num_bytes: int
    """Copied into all ranks of one engine."""
    copies: int
    memory_copy_s: float
    """As many bytes from one warm buffer of the process into another: the floor."""
    planned_s: float
    """The plan's copies out of the trainer's process, stamps checked before and after."""
    verify_s: float
    """Checksums of all slices on both sides."""
    open_s: float
    """Once: opening the trainer's memory, first touch of every page."""
    bind_s: float
    """Once: laying out all copies."""
    engine_planned_s: float | None
    """A real engine, begin to commit, by the plan; on a CPU it repacks all weights for its kernels."""
    engine_whole_s: float | None
    """A real engine, begin to commit, with whole tensors in buckets through vLLM's own loading."""

    @property
    def of_floor(self) -> float:
        """Rate of the planned copies over that of a plain copy."""
        return self.memory_copy_s / self.planned_s

    @property
    def planned_gb_per_s(self) -> float:
        """Rate of the planned copies."""
        return self.num_bytes / _GB / self.planned_s

    @property
    def memory_gb_per_s(self) -> float:
        """Rate of a plain copy."""
        return self.num_bytes / _GB / self.memory_copy_s

    @property
    def times_faster(self) -> float | None:
        """The whole tensors' time over that of the planned copies."""
        return None if self.engine_whole_s is None else self.engine_whole_s / self.planned_s

    def as_dict(self) -> dict[str, float | int | None]:
        """All fields, and the ratios."""
        return asdict(self) | {
            "of_floor": self.of_floor,
            "planned_gb_per_s": self.planned_gb_per_s,
            "memory_gb_per_s": self.memory_gb_per_s,
            "times_faster": self.times_faster,
        }


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
        self._handles = [SharedHandles.from_json(text) for text in _received(trainer)]
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
        if self._settings.with_engine:
            ways |= self._engine_ways()
        seconds = self._medians(ways)
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
        _received(self._trainer)

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

    def _engine_ways(self) -> dict[str, Way]:
        from clipo_megatron.rollout.engine import RolloutEngine

        engine = RolloutEngine(_engine_settings(self._settings))
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

        if engine.planned_sync_problem(is_asked_for=True):
            return {"engine_whole_s": whole}
        engine.open_plan(to_json(self._plan), 0, [handles.to_json() for handles in self._handles])
        return {"engine_whole_s": whole, "engine_planned_s": planned}

    def _finished(self, _: object) -> None:
        if self._settings.device == "cuda":
            torch.cuda.synchronize()


def _received(pipe: Connection) -> Any:  # noqa: ANN401 (what the other end sends)
    try:
        return pipe.recv()
    except EOFError:
        raise WorkerError("the trainer's process died; its traceback is above") from None


def _engine_settings(settings: SyncSpeedSettings) -> EngineSettings:
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
    )
