"""Laws of planned syncs into vLLM: the bits in use are those that whole tensors give; what fails is never served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from support.engine_bits import Bits, bits_of_worker, resources_of_worker
from support.engines import SAMPLING, random_prompts, tiny_engine, update
from support.plans import trainer_shards
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.errors import EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.sync.shared_parameters import SharedParameters, share
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.hf_folder import HFReader

TIMEOUT_S = 60.0
NUM_SYNCS = 200
VOCAB_SIZE = 520
"""No multiple of 64: the last rows of the engine's embedding are padding."""
# Family, dtype and degrees; together all that the list of tested engines names.
CASES = {
    "qwen2 tied, bfloat16": ({"family": "qwen2", "tied": True}, "bfloat16", 1, {"world_size": 4, "tp": 2, "pp": 2}),
    "qwen3, float32": ({"family": "qwen3", "num_kv_heads": 1}, "float32", 2, {"world_size": 2, "pp": 2}),
    "llama, float32": ({"family": "llama", "tied": True}, "float32", 1, {"world_size": 2, "tp": 2}),
    "mixtral, float32": ({"family": "mixtral"}, "float32", 1, {"world_size": 2, "tp": 2, "etp": 2}),
    "qwen3_moe, bfloat16": ({"family": "qwen3_moe"}, "bfloat16", 1, {"world_size": 2, "ep": 2}),
}


class Trainer:
    """The shards of all ranks of a layout, shared as a trainer's."""

    def __init__(self, arch: Architecture, layout: ParallelLayout, folder: Path) -> None:
        self._arch, self._layout = arch, layout
        self._shards = self._read(folder)
        self.shared: list[SharedParameters] = [
            share(shard, owner=f"trainer rank {rank}") for rank, shard in self._shards.items()
        ]

    def hold(self, folder: Path, version: int) -> None:
        """Take the weights of a folder, in place, as `version`."""
        for shared in self.shared:
            shared.begin_change()
        for rank, shard in self._read(folder).items():
            for name, tensor in shard.items():
                self._shards[rank][name].copy_(tensor)
        for shared in self.shared:
            shared.end_change(version)

    @property
    def handles(self) -> list[str]:
        return [shared.handles.to_json() for shared in self.shared]

    def _read(self, folder: Path) -> Mapping[int, dict[str, Tensor]]:
        with HFReader(folder) as reader:
            return {
                rank: {name: tensor.clone() for name, tensor in self._of_rank(reader, rank).items()}
                for rank in range(self._layout.world_size)
            }

    def _of_rank(self, reader: HFReader, rank: int) -> dict[str, Tensor]:
        return trainer_shards(reader, self._arch, self._layout, rank)


@dataclass
class Case:
    engine: RolloutEngine
    trainer: Trainer
    plan: SyncPlan
    folders: list[Path]
    """Three sets of weights; the engine has started with the first."""
    version: int = 0

    def pull(self, folder: Path, *, verify: bool = True) -> None:
        self.version += 1
        self.trainer.hold(folder, self.version)
        self.engine.begin_pull(self.version, timeout_s=TIMEOUT_S)
        self.engine.pull(self.version, verify=verify, timeout_s=TIMEOUT_S)
        self.engine.commit_pull(self.version, timeout_s=TIMEOUT_S)

    def send(self, folder: Path) -> None:
        self.version += 1
        update(self.engine, self.version, list(load_file(folder / "model.safetensors").items()))

    def bits(self) -> list[Bits]:
        return self.engine._workers.require().collective_rpc(bits_of_worker)

    def refuses(self) -> None:
        """Nothing is served, whatever version is asked for."""
        for version in (None, self.version - 1, self.version):
            with pytest.raises(EngineError, match=r"stale|receiving"):
                self.engine.generate(random_prompts((5,)), SAMPLING, version=version)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    model, dtype, tp, trainer = CASES[request.param]
    folders = [
        make_tiny_hf(tmp_path_factory.mktemp("model"), **model, dtype=dtype, vocab_size=VOCAB_SIZE, seed=seed)
        for seed in range(3)
    ]
    arch, layout = read_architecture(folders[0]), ParallelLayout(**trainer)
    apart = place_apart(trainer_ranks=layout.world_size, engine_ranks=tp, gpus_per_node=8)
    plan = plan_sync(arch, layout, EngineLayout(engines=1, tp=tp), apart, dtype=dtype)
    shards = Trainer(arch, layout, folders[0])
    with tiny_engine(folders[0], tp=tp, dtype=dtype, kv_cache_mib=16) as engine:
        assert engine.planned_sync_problem(is_asked_for=False) == ""
        assert engine._names("clipo_expert_backends") == (["CPU"] if arch.experts else [])
        num_bytes, floor_seconds = engine.open_plan(to_json(plan), 0, shards.handles)
        assert num_bytes == sum(plan.num_bytes(t.copy) for rank in range(tp) for t in plan.into(0, rank))
        assert 0 < floor_seconds < 10
        yield Case(engine, shards, plan, folders)


