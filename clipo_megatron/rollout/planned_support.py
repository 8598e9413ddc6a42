"""Which engines may be filled by a plan: the releases, families and number formats that the tests compare bit by bit."""

from __future__ import annotations

import re
from typing import Any

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
    quantization: Any,  # noqa: ANN401 (vLLM's)
    is_asked_for: bool,
) -> str:
    """Why a plan must not fill such an engine; empty if it may.

    Args:
        release: of vLLM.
        family: of the model, as in weights/families.py.
        dtype: of the parameters.
        device: "cpu" or "cuda".
        quantization: vLLM's method, None for none.
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
    return "" if quantization is None else f"quantization {quantization}: planned syncs are tested without only"
