"""Weights of this rank's stage: read from a Hugging Face folder, given out as full Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.collectives import gather_shards, messages_within
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.groups import Groups
from clipo_megatron.policy.stage import Stage
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.finite import all_finite
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import hf_tensors_of, local_parameter
from clipo_megatron.weights.names import OUTPUT_LAYER, global_name, is_expert, padded_vocab_size, split_dim


def mark_split_parameters(stage: Stage, architecture: Architecture) -> None:
    """Mark the parameters that the tp (etp) ranks share out. Megatron 0.16.1 does it only while drawing initial values.

    Without the mark the global gradient norm takes them for copies and counts those of tp rank 0 alone. An expert's are
    never copies between tp ranks, whatever etp is.
    """
    for name, parameter in stage.named_parameters():
        dim = split_dim(name, architecture)
        if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def mark_experts(stage: Stage) -> None:
    """Have the gradients of experts summed over the ranks that hold the same experts; before gradient buffers are made.

    Megatron 0.16.1 does so for ep > 1 only. At ep = 1 it takes them for dense weights: with etp < tp each tp rank would
    keep the sums of its own tokens, with etp > tp the shards of different ranks would be added up.
    """
    for name, parameter in stage.named_parameters():
        if is_expert(name):
            parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]  Megatron's mark


@torch.no_grad()
def load_hf_weights(
    stage: Stage, folder: Path, architecture: Architecture, layout: ParallelLayout, *, rank: int
) -> None:
    """Set this stage's parameters from the folder; each rank reads only its own slices.

    Raises:
        ConfigError: a tensor is missing, has another shape or holds a value that is not finite.
    """
    with HFReader(folder) as reader:
        for name, parameter in stage.named_parameters():
            tensor = local_parameter(
                reader,
                name,
                architecture,
                tp=layout.tp,
                tp_rank=layout.tp_rank(rank),
                padded_vocab=padded_vocab_size(architecture.vocab_size, layout.tp),
                etp=layout.etp,
                etp_rank=layout.etp_rank(rank),
            )
            if not all_finite(tensor):
                raise ConfigError(f"{folder}: {name}: holds values that are not finite; take another copy of the model")
            parameter.copy_(tensor)


def stage_hf_tensors(
    stage: Stage,
    architecture: Architecture,
    layout: ParallelLayout,
    groups: Groups,
    *,
    rank: int,
    timeout_s: float | None,
) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors of this stage, one parameter after the other, the same on all its ranks.

    A tied output layer on a later stage is a copy of the first stage's embedding and is left out.

    Collectives: one all_gather per split parameter on the tp group; per expert parameter one on the etp and one on the ep
    group. All their ranks must draw the iterator to its end (`ParallelLayout.ranks_of_weights`). `timeout_s` as for
    `messages_within`.

    Yields:
        (name, tensor): in the policy's dtype, on its device.
    """
    with messages_within(timeout_s, [groups.tp, groups.etp, groups.ep]):
        for name, parameter in stage.named_parameters():
            if architecture.tied and name == OUTPUT_LAYER:
                continue
            if is_expert(name):
                yield from _expert_tensors(name, parameter, architecture, layout, groups, rank=rank)
            else:
                is_split = split_dim(name, architecture) is not None
                shards = gather_shards(parameter, groups.tp) if is_split else [parameter.detach()] * layout.tp
                yield from hf_tensors_of(name, shards, architecture)


def _expert_tensors(
    name: str, parameter: Tensor, architecture: Architecture, layout: ParallelLayout, groups: Groups, *, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """The expert with this place on each ep rank, one after the other."""
    assert architecture.experts is not None
    num_local = architecture.experts.num_experts // layout.ep
    own = torch.stack(gather_shards(parameter, groups.etp))
    for ep_rank, shards in enumerate(gather_shards(own, groups.ep)):
        distance = (ep_rank - layout.ep_rank(rank)) * num_local
        there = global_name(name, first_layer=0, first_expert=distance)
        yield from hf_tensors_of(there, list(shards), architecture)
