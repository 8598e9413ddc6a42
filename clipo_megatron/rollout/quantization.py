"""FP8 engines: what vLLM is told at the start, and which of its kernels keep weights as planned copies write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipo_megatron.rollout.settings import EngineSettings
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.fp8_parameters import kept_modules

if TYPE_CHECKING:
    import torch

TESTED_KERNELS = ("PerTensorTorchFP8ScaledMMLinearKernel",)
"""Of vLLM, by class: planned copies give the bits that vLLM's own loading gives."""
READ_KERNELS = (*TESTED_KERNELS, "CutlassFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel")
"""Their sources leave weights and scales as quantised; never run here, so for those who ask for planned copies."""


def quantization_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What `vllm.LLM` is given for the settings' number format: it quantises the model folder's weights as it loads them.

    Returns:
        Nothing for engines that hold weights as they are in training.
    """
    if settings.quantization == "none":
        return {}
    kept = kept_modules(read_architecture(Path(settings.model_path)))
    return {"quantization": settings.quantization, "quantization_config": {"ignore": kept} if kept else None}


def fp8_kernels(model: torch.nn.Module) -> list[str]:
    """Classes of the kernels that a worker's model multiplies FP8 matrices with, sorted."""

    def found() -> Iterator[str]:
        for module in model.modules():
            kernel = getattr(getattr(module, "quant_method", None), "fp8_linear", None)
            if kernel is not None:
                yield type(kernel).__name__

    return sorted(set(found()))
