"""Which of vLLM's kernels multiply unquantised experts, and which of them keep weights as planned copies write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

READ_BACKENDS = ("TRITON",)
"""Their sources (vLLM 0.24 to 0.32) leave experts as loaded. Others, as FLASHINFER_CUTLASS (up before gate) and
FLASHINFER_TRTLLM (rows permuted), store another order under the same names and shapes, which no check of these finds."""


def expert_backends(model: torch.nn.Module) -> list[str]:
    """Kernels of a worker's layers of experts, sorted: vLLM's names, the class where there is none."""

    def found() -> Iterator[str]:
        for module in model.modules():
            if "w13_weight" not in module._parameters:
                continue
            method = getattr(module, "quant_method", None)
            method = getattr(method, "old_quant_method", method)  # what the modular kernel took the place of
            backend = getattr(method, "unquantized_backend", None)
            yield type(method).__name__ if backend is None else backend.name

    return sorted(set(found()))
