"""The policy with Transformer Engine's layers on one GPU, bfloat16, against transformers in float32 on the CPU.

These tests print their figures. No GPU was at hand when they were written: they have not been run yet.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.policy_cases import ALGORITHM, CONTRASTIVE, OPTIMIZER, make_batch, scored
from support.tiny_models import make_tiny_hf
from transformers import AutoModelForCausalLM

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.records import RolloutBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("qwen3"), "qwen3", dtype="bfloat16", head_dim=64)


@pytest.fixture
def worker(folder: Path, tmp_path: Path) -> Iterator[PolicyWorker]:
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=120),
    )
    settings = PolicySettings(
        model_path=folder,
        layout=ParallelLayout(world_size=1),
        dtype="bfloat16",
        device="cuda",
        sequence_parallel=False,
        micro_batch_tokens=64,
        recompute="none",
        temperature=TEMPERATURE,
        algorithm=ALGORITHM,
        contrastive=CONTRASTIVE,
        optimizer=OPTIMIZER,
        seed=3,
    )
    yield PolicyWorker(settings, rank=0)
    dist.destroy_process_group()


def _transformers_logprobs(folder: Path, batch: RolloutBatch) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    columns = np.zeros(len(batch.input_ids), dtype=np.float32)
    for start, stop, prompt in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.prompt_lengths, strict=True):
        ids = torch.from_numpy(batch.input_ids[start:stop].astype(np.int64))
        with torch.no_grad():
            logp = (model(ids[None]).logits[0, prompt - 1 : -1] / TEMPERATURE).log_softmax(-1)
        columns[start + prompt : stop] = logp.gather(1, ids[prompt:, None])[:, 0].numpy()
    return columns


def test_logprobs_are_those_of_transformers_up_to_bfloat16(worker: PolicyWorker, folder: Path) -> None:
    batch = make_batch()
    scores = worker.score(batch, step=1, with_reference=False)
    assert scores is not None
    difference = np.abs(scores.old_logprobs - _transformers_logprobs(folder, batch))[batch.response_mask]
    print(f"{torch.cuda.get_device_name()}: |difference| mean {difference.mean():.4f}, max {difference.max():.4f} nats")
    # bfloat16 keeps 8 bits; the random model's logits are wide, so single tokens are off by tenths of a nat.
    assert difference.mean() < 0.05
    assert difference.max() < 1.0


def test_an_update_lowers_the_loss_of_the_same_batch(worker: PolicyWorker) -> None:
    batch = make_batch()
    scores = worker.score(batch, step=1, with_reference=True)
    assert scores is not None
    ready = scored(batch, scores, noise=0.0)
    reports = [worker.train(ready, step=step) for step in range(1, 6)]
    losses = [report.metrics["loss"] for report in reports if report is not None]
    print(f"{torch.cuda.get_device_name()}: policy loss by update {losses}")
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
