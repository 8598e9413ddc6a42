"""What the `step` part runs on: a random model of a given shape, a batch of full sequences, and their useful FLOPs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch.distributed as dist

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionRecipe, PrecisionSettings
from clipo_megatron.policy.settings import AlgorithmSettings, ContrastiveSettings, OptimizerSettings, PolicySettings
from clipo_megatron.records import RolloutBatch
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.counts import active_parameters
from clipo_megatron.weights.reduced import write_random_model

ONE_RANK = ParallelLayout(world_size=1)
HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """Model of the Qwen3 kind with heads of 128, four query heads to a key/value head; sequences of one length."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    sequence_tokens: int
    """A quarter of them prompt."""
    micro_batch_tokens: int
    micro_batches: int
    """Of one optimizer step."""

    @property
    def prompt_tokens(self) -> int:
        """Of each sequence."""
        return self.sequence_tokens // 4

    @property
    def num_rows(self) -> int:
        """Sequences of the batch."""
        return self.micro_batches * self.micro_batch_tokens // self.sequence_tokens


# A layer of the GPU shape is one of Qwen3-8B; as there, the output layer has 6 to 9 % of the work.
CPU_SHAPE = StepShape(
    num_layers=4,
    hidden_size=512,
    ffn_size=1536,
    vocab_size=2048,
    sequence_tokens=256,
    micro_batch_tokens=1024,
    micro_batches=2,
)
GPU_SHAPE = StepShape(
    num_layers=6,
    hidden_size=4096,
    ffn_size=12288,
    vocab_size=32768,
    sequence_tokens=2048,
    micro_batch_tokens=8192,
    micro_batches=8,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Useful operations of one forward over the batch; backward counts twice, recomputing not at all."""

    layers: float
    output: float
    """Output layer on the response tokens: the others are not scored."""


def count_flops(arch: Architecture, batch: RolloutBatch) -> Flops:
    """2 for each weight and token; 2 n^2 for each causal attention channel and sequence of n tokens."""
    lengths = batch.lengths.astype(np.float64)
    products = 2 * active_parameters(arch) * lengths.sum()
    attention = 2 * arch.num_heads * arch.head_dim * (lengths**2).sum()
    return Flops(
        layers=arch.num_layers * (products + attention),
        output=2.0 * arch.hidden_size * arch.vocab_size * float(batch.response_lengths.sum()),
    )


@contextmanager
def random_model(shape: StepShape) -> Iterator[Path]:
    """A Hugging Face folder with random weights, as long as the block lasts."""
    num_heads = shape.hidden_size // HEAD_DIM
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(1, num_heads // 4),
        "head_dim": HEAD_DIM,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max(4096, shape.sequence_tokens),
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 0,
    }
    with TemporaryDirectory(prefix="clipo-benchmark-") as folder:
        yield write_random_model(Path(folder) / "model", config, seed=0)


def policy_settings(
    model_path: Path, shape: StepShape, args: argparse.Namespace, recipe: PrecisionRecipe
) -> PolicySettings:
    """One rank, one update a step, the paper's head."""
    return PolicySettings(
        model_path=model_path,
        layout=ONE_RANK,
        dtype=args.dtype,
        device=args.device,
        sequence_parallel=False,
        micro_batch_tokens=shape.micro_batch_tokens,
        recompute=args.recompute,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        precision=PrecisionSettings(recipe=recipe),
        routing_replay=False,
        freeze_router=False,
        temperature=1.0,
        algorithm=AlgorithmSettings(),
        contrastive=ContrastiveSettings(),
        optimizer=OptimizerSettings(),
        seed=0,
    )


def draw_batch(shape: StepShape, *, group_size: int = 4) -> RolloutBatch:
    """Groups with right and wrong rollouts, random tokens, advantages of both signs."""
    random = np.random.default_rng(0)
    rows, num_tokens = np.arange(shape.num_rows), shape.num_rows * shape.sequence_tokens
    is_correct = rows % group_size < group_size // 2
    return RolloutBatch(
        input_ids=random.integers(0, shape.vocab_size, num_tokens).astype(np.int32),
        cu_seqlens=np.arange(shape.num_rows + 1, dtype=np.int64) * shape.sequence_tokens,
        prompt_lengths=np.full(shape.num_rows, shape.prompt_tokens, dtype=np.int64),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        group_id=rows // group_size,
        row_key=rows,
        is_correct=is_correct,
        outcome=is_correct.astype(np.float32),
        truncated=np.zeros(shape.num_rows, dtype=bool),
        advantages=np.where(is_correct, 1.0, -1.0).astype(np.float32),
    )


def start_one_rank(device: str) -> None:
    """A default process group of this process alone."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
