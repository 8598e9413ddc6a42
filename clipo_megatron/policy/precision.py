"""FP8 as settings: what Megatron and Transformer Engine are told on a GPU, and what a machine must have for it.

Embeddings, router, output layer and contrastive head are never FP8; parameters stay in the policy's dtype.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from packaging.version import Version

PrecisionRecipe = Literal["none", "delayed", "tensorwise", "blockwise"]

_MULTIPLE: dict[PrecisionRecipe, int] = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}
# Transformer Engine releases from which Megatron-core 0.16.1 takes the recipe (fp8_utils.get_fp8_recipe).
_FIRST_ENGINE: dict[PrecisionRecipe, Version] = {
    "delayed": Version("2.1"),
    "tensorwise": Version("2.2"),
    "blockwise": Version("2.3"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionSettings:
    """Number format of the transformer layers' matrix products."""

    recipe: PrecisionRecipe = "none"
    """How FP8 scales are found: delayed (per tensor, from the largest magnitudes of past micro-batches), tensorwise
    (per tensor, from its own), blockwise (per 1x128 activations and gradients, per 128x128 weights)."""
    first_last_layers_bf16: bool = False
    """Leave the model's first and last transformer layer out; not with delayed."""
    amax_history: int = 1024
    """Micro-batches that a scale looks back on; delayed only."""


class MegatronFP8Options(TypedDict, total=False):
    """Fields of Megatron's TransformerConfig; none of them set means no FP8."""

    fp8: Literal["hybrid", "e4m3"]
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"]
    fp8_amax_history_len: int
    fp8_amax_compute_algo: Literal["max"]
    fp8_param: bool
    first_last_layers_bf16: bool
    disable_parameter_transpose_cache: bool


def fp8_multiple(recipe: PrecisionRecipe) -> int:
    """Tokens that a rank's share of a micro-batch must be a multiple of, after the split over cp and tp ranks.

    16: the inner dimension of an FP8 product, which the tokens are for the weights' gradient. 128: whole blocks along
    the tokens, so that shares are quantized before they are gathered.
    """
    return _MULTIPLE[recipe]


def megatron_fp8_options(settings: PrecisionSettings, *, device: Literal["cpu", "cuda"]) -> MegatronFP8Options:
    """What TransformerConfig is told. Nothing on a CPU, where fp8_modules stands in for Transformer Engine.

    hybrid is e4m3 forward and e5m2 for gradients; blockwise scales are fine enough for e4m3 throughout.
    """
    if settings.recipe == "none" or device == "cpu":
        return {}
    options: MegatronFP8Options = {
        "fp8": "e4m3" if settings.recipe == "blockwise" else "hybrid",
        "fp8_recipe": settings.recipe,
        "fp8_param": False,
        "first_last_layers_bf16": settings.first_last_layers_bf16,
        # FP8 copies of weights would outlive the swap of policy and reference weights; each forward makes its own.
        "disable_parameter_transpose_cache": True,
    }
    if settings.recipe == "delayed":
        options["fp8_amax_history_len"] = settings.amax_history
        options["fp8_amax_compute_algo"] = "max"  # Megatron's default is the latest alone, whatever the length
    return options


def hardware_problems(recipe: PrecisionRecipe) -> list[str]:
    """What this machine lacks for `recipe` on a GPU: device, CUDA, Transformer Engine. Looks at the current device."""
    if recipe == "none":
        return []
    if not torch.cuda.is_available():
        return [
            f"precision.recipe = {recipe}: no CUDA device is visible here; set run.device=cpu (slow, FP8 is emulated) or "
            "precision.recipe=none"
        ]
    try:
        engine = Version(importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        engine = None
    cuda = None if torch.version.cuda is None else Version(torch.version.cuda)
    return device_problems(recipe, capability=torch.cuda.get_device_capability(), cuda=cuda, engine=engine)


def device_problems(
    recipe: PrecisionRecipe, *, capability: tuple[int, int], cuda: Version | None, engine: Version | None
) -> list[str]:
    """All faults of a machine with these parts, each with what to do.

    Args:
        recipe: of the run.
        capability: compute capability of the device; (9, 0) is Hopper.
        cuda: that torch was built for; None when it was built for another platform.
        engine: Transformer Engine's version; None when it is not installed.
    """
    if recipe == "none":
        return []
    key = f"precision.recipe = {recipe}"
    problems: list[str] = []
    # https://github.com/NVIDIA/TransformerEngine, transformer_engine/pytorch/quantization.py: the support checks.
    least = (9, 0) if recipe == "blockwise" else (8, 9)
    if capability < least:
        other = "tensorwise or none" if recipe == "blockwise" and capability >= (8, 9) else "none"
        problems.append(
            f"{key}: this GPU has compute capability {capability[0]}.{capability[1]} and the recipe needs {least[0]}."
            f"{least[1]} or more; set precision.recipe={other} or use newer GPUs"
        )
    least_cuda = Version("12.9") if recipe == "blockwise" else Version("12.1")
    if cuda is None or cuda < least_cuda:
        problems.append(
            f"{key}: torch is built for CUDA {cuda}, the recipe needs CUDA >= {least_cuda}; install such a build or choose "
            + ("precision.recipe=tensorwise" if recipe == "blockwise" else "precision.recipe=none")
        )
    if engine is None:
        problems.append(f"{key}: Transformer Engine is not installed; install transformer-engine[pytorch]")
    elif engine < _FIRST_ENGINE[recipe]:
        problems.append(
            f"{key}: Transformer Engine is {engine}, the recipe needs >= {_FIRST_ENGINE[recipe]}; upgrade "
            "transformer-engine[pytorch]"
        )
    return problems
