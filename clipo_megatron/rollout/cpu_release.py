"""The vLLM release that what touches its inside on a CPU was checked against."""

from __future__ import annotations

import vllm

from clipo_megatron.errors import EngineError

CHECKED_RELEASE = (0, 32)


def require_checked_release(purpose: str) -> None:
    """Refuse another release.

    Args:
        purpose: what the release is needed for, as "weights can be updated".

    Raises:
        EngineError: another release is installed.
    """
    release = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if release != CHECKED_RELEASE:
        checked = ".".join(map(str, CHECKED_RELEASE))
        raise EngineError(
            f"vLLM {vllm.__version__} on a CPU: {purpose} in {checked} only, as this reaches into vLLM and is checked "
            "against that release; install it"
        )
