"""The engine's end of vLLM's own weight transfer, on a real engine, with a backend that can run on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.engines import (
    SAMPLING,
    load_reference,
    perturbed,
    random_prompts,
    tiny_engine,
    worst_difference,
)
from support.tiny_models import make_tiny_hf
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

from clipo_megatron.checks.sync_native import native_problem
from clipo_megatron.rollout.native_transfer import _described, _packed, nccl_update


class InProcess(IPCWeightTransferEngine):
    """vLLM's ipc engine, but that tensors of this process stand in place of handles: CUDA alone has those."""

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        loaded = list(zip(update_info.names, update_info.ipc_handles or (), strict=True))
        assert [str(tensor.dtype) for _, tensor in loaded] == [f"torch.{name}" for name in update_info.dtype_names]
        assert [list(tensor.shape) for _, tensor in loaded] == update_info.shapes
        self.model.load_weights(loaded)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WeightTransferEngineFactory._registry, "ipc", lambda: InProcess)


def test_an_update_by_vllm_itself_gives_the_engine_its_weights(in_process: None, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3", tied=False)
    reference = load_reference(folder)
    with tiny_engine(folder, native_transfer="ipc") as engine:
        engine.native.connect()
        for seed in (1, 2):
            tensors = perturbed(reference, seed=seed)
            engine.native.update(_described(tensors) | {"ipc_handles": [tensor.clone() for _, tensor in tensors]})
            groups = engine.generate(random_prompts((5, 40)), dataclasses.replace(SAMPLING, samples=2), version=None)
            assert worst_difference(reference, groups) < 1e-4


def test_what_is_told_of_tensors_is_what_the_release_takes() -> None:
    tensors = [("a", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(4))]
    info = NCCLWeightTransferUpdateInfo(**nccl_update(tensors))
    assert (info.names, info.dtype_names, info.shapes) == (["a", "b"], ["bfloat16", "float32"], [[2, 3], [4]])
    meeting = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    assert NCCLWeightTransferInitInfo(**meeting, **_packed("NCCLWeightTransferInitInfo")).packed is True


def test_where_it_can_not_be_measured_the_reason_is_told() -> None:
    for backend in ("ipc", "nccl"):
        assert native_problem(backend, device="cpu", engine_tp=1) == (
            f"vLLM's {backend} engine moves CUDA tensors only, and this is a CPU run"
        )
        assert "this one has tp 2" in native_problem(backend, device="cuda", engine_tp=2)
    assert native_problem("ipc", device="cuda", engine_tp=1) == ""
