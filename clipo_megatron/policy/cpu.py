"""All that makes Megatron-core run without a GPU: a scope in which its CUDA calls mean the CPU.

Megatron-core names the CUDA device in some sixty places (https://github.com/NVIDIA/Megatron-LM). Nothing is patched
for good: outside the scope torch is untouched. The modules that stand in for Transformer Engine's are in cpu_modules.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from clipo_megatron.errors import ConfigError

_CPU = torch.device("cpu")
_FIRST, _BEYOND = Version("0.16.1"), Version("0.20")


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
    (megatron_random, "_lazy_call", _call_now),
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
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in _PATCHES]
    try:
        for owner, name, stand_in in _PATCHES:
            setattr(owner, name, stand_in)
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
