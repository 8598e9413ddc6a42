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
    cp: dist.ProcessGroup
    """Ranks that share out the tokens of the same sequences."""
    tp_cp: dist.ProcessGroup
    """Ranks of this stage with the same sequences."""
    dp: dist.ProcessGroup
    """Ranks with the same tensors and other rows of the batch."""
    dp_cp: dist.ProcessGroup
    """Ranks with the same tensors and other tokens."""
    ep: dist.ProcessGroup
    """Ranks that share out the experts of each layer."""
    etp: dist.ProcessGroup
    """Ranks that split each of this rank's experts."""
    expert_dp: dist.ProcessGroup
    """Ranks with the same experts."""


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
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    _check_order(layout, dist.get_rank())
    # Sequence parallelism forks this tracker in every forward pass, dropout or not.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def group(found: object) -> dist.ProcessGroup:
        return cast("dist.ProcessGroup", found)

    return Groups(
        world=group(dist.group.WORLD),
        tp=group(parallel_state.get_tensor_model_parallel_group()),
        cp=group(parallel_state.get_context_parallel_group()),
        tp_cp=group(parallel_state.get_tensor_and_context_parallel_group()),
        dp=group(parallel_state.get_data_parallel_group()),
        dp_cp=group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ep=group(parallel_state.get_expert_model_parallel_group()),
        etp=group(parallel_state.get_expert_tensor_parallel_group()),
        expert_dp=group(parallel_state.get_expert_data_parallel_group()),
    )


def _check_order(layout: ParallelLayout, rank: int) -> None:
    found = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "cp": parallel_state.get_context_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
    }
    wanted = {
        "tp": layout.tp_rank(rank),
        "cp": layout.cp_rank(rank),
        "dp": layout.dp_rank(rank),
        "pp": layout.pp_rank(rank),
        "ep": layout.ep_rank(rank),
        "etp": layout.etp_rank(rank),
    }
    if found != wanted:
        raise CheckError(f"rank {rank}: Megatron's ranks are {found} where the layout says {wanted}")
