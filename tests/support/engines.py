"""Small vLLM engines for tests, and transformers in float32 as the oracle of what they sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from clipo_megatron.records import Prompt, RolloutGroup, Sampling
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.rollout.environment import engine_environment
from clipo_megatron.rollout.settings import EngineSettings
from clipo_megatron.sync.bucket import pack_buckets

MAX_MODEL_LEN = 384
SAMPLING = Sampling(samples=4, temperature=1.0, top_p=1.0, max_tokens=48, seed=0, step=1, routed_experts=True)
BUCKET_BYTES = 40_000
"""Small enough that the parts of a fused matrix come in several buckets."""


def tiny_settings(
    folder: Path,
    *,
    tp: int = 1,
    dtype: str = "float32",
    return_routed_experts: bool = False,
    kv_cache_mib: int = 64,
    sleeps: bool = False,
    native_transfer: Literal["", "ipc", "nccl"] = "",
    quantization: Literal["none", "fp8_per_tensor", "fp8_per_block"] = "none",
) -> EngineSettings:
    """Settings that fit a tiny model."""
    return EngineSettings(
        model_path=str(folder),
        dtype=dtype,
        device="cpu",
        tp=tp,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        kv_cache_mib=kv_cache_mib,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        prefix_caching=True,
        seed=0,
        return_routed_experts=return_routed_experts,
        sleeps=sleeps,
        native_transfer=native_transfer,
        quantization=quantization,
    )


@contextmanager
def tiny_engine(
    folder: Path,
    *,
    tp: int = 1,
    dtype: str = "float32",
    return_routed_experts: bool = False,
    kv_cache_mib: int = 64,
    sleeps: bool = False,
    native_transfer: Literal["", "ipc", "nccl"] = "",
    quantization: Literal["none", "fp8_per_tensor", "fp8_per_block"] = "none",
) -> Iterator[RolloutEngine]:
    """An engine on a tiny model folder, in this process; closed at the end."""
    settings = tiny_settings(
        folder,
        tp=tp,
        dtype=dtype,
        return_routed_experts=return_routed_experts,
        kv_cache_mib=kv_cache_mib,
        sleeps=sleeps,
        native_transfer=native_transfer,
        quantization=quantization,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment("cpu", tp).items():
            patch.setenv(name, value)
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it
        engine = RolloutEngine(settings)
        try:
            yield engine
        finally:
            engine.close()


def random_prompts(lengths: Sequence[int]) -> list[Prompt]:
    """Prompts of these lengths; ids from 3 on, so no special tokens."""
    rng = np.random.default_rng(0)
    return [
        Prompt(
            index=10 * number,
            token_ids=rng.integers(3, 380, length).astype(np.int32),
            answer="1",
            verifier="math",
            source="test",
        )
        for number, length in enumerate(lengths)
    ]


def perturbed(model: PreTrainedModel, *, seed: int, scale: float = 0.05) -> list[tuple[str, torch.Tensor]]:
    """Move all weights of `model` in place; returns what its Hugging Face folder would hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    skipped = "lm_head.weight" if model.config.tie_word_embeddings else ""
    return [(name, tensor) for name, tensor in model.state_dict().items() if name != skipped]


def update(engine: RolloutEngine, version: int, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """One whole weight update, in several buckets."""
    engine.begin_update(version)
    for bucket in pack_buckets(tensors, version=version, bucket_bytes=BUCKET_BYTES):
        engine.load_bucket(bucket)
    engine.commit_update(version, len(tensors))


def load_reference(folder: Path) -> PreTrainedModel:
    """The folder's model in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def greedy_ids(model: PreTrainedModel, prompt: Prompt, *, max_tokens: int) -> list[int]:
    """The most likely continuation, by a full forward for every token."""
    ids = prompt.token_ids.tolist()
    while len(ids) < len(prompt.token_ids) + max_tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt.token_ids) :]


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, prompt: Prompt, response: NDArray[np.int32], *, temperature: float
) -> NDArray[np.float32]:
    """Log-probs of the response's tokens, by one full forward."""
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, response])).long()
    logprobs = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt.token_ids) - 1 : -1].gather(1, ids[len(prompt.token_ids) :, None])[:, 0].numpy()


def worst_difference(model: PreTrainedModel, groups: Sequence[RolloutGroup], *, temperature: float = 1.0) -> float:
    """max |sampled - reference log-prob| over all tokens, in nats."""
    return max(
        float(
            np.abs(
                rollout.sampled_logprobs
                - reference_logprobs(model, group.prompt, rollout.response_ids, temperature=temperature)
            ).max()
        )
        for group in groups
        for rollout in group.rollouts
    )
