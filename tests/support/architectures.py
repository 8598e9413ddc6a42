"""Architectures of a few weights, for tests of the weights that need no checkpoint of transformers."""

from __future__ import annotations

from clipo_megatron.weights.architecture import Architecture, Experts
from clipo_megatron.weights.families import FAMILIES


def small_architecture(
    family: str, *, vocab_size: int = 130, tied: bool = False, num_kv_heads: int = 4, **sizes: int
) -> Architecture:
    return Architecture(
        family=family,
        hidden_size=sizes.get("hidden_size", 12),
        num_layers=sizes.get("num_layers", 2),
        num_heads=num_kv_heads * sizes.get("heads_per_group", 2),
        num_kv_heads=num_kv_heads,
        head_dim=sizes.get("head_dim", 6),
        ffn_size=sizes.get("ffn_size", 20),
        vocab_size=vocab_size,
        tied=tied,
        rope_base=1e4,
        rope_scaling=None,
        rms_eps=1e-6,
        qkv_bias=FAMILIES[family].has("linear_qkv.bias"),
        qk_norm=FAMILIES[family].has("q_layernorm.weight"),
        max_positions=64,
        dtype="float32",
        eos_ids=(0,),
        experts=Experts(
            num_experts=sizes.get("num_experts", 4), experts_per_token=2, ffn_size=sizes.get("expert_ffn_size", 8)
        )
        if FAMILIES[family].has_experts
        else None,
    )
