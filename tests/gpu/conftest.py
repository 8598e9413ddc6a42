"""One process group for all tests on the GPU, and Transformer Engine as fresh for each as for the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def nccl_group() -> Iterator[None]:
    """A world of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def fresh_engine(nccl_group: None) -> Iterator[None]:
    """Drops what FP8 keeps between modules: the histories of a policy that is gone are scaled with the next one's."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    yield
    FP8GlobalStateManager.reset()
    torch.cuda.empty_cache()
