"""Laws of planned syncs over a process group: what arrives, what is refused, that nobody waits for ever."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.architectures import small_architecture
from support.plan_cases import Case, shards_of
from support.plans import UNWRITTEN, Parameters, numbered_folder, shapes_by_layer, sliced_engine_rank
from support.ranks import run_ranks

from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.link_group import join
from clipo_megatron.sync.placement import Placement
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.process_group_transport import PlannedReceives, PlannedSends

VERSIONS = 3


def case_of(family: str, trainer: ParallelLayout, engines: EngineLayout, **sizes: int) -> Case:
    arch = small_architecture(family, **sizes)
    size = trainer.world_size + engines.num_ranks
    gpus = random.Random(size).sample(range(size), size)
    placement = Placement(
        trainer=tuple(gpus[: trainer.world_size]), engines=tuple(gpus[trainer.world_size :]), gpus_per_node=2
    )
    return Case(arch, trainer, engines, placement, 100)


CASES = {
    "dense, tp 2 x pp 2 to 2 x tp 2": case_of(
        "qwen3", ParallelLayout(world_size=4, tp=2, pp=2), EngineLayout(engines=2, tp=2), num_layers=4
    ),
    "experts, ep 2 x dp 2 to 1 x tp 2": case_of(
        "qwen3_moe", ParallelLayout(world_size=4, ep=2), EngineLayout(engines=1, tp=2), num_layers=3
    ),
    "experts, etp 2 x pp 2 to 3 x tp 1": case_of(
        "mixtral", ParallelLayout(world_size=4, tp=2, etp=2, pp=2), EngineLayout(engines=3, tp=1), num_layers=2
    ),
}


def _targets(case: Case) -> Parameters:
    shapes = shapes_by_layer(case.plan.engine_shapes, case.arch.num_layers)
    return {name: torch.full(shape, -7.0) for name, shape in shapes.items()}


def _group(folder: Path, size: int, timeout_s: float = 30.0):
    store = dist.FileStore(str(folder / "sync-store"), size)
    return join(store, rank=dist.get_rank(), size=size, device="cpu", timeout_s=timeout_s, patience_s=60.0)


def _synced(case: Case, folder: Path, bucket_bytes: int) -> dict[str, torch.Tensor]:
    """An engine rank's parameters after some syncs, whose weights are those of the folder times the version."""
    world = case.trainer.world_size
    group, rank = _group(folder, dist.get_world_size()), dist.get_rank()
    if rank < world:
        parameters = {name: tensor.clone() for name, tensor in shards_of(case, folder)[rank].items()}
        first = {name: tensor.clone() for name, tensor in parameters.items()}
        sends = PlannedSends(case.plan, rank, parameters, group, bucket_bytes=bucket_bytes)
        for version in range(1, VERSIONS + 1):
            for name, tensor in parameters.items():
                torch.mul(first[name], version, out=tensor)
            sends.send(version, verify=version == 2)
        return {}
    targets = _targets(case)
    engine, engine_rank = divmod(rank - world, case.engines.tp)
    receives = PlannedReceives(case.plan, engine, engine_rank, targets, group, bucket_bytes=bucket_bytes)
    for version in range(1, VERSIONS + 1):
        receives.receive(version, verify=version == 2)
    return targets


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("name", CASES)
def test_each_engine_rank_holds_its_slices_of_the_last_version(name: str, bucket_bytes: int, tmp_path: Path) -> None:
    case = CASES[name]
    hf = numbered_folder(case.arch, tmp_path)
    found = run_ranks(
        _synced, case, tmp_path, bucket_bytes, world_size=case.trainer.world_size + case.engines.num_ranks
    )
    for place, (_, rank) in enumerate(case.engine_ranks()):
        expected = sliced_engine_rank(case.arch, hf, tp=case.engines.tp, rank=rank, expert_parallel=False)
        for key, tensor in expected.items():
            wanted = torch.where(tensor == UNWRITTEN, 0.0, tensor * VERSIONS)
            assert torch.equal(found[case.trainer.world_size + place][key], wanted), key


