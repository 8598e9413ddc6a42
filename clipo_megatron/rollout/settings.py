"""What an engine needs to start: plain values, so that they travel to the process that will hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """One rollout engine."""

    model_path: str
    """Hugging Face folder."""
    dtype: Literal["float32", "bfloat16"]
    """Of weights and activations."""
    device: Literal["cpu", "cuda"]
    """Where the engine runs; must be what the installed vLLM is built for."""
    tp: int
    """Tensor parallel degree."""
    max_model_len: int
    """Prompt and response tokens of one sequence at most."""
    max_num_seqs: int
    """Requests run at the same time."""
    kv_cache_mib: int
    """KV cache on a CPU."""
    gpu_memory_utilization: float
    """Share of a GPU's memory for weights and KV cache."""
    enforce_eager: bool
    """No CUDA graphs."""
    prefix_caching: bool
    """Share the KV cache of common prompts."""
    seed: int
    """Of vLLM's own generator; requests have their own seeds."""
    sleeps: bool = False
    """Can give its memory back between updates, since others work on its devices."""
    quantization: Literal["none", "fp8_per_tensor", "fp8_per_block"] = "none"
    """FP8 matrices in the layers, by vLLM's names; needs bfloat16. On a CPU: fp8_per_tensor, dense models."""
    native_transfer: Literal["", "ipc", "nccl"] = ""
    """vLLM's own weight transfer that the engine is ready for; only to measure it."""
    return_routed_experts: bool = False
    """Return the experts that each token was sent to. Mixture of experts only; on a GPU it needs prefix_caching."""
