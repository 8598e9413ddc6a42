"""Which of its attention paths Transformer Engine takes for packed sequences: a kernel, or the slow one in plain torch.

It falls back without a word when no kernel fits the machine, a second cuDNN on the library path for example. Written
against Transformer Engine 2.3 to 2.20.2; not run on a GPU yet.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from clipo_megatron.errors import CheckError

_LOG = logging.getLogger(__name__)

Path = Literal["flash", "fused", "unfused"]
"""flash-attn's kernels, cuDNN's, or matrix products and a softmax one after the other."""
CudnnVersion = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionEngine:
    """The libraries that compute attention."""

    transformer_engine: str
    cudnn: CudnnVersion
    """That Transformer Engine has loaded."""
    torch_cudnn: CudnnVersion | None
    """That torch has loaded; None when it has none."""


class AttentionWatch:
    """Warns once of slow attention in each phase of a step. Does nothing where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_on = device.type == "cuda"
        self._phases: set[str] = set()

    def __call__(self, phase: str) -> None:
        """Look at the last forward of this process, which was one of `phase`: scoring and training may differ."""
        if not self._is_on or phase in self._phases:
            return
        path = last_path()
        if path is None:
            return
        self._phases.add(phase)
        problem = slow_attention(path, find_engine())
        if problem is not None:
            _LOG.warning("%s: %s", phase, problem)


def last_path() -> Path | None:
    """The path of the last attention in this process; None before the first one."""
    # Exported by transformer_engine/pytorch/attention/dot_product_attention/__init__.py, in spite of its name.
    from transformer_engine.pytorch.attention.dot_product_attention import (  # pyright: ignore[reportMissingImports]
        _attention_backends,
    )

    return path_of(_attention_backends)


def path_of(selection: Mapping[str, object]) -> Path | None:
    """The path that Transformer Engine's record of its last choice names; None when it has not chosen yet.

    Raises:
        CheckError: the record has other keys than the versions that this was written against.
    """
    keys: dict[Path, str] = {
        "flash": "use_flash_attention",
        "fused": "use_fused_attention",
        "unfused": "use_unfused_attention",
    }
    if not selection.keys() >= set(keys.values()):
        raise CheckError(
            f"Transformer Engine records its attention under {sorted(selection)}, where {sorted(keys.values())} were "
            "expected; use a release from 2.3 to 2.20"
        )
    return next((path for path, key in keys.items() if selection[key]), None)


def find_engine() -> AttentionEngine:
    """The libraries of this process."""
    from transformer_engine.pytorch.utils import get_cudnn_version  # pyright: ignore[reportMissingImports]

    of_torch = torch.backends.cudnn.version()
    return AttentionEngine(
        transformer_engine=importlib.metadata.version("transformer-engine"),
        cudnn=get_cudnn_version(),
        torch_cudnn=None if of_torch is None else decode_cudnn_version(of_torch),
    )


def decode_cudnn_version(number: int) -> CudnnVersion:
    """(major, minor, patch) of a version as cuDNN encodes it: 8907 is 8.9.7, 91900 is 9.19.0."""
    magnitude = 1000 if number < 90000 else 10000
    return number // magnitude, number % magnitude // 100, number % 100


def slow_attention(path: Path, engine: AttentionEngine) -> str | None:
    """What is wrong with `path`, and what to do; None when it is a kernel."""
    if path != "unfused":
        return None
    text = (
        f"attention runs on the unfused path of Transformer Engine {engine.transformer_engine}: right, but slow (350 "
        "instead of 526 TFLOP/s, forward and backward, on one H100), in memory that grows with the square of the "
        "longest sequence"
    )
    if engine.torch_cudnn is not None and engine.cudnn != engine.torch_cudnn:
        return (
            f"{text}; it has loaded cuDNN {_dotted(engine.cudnn)} and torch {_dotted(engine.torch_cudnn)}: set "
            "CUDNN_HOME and CUDNN_PATH to torch's (site-packages/nvidia/cudnn), and put its lib folder first in "
            "LD_LIBRARY_PATH"
        )
    return (
        f"{text}; start once with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 to read why its kernels were refused (cuDNN is "
        f"{_dotted(engine.cudnn)}); a newer cuDNN or flash-attn may have one for this model's heads"
    )


def probe_attention(
    *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, lengths: Sequence[int] = (96, 160, 64)
) -> str | None:
    """Run one packed attention, forward and backward, on the current CUDA device: what `slow_attention` says of it.

    Args:
        num_heads: query heads of a tp rank.
        num_kv_heads: key/value heads of a tp rank.
        head_dim: width of a head.
        dtype: of the policy.
        lengths: tokens of each packed sequence.
    """
    from transformer_engine.pytorch import DotProductAttention  # pyright: ignore[reportMissingImports]

    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    query, key, value = (
        torch.randn(sum(lengths), heads, head_dim, dtype=dtype, device="cuda", requires_grad=True)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    attention = DotProductAttention(num_heads, head_dim, num_gqa_groups=num_kv_heads)
    states = attention(
        query,
        key,
        value,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=offsets,
        cu_seqlens_kv_padded=offsets,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    states.sum().backward()
    path = last_path()
    if path is None:
        raise CheckError("Transformer Engine ran attention and recorded no path; use a release from 2.3 to 2.20")
    return slow_attention(path, find_engine())


def _dotted(version: CudnnVersion) -> str:
    return ".".join(map(str, version))
