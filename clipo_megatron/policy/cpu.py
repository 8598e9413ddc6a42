"""All that makes Megatron-core run without a GPU: a scope in which its CUDA calls mean the CPU.

Megatron-core names the CUDA device in some sixty places (https://github.com/NVIDIA/Megatron-LM). Nothing is patched
for good: outside the scope torch is untouched. The modules that stand in for Transformer Engine's are in cpu_modules.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from clipo_megatron.errors import ConfigError

_CPU = torch.device("cpu")
_FIRST, _BEYOND = Version("0.16.1"), Version("0.20")
_ABSENT = object()


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors asked for on "cuda" come on the CPU, `.cuda()` gives the tensor itself, `.type()` names a CUDA type."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (torch's own signature)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # the optimizers compare with CUDA's names
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs and str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


class _Generator:
    """Stands in for the CUDA generator. Nothing ever draws from it: the policy has no dropout and no random init."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def manual_seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def get_state(self, *_device: object, **_options: object) -> torch.Tensor:
        return self._generator.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)


_GENERATOR = _Generator()


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | torch.Tensor | None = None,
    input_split_sizes: Sequence[int] | torch.Tensor | None = None,
    **options: Any,  # noqa: ANN401 (torch's own)
) -> Any:  # noqa: ANN401 (torch's own)
    """Takes split sizes as tensors too: without a GPU the token dispatcher does not turn its own into lists."""

    def as_list(sizes: Sequence[int] | torch.Tensor | None) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    return _TORCH_ALL_TO_ALL(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **options)


def _all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:  # noqa: ANN401
    """Takes shares of different lengths, as NCCL does: each rank broadcasts its own."""
    if len({share.shape for share in tensor_list}) == 1:
        _TORCH_ALL_GATHER(tensor_list, tensor, group=group)
        return
    for rank, share in enumerate(tensor_list):
        if rank == torch.distributed.get_rank(group):
            share.copy_(tensor)
        torch.distributed.broadcast(share, group=group, group_src=rank)


def _reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], group: Any = None) -> None:  # noqa: ANN401
    """Takes shares of different lengths, as NCCL does: each is summed on the rank that it goes to."""
    if len({share.shape for share in input_list}) == 1:
        _TORCH_REDUCE_SCATTER(output, input_list, group=group)
        return
    for rank, share in enumerate(input_list):
        total = share.clone()
        torch.distributed.reduce(total, group=group, group_dst=rank)
        if rank == torch.distributed.get_rank(group):
            output.copy_(total)


_TORCH_ALL_GATHER = torch.distributed.all_gather
_TORCH_REDUCE_SCATTER = torch.distributed.reduce_scatter
_TORCH_ALL_TO_ALL = torch.distributed.all_to_all_single


class _Stream:
    """Stands in for a CUDA stream and its event; on the CPU all work is done when a call returns."""

    def wait_stream(self, _other: object) -> None: ...

    def record_event(self, _event: object = None) -> _Stream:
        return self

    def synchronize(self) -> None: ...


_STREAM = _Stream()


def _call_now(callback: Callable[[], None], **_options: object) -> None:
    callback()


# Each: owner, attribute, stand-in. `_lazy_call` is patched where Megatron imported it to.
_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: _CPU),
    (torch.cuda, "synchronize", lambda *_args: None),
    (torch.cuda, "manual_seed", _GENERATOR.manual_seed),
    (torch.cuda, "get_rng_state", _GENERATOR.get_state),
    (torch.cuda.random, "get_rng_state", _GENERATOR.get_state),
    (torch.cuda, "default_generators", {None: _GENERATOR, _CPU: _GENERATOR}),
    (torch.cuda, "Stream", lambda *_args, **_options: _STREAM),
    (torch.cuda, "current_stream", lambda *_args: _STREAM),
    (torch.cuda, "stream", lambda _stream: contextlib.nullcontext()),
    (torch.distributed, "all_to_all_single", _all_to_all_single),
    (torch.distributed, "all_gather", _all_gather),
    (torch.distributed, "reduce_scatter", _reduce_scatter),
    (megatron_random, "_lazy_call", _call_now),
    # 0.16.1 asks for it without looking whether Transformer Engine is there.
    (moe_utils, "te_general_gemm", getattr(moe_utils, "te_general_gemm", None)),
)


def check_version() -> None:
    """Refuse a megatron-core that the scope was not tested with.

    Raises:
        ConfigError: the installed version is outside the window.
    """
    found = Version(importlib.metadata.version("megatron-core"))
    if not _FIRST <= found < _BEYOND:
        raise ConfigError(
            f"megatron-core {found}: on a CPU it must be >= {_FIRST} and < {_BEYOND}; install megatron-core=={_FIRST}"
        )


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Inside the scope Megatron runs on the CPU; every call into it has to be made there. Not for use with a GPU."""
    saved = [(owner, name, getattr(owner, name, _ABSENT)) for owner, name, _ in _PATCHES]
    try:
        for owner, name, stand_in in _PATCHES:
            setattr(owner, name, stand_in)
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, original in saved:
            delattr(owner, name) if original is _ABSENT else setattr(owner, name, original)
