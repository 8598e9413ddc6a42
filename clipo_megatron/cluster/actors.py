"""The Ray actors: thin shells around one policy rank and one rollout engine. No logic of their own."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import ray

from clipo_megatron.cluster.engine_leftovers import claim
from clipo_megatron.cluster.memory_use import MemoryUse, memory_use
from clipo_megatron.cluster.worker_log import DUMP_SIGNAL, LoggedWorker, WorkerFailure
from clipo_megatron.doctor.finding import host_name
from clipo_megatron.errors import EngineError, EngineLostError
from clipo_megatron.imports import large_imports
from clipo_megatron.records import Prompt, RolloutBatch, RolloutGroup, Sampling, Scores, TrainReport, WeightBucket

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    from clipo_megatron.checkpoint.dist_index import WrittenFile
    from clipo_megatron.policy.settings import PolicySettings
    from clipo_megatron.rollout.settings import EngineSettings
    from clipo_megatron.sync.meeting import Meeting

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def reports_failure(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Log a method's traceback in the worker and raise the cause as a `WorkerFailure`."""

    @functools.wraps(method)
    def wrapped(self: LoggedWorker, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 (whatever it is, it must reach the driver as one picklable error)
            moment = time.time()
            logging.getLogger(__name__).error("failed in %s\n%s", method.__name__, traceback.format_exc())
            lines = str(error).strip().splitlines() or [""]
            cause = f"{type(error).__name__}: {lines[0]}"
            is_lost = isinstance(error, EngineLostError)
            raise WorkerFailure(self.worker_name, method.__name__, cause, moment, is_lost) from None

    return wrapped


class PolicyActor(LoggedWorker):
    """One rank of the policy."""

    def __init__(
        self, rank: int, settings: PolicySettings, *, bucket_bytes: int, timeout_s: float, log_folder: str
    ) -> None:
        self.open_log(f"policy_{rank}", log_folder)
        self._rank = rank
        self._settings = settings
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        logger.info("rank %d is process %d on %s", rank, os.getpid(), host_name())
        self._stream: Iterator[WeightBucket] | None = None
        self._meeting_point: tuple[str, TCPStore] | None = None
        self._meetings = 0

    @reports_failure
    def open_rendezvous(self) -> tuple[str, int]:
        """Start the store that all ranks meet at; the port is the one the system gave. Rank 0 only."""
        host, self._store = _serve_store(self._settings.layout.world_size)
        return host, self._store.port

    @reports_failure
    def start(self, host: str, port: int) -> None:
        """Join the process group and build the model."""
        with large_imports():
            import torch
            import torch.distributed as dist
            from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

            from clipo_megatron.policy.worker import PolicyWorker

        settings, world_size = self._settings, self._settings.layout.world_size
        timeout = timedelta(seconds=self._timeout_s)
        if self._rank:
            self._store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
        if settings.device == "cuda":
            torch.cuda.set_device(0)
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if settings.device == "cuda" else "gloo",
            store=self._store,
            rank=self._rank,
            world_size=world_size,
            timeout=timeout,
        )
        self._worker = PolicyWorker(settings, rank=self._rank)

    @reports_failure
    def score(self, batch: RolloutBatch, step: int, with_reference: bool) -> Scores | None:
        """See `PolicyWorker.score`."""
        return self._worker.score(batch, step=step, with_reference=with_reference)

    @reports_failure
    def train(self, batch: RolloutBatch, step: int) -> TrainReport | None:
        """See `PolicyWorker.train`."""
        return self._worker.train(batch, step=step)

    @reports_failure
    def device(self) -> str:
        """CUDA's names of this rank's devices, as Ray gave them; empty on a CPU."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "") if self._settings.device == "cuda" else ""

    @reports_failure
    def memory(self) -> MemoryUse:
        """See `memory_use`."""
        return memory_use(self._settings.device)

    @reports_failure
    def offload(self) -> None:
        """See `Offload.offload`."""
        self._worker.memory.offload()

    @reports_failure
    def onload(self) -> None:
        """See `Offload.onload`."""
        self._worker.memory.onload()

    @reports_failure
    def begin_save(self, folder: str) -> dict[str, Any] | None:
        """See `PolicyWorker.begin_save`; returns the state that is no tensor on the rank that reports."""
        self._worker.begin_save(Path(folder))
        return self._worker.training_plain() if self._worker.reports else None

    @reports_failure
    def is_saving(self) -> bool:
        """See `PolicyWorker.is_saving`."""
        return self._worker.is_saving()

    @reports_failure
    def finish_save(self) -> tuple[WrittenFile, ...]:
        """See `PolicyWorker.finish_save`."""
        return self._worker.finish_save()

    @reports_failure
    def load(self, folder: str, with_optimizer: bool) -> list[str]:
        """See `PolicyWorker.load`."""
        return self._worker.load(Path(folder), with_optimizer=with_optimizer)

    @reports_failure
    def share_weights(self) -> str:
        """See `WeightSharing.share`."""
        return self._worker.sharing.share()

    @reports_failure
    def open_meeting_point(self) -> tuple[str, int, int]:
        """Host and port of the store that engine ranks meet the trainer's at, and the meeting's number. Rank 0 only."""
        if self._meeting_point is None:
            self._meeting_point = _serve_store(None)
        host, store = self._meeting_point
        self._meetings += 1
        return host, store.port, self._meetings

    @reports_failure
    def open_links(self, plan: str, meeting: Meeting) -> None:
        """See `WeightSharing.open_links`."""
        self._worker.sharing.open_links(plan, meeting)

    @reports_failure
    def send_weights(self, version: int, verify: bool, only: Sequence[int]) -> None:
        """See `WeightSharing.send`."""
        self._worker.sharing.send(version, verify=verify, only=only)

    @reports_failure
    def offer_weights(self, version: int) -> None:
        """See `WeightSharing.offer`."""
        self._worker.sharing.offer(version)

    @reports_failure
    def confirm_weights(self, version: int) -> None:
        """See `WeightSharing.confirm`."""
        self._worker.sharing.confirm(version)

    @reports_failure
    def open_stream(self, version: int, first_index: int, message_s: float | None) -> None:
        """Make ready to hand out this stage's weights as buckets, numbered from `first_index`; see `hf_tensors`."""
        from clipo_megatron.sync.bucket import pack_buckets

        buckets = pack_buckets(
            self._worker.hf_tensors(timeout_s=message_s), version=version, bucket_bytes=self._bucket_bytes
        )
        self._stream = (replace(bucket, index=first_index + number) for number, bucket in enumerate(buckets))

    @reports_failure
    def next_bucket(self) -> WeightBucket | None:
        """The next bucket of the open stream, None at its end."""
        assert self._stream is not None
        return next(self._stream, None)

    @reports_failure
    def drain_stream(self, message_s: float | None) -> None:
        """Take part in the stream's collectives and keep nothing; see `PolicyWorker.hf_tensors`."""
        for _ in self._worker.hf_tensors(timeout_s=message_s):
            pass


