"""Batches, settings and workers for tests of the policy; views of a worker's insides come from policy.inspection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from clipo_megatron.checkpoint.dist_index import WrittenFile, write_index
from clipo_megatron.checkpoint.training import POLICY_FILE
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.inspection import (  # noqa: F401 (tests take them from here, beside what they are used on)
    errors_by_kind,
    full_gradients,
    head_weights,
    relative_error,
    share_scores,
    weights_of,
)
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
    weights: Path | None = None,
    device: str = "cpu",
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
    engine_fp8: str = "none",
) -> PolicyWorker:
    """This rank's worker."""
    settings = PolicySettings(
        model_path=folder,
        weights=weights,
        layout=layout,
        dtype=dtype,
        device=device,
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
        engine_fp8=engine_fp8,
    )
    return PolicyWorker(settings, rank=dist.get_rank())


def scored(batch: RolloutBatch, scores: Scores, *, noise: float = 0.3) -> RolloutBatch:
    """The batch ready to train on; old log-probs are moved by `noise`, so that some tokens are clipped, others not."""
    moved = np.random.default_rng(1).normal(size=len(batch.input_ids)).astype(np.float32)
    return batch.with_(
        old_logprobs=scores.old_logprobs + noise * moved * batch.response_mask,
        reference_logprobs=scores.reference_logprobs,
        advantages=make_advantages(batch),
    )


def save_state(worker: PolicyWorker, folder: Path, *, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Write a whole checkpoint of the policy into `folder`, as the driver of a run does. Collective over all ranks.

    `meanwhile` is done between the snapshot and the end of its writing.
    """
    worker.begin_save(folder)
    plain = worker.training_plain() if worker.reports else None
    meanwhile()
    shares: list[tuple[tuple[WrittenFile, ...], dict[str, object] | None]] = [((), None)] * dist.get_world_size()
    dist.all_gather_object(shares, (worker.finish_save(), plain))
    if dist.get_rank() == 0:
        write_index(folder, [file for files, _ in shares for file in files])
        (reported,) = (plain for _, plain in shares if plain is not None)
        (folder / POLICY_FILE).write_text(json.dumps(reported))
    dist.barrier()
