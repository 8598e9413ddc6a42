"""Log-probs over the whole vocabulary from the weights of a Megatron checkpoint: one rank, on the CPU, no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import check_version, cuda_means_cpu
from clipo_megatron.policy.dist_weights import Sharding, load_dist_weights
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.micro_batch import Padding, pack
from clipo_megatron.policy.model import build_chunks, transformer_config
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.routing import install_replay, micro_batch_routes
from clipo_megatron.policy.stage import Stage
from clipo_megatron.records import Ids, RolloutBatch, Routes
from clipo_megatron.weights.architecture import Architecture, read_architecture

_ONE = ParallelLayout(world_size=1)
_CPU = torch.device("cpu")


@torch.no_grad()
def checkpoint_logprobs(
    folder: Path, config: Path, sequences: Sequence[Ids], *, routes: Sequence[Routes] | None, round_to: str | None
) -> tuple[list[Tensor], float]:
    """Run the model in float32. The default process group must have one rank.

    Args:
        folder: of a distributed checkpoint; of a training checkpoint the weights alone are read.
        config: folder of the model's config.json.
        sequences: token ids, int32 [L] each.
        routes: int16 [L, layers, experts per token] of each: experts to send its tokens to; None: the routers decide.
        round_to: number format that the weights are rounded to before they are taken as float32; None: as stored.

    Returns:
        (float32 [L, vocabulary] of each sequence: log-probs of the token after each; share of (token, layer) pairs at
        which the router's own choice was that of `routes`, 1 without).

    Raises:
        ConfigError: config.json can't be used.
        CheckpointError: the checkpoint is damaged, or lacks a tensor of the model.
    """
    architecture = read_architecture(config)
    check_version()
    with cuda_means_cpu():
        make_groups(_ONE, seed=0)
        stage = _build(architecture)
        with DistReader(folder) as reader:
            load_dist_weights(stage, reader, Sharding(architecture, _ONE, rank=0))
        if round_to is not None:
            for parameter in stage.parameters():
                parameter.copy_(parameter.to(getattr(torch, round_to)))
        states_TH = _final_states(stage, architecture, sequences, routes)
        weight_VH = stage.output_weight[: architecture.vocab_size]
        lengths = [len(sequence) for sequence in sequences]
        logprobs = [(states_LH @ weight_VH.T).log_softmax(-1) for states_LH in states_TH.split(lengths)]
        if stage.replay is None:
            return logprobs, 1.0
        agreeing, replayed = stage.replay.take_counts().tolist()
        return logprobs, agreeing / replayed


def _build(architecture: Architecture) -> Stage:
    precision = PrecisionSettings()
    config = transformer_config(
        architecture,
        _ONE,
        dtype=torch.float32,
        device="cpu",
        sequence_parallel=False,
        recompute="none",
        precision=precision,
    )
    chunks = build_chunks(config, architecture, _ONE, rank=0, device="cpu", precision=precision)
    return Stage([chunk.eval() for chunk in chunks], architecture, _ONE, rank=0)


def _final_states(
    stage: Stage, architecture: Architecture, sequences: Sequence[Ids], routes: Sequence[Routes] | None
) -> Tensor:
    """[tokens of all sequences, H] after the final norm."""
    batch = _as_batch(sequences, routes)
    rows = range(len(sequences))
    micro_batch = pack(batch, rows, padding=Padding(), cp_rank=0, device=_CPU)
    chunk = stage.chunks[0]
    if batch.routed_experts is not None:
        assert architecture.experts is not None
        stage.replay = install_replay(stage.chunks)
        num_experts = architecture.experts.num_experts
        tokens = micro_batch_routes(batch.routed_experts, micro_batch, num_experts=num_experts, shard=0, num_shards=1)
        stage.replay.set_routes(chunk, tokens)
    states = chunk(
        micro_batch.input_ids, micro_batch.position_ids, attention_mask=None, packed_seq_params=micro_batch.packed
    )
    return states[:, 0]


def _as_batch(sequences: Sequence[Ids], routes: Sequence[Routes] | None) -> RolloutBatch:
    lengths = [len(sequence) for sequence in sequences]
    num_tokens, num_rows = sum(lengths), len(sequences)
    return RolloutBatch(
        input_ids=np.concatenate(sequences),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.ones(num_rows, dtype=np.int64),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        group_id=np.zeros(num_rows, dtype=np.int64),
        row_key=np.arange(num_rows),
        is_correct=np.zeros(num_rows, dtype=np.bool_),
        outcome=np.zeros(num_rows, dtype=np.float32),
        truncated=np.zeros(num_rows, dtype=np.bool_),
        routed_experts=None if routes is None else np.concatenate(routes),
    )