SMALL = case_of("qwen3", ParallelLayout(world_size=2, tp=2), EngineLayout(engines=1, tp=1))


def _faulty(folder: Path, fault: str) -> str:
    """Two trainer ranks and an engine rank, of which one is at fault; returns what the engine rank refuses with."""
    rank = dist.get_rank()
    group = _group(folder, 3, timeout_s=1.5)
    if rank < 2:
        parameters = shards_of(SMALL, folder)[rank]
        sends = PlannedSends(SMALL.plan, rank, parameters, group, bucket_bytes=2000)
        if rank == 1 and fault == "late":
            time.sleep(3)
            return ""
        if rank == 1 and fault == "dies":
            time.sleep(0.5)
            del sends, group
            return ""
        try:
            sends.send(4 if rank == 1 and fault == "version" else 5, verify=False)
        except EngineError:
            return "refused"
        return ""
    receives = PlannedReceives(SMALL.plan, 0, 0, _targets(SMALL), group, bucket_bytes=2000)
    with pytest.raises(EngineError) as raised:
        receives.receive(5, verify=False)
    return str(raised.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("version", "engine 0 rank 0: trainer rank 1 sends version 4, expected 5"),
        ("late", "trainer rank 1 is late or gone"),
        ("dies", "trainer rank 1 is late or gone"),
    ],
)
def test_a_rank_at_fault_is_named(fault: str, message: str, tmp_path: Path) -> None:
    numbered_folder(SMALL.arch, tmp_path)
    assert message in run_ranks(_faulty, tmp_path, fault, world_size=3)[2]


TWO_ENGINES = case_of("qwen3", ParallelLayout(world_size=1), EngineLayout(engines=2, tp=1))


class _Slow:
    """A group whose receiver takes its time: what is sent to it lies in the sender's buffers until then."""

    def __init__(self, group) -> None:
        self._group = group

    def recv(self, tensors, rank, tag):
        time.sleep(0.01)
        return self._group.recv(tensors, rank, tag)

    def abort(self):
        self._group.abort()


def _one_by_one(folder: Path, bucket_bytes: int) -> Parameters:
    """The first version for both engines, one more for engine 1 alone, and one for engine 0; what they hold then."""
    group, rank = _group(folder, 3), dist.get_rank()
    if rank == 0:
        parameters = {name: tensor.clone() for name, tensor in shards_of(TWO_ENGINES, folder)[0].items()}
        first = {name: tensor.clone() for name, tensor in parameters.items()}
        sends = PlannedSends(TWO_ENGINES.plan, 0, parameters, group, bucket_bytes=bucket_bytes)
        for version, only in ((1, None), (2, [1]), (3, [0])):
            for name, tensor in parameters.items():
                torch.mul(first[name], version, out=tensor)
            sends.send(version, verify=False, only=only)
        return {}
    targets = _targets(TWO_ENGINES)
    receives = PlannedReceives(TWO_ENGINES.plan, rank - 1, 0, targets, _Slow(group), bucket_bytes=bucket_bytes)
    receives.receive(1, verify=False)
    receives.receive(3 if rank == 1 else 2, verify=False)
    return targets


@pytest.mark.parametrize("bucket_bytes", [500, 3000])
def test_an_engine_that_is_served_alone_gets_its_own_slices(bucket_bytes: int, tmp_path: Path) -> None:
    """Its buckets are every second one of the sender's, and so all in the same of its two buffers."""
    hf = numbered_folder(TWO_ENGINES.arch, tmp_path)
    found = run_ranks(_one_by_one, tmp_path, bucket_bytes, world_size=3)
    expected = sliced_engine_rank(TWO_ENGINES.arch, hf, tp=1, rank=0, expert_parallel=False)
    for engine, version in ((0, 3), (1, 2)):
        for key, tensor in expected.items():
            wanted = torch.where(tensor == UNWRITTEN, 0.0, tensor * version)
            assert torch.equal(found[1 + engine][key], wanted), (engine, key)


