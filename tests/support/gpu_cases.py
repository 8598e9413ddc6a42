"""What the tests on a GPU build and measure. Every function takes the device, so all of it runs on a CPU too.

On a CPU the layers are plain torch and FP8 is emulated: the same bounds hold there, `tests/megatron` has its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from support.policy_cases import (
    ALGORITHM,
    OPTIMIZER,
    full_gradients,
    make_advantages,
    make_batch,
    make_worker,
    save_state,
    scored,
    share_scores,
    weights_of,
)
from support.tiny_models import make_tiny_hf
from transformers import AutoModelForCausalLM

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.records import RolloutBatch

ONE = ParallelLayout(world_size=1)
NO_FP8 = PrecisionSettings()
ONE_UPDATE = replace(ALGORITHM, updates_per_step=1, kl_coefficient=0.0)
TEMPERATURE = 0.8
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3": {"family": "qwen3"},
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "llama3_rope": {"family": "llama", "llama3_rope": True},
    "qwen3_moe": {"family": "qwen3_moe"},
}
TOKENS = 256
"""Of a micro-batch at most: whole blocks of blockwise FP8, and several micro-batches."""


@dataclass(frozen=True)
class Nats:
    """Distance of log-probs over the response tokens."""

    mean: float
    largest: float


@dataclass(frozen=True)
class Trained:
    """What some steps on the same batch gave; gradients are those of the last."""

    losses: list[float]
    logprobs: np.ndarray
    """Of the last scoring."""
    gradients: dict[str, torch.Tensor]


def make_folder(folder: Path, name: str) -> Path:
    """A tiny model in bfloat16. Its widths suit FP8 (multiples of 128), its heads (of 64) all attention kernels."""
    return make_tiny_hf(
        folder,
        dtype="bfloat16",
        vocab_size=300,
        tokenizer_size=280,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        ffn_size=512,
        expert_ffn_size=256,
        **FAMILIES[name],
    )


def gpu_batch() -> RolloutBatch:
    """Sixteen ragged rows of up to sixty tokens."""
    return make_batch(longest_response=60)


def transformers_logprobs(folder: Path, batch: RolloutBatch, *, dtype: torch.dtype, device: str) -> np.ndarray:
    """float32 [T], one sequence at a time; the softmax is float32 in either dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    columns = np.zeros(len(batch.input_ids), dtype=np.float32)
    for (start, stop), prompt in zip(itertools.pairwise(batch.cu_seqlens), batch.prompt_lengths, strict=True):
        ids = torch.from_numpy(batch.input_ids[start:stop].astype(np.int64)).to(device)
        with torch.no_grad():
            logp = (model(ids[None]).logits[0, prompt - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
        columns[start + prompt : stop] = logp.gather(1, ids[prompt:, None])[:, 0].cpu().numpy()
    return columns


def policy_logprobs(folder: Path, batch: RolloutBatch, *, device: str) -> np.ndarray:
    """float32 [T] of the policy in bfloat16."""
    worker = make_worker(
        folder, ONE, device=device, dtype="bfloat16", micro_batch_tokens=TOKENS, temperature=TEMPERATURE
    )
    scores = worker.score(batch, step=1, with_reference=False)
    assert scores is not None
    return scores.old_logprobs


def transformers_gradients(
    folder: Path, batch: RolloutBatch, *, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """Gradient of the policy loss where no ratio has left one: minus the mean of advantage times log-prob."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    model.get_input_embeddings().padding_idx = None  # transformers drops the gradient of the padding token's row
    advantages, num_tokens = make_advantages(batch), int(batch.response_lengths.sum())
    for row, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens)):
        prompt = int(batch.prompt_lengths[row])
        ids = torch.from_numpy(batch.input_ids[start:stop].astype(np.int64)).to(device)
        logp = (model(ids[None]).logits[0, prompt - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
        chosen = logp.gather(1, ids[prompt:, None])
        (-float(advantages[row]) * chosen.sum() / num_tokens).backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def nats_between(found: np.ndarray, wanted: np.ndarray, batch: RolloutBatch) -> Nats:
    difference = np.abs(found - wanted)[batch.response_mask]
    return Nats(mean=float(difference.mean()), largest=float(difference.max()))


def train(
    folder: Path,
    *,
    device: str,
    precision: PrecisionSettings = NO_FP8,
    steps: int = 1,
    learning_rate: float = 1e-3,
    has_fresh_scores: bool = True,
) -> Trained:
    """Train on the same batch in bfloat16, one update a step.

    With fresh scores each step starts from a ratio of one, as in a run; without, old log-probs are those of the first.
    """
    worker = make_worker(
        folder,
        ONE,
        device=device,
        dtype="bfloat16",
        precision=precision,
        micro_batch_tokens=TOKENS,
        temperature=TEMPERATURE,
        algorithm=ONE_UPDATE,
        optimizer=replace(OPTIMIZER, learning_rate=learning_rate),
    )
    batch = gpu_batch()
    losses: list[float] = []
    for step in range(steps):
        if step == 0 or has_fresh_scores:
            scores = share_scores(worker.score(batch, step=step, with_reference=False), ONE)
            ready = scored(batch, scores, noise=0.0)
        report = worker.train(ready, step=step)
        assert report is not None
        assert not report.skipped
        losses.append(report.metrics["loss"])
    gradients = {name: gradient.cpu() for name, gradient in full_gradients(worker).items()}
    return Trained(losses=losses, logprobs=scores.old_logprobs, gradients=gradients)


def cosines_by_kind(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Cosine of each kind of gradient: the same tensor of all layers and experts, laid end to end."""
    assert found.keys() == wanted.keys()
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)

    def together(gradients: Mapping[str, torch.Tensor], names: list[str]) -> torch.Tensor:
        return torch.cat([gradients[name].double().flatten() for name in names])

    return {
        kind: float(torch.nn.functional.cosine_similarity(together(found, names), together(wanted, names), dim=0))
        for kind, names in kinds.items()
    }


@dataclass(frozen=True)
class Held:
    """A policy's weights and AdamW's values, on the host."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    updates: int


def saved_and_restored(folder: Path, state: Path, *, device: str) -> tuple[Held, Held, Held]:
    """What a policy held when it was saved, what it held after a step that was taken while the file was written, and what
    a new policy holds that was given the checkpoint."""
    options = {"device": device, "dtype": "bfloat16", "micro_batch_tokens": TOKENS, "algorithm": ONE_UPDATE}
    batch = gpu_batch()
    worker = make_worker(folder, ONE, **options)
    ready = scored(batch, share_scores(worker.score(batch, step=0, with_reference=False), ONE))
    worker.train(ready, step=0)
    before = _held(worker)
    save_state(worker, state, meanwhile=lambda: worker.train(ready, step=1))
    after = _held(worker)
    restored = make_worker(folder, ONE, **options)
    restored.load(state)
    return before, after, _held(restored)


def _held(worker: PolicyWorker) -> Held:
    return Held(
        weights={name: weight.cpu() for name, weight in weights_of(worker).items()},
        optimizer={
            f"{shard.name}: {kind}": value.cpu().clone()
            for shard in worker._state._shards
            for kind, value in shard.values().items()
        },
        updates=worker._optimizer.updates,
    )
