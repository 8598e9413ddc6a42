"""Weights of this rank's stage: read from a Hugging Face folder, given out as full Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from clipo_megatron.parallel.collectives import gather_shards
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import hf_tensors_of, local_parameter
from clipo_megatron.weights.names import OUTPUT_LAYER, layer_range, padded_vocab_size, split_dim


def global_names(model: GPTModel, architecture: Architecture, layout: ParallelLayout, *, rank: int) -> dict[str, str]:
    """This stage's parameter names to their names in the whole model: layers are numbered over all stages."""
    first = layer_range(architecture.num_layers, layout.pp, layout.pp_rank(rank)).start
    names: dict[str, str] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        names[name] = ".".join(parts)
    return names


def mark_split_parameters(model: GPTModel, architecture: Architecture, layout: ParallelLayout, *, rank: int) -> None:
    """Mark the parameters that the tp ranks share out. Megatron 0.16.1 does it only while drawing initial values.

    Without the mark the global gradient norm takes them for copies and counts those of tp rank 0 alone.
    """
    names = global_names(model, architecture, layout, rank=rank)
    for name, parameter in model.named_parameters():
        dim = split_dim(names[name], architecture)
        if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


@torch.no_grad()
def load_hf_weights(
    model: GPTModel, folder: Path, architecture: Architecture, layout: ParallelLayout, *, rank: int
) -> None:
    """Set this stage's parameters from the folder; each rank reads only its own slices.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    names = global_names(model, architecture, layout, rank=rank)
    with HFReader(folder) as reader:
        for name, parameter in model.named_parameters():
            tensor = local_parameter(
                reader,
                names[name],
                architecture,
                tp=layout.tp,
                tp_rank=layout.tp_rank(rank),
                padded_vocab=padded_vocab_size(architecture.vocab_size, layout.tp),
            )
            parameter.copy_(tensor)


def stage_hf_tensors(
    model: GPTModel, architecture: Architecture, layout: ParallelLayout, *, rank: int, group: dist.ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors of this stage, one parameter after the other, the same on all its tp ranks.

    A tied output layer on a later stage is a copy of the first stage's embedding and is left out.

    Collectives: one all_gather per split parameter on `group` (tp). All its ranks must draw the iterator to its end.

    Yields:
        (name, tensor): in the policy's dtype, on its device.
    """
    names = global_names(model, architecture, layout, rank=rank)
    for name, parameter in model.named_parameters():
        name = names[name]
        if architecture.tied and name == OUTPUT_LAYER:
            continue
        is_split = split_dim(name, architecture) is not None
        shards = gather_shards(parameter, group) if is_split else [parameter.detach()] * layout.tp
        yield from hf_tensors_of(name, shards, architecture)
