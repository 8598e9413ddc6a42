"""Which engines may be filled by a plan: the releases, families and number formats that the tests compare bit by bit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from clipo_megatron.rollout.quantization import READ_KERNELS, TESTED_KERNELS
from clipo_megatron.weights.families import FAMILIES

TESTED_RELEASES = ("0.32",)
_SUPPORTED_RELEASES = tuple(f"0.{minor}" for minor in range(24, 33))
"""Of the project; a GPU's parameters are written in place, so only their names and shapes count, which are compared."""
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
        return ""
    if FAMILIES[family].has_experts:
        return f"quantization {quantization}: planned syncs of FP8 experts are not there yet, vLLM repacks them"
    tested_kernels = READ_KERNELS if by_choice else TESTED_KERNELS
    if unknown := [kernel for kernel in kernels if kernel not in tested_kernels]:
        return f"vLLM's FP8 kernel {unknown[0]}: planned syncs are tested with {', '.join(tested_kernels)} only"
    return "" if kernels else f"quantization {quantization}: no FP8 kernel was found in the engine's layers"
