"""Repairs two faults of vLLM 0.32's layerwise reload on CPUs, both wrong numbers without an error. GPUs have neither.

Tied head: it has a packed copy of the embedding for its matrix product; the reload finds no tensor of its own and
leaves the old copy. Experts: the packing for their grouped product is skipped when the kernel exists already.
Same family as https://github.com/vllm-project/vllm/issues/48312; tests/vllm/test_cpu_reload.py fails once it is mended.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from clipo_megatron.rollout.cpu_release import require_checked_release


def repack_after_reload(model: torch.nn.Module) -> None:
    """Pack again what the reload has left packed from the old weights. Does nothing on a GPU.

    Args:
        model: a worker's model whose reload has just been finished.

    Raises:
        EngineError: on a CPU, with another vLLM release than the repair is known to work for.
    """
    if not current_platform.is_cpu():
        return
    require_checked_release("weights can be updated")
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            method.process_weights_after_loading(module)  # pyright: ignore[reportOptionalMemberAccess]
        elif type(module).__name__ == "RoutedExperts":
            method.moe_kernel.fused_experts.process_weights_after_loading(module)  # pyright: ignore
