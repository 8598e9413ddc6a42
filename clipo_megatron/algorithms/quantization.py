"""FP8 in plain torch: tensors scaled, rounded to 8-bit floats and scaled back, with Transformer Engine's scale rules.

Letters: R rows, C columns, K tensors that share a history, L length of the history. Scales and amaxes (largest
magnitudes) are float32. Formats: float8_e4m3fn (largest 448) and float8_e5m2 (largest 57,344), arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Block = tuple[int, int]
"""(rows, columns) that share a scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A matrix in FP8: values = round(clamp(x * scale)), x is about values / scale."""

    values_RC: Tensor
    """float8_e4m3fn or float8_e5m2"""
    scale: Tensor
    """float32, one per block: [ceil(R / block rows), ceil(C / block columns)]; [1, 1] for the whole matrix."""
    block: Block

    def dequantize(self) -> Tensor:
        """The matrix as a product sees it: values * (1 / scale), float32 [R, C]."""
        return self.values_RC.float() * _spread(self.scale.reciprocal(), self.block, self.values_RC.shape)


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest |x|, float32 scalar; 0 of no elements."""
    return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def current_scale(amax: Tensor, *, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The scale that maps `amax` onto the format's largest number m: m / amax.

    1 where amax is 0, infinite or NaN; float32's largest where the quotient overflows; with `power_of_two` the quotient
    is rounded down to a power of two. Source: https://github.com/NVIDIA/TransformerEngine, common/recipe,
    `compute_scale_from_amax`; plain quotients are Float8CurrentScaling's default, powers of two Float8BlockScaling's.

    Args:
        amax: float32, any shape, >= 0.
        dtype: the FP8 format.
        power_of_two: round down.

    Returns:
        float32 of the shape of `amax`.
    """
    scale = (torch.finfo(dtype).max / amax).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def quantize_tensor(x_RC: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Quantized:
    """One scale for all: round to nearest even, what is beyond the format's range becomes its largest number.

    Args:
        x_RC: any float format.
        scale: float32 scalar, > 0.
        dtype: the FP8 format.
    """
    return Quantized(values_RC=_round(x_RC.float() * scale, dtype), scale=scale.reshape(1, 1), block=(1, 1))


def quantize_blocks(x_RC: Tensor, *, block: Block, dtype: torch.dtype) -> Quantized:
    """One power-of-two scale for each block, from its own values (as in arXiv 2412.19437, section 3.3).

    Blocks at the lower and right edge may be smaller. Transformer Engine's Float8BlockScaling takes (1, 128) for
    activations and gradients, along the dim that the product sums over, and (128, 128) for weights.
    """
    rows, columns = x_RC.shape
    height, width = block
    padded = torch.nn.functional.pad(x_RC.float(), (0, -columns % width, 0, -rows % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scale = current_scale(tiles.abs().amax((1, 3)), dtype=dtype, power_of_two=True)
    values_RC = _round(x_RC.float() * _spread(scale, block, x_RC.shape), dtype)
    return Quantized(values_RC=values_RC, scale=scale, block=block)


def push_amax(history_KL: Tensor, scale_K: Tensor, amax_K: Tensor, *, largest_K: Tensor) -> tuple[Tensor, Tensor]:
    """One step of delayed scaling: the history takes in the newest amax, the next scale is m / max(history).

    A tensor whose amax is 0 (it was not run, or is all zeros) keeps history and scale. The scale also stays while the
    history holds an infinity; NaN counts as nothing. Source: https://github.com/NVIDIA/TransformerEngine,
    common/recipe/delayed_scaling.cu, with amax_compute_algo "max" and margin 0.

    Args:
        history_KL: past amaxes, newest last, 0 for none, float32 [K, L].
        scale_K: in use so far, float32 [K]; 1 at the start.
        amax_K: of the tensors just quantized, float32 [K].
        largest_K: largest number m of each tensor's format, float32 [K].

    Returns:
        (history_KL, scale_K) for the next step.
    """
    seen_K = amax_K != 0
    moved_KL = torch.cat([history_KL[:, 1:], amax_K[:, None]], dim=1)
    amax_of_history_K = moved_KL.nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
    usable_K = seen_K & (amax_of_history_K > 0) & amax_of_history_K.isfinite()
    scale_new_K = (largest_K / amax_of_history_K).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(seen_K[:, None], moved_KL, history_KL), torch.where(usable_K, scale_new_K, scale_K)


def _round(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    # torch's conversion gives NaN or infinity beyond the range; the tensor cores' one saturates. NaN stays NaN.
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).to(dtype)


def _spread(scale: Tensor, block: Block, shape: torch.Size) -> Tensor:
    if scale.numel() == 1:
        return scale
    height, width = block
    return scale.repeat_interleave(height, 0)[: shape[0]].repeat_interleave(width, 1)[:, : shape[1]]
