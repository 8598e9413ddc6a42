"""Tiny random Hugging Face checkpoints with a small tokenizer, written by transformers itself; no network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Family = Literal["qwen2", "qwen3", "llama", "qwen3_moe", "mixtral"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The CPU attention kernel of vLLM takes head sizes that are multiples of 32.
HEAD_DIM = 32


@functools.cache
def tiny_tokenizer(size: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; at least 259 tokens: 3 special ones and all bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [f"What is {a} + {b} ? The answer is \\boxed{{{a + b}}}." for a in range(40) for b in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_hf(
    folder: Path,
    family: Family,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool = False,
    vocab_size: int = 512,
    tokenizer_size: int = 384,
    hidden_size: int | None = None,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = HEAD_DIM,
    ffn_size: int = 96,
    num_experts: int = 4,
    experts_per_token: int = 2,
    expert_ffn_size: int = 64,
    max_positions: int = 2048,
    rope_base: float = 1e6,
    llama3_rope: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random checkpoint of `family` into `folder` and return it.

    Biases are not zero and norms not one, so that a tensor that is lost or misplaced changes the outputs.

    Args:
        folder: created if missing.
        family: architecture of the checkpoint.
        seed: the same seed and shape give the same tensors.
        dtype: "float32", "bfloat16" or "float16"; of the stored tensors.
        tied: whether the output layer shares the embedding's tensor.
        vocab_size: rows of the embedding, >= `tokenizer_size`; the rows above the tokenizer's length are never used.
        tokenizer_size: tokens of the tokenizer, >= 259.
        hidden_size: default num_heads * head_dim; for all but qwen2 and llama half of it, as head_dim is a key of its
            own there.
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads`.
        head_dim: width of a head.
        ffn_size: width of the gate and of the up projection, where there are no experts.
        num_experts: qwen3_moe and mixtral only, as the next two: experts of each layer.
        experts_per_token: experts that the router chooses for a token.
        expert_ffn_size: width of an expert's gate and of its up projection.
        max_positions: `max_position_embeddings`.
        rope_base: theta.
        llama3_rope: llama only: the `llama3` rope scaling, with factors that matter at tens of tokens.
        max_shard_size: as in transformers; a small one gives several files and an index.
    """
    if hidden_size is None:
        hidden_size = num_heads * head_dim // (1 if family in ("qwen2", "llama") else 2)
    tokenizer = tiny_tokenizer(tokenizer_size)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"vocab_size = {vocab_size}: must be >= the tokenizer's {len(tokenizer)} tokens")
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": rope_base}
    if llama3_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    config = _config(
        family,
        {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": ffn_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_positions,
            "rope_parameters": rope,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | _expert_keys(family, num_experts, experts_per_token, expert_ffn_size),
    )
    _save(config, folder, seed=seed, dtype=dtype, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def _expert_keys(family: Family, num_experts: int, experts_per_token: int, expert_ffn_size: int) -> dict[str, object]:
    if family == "mixtral":
        return {
            "num_local_experts": num_experts,
            "num_experts_per_tok": experts_per_token,
            "intermediate_size": expert_ffn_size,
        }
    if family == "qwen3_moe":
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": experts_per_token,
            "moe_intermediate_size": expert_ffn_size,
            "norm_topk_prob": True,
        }
    return {}


def _config(family: Family, keys: dict[str, object]) -> PreTrainedConfig:
    from transformers import LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    if family == "qwen2":
        # Qwen2 has no key for it: a head is hidden_size / num_heads wide.
        if keys["hidden_size"] != keys["num_attention_heads"] * keys["head_dim"]:
            raise ValueError(f"hidden_size = {keys['hidden_size']}: qwen2 needs num_heads * head_dim")
        keys = {key: value for key, value in keys.items() if key != "head_dim"}
    classes = {
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "llama": LlamaConfig,
        "qwen3_moe": Qwen3MoeConfig,
        "mixtral": MixtralConfig,
    }
    return classes[family](**keys)


def _save(config: PreTrainedConfig, folder: Path, *, seed: int, dtype: str, max_shard_size: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(0.12 * noise)
    model.generation_config.do_sample = False
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
