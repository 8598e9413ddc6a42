"""What one rank of the step check does. Imports megatron; the process that starts the ranks imports `checks.step` alone."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from clipo_megatron.checkpoint.dist_archive import bytes_of
from clipo_megatron.checks.step import Longest, RankStep
from clipo_megatron.data.packing import alignment, least_rows
from clipo_megatron.errors import CheckError
from clipo_megatron.policy.inspection import share_scores
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.records import RolloutBatch
from clipo_megatron.weights.architecture import read_architecture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on a CPU Megatron tells at length what it does without
    from clipo_megatron.policy.packer import Packer
    from clipo_megatron.policy.worker import PolicyWorker


def train_and_die(settings: PolicySettings, longest: Longest, beside: Path, killed: Path, told: Path) -> None:
    """One training step and a save; what was seen goes to a file of `told`. Then SIGKILL in the middle of another save.

    Args:
        settings: of the policy.
        longest: rollouts to train on.
        beside: folder of the first save.
        killed: of the second.
        told: folder; the file is RANK.pickle.

    Raises:
        CheckError: the update was skipped, since a loss or gradient was not finite.
    """
    worker = PolicyWorker(settings, rank=dist.get_rank())
    batch = longest_batch(settings, longest)
    started = time.perf_counter()
    scores = worker.score(batch, step=1, with_reference=settings.algorithm.kl_coefficient > 0)
    scores = share_scores(scores, settings.layout)
    report = worker.train(
        batch.with_(old_logprobs=scores.old_logprobs, reference_logprobs=scores.reference_logprobs), step=1
    )
    train_s = time.perf_counter() - started
    if report is not None and report.skipped:
        raise CheckError("the update was skipped: a loss or a gradient is not finite; check the model's weights")
    peak_bytes = _peak_bytes(settings.device)
    packer = Packer(settings, read_architecture(settings.model_path), rank=dist.get_rank(), device=torch.device("cpu"))
    micro_batches, plan = packer(batch, with_routes=False)
    started = time.perf_counter()
    worker.begin_save(beside)
    files = worker.finish_save()
    seen = RankStep(
        state=_state(worker),
        files=files,
        plain=worker.training_plain() if worker.reports else None,
        tokens=max(max(of_rank) for of_rank in plan.tokens),
        micro_batches=len(micro_batches),
        train_s=train_s,
        save_s=time.perf_counter() - started,
        peak_bytes=peak_bytes,
    )
    (told / f"{dist.get_rank()}.pickle").write_bytes(pickle.dumps(seen))
    dist.barrier()
    worker.begin_save(killed)
    os.kill(os.getpid(), signal.SIGKILL)


def load(settings: PolicySettings, checkpoint: Path) -> RankStep:
    """A fresh policy with the checkpoint's state, and what it would save."""
    worker = PolicyWorker(settings, rank=dist.get_rank())
    started = time.perf_counter()
    told = worker.load(checkpoint, with_optimizer=True)
    return RankStep(state=_state(worker), warnings=tuple(told), load_s=time.perf_counter() - started)


def longest_batch(settings: PolicySettings, longest: Longest) -> RolloutBatch:
    """As many of the longest rollouts as fill one micro-batch of each data parallel rank, more where the schedule needs it."""
    layout, arch = settings.layout, read_architecture(settings.model_path)
    of_sequence, _ = alignment(tp=layout.tp, cp=layout.cp, sequence_parallel=settings.sequence_parallel, fp8_multiple=1)
    length = longest.prompt_tokens + longest.response_tokens
    fit = max(1, settings.micro_batch_tokens // (-(-length // of_sequence) * of_sequence))
    rows = fit * least_rows(dp=layout.dp, count_multiple=layout.pp if layout.vpp > 1 else 1)
    random = np.random.default_rng(settings.seed)
    is_correct = np.arange(rows) % 2 == 0
    return RolloutBatch(
        input_ids=random.integers(0, arch.vocab_size, rows * length).astype(np.int32),
        cu_seqlens=np.arange(rows + 1, dtype=np.int64) * length,
        prompt_lengths=np.full(rows, longest.prompt_tokens, dtype=np.int64),
        sampled_logprobs=np.zeros(rows * length, dtype=np.float32),
        group_id=np.arange(rows, dtype=np.int64) // longest.group_size,
        row_key=np.arange(rows, dtype=np.int64),
        is_correct=is_correct,
        outcome=is_correct.astype(np.float32),
        truncated=np.ones(rows, dtype=bool),
        advantages=np.where(is_correct, 1.0, -1.0).astype(np.float32),
    )


def _state(worker: PolicyWorker) -> dict[str, int]:
    """Checksum of each part that this rank saves."""
    return {
        f"{part.key} from {part.start}": zlib.crc32(bytes_of(part.tensor.detach().cpu().contiguous()))
        for part in worker._state.parts(worker.memory.readable)
    }


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
