"""The process groups of a layout, made by Megatron and handed on as one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """This rank's groups."""

    world: dist.ProcessGroup
    tp: dist.ProcessGroup
    """Ranks that split this stage's tensors."""
    dp: dist.ProcessGroup
    """Ranks with the same tensors and other rows of the batch."""


def make_groups(layout: ParallelLayout, *, seed: int) -> Groups:
    """Set Megatron's parallel state up for `layout` and return this rank's groups.

    Collectives: makes process groups; every rank of the initialised default group must call.

    Raises:
        CheckError: the default group has another size than the layout, or Megatron orders its ranks otherwise.
    """
    if dist.get_world_size() != layout.world_size:
        raise CheckError(
            f"layout.world_size = {layout.world_size}, but {dist.get_world_size()} ranks were started; start as many "
            "ranks as the layout has"
        )
    # Megatron keeps its groups in module globals; a second policy in the same process takes them over.
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        create_gloo_process_groups=False,
    )
    rank = dist.get_rank()
    found = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    wanted = (layout.tp_rank(rank), layout.dp_rank(rank), layout.pp_rank(rank))
    if found != wanted:
        raise CheckError(f"rank {rank}: Megatron's (tp, dp, pp) rank is {found} where the layout says {wanted}")
    # Sequence parallelism forks this tracker in every forward pass, dropout or not.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Groups(
        world=cast("dist.ProcessGroup", dist.group.WORLD),
        tp=cast("dist.ProcessGroup", parallel_state.get_tensor_model_parallel_group()),
        dp=cast("dist.ProcessGroup", parallel_state.get_data_parallel_group()),
    )
