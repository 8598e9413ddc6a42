"""Every bit that a vLLM worker computes with: parameters, buffers, and what its packed matrices make of a probe."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

Bits = dict[str, str]
"""Name -> digest."""


@torch.no_grad()
def bits_of_worker(worker: WorkerBase) -> Bits:
    """To be run in the worker. A matrix that is packed inside a kernel is told by its products with random vectors."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    model = worker.model_runner.get_model()
    found = {name: _digest(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, module in model.named_modules():
        if isinstance(module, (LinearBase, ParallelLMHead)):
            is_head = isinstance(module, ParallelLMHead)
            width = module.embedding_dim if is_head else getattr(module, "input_size_per_partition", module.input_size)
            probe = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
            bias = getattr(module, "bias", None)
            product = module.quant_method.apply(module, probe.to(worker.model_config.dtype), bias)
            found[f"product of {name}"] = _digest(product)
    return found


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest() + f" {tensor.dtype} {tuple(tensor.shape)}"


def resources_of_worker(worker: object) -> tuple[int, int]:
    """Resident bytes and open file descriptors of the worker's process; to be run in the worker."""
    del worker
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd"))
