"""Which parameters of a running vLLM model a planned sync writes where they are in use, and where that memory is."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.platforms import current_platform

from clipo_megatron.errors import EngineError
from clipo_megatron.sync.plan import SyncPlan
from clipo_megatron.sync.slices import engine_tensors
from clipo_megatron.weights.engine_parameters import live_name


class LiveParameters:
    """A worker's parameters by the names of a plan.

    On GPUs all are in use in loading format. On CPUs vLLM keeps them repacked, but for FP8 matrices, so only the modules that
    have one are written in place; the others go through vLLM's layerwise reload.
    """

    def __init__(self, model: torch.nn.Module, plan: SyncPlan) -> None:
        """Find them; nothing is written.

        Args:
            model: the worker's, in use.
            plan: of the whole sync.

        Raises:
            EngineError: the model has no such parameter, or is in the middle of a reload.
        """
        live = dict(model.named_parameters())
        self.device = next(iter(live.values())).device
        tensors = engine_tensors(plan)
        names = {name: live_name(name, live) for name in tensors}
        written = set(names)
        if current_platform.is_cpu():
            fp8_modules = {_module(names[name]) for name, (_, dtype) in tensors.items() if dtype == torch.float8_e4m3fn}
            written = {name for name, found in names.items() if _module(found) in fp8_modules}
        self.in_place: dict[str, Tensor] = {
            name: _by_rows(live[found].data, found) for name, found in names.items() if name in written
        }
        """Name in the plan -> memory in use, in loading format."""
        self.reloaded: dict[str, str] = {name: found for name, found in names.items() if name not in written}
        """Name in the plan -> name in the model."""


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _by_rows(tensor: Tensor, name: str) -> Tensor:
    """FP8 kernels that multiply from the right are given a matrix as the transposed view of its rows."""
    if tensor.is_meta:
        raise EngineError(f"{name} has no memory: the model is in the middle of a reload")
    is_transposed = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()
    return tensor.t() if is_transposed else tensor
