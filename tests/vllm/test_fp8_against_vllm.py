"""Laws of FP8 copies with vLLM's online quantization as the oracle: its numbers on CPU tensors, and what it quantises.

Its FP8 kernels need other processors; the functions that quantise at load time don't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import tiny_engine
from support.fp8_oracle import awkward_matrix
from support.tiny_models import make_tiny_hf

from clipo_megatron.sync.fp8 import (
    ShardBlocks,
    amax_of_blocks,
    block_scales,
    quantize_blocks_into,
    tensor_scale,
)
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.engine_parameters import engine_parameters
from clipo_megatron.weights.fp8_parameters import BLOCK, is_quantized, kept_modules

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 400),
    columns=st.integers(1, 400),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_block_scales_and_values_are_vllm_s_bit_for_bit(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    matrix = awkward_matrix(rows, columns, seed=seed, dtype=dtype)
    blocks = ShardBlocks(
        num_rows=-(-rows // BLOCK),
        num_columns=-(-columns // BLOCK),
        row_R=torch.arange(rows) // BLOCK,
        first_column=0,
    )
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = block_scales(amax_of_blocks(matrix, blocks))
    quantize_blocks_into(values, matrix, scales, blocks)
    with torch.compiler.set_stance("force_eager"):  # an engine's process on a CPU does not compile it either
        expected, expected_scales = per_block_cast_to_fp8(matrix, block_size=[BLOCK, BLOCK], use_ue8m0=False)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_the_scale_of_a_matrix_is_vllm_s_bit_for_bit(seed: int, dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.quantization.online.fp8 import _fp8_scale
    from vllm.model_executor.layers.quantization.utils.quant_utils import weight_amax

    matrix = awkward_matrix(50, 70, seed=seed, dtype=dtype)
    expected = _fp8_scale(weight_amax(matrix).reshape(1))
    assert torch.equal(tensor_scale(matrix.abs().amax().float().reshape(1)), expected)


def _quantized_by_vllm(worker: WorkerBase, ignored: list[str]) -> list[str]:
    """Names of the parameters that vLLM's online quantization would take of the worker's model; to be run there."""
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    config = OnlineQuantizationConfig(
        QuantizationConfigArgs(linear="fp8_per_block", moe="fp8_per_block", ignore=ignored)
    )
    model = worker.model_runner.get_model()
    config.packed_modules_mapping = model.packed_modules_mapping
    names = []
    for prefix, module in model.named_modules():
        own = [name for name, parameter in module.named_parameters(recurse=False) if "weight" in name]
        if own and config.resolve_quant_method_cls(type(module), prefix) is not None:
            names += [f"{prefix}.{name}" for name in own]
    return names


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_vllm_quantises_the_same_parameters_once_told_what_to_keep(family, tmp_path) -> None:
    folder = make_tiny_hf(tmp_path, family)
    arch = read_architecture(folder)
    expected = {
        parameter.names[0].replace("{layer}", str(layer))
        for parameter in engine_parameters(arch, tp=1, tp_rank=0)
        if is_quantized(parameter.rule)
        for layer in range(arch.num_layers)
    }
    with tiny_engine(folder, kv_cache_mib=16) as engine:
        (found,) = engine._workers.require().collective_rpc(_quantized_by_vllm, args=(kept_modules(arch),))
        (without_list,) = engine._workers.require().collective_rpc(_quantized_by_vllm, args=([],))
    assert set(found) == expected
    routers = {name for name in without_list if name.endswith(".mlp.gate.weight")}
    assert set(without_list) == expected | routers
    assert bool(routers) == (family == "qwen3_moe")