def test_a_pull_gives_the_bits_that_whole_tensors_give(case: Case) -> None:
    case.send(case.folders[1])
    golden = case.bits()
    case.pull(case.folders[2])
    other = case.bits()
    case.pull(case.folders[1], verify=False)
    assert case.bits() == golden
    case.send(case.folders[2])
    assert case.bits() == other
    for one, two in zip(golden, other, strict=True):
        assert {name for name in one if "product" in name and one[name] == two[name]} == set()


@pytest.mark.parametrize("case", ["qwen3, float32", "qwen3_moe, bfloat16"], indirect=True)
def test_200_syncs_leave_memory_and_descriptors_as_they_were_and_the_right_bits(case: Case) -> None:
    case.send(case.folders[1])
    golden = case.bits()
    resident: list[list[int]] = []
    descriptors: list[list[int]] = []
    for number in range(NUM_SYNCS):
        case.pull(case.folders[1 + number % 2], verify=number == 0)
        found = case.engine._workers.require().collective_rpc(resources_of_worker)
        resident.append([of_worker for of_worker, _ in found])
        descriptors.append([count for _, count in found])
    settled = np.array(resident[NUM_SYNCS // 4 :], dtype=np.float64)  # [syncs, workers]
    slopes = np.polyfit(np.arange(len(settled)), settled, 1)[0]
    print(f"bytes a sync: {slopes.round()}, descriptors {descriptors[0]} to {descriptors[-1]}")
    num_bytes = sum(case.plan.num_bytes(transfer.copy) for transfer in case.plan.into(0, 0))
    assert (slopes < 0.05 * num_bytes).all()  # a kept layer would be more
    assert max(descriptors[NUM_SYNCS // 4 :]) <= max(descriptors[: NUM_SYNCS // 4])
    case.pull(case.folders[1])
    assert case.bits() == golden


def test_weights_of_another_version_are_never_served(case: Case) -> None:
    case.pull(case.folders[1])
    case.version += 1
    for stamped in (case.version - 1, case.version + 1):
        case.trainer.hold(case.folders[2], stamped)
        case.engine.begin_pull(case.version, timeout_s=TIMEOUT_S)
        case.refuses()
        with pytest.raises(
            EngineError, match=rf"worker 0 of \d: clipo_pull.*trainer rank 0 are those of version {stamped}"
        ):
            case.engine.pull(case.version, verify=False, timeout_s=TIMEOUT_S)
        case.refuses()
    case.pull(case.folders[2])
    assert case.engine.generate(random_prompts((5,)), SAMPLING, version=case.version)


def test_weights_in_change_are_never_served(case: Case) -> None:
    case.version += 1
    case.trainer.hold(case.folders[1], case.version)
    case.trainer.shared[-1].begin_change()
    case.engine.begin_pull(case.version, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match="are in change"):
        case.engine.pull(case.version, verify=False, timeout_s=TIMEOUT_S)
    case.refuses()
    with pytest.raises(EngineError, match="no update is under way"):
        case.engine.commit_pull(case.version, timeout_s=TIMEOUT_S)
    case.send(case.folders[1])  # the other way is open
    assert case.engine.generate(random_prompts((5,)), SAMPLING, version=case.version)


def test_a_pull_that_is_not_whole_can_t_be_committed(case: Case) -> None:
    case.version += 1
    case.trainer.hold(case.folders[2], case.version)
    case.engine.begin_pull(case.version, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match="was not pulled to its end"):
        case.engine.commit_pull(case.version, timeout_s=TIMEOUT_S)
    case.refuses()


def test_late_messages_of_another_version_are_refused(case: Case) -> None:
    case.pull(case.folders[1])
    with pytest.raises(EngineError, match="no update is under way"):
        case.engine.pull(case.version, verify=False, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match="too late"):
        case.engine.begin_pull(case.version - 1, timeout_s=TIMEOUT_S)
    assert case.engine.generate(random_prompts((5,)), SAMPLING, version=case.version)
    case.version += 1
    case.engine.begin_pull(case.version, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match=f"part of version {case.version - 1} during the update"):
        case.engine.pull(case.version - 1, verify=False, timeout_s=TIMEOUT_S)
    case.refuses()
