"""FP8 engines on a GPU: what vLLM's kernels hold is what the trainer would send them, value by value.

No GPU was at hand when these tests were written: they have not been run yet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.engines import SAMPLING, random_prompts, tiny_settings
from support.fp8_oracle import blocks_by_loops, tensor_by_loops
from support.tiny_models import make_tiny_hf

from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.rollout.environment import engine_environment
from clipo_megatron.rollout.quantization import READ_KERNELS, fp8_kernels

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ORACLES = {
    "fp8_per_block": ("weight_scale_inv", blocks_by_loops),
    "fp8_per_tensor": ("weight_scale", lambda matrix: tensor_by_loops(matrix, float(matrix.abs().max()))),
}


def _o_proj_of_worker(worker: WorkerBase) -> tuple[list[str], dict[str, np.ndarray]]:
    """Kernels of the model, and the parameters of the first layer's o_proj; to be run in the worker."""
    model = worker.model_runner.get_model()
    parameters = dict(model.model.layers[0].self_attn.o_proj.named_parameters())
    weight = parameters["weight"]
    rows = weight if weight.is_contiguous() else weight.t()
    found = {"weight": rows.view(torch.uint8).cpu().numpy()}
    scales = {name: value.float().cpu().numpy() for name, value in parameters.items() if "scale" in name}
    return fp8_kernels(model), found | scales


@pytest.mark.parametrize("quantization", ORACLES)
def test_an_engine_holds_its_matrices_as_a_float64_loop_quantises_them(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3", hidden_size=256, head_dim=128, num_kv_heads=2, ffn_size=256)
    for name, value in engine_environment("cuda", 1).items():
        monkeypatch.setenv(name, value)
    settings = replace(
        tiny_settings(folder, dtype="bfloat16", quantization=quantization), device="cuda", gpu_memory_utilization=0.2
    )
    scale_name, oracle = ORACLES[quantization]
    engine = RolloutEngine(settings)
    try:
        ((kernels, found),) = engine._workers.require().collective_rpc(_o_proj_of_worker)
        print(quantization, kernels)
        matrix = load_file(folder / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].bfloat16()
        codes, scales = oracle(matrix)
        assert np.array_equal(found[scale_name].reshape(scales.shape), scales)
        assert np.array_equal(found["weight"], codes)
        assert set(kernels) <= set(READ_KERNELS)
        (group,) = engine.generate(random_prompts((5,)), replace(SAMPLING, routed_experts=False), version=None)
        assert all(np.isfinite(rollout.sampled_logprobs).all() for rollout in group.rollouts)
    finally:
        engine.close()