def _serve_store(world_size: int | None) -> tuple[str, TCPStore]:
    """A store on this node's interface of the cluster, and its host; the port is one that the system gave."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host = ray.util.get_node_ip_address()
    # A socket of its own: the store would listen on all interfaces, and it asks nobody who he is.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return host, TCPStore(
        host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class EngineActor(LoggedWorker):
    """One rollout engine."""

    def __init__(
        self, number: int, settings: EngineSettings, log_folder: str, *, generation: int = 0, run: str = "run"
    ) -> None:
        name = f"engine_{number}"
        self.open_log(f"{name}.restart{generation}" if generation else name, log_folder)
        self.worker_name = name
        claim(run, number, generation)
        logger.info("engine %d is process %d on %s", number, os.getpid(), host_name())
        self._number = number
        self._settings = settings

    @reports_failure
    def start(self) -> None:
        """Start vLLM on the model folder."""
        from clipo_megatron.rollout.engine import RolloutEngine

        self._engine = RolloutEngine(self._settings)
        self._engine.write_stacks(DUMP_SIGNAL, self.log_path.with_suffix(""))

    @reports_failure
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int | None) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        return self._engine.generate(prompts, sampling, version=version)

    @reports_failure
    def holds(self, version: int) -> bool:
        """Whether exactly this version is served."""
        try:
            return self._engine.version == version
        except EngineError:
            return False

    @reports_failure
    def memory(self) -> MemoryUse:
        """Of the processes; GPUs are asked by the trainer, whose they are as well."""
        return memory_use("cpu")

    @reports_failure
    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._engine.sleep()

    @reports_failure
    def begin_update(self, version: int, timeout_s: float) -> None:
        """See `RolloutEngine.begin_update`."""
        self._engine.begin_update(version, timeout_s=timeout_s)

    @reports_failure
    def load_bucket(self, bucket: WeightBucket, timeout_s: float) -> None:
        """See `RolloutEngine.load_bucket`."""
        self._engine.load_bucket(bucket, timeout_s=timeout_s)

    @reports_failure
    def commit_update(self, version: int, num_tensors: int, timeout_s: float) -> None:
        """See `RolloutEngine.commit_update`."""
        self._engine.commit_update(version, num_tensors, timeout_s=timeout_s)

    @reports_failure
    def planned_sync_problem(self, is_asked_for: bool) -> str:
        """See `RolloutEngine.planned_sync_problem`."""
        return self._engine.planned_sync_problem(is_asked_for=is_asked_for)

    @reports_failure
    def open_plan(self, plan: str, handles: Sequence[str]) -> tuple[int, float]:
        """See `RolloutEngine.open_plan`."""
        return self._engine.open_plan(plan, self._number, handles)

    @reports_failure
    def open_links(self, plan: str, meeting: Meeting) -> tuple[int, float]:
        """See `RolloutEngine.open_links`."""
        return self._engine.open_links(plan, self._number, meeting)

    @reports_failure
    def begin_pull(self, version: int, timeout_s: float) -> None:
        """See `RolloutEngine.begin_pull`."""
        self._engine.begin_pull(version, timeout_s=timeout_s)

    @reports_failure
    def pull(self, version: int, verify: bool, timeout_s: float) -> None:
        """See `RolloutEngine.pull`."""
        self._engine.pull(version, verify=verify, timeout_s=timeout_s)

    @reports_failure
    def commit_pull(self, version: int, timeout_s: float) -> None:
        """See `RolloutEngine.commit_pull`."""
        self._engine.commit_pull(version, timeout_s=timeout_s)

    @reports_failure
    def abort_update(self, timeout_s: float) -> None:
        """See `RolloutEngine.abort_update`."""
        self._engine.abort_update(timeout_s=timeout_s)
