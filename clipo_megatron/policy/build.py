"""Builds this rank's stage of the policy: model chunks with their weights, gradient buffers and optimizer."""

from __future__ import annotations

import torch

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.policy.dist_weights import Sharding, load_dist_weights
from clipo_megatron.policy.groups import Groups
from clipo_megatron.policy.model import build_chunks, transformer_config
from clipo_megatron.policy.optimizer import PolicyOptimizer, wrap_chunks
from clipo_megatron.policy.packer import is_sequence_split
from clipo_megatron.policy.routing import install_replay
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.policy.stage import Stage
from clipo_megatron.policy.weight_io import load_hf_weights, mark_experts, mark_split_parameters
from clipo_megatron.weights.architecture import Architecture

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_stage(
    settings: PolicySettings, architecture: Architecture, groups: Groups, *, rank: int, device: torch.device
) -> tuple[Stage, PolicyOptimizer]:
    """The stage with its weights, and the optimizer over it.

    Collectives: none but the optimizer's own; every rank must call.

    Raises:
        ConfigError: the model folder lacks a tensor, or the layout does not divide the model.
        CheckpointError: `settings.weights` lacks a tensor, or holds those of another model or dtype.
    """
    layout, dtype = settings.layout, _DTYPES[settings.dtype]
    config = transformer_config(
        architecture,
        layout,
        dtype=dtype,
        device=settings.device,
        sequence_parallel=is_sequence_split(settings),
        recompute=settings.recompute,
        precision=settings.precision,
    )
    chunks = build_chunks(config, architecture, layout, rank=rank, device=settings.device, precision=settings.precision)
    stage = Stage([chunk.to(device) for chunk in chunks], architecture, layout, rank=rank)
    mark_split_parameters(stage, architecture)
    mark_experts(stage)
    if settings.weights is None:
        load_hf_weights(stage, settings.model_path, architecture, layout, rank=rank)
    else:
        with DistReader(settings.weights) as reader:
            load_dist_weights(stage, reader, Sharding(architecture, layout, rank=rank))
    if settings.freeze_router:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(not name.endswith(".mlp.router.weight"))
    stage.wrapped = wrap_chunks(
        stage.chunks,
        config,
        distributed_optimizer=settings.distributed_optimizer,
        overlap_grad_reduce=settings.overlap_grad_reduce,
    )
    if settings.routing_replay and architecture.experts is not None:
        stage.replay = install_replay(stage.chunks)
    optimizer = PolicyOptimizer(
        stage.wrapped,
        settings.optimizer,
        dtype=dtype,
        distributed_optimizer=settings.distributed_optimizer,
        world=groups.world,
    )
    return stage, optimizer
