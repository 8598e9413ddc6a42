"""Batches, settings and workers for tests of the policy, and views of a worker's insides that only tests need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.parallel.collectives import gather_shards
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.settings import AlgorithmSettings, ContrastiveSettings, OptimizerSettings, PolicySettings
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.records import RolloutBatch, Scores

VOCAB_SIZE = 300
"""Padded to 384 at tp = 1 and to 512 at tp = 2: layouts differ in their padding as well."""
# Adam divides by sqrt(v) + eps: 1e-8 would turn rounding noise of 1e-9 on a near-zero gradient into a whole step.
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, eps=1e-3, clip_grad=1.0)
ALGORITHM = AlgorithmSettings(updates_per_step=2, kl_coefficient=0.1)
CONTRASTIVE = ContrastiveSettings(head_size=24)
PRECISION = PrecisionSettings()


def make_batch(*, num_groups: int = 4, group_size: int = 4, seed: int = 0, longest_response: int = 14) -> RolloutBatch:
    """A ragged batch: some responses of one token, a group that is all right, the others mixed."""
    random = np.random.default_rng(seed)
    num_rows = num_groups * group_size
    prompt_lengths = np.repeat(random.integers(1, 7, num_groups), group_size)
    response_lengths = random.integers(2, longest_response, num_rows)
    response_lengths[:: group_size + 1] = 1
    cu_seqlens = np.concatenate([[0], np.cumsum(prompt_lengths + response_lengths)]).astype(np.int64)
    is_correct = np.arange(num_rows) % group_size < group_size // 2 + 1
    is_correct[:group_size] = True
    return RolloutBatch(
        input_ids=random.integers(0, VOCAB_SIZE, cu_seqlens[-1]).astype(np.int32),
        cu_seqlens=cu_seqlens,
        prompt_lengths=prompt_lengths.astype(np.int64),
        sampled_logprobs=np.zeros(cu_seqlens[-1], dtype=np.float32),
        group_id=np.repeat(np.arange(num_groups), group_size),
        row_key=random.permutation(num_rows).astype(np.int64),
        is_correct=is_correct,
        outcome=is_correct.astype(np.float32),
        truncated=np.zeros(num_rows, dtype=bool),
    )


def make_advantages(batch: RolloutBatch, *, seed: int = 0) -> np.ndarray:
    """float32 [S], both signs."""
    return np.random.default_rng(seed).normal(size=batch.num_sequences).astype(np.float32)


def make_worker(
    folder: Path,
    layout: ParallelLayout,
    *,
    sequence_parallel: bool = True,
    dtype: str = "float32",
    micro_batch_tokens: int = 64,
    recompute: str = "none",
    distributed_optimizer: bool = True,
    overlap_grad_reduce: bool = True,
    precision: PrecisionSettings = PRECISION,
    routing_replay: bool = False,
    freeze_router: bool = False,
    temperature: float = 0.8,
    algorithm: AlgorithmSettings = ALGORITHM,
    contrastive: ContrastiveSettings | None = CONTRASTIVE,
    optimizer: OptimizerSettings = OPTIMIZER,
) -> PolicyWorker:
    """This rank's worker on the CPU."""
    settings = PolicySettings(
        model_path=folder,
        layout=layout,
        dtype=dtype,
        device="cpu",
        sequence_parallel=sequence_parallel,
        micro_batch_tokens=micro_batch_tokens,
        recompute=recompute,
        distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        precision=precision,
        routing_replay=routing_replay,
        freeze_router=freeze_router,
        temperature=temperature,
        algorithm=algorithm,
        contrastive=contrastive,
        optimizer=optimizer,
        seed=3,
    )
    return PolicyWorker(settings, rank=dist.get_rank())


def share_scores(scores: Scores | None, layout: ParallelLayout) -> Scores:
    """The scores of the rank that reports, on every rank: what the driver does in a run."""
    box = [scores]
    dist.broadcast_object_list(box, src=layout.rank(tp=0, dp=0, pp=layout.pp - 1))
    assert box[0] is not None
    return box[0]


def scored(batch: RolloutBatch, scores: Scores, *, noise: float = 0.3) -> RolloutBatch:
    """The batch ready to train on; old log-probs are moved by `noise`, so that some tokens are clipped, others not."""
    moved = np.random.default_rng(1).normal(size=len(batch.input_ids)).astype(np.float32)
    return batch.with_(
        old_logprobs=scores.old_logprobs + noise * moved * batch.response_mask,
        reference_logprobs=scores.reference_logprobs,
        advantages=make_advantages(batch),
    )


def full_gradients(worker: PolicyWorker) -> dict[str, Tensor]:
    """This stage's gradients of the last update, clipped, under Hugging Face names. Collective over all ranks."""
    groups = worker._groups
    if worker._settings.distributed_optimizer:
        for chunk in worker._stage.wrapped:
            _gather_gradients(chunk.buffers, groups.dp_cp)
            _gather_gradients(chunk.expert_parallel_buffers, groups.expert_dp)
    own = {name: parameter for name, parameter in worker._stage.named_parameters() if parameter.requires_grad}
    for parameter in own.values():  # give the gradients out as if they were the weights
        parameter.data, parameter.kept = parameter.main_grad.clone(), parameter.data
    gradients = dict(worker.hf_tensors())
    for parameter in own.values():
        parameter.data = parameter.kept
    return {name: gradient.clone() for name, gradient in gradients.items()}


def _gather_gradients(buffers: list, group: dist.ProcessGroup) -> None:
    """Reduce-scattered buffers: each rank holds the sums of its own part of each bucket."""
    for buffer in buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            bucket.grad_data.copy_(torch.cat(gather_shards(own, group)))


def weights_of(worker: PolicyWorker) -> dict[str, Tensor]:
    """This stage's weights, copied."""
    return {name: tensor.clone() for name, tensor in worker.hf_tensors()}


def head_weights(worker: PolicyWorker) -> dict[str, Tensor]:
    """The head's weights, copied; empty before the last stage."""
    return (
        {} if worker._head is None else {name: p.detach().clone() for name, p in worker._head.module.named_parameters()}
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, Euclidean norms."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def errors_by_kind(found: Mapping[object, Tensor], wanted: Mapping[object, Tensor]) -> dict[str, float]:
    """Relative error of each kind of tensor: the same one of all layers and experts, taken together."""
    kinds: dict[str, list[object]] = {}
    for name in found:
        kinds.setdefault(re.sub(r"\d+", "*", str(name)), []).append(name)
    return {
        kind: relative_error(
            torch.cat([found[name].flatten() for name in names]), torch.cat([wanted[name].flatten() for name in names])
        )
        for kind, names in kinds.items()
    }
