"""Laws of planned syncs that Megatron ranks send to a real vLLM engine: its bits are those that whole tensors give."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.engine_bits import Bits, bits_of_worker, resources_of_worker
from support.engines import tiny_engine, update
from support.policy_ranks import PolicyRanks, policy_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.weight_io import load_hf_weights
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.sync.meeting import Meeting
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture

TIMEOUT_S = 60.0
NUM_SYNCS = 40
VOCAB_SIZE = 520
"""No multiple of 64: the last rows of the engine's embedding are padding."""
CASES = {
    "dense tied, tp2 x pp2 to tp 2": ({"family": "qwen3", "tied": True}, {"world_size": 4, "tp": 2, "pp": 2}, 2),
    "dense untied, dp2 to tp 1": ({"family": "qwen2"}, {"world_size": 2}, 1),
    "mixture, ep2 to tp 1": ({"family": "qwen3_moe"}, {"world_size": 2, "ep": 2}, 1),
    "dense tied, tp2 to an FP8 engine": ({"family": "qwen3", "tied": True}, {"world_size": 2, "tp": 2}, 1),
}


def _open(worker: PolicyWorker, plan: str, meeting: Meeting) -> None:
    worker.sharing.open_links(plan, meeting)


def _hold(worker: PolicyWorker, folder: Path) -> None:
    worker.sharing.withdraw()
    load_hf_weights(worker._stage, folder, worker._architecture, worker._layout, rank=worker._rank)


def _send(worker: PolicyWorker, version: int, verify: bool) -> None:
    worker.sharing.offer(version)
    worker.sharing.send(version, verify=verify, only=None)


class Pair:
    """Trainer ranks and an engine that have met."""

    def __init__(
        self,
        engine: RolloutEngine,
        ranks: PolicyRanks,
        folder: Path,
        layout: ParallelLayout,
        tp: int,
        *,
        is_fp8: bool = False,
    ):
        self.engine, self._ranks = engine, ranks
        apart = place_apart(trainer_ranks=layout.world_size, engine_ranks=tp, gpus_per_node=1)
        engines = EngineLayout(engines=1, tp=tp)
        dtype, fp8 = ("bfloat16", "tensor") if is_fp8 else ("float32", "none")
        plan = plan_sync(read_architecture(folder), layout, engines, apart, dtype=dtype, fp8=fp8, cut_elements=1024)
        self.plan = to_json(plan)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._meetings = 0
        self._size = layout.world_size + tp

    def meet(self) -> None:
        meeting = Meeting(
            host="127.0.0.1",
            port=self._store.port,
            number=self._meetings,
            size=self._size,
            device="cpu",
            bucket_bytes=20_000,
            timeout_s=TIMEOUT_S,
            patience_s=TIMEOUT_S,
        )
        self._meetings += 1
        self._beside(_open, self.plan, meeting, own=lambda: self.engine.open_links(self.plan, 0, meeting))

    def pull(self, version: int, *, verify: bool) -> None:
        self.engine.begin_pull(version, timeout_s=TIMEOUT_S)
        own = lambda: self.engine.pull(version, verify=verify, timeout_s=TIMEOUT_S)  # noqa: E731
        self._beside(_send, version, verify, own=own)
        self.engine.commit_pull(version, timeout_s=TIMEOUT_S)

    def bits(self) -> list[Bits]:
        return self.engine._workers.require().collective_rpc(bits_of_worker)

    def _beside(self, work, *arguments: object, own) -> None:
        """Both ends at the same time."""
        failed: list[BaseException] = []

        def on_ranks() -> None:
            try:
                self._ranks.call(work, *arguments)
            except BaseException as error:  # noqa: BLE001  raised below
                failed.append(error)

        thread = threading.Thread(target=on_ranks)
        thread.start()
        own()
        thread.join()
        assert not failed, failed[0]


@pytest.mark.parametrize("case", CASES)
def test_sent_slices_give_an_engine_the_bits_that_whole_tensors_give(case: str, tmp_path: Path) -> None:
    model, trainer, tp = CASES[case]
    layout, is_fp8 = ParallelLayout(**trainer), "FP8" in case
    dtype = torch.bfloat16 if is_fp8 else torch.float32
    folders = [make_tiny_hf(tmp_path / str(seed), **model, vocab_size=VOCAB_SIZE, seed=seed) for seed in range(3)]
    name = str(dtype).removeprefix("torch.")
    with (
        policy_ranks(folders[0], layout, dtype=name, engine_fp8="tensor" if is_fp8 else "none") as ranks,
        tiny_engine(
            folders[0], tp=tp, dtype=name, kv_cache_mib=16, quantization="fp8_per_tensor" if is_fp8 else "none"
        ) as engine,
    ):
        pair = Pair(engine, ranks, folders[0], layout, tp, is_fp8=is_fp8)
        version, wanted = 0, []
        for folder in folders[1:]:
            version += 1
            tensors = load_file(folder / "model.safetensors")
            update(engine, version, [(name, tensor.to(dtype)) for name, tensor in tensors.items()])
            wanted.append(pair.bits())
        assert wanted[0] != wanted[1]
        for verify in (True, False):
            pair.meet()  # a second time: as after an engine was started again
            for folder, bits in zip(folders[1:], wanted, strict=True):
                version += 1
                ranks.call(_hold, folder)
                pair.pull(version, verify=verify)
                assert pair.bits() == bits


def test_memory_and_descriptors_stay_the_same_over_many_syncs(tmp_path: Path) -> None:
    folder, layout = make_tiny_hf(tmp_path, "qwen3"), ParallelLayout(world_size=2, tp=2)
    with policy_ranks(folder, layout) as ranks, tiny_engine(folder, kv_cache_mib=16) as engine:
        pair = Pair(engine, ranks, folder, layout, 1)
        pair.meet()
        found = []
        for version in range(1, NUM_SYNCS + 1):
            pair.pull(version, verify=version % 2 == 0)
            here = engine._workers.require().collective_rpc(resources_of_worker)[0]
            found.append((here, *ranks.call(resources_of_worker)))
    for who in range(3):
        resident = [row[who][0] for row in found[10:]]
        assert resident[-1] - resident[0] < 2 << 20, resident
        assert len({row[who][1] for row in found[10:]}) == 1
