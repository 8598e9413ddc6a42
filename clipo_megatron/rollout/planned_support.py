"""Which engines may be filled by a plan: the releases, families and number formats that the tests compare bit by bit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from clipo_megatron.rollout.expert_backends import READ_BACKENDS
from clipo_megatron.rollout.quantization import READ_KERNELS, TESTED_KERNELS
from clipo_megatron.weights.families import FAMILIES

TESTED_RELEASES = ("0.32",)
_SUPPORTED_RELEASES = tuple(f"0.{minor}" for minor in range(24, 33))
"""Of the project. A GPU's parameters are written in place: names and shapes are compared, and kernels must be ones whose sources
leave weights as loaded, for a shape does not tell the order."""
TESTED_DTYPES = ("float32", "bfloat16")
TESTED_DEVICES = ("cpu",)


def planned_sync_problem(
    *,
    release: str,
    family: str,
    dtype: str,
    device: str,
    quantization: str,
    kernels: Sequence[str],
    expert_backends: Sequence[str],
    is_asked_for: bool,
) -> str:
    """Why a plan must not fill such an engine; empty if it may.

    Args:
        release: of vLLM.
        family: of the model, as in weights/families.py.
        dtype: of the parameters.
        device: "cpu" or "cuda".
        quantization: of the engine, "none" or vLLM's name.
        kernels: classes of vLLM's FP8 kernels in use.
        expert_backends: vLLM's names of the kernels of its unquantised experts.
        is_asked_for: the transport is the user's own choice: a GPU and its release are none of the reasons then.
    """
    by_choice = is_asked_for and device == "cuda"
    tested_families = [name for name, known in FAMILIES.items() if known.is_sync_tested]
    found = re.match(r"\d+\.\d+", release)
    for what, value, tested in (
        ("vLLM", found[0] if found else release, _SUPPORTED_RELEASES if by_choice else TESTED_RELEASES),
        ("model family", family, tested_families),
        ("dtype", dtype, TESTED_DTYPES),
        ("device", device, ("cuda", *TESTED_DEVICES) if by_choice else TESTED_DEVICES),
    ):
        if value not in tested:
            return f"{what} {value}: planned syncs are tested with {', '.join(tested)} only"
    if quantization == "none":
        return _expert_problem(expert_backends) if device == "cuda" and FAMILIES[family].has_experts else ""
    if FAMILIES[family].has_experts:
        return f"quantization {quantization}: planned syncs of FP8 experts are not there yet, vLLM repacks them"
    tested_kernels = READ_KERNELS if by_choice else TESTED_KERNELS
    if unknown := [kernel for kernel in kernels if kernel not in tested_kernels]:
        return f"vLLM's FP8 kernel {unknown[0]}: planned syncs are tested with {', '.join(tested_kernels)} only"
    return "" if kernels else f"quantization {quantization}: no FP8 kernel was found in the engine's layers"


def _expert_problem(backends: Sequence[str]) -> str:
    """Of experts that are written where they are in use."""
    if unknown := [backend for backend in backends if backend not in READ_BACKENDS]:
        return (
            f"vLLM's backend of experts {unknown[0]}: it may keep weights in another order under the same names and shapes; "
            f"planned syncs write them in place for {', '.join(READ_BACKENDS)} only, which vLLM takes by itself on Hopper GPUs "
            "and where its moe_backend says so"
        )
    return "" if backends else "no backend of experts was found in the engine's layers"
