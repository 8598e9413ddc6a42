"""Laws of syncs, planned and streamed, over a real Ray cluster when a trainer rank or an engine dies, is late, or is at another version.

Whoever fails is named with the phase; no engine serves a version that it does not hold whole.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from support.engines import MAX_MODEL_LEN, SAMPLING, load_reference, random_prompts, worst_difference
from support.tiny_models import make_tiny_hf

from clipo_megatron.cluster.engines import RayEngines
from clipo_megatron.cluster.planned_sync import PlannedSync, SyncSettings, open_planned_sync
from clipo_megatron.cluster.policy import PolicyWeights, RayPolicy
from clipo_megatron.cluster.ray_start import start_ray
from clipo_megatron.cluster.streamed_sync import StreamedSync
from clipo_megatron.cluster.sync_ways import Deadline
from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.settings import AlgorithmSettings, OptimizerSettings, PolicySettings
from clipo_megatron.records import RolloutGroup
from clipo_megatron.rollout.environment import engine_environment
from clipo_megatron.rollout.settings import EngineSettings
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout

PHASES = ("begin", "transfer", "commit")
NUM_ENGINES = 5
TRAINER = ParallelLayout(world_size=4, tp=2, pp=2)
"""Ranks 0 and 1 make the buckets of the first stage together, ranks 2 and 3 those of the second."""
TIMEOUT_S = 60.0
SHORT_S = 3.0


@dataclass
class Cluster:
    policy: RayPolicy
    engines: RayEngines
    planned: PlannedSync
    folder: Path
    version: int = 0

    def take(self, version: int) -> PolicyWeights:
        """The trainer's weights become those of `version`: the folder's, all scaled."""
        ray.get([actor.__ray_call__.remote(_scale_by(_scale(version))) for actor in self.policy._actors])
        return self.policy.weight_buckets(version)

    def phases(self, version: int, planned: PlannedSync) -> dict[str, Callable[[], object]]:
        weights = self.take(version)
        return {
            "begin": lambda: planned.begin(version, weights),
            "transfer": lambda: planned.transfer(version, weights, verify=True),
            "commit": lambda: planned.commit(version),
        }

    def serves(self, name: str, version: int) -> bool:
        """Whether an engine answers for a version; then with its weights, whole."""
        prompts, sampling = random_prompts((5,)), SAMPLING
        groups: list[RolloutGroup] = []
        try:
            groups = ray.get(self.engines._actors[name].generate.remote(prompts, sampling, version))
        except WorkerError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert any(word in refusal for word in ("stale", "receiving", "holds")), refusal
            return False
        reference = load_reference(self.folder)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(_scale(version))
        assert worst_difference(reference, groups) < 1e-4
        return True


def _scale(version: int) -> float:
    return 1.0 + version / 64


def _scale_by(factor: float) -> Callable[[Any], None]:
    def scale(actor: Any) -> None:
        worker = actor._worker
        worker.sharing.withdraw()
        if not hasattr(actor, "started_with"):
            actor.started_with = [parameter.detach().clone() for parameter in worker._stage.parameters()]
        for parameter, first in zip(worker._stage.parameters(), actor.started_with, strict=True):
            parameter.data.copy_(first * factor)

    return scale


def _policy(folder: Path, logs: Path) -> RayPolicy:
    settings = PolicySettings(
        model_path=folder,
        weights=None,
        layout=TRAINER,
        dtype="float32",
        device="cpu",
        sequence_parallel=False,
        micro_batch_tokens=64,
        recompute="none",
        distributed_optimizer=True,
        overlap_grad_reduce=False,
        precision=PrecisionSettings(),
        routing_replay=False,
        freeze_router=False,
        temperature=1.0,
        algorithm=AlgorithmSettings(),
        contrastive=None,
        optimizer=OptimizerSettings(),
        seed=0,
    )
    options = {"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return RayPolicy(
        settings,
        actor_options=[options] * TRAINER.world_size,
        bucket_bytes=1 << 14,  # many buckets of a stage
        timeout_s=TIMEOUT_S,
        start_timeout_s=5 * TIMEOUT_S,
        log_folder=logs,
    )


def _sync_settings(folder: Path, timeout_s: float = TIMEOUT_S) -> SyncSettings:
    return SyncSettings(
        transport="shm",
        verify="first",
        timeout_s=timeout_s,
        model_path=folder,
        dtype="float32",
        trainer=TRAINER,
        engines=EngineLayout(engines=NUM_ENGINES, tp=1),
        device="cpu",
        bucket_bytes=1 << 20,
        gpus=place_apart(trainer_ranks=TRAINER.world_size, engine_ranks=NUM_ENGINES, gpus_per_node=16),
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3")
    logs = tmp_path_factory.mktemp("logs")
    start_ray(num_cpus=NUM_ENGINES + TRAINER.world_size, object_store_memory=100 << 20)
    try:
        policy = _policy(folder, logs)
        engines = RayEngines(
            EngineSettings(
                model_path=str(folder),
                dtype="float32",
                device="cpu",
                tp=1,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=16,
                kv_cache_mib=16,
                gpu_memory_utilization=0.5,
                enforce_eager=True,
                prefix_caching=True,
                seed=0,
            ),
            actor_options=[{"num_cpus": 1, "runtime_env": {"env_vars": engine_environment("cpu", 1)}}] * NUM_ENGINES,
            log_folder=logs,
            timeout_s=2 * TIMEOUT_S,
            start_timeout_s=5 * TIMEOUT_S,
            sync=_sync_settings(folder),
            max_restarts=0,
        )
        policy.start()
        engines.start()
        planned = open_planned_sync(engines._actors, _sync_settings(folder), policy.weight_buckets(0))
        assert planned is not None
        yield Cluster(policy, engines, planned, folder)
    finally:
        ray.shutdown()


def _pid(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _actor: os.getpid()))


def _among(planned: PlannedSync, names: list[str], timeout_s: float = TIMEOUT_S) -> PlannedSync:
    """The same sync with some of the engines only."""
    return PlannedSync(
        {name: planned._actors[name] for name in names},
        _sync_settings(planned._settings.model_path, timeout_s),
        way=_hurried(planned._way, timeout_s),
        costs=planned._costs,
    )


class _Faulty(PolicyWeights):
    """Weights in buckets, with a fault after the first of them."""

    def __init__(self, cluster: Cluster, version: int, fault: Callable[[], object]) -> None:
        super().__init__(cluster.policy, version)
        self._fault = fault

    def stream(self, *, timeout_s: float, since: float) -> Generator[tuple[ray.ObjectRef, int, int]]:
        with closing(super().stream(timeout_s=timeout_s, since=since)) as buckets:
            yield next(buckets)
            self._fault()
            yield from buckets


def _streamed(cluster: Cluster, names: list[str], timeout_s: float = TIMEOUT_S) -> StreamedSync:
    actors = {name: cluster.engines._actors[name] for name in names}
    return StreamedSync(actors, Deadline(timeout_s=timeout_s, engine_tp=1))


def _hurried(way: Any, timeout_s: float) -> Any:
    hurried = copy.copy(way)
    hurried._deadline = Deadline(timeout_s=timeout_s, engine_tp=1)
    return hurried


def _until(phases: dict[str, Callable[[], object]], last: str) -> Callable[[], object]:
    """Go through the phases before `last`; returns that one."""
    for name, step in phases.items():
        if name == last:
            return step
        step()
    raise AssertionError(last)


def _kill_soon(pid: int) -> None:
    """Stop a process at once, so that it is in the next phase, and kill it a second later."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(1.0, lambda: os.kill(pid, signal.SIGKILL)).start()