def _bereaved(folder: Path) -> str:
    """Engine 0 is gone before anything is sent; what the trainer and engine 1, which live on, are told."""
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    group = _group(folder, 3, timeout_s=100.0)
    if rank == 0:
        sends = PlannedSends(TWO_ENGINES.plan, 0, shards_of(TWO_ENGINES, folder)[0], group, bucket_bytes=500)
        del group
        store.wait(["gone"], timedelta(seconds=60))
        with pytest.raises(EngineError) as raised:
            sends.send(5, verify=False)
        store.wait(["told"], timedelta(seconds=50))  # this process stays, and so would its connections
        with pytest.raises(EngineError, match=r"^the group with the engine ranks was left after an error: meet anew"):
            sends.send(5, verify=False)
        return str(raised.value)
    receives = PlannedReceives(TWO_ENGINES.plan, rank - 1, 0, _targets(TWO_ENGINES), group, bucket_bytes=500)
    del group
    if rank == 1:
        del receives
        store.set("gone", "")
        return ""
    with pytest.raises(EngineError) as raised:
        receives.receive(5, verify=False)
    store.set("told", "")
    return str(raised.value)


def test_the_others_hear_of_a_dead_engine_at_once_and_not_at_their_deadline(tmp_path: Path) -> None:
    numbered_folder(TWO_ENGINES.arch, tmp_path)
    told = run_ranks(_bereaved, tmp_path, world_size=3)
    assert told[0].startswith("engine rank 0 is late or gone")
    assert told[2].startswith("trainer rank 0 is late or gone")


class _Flipping:
    """A group on whose way one bit is turned."""

    def __init__(self, group) -> None:
        self._group = group

    def send(self, tensors, rank, tag):
        if tensors[0].dtype == torch.uint8:
            tensors[0][0] ^= 1
        return self._group.send(tensors, rank, tag)

    def abort(self):
        self._group.abort()


def _flipped(folder: Path) -> str:
    group = _group(folder, 3)
    rank = dist.get_rank()
    if rank < 2:
        through = _Flipping(group) if rank == 0 else group
        PlannedSends(SMALL.plan, rank, shards_of(SMALL, folder)[rank], through, bucket_bytes=1 << 20).send(
            0, verify=True
        )
        return ""
    receives = PlannedReceives(SMALL.plan, 0, 0, _targets(SMALL), group, bucket_bytes=1 << 20)
    with pytest.raises(CheckError) as raised:
        receives.receive(0, verify=True)
    return str(raised.value)


def test_a_bit_that_is_turned_on_the_way_is_seen(tmp_path: Path) -> None:
    numbered_folder(SMALL.arch, tmp_path)
    told = run_ranks(_flipped, tmp_path, world_size=3)[2]
    assert told.startswith("engine 0 rank 0: 1 of ")
    assert "those of trainer rank 0" in told


def test_ends_that_do_not_fit_the_plan_are_refused(tmp_path: Path) -> None:
    numbered_folder(SMALL.arch, tmp_path)
    group = join(dist.HashStore(), rank=0, size=1, device="cpu", timeout_s=5, patience_s=60.0)
    shard, targets = shards_of(SMALL, tmp_path)[0], _targets(SMALL)
    short = {name: tensor for name, tensor in shard.items() if "linear_fc1" not in name}
    with pytest.raises(EngineError, match=r"trainer rank 0 has no parameter .*linear_fc1"):
        PlannedSends(SMALL.plan, 0, short, group, bucket_bytes=1)
    with pytest.raises(EngineError, match=r"trainer rank 0: .* is torch\.float64"):
        PlannedSends(SMALL.plan, 0, {name: tensor.double() for name, tensor in shard.items()}, group, bucket_bytes=1)
    fewer = {name: tensor for name, tensor in targets.items() if name != "model.norm.weight"}
    with pytest.raises(EngineError, match=r"model\.norm\.weight, which the plan fills"):
        PlannedReceives(SMALL.plan, 0, 0, fewer, group, bucket_bytes=1)
    with pytest.raises(EngineError, match=r"more: the plan has no such engine parameter"):
        PlannedReceives(SMALL.plan, 0, 0, targets | {"more": torch.zeros(1)}, group, bucket_bytes=1)
