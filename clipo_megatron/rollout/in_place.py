"""Which parameters of a running vLLM model a planned sync writes where they are in use, and where that memory is."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
            EngineError: the model has no such parameter, or one that the plan does not fill; or it is in the middle of a
                reload.
        """
        live = dict(model.named_parameters())
        self.device = next(iter(live.values())).device
        tensors = engine_tensors(plan)
        names = {name: live_name(name, live) for name in tensors}
        _refuse_unknown(live, set(names.values()))
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


def _refuse_unknown(live: Mapping[str, torch.nn.Parameter], filled: Collection[str]) -> None:
    """What no copy fills would keep its first value for ever. A second name of a filled parameter, a tied head, is none."""
    known = {live[name].data_ptr() for name in filled} - {0}
    unknown = [
        name
        for name, parameter in live.items()
        if name not in filled and parameter.numel() and parameter.data_ptr() not in known
    ]
    if unknown:
        raise EngineError(
            f"{unknown[0]}: the engine has this parameter, and the plan fills none of its name ({len(unknown)} such of "
            f"{len(live)}), so it would keep its first value for ever: this vLLM release or model has more than "
            "weights/engine_parameters.py knows; set sync.transport to stream"
        )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _by_rows(tensor: Tensor, name: str) -> Tensor:
    """FP8 kernels that multiply from the right are given a matrix as the transposed view of its rows."""
    if tensor.is_meta:
        raise EngineError(f"{name} has no memory: the model is in the middle of a reload")
    is_transposed = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()
    return tensor.t() if is_transposed else tensor