# The tests use up the cluster in this order: first what it survives, then its engines one by one, then the trainer.


def test_where_planned_copies_do_not_fit_weights_are_streamed_unless_the_copies_were_asked_for(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    settings, actors = replace(_sync_settings(cluster.folder), dtype="bfloat16"), cluster.engines._actors
    weights = cluster.policy.weight_buckets(0)
    reason = r"engine_\d failed in open_plan: .*the plan says torch.bfloat16"
    with pytest.raises(ConfigError, match=rf"^sync.transport = shm: {reason}"):
        open_planned_sync(actors, settings, weights)
    with caplog.at_level(logging.INFO):
        assert open_planned_sync(actors, replace(settings, transport="auto"), weights) is None
    assert re.search(rf"weight sync: stream, since {reason}", caplog.text)
    assert open_planned_sync(actors, replace(settings, transport="stream"), weights) is None


@pytest.mark.parametrize(
    ("victim", "phase"),
    # The trainer has no part in a commit.
    [("policy_1", "begin"), ("policy_1", "transfer"), *(("engine_0", phase) for phase in PHASES)],
)
def test_who_is_late_in_a_phase_is_named_and_the_next_update_mends_it(
    cluster: Cluster, victim: str, phase: str
) -> None:
    actor = cluster.policy._actors[1] if victim == "policy_1" else cluster.engines._actors[victim]
    names, pid = ["engine_0", "engine_1"], _pid(actor)
    cluster.version += 1
    hurried = _among(cluster.planned, names, SHORT_S)
    step = _until(cluster.phases(cluster.version, hurried), phase)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(WorkerError, match=rf"^sync {phase}: not done after 3 s: {victim};"):
            step()
    finally:
        os.kill(pid, signal.SIGCONT)
    for name in names:
        cluster.serves(name, cluster.version)
    cluster.version += 1
    _among(cluster.planned, names).update(cluster.version, cluster.take(cluster.version))
    assert all(cluster.serves(name, cluster.version) for name in names)


@pytest.mark.parametrize("victim", ["policy_1", "engine_0"])
def test_who_is_late_while_slices_are_sent_is_named_and_after_a_new_meeting_all_is_well(
    cluster: Cluster, victim: str
) -> None:
    actors = cluster.engines._actors
    actor = cluster.policy._actors[1] if victim == "policy_1" else actors[victim]
    pid, settings = _pid(actor), replace(_sync_settings(cluster.folder, SHORT_S), transport="gloo")
    sent = open_planned_sync(actors, settings, cluster.policy.weight_buckets(0))
    assert sent is not None
    cluster.version += 1
    sent.update(cluster.version, cluster.take(cluster.version))
    assert all(cluster.serves(name, cluster.version) for name in actors)
    cluster.version += 1
    step = _until(cluster.phases(cluster.version, sent), "transfer")
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(WorkerError, match=rf"^sync transfer: not done after \d+ s: {victim};"):
            step()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not any(cluster.serves(name, cluster.version) for name in actors)
    # The group is of no use after that; the next sync meets anew.
    cluster.planned = open_planned_sync(actors, _sync_settings(cluster.folder), cluster.policy.weight_buckets(0))
    cluster.version += 1
    cluster.planned.update(cluster.version, cluster.take(cluster.version))
    assert all(cluster.serves(name, cluster.version) for name in actors)


def test_an_engine_that_is_late_in_a_streamed_transfer_is_named_and_the_next_update_mends_it(cluster: Cluster) -> None:
    """The trainer's ranks were amid making buckets together: what they make next is whole, too."""
    names, pid = ["engine_0", "engine_1"], _pid(cluster.engines._actors["engine_0"])
    cluster.version += 1
    cluster.take(cluster.version)
    weights = _Faulty(cluster, cluster.version, lambda: os.kill(pid, signal.SIGSTOP))
    try:
        with pytest.raises(WorkerError, match=r"^sync transfer: not done after 10 s: engine_0;"):
            _streamed(cluster, names, 10.0).update(cluster.version, weights)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not any(cluster.serves(name, cluster.version) for name in names)
    cluster.version += 1
    _streamed(cluster, names).update(cluster.version, cluster.take(cluster.version))
    assert all(cluster.serves(name, cluster.version) for name in names)


def test_only_engines_that_were_updated_are_counted_and_one_that_was_started_again_is_verified(
    cluster: Cluster,
) -> None:
    names = ["engine_0", "engine_1"]
    planned = _among(cluster.planned, names)
    assert planned._is_to_verify(set(names))
    cluster.version += 1
    weights = cluster.take(cluster.version)
    both = planned.update(cluster.version, weights)
    assert not planned._is_to_verify(set(names))
    cluster.version += 1
    one = planned.update(cluster.version, cluster.take(cluster.version), only=names[:1])
    assert both.num_bytes == 2 * one.num_bytes > 0
    planned.admit(names[1:], weights)
    assert not planned._is_to_verify(set(names[:1]))
    assert planned._is_to_verify(set(names[1:]))


def test_a_stale_version_of_the_trainer_is_served_by_no_engine(cluster: Cluster) -> None:
    cluster.version += 2
    asked, stale = cluster.version, cluster.version - 1
    cluster.planned.begin(asked, cluster.take(stale))
    with pytest.raises(
        WorkerError, match=rf"^engine_\d failed in pull: .*trainer rank \d are those of version {stale}"
    ):
        cluster.planned.transfer(asked, cluster.policy.weight_buckets(asked), verify=False)
    for name in cluster.engines._actors:
        assert not cluster.serves(name, asked)
        assert not cluster.serves(name, stale)


@pytest.mark.parametrize("phase", PHASES)
def test_an_engine_killed_in_a_phase_is_named_and_the_others_serve_whole_versions(cluster: Cluster, phase: str) -> None:
    number = 4 - PHASES.index(phase)
    victim, others = f"engine_{number}", [f"engine_{other}" for other in range(number)]
    planned = _among(cluster.planned, [*others, victim])
    pid = _pid(cluster.engines._actors[victim])
    cluster.version += 1
    step = _until(cluster.phases(cluster.version, planned), phase)
    _kill_soon(pid)
    with pytest.raises(WorkerError, match=rf"^{victim} died in sync {phase}: its process ended"):
        step()
    served = [cluster.serves(name, cluster.version) for name in others]
    assert served == [phase == "commit"] * len(others)
    assert not any(cluster.serves(name, cluster.version - 1) for name in others)
    cluster.version += 1
    _among(cluster.planned, others).update(cluster.version, cluster.take(cluster.version))
    assert all(cluster.serves(name, cluster.version) for name in others)


def test_an_engine_killed_in_a_streamed_transfer_is_named_and_the_others_serve_the_version(cluster: Cluster) -> None:
    pid = _pid(cluster.engines._actors["engine_1"])
    cluster.version += 1
    cluster.take(cluster.version)
    weights = _Faulty(cluster, cluster.version, lambda: _kill_soon(pid))
    with pytest.raises(WorkerError, match=r"^engine_1 died in sync transfer: its process ended"):
        _streamed(cluster, ["engine_0", "engine_1"]).update(cluster.version, weights)
    assert cluster.serves("engine_0", cluster.version)


def test_a_trainer_rank_that_is_late_in_a_streamed_transfer_is_named_though_another_waits_for_it(
    cluster: Cluster,
) -> None:
    pid = _pid(cluster.policy._actors[3])
    cluster.version += 1
    cluster.take(cluster.version)
    weights = _Faulty(cluster, cluster.version, lambda: os.kill(pid, signal.SIGSTOP))
    try:
        with pytest.raises(WorkerError, match=r"^sync transfer: not done after 10 s: policy_3;"):
            _streamed(cluster, ["engine_0"], 10.0).update(cluster.version, weights)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not cluster.serves("engine_0", cluster.version)


def test_a_trainer_killed_in_the_transfer_is_named_and_nothing_is_served(cluster: Cluster) -> None:
    planned = _among(cluster.planned, ["engine_0"])
    pid = _pid(cluster.policy._actors[3])
    cluster.version += 1
    step = _until(cluster.phases(cluster.version, planned), "transfer")
    _kill_soon(pid)
    with pytest.raises(WorkerError, match=r"^policy_3 died in sync transfer: its process ended"):
        step()
    assert not cluster.serves("engine_0", cluster.version)
    cluster.version += 1
    with pytest.raises(WorkerError, match=r"^policy_3 died in sync begin"):
        planned.begin(cluster.version, cluster.policy.weight_buckets(cluster.version))
    assert not cluster.serves("engine_0", cluster.version)


def test_a_trainer_rank_killed_in_a_streamed_transfer_is_named_though_another_lost_its_connection(
    cluster: Cluster,
) -> None:
    pid = _pid(cluster.policy._actors[1])
    cluster.version += 1
    weights = _Faulty(cluster, cluster.version, lambda: _kill_soon(pid))
    with pytest.raises(WorkerError, match=r"^policy_1 died in sync transfer: its process ended"):
        _streamed(cluster, ["engine_0"]).update(cluster.version, weights)
    assert not cluster.serves("engine_0", cluster.version)
