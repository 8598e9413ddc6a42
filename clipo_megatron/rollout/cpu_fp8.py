"""FP8 engines on a CPU: gives vLLM the one function that its CPU build lacks for them, the cast of a matrix with a given scale.

The rest is vLLM's: which matrices, their scales, the cast of activations, the product (`torch._scaled_mm`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform

from clipo_megatron.errors import EngineError
from clipo_megatron.rollout.cpu_release import require_checked_release
from clipo_megatron.rollout.receiver import WeightReceiver
from clipo_megatron.sync.fp8 import quantize_tensor_into

__all__ = ["WeightReceiver", "scaled_fp8_quant"]
# vLLM imports the module of its extension class in every worker before it makes the model: FP8 engines name it as of here.


def scaled_fp8_quant(matrix_RC: Tensor, scale: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [R, C] and the scale, by the rule of vLLM's CUDA kernel, in place of `vllm._custom_ops.scaled_fp8_quant`.

    Args:
        matrix_RC: rows and columns.
        scale: float32 [1].
        options: of vLLM's function; none is served.

    Raises:
        EngineError: asked for what loading a matrix does not need.
    """
    asked = {name: value for name, value in options.items() if value not in (None, False)}
    if scale is None or scale.numel() != 1 or asked:
        raise EngineError(
            f"FP8 on a CPU: vLLM asks to quantise with scale = {scale}, {asked}; only one given scale a matrix is served: set "
            "rollout.quantization to fp8_per_tensor or none"
        )
    values_RC = torch.empty(matrix_RC.shape, dtype=torch.float8_e4m3fn)
    quantize_tensor_into(values_RC, matrix_RC.data, scale)
    return values_RC, scale


if current_platform.is_cpu():
    require_checked_release("FP8 engines run")
    _custom_ops.scaled_fp8_quant = scaled_fp8_quant
