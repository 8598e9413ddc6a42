"""The name tables, Hugging Face <-> Megatron's GPTModel: one per model family. A new family is a few lines here.

Left: parameter names of GPTModel with local layer specs, with the numbers of layer and expert in the whole model.
Right: names and shapes in the Hugging Face folder. Dims: hidden, ffn, vocab, query and kv (heads * head_dim), head_dim,
experts, expert_ffn.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.weights.rules import HFTensor, Rule, Split

_MEGATRON_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family: its class in transformers and its table."""

    name: str
    hf_class: str
    """Entry of config.json's `architectures`."""
    rules: tuple[Rule, ...]

    def has(self, megatron_suffix: str) -> bool:
        """Whether a Megatron parameter of the table ends in `megatron_suffix`."""
        return any(rule.megatron.endswith(megatron_suffix) for rule in self.rules)

    @property
    def has_experts(self) -> bool:
        """Whether its layers are mixtures of experts."""
        return any(rule.is_of_expert for rule in self.rules)


def _whole(megatron: str, split: Split, hf: str, *dims: str) -> Rule:
    return Rule(megatron, split, (HFTensor(hf, dims),))


def _layer(megatron: str, split: Split, *tensors: tuple[str, tuple[str, ...]]) -> Rule:
    hf = tuple(HFTensor(_HF_LAYER + name, dims) for name, dims in tensors)
    return Rule(_MEGATRON_LAYER + megatron, split, hf)


_BOTTOM = (
    _whole("embedding.word_embeddings.weight", Split.VOCAB_PARALLEL, "model.embed_tokens.weight", "vocab", "hidden"),
)
_ATTENTION = (
    _layer("input_layernorm.weight", Split.REPLICATED, ("input_layernorm.weight", ("hidden",))),
    _layer(
        "self_attention.linear_qkv.weight",
        Split.QKV_PARALLEL,
        ("self_attn.q_proj.weight", ("query", "hidden")),
        ("self_attn.k_proj.weight", ("kv", "hidden")),
        ("self_attn.v_proj.weight", ("kv", "hidden")),
    ),
    _layer("self_attention.linear_proj.weight", Split.ROW_PARALLEL, ("self_attn.o_proj.weight", ("hidden", "query"))),
    _layer("pre_mlp_layernorm.weight", Split.REPLICATED, ("post_attention_layernorm.weight", ("hidden",))),
)
_DENSE_MLP = (
    _layer(
        "mlp.linear_fc1.weight",
        Split.COLUMN_PARALLEL,
        ("mlp.gate_proj.weight", ("ffn", "hidden")),
        ("mlp.up_proj.weight", ("ffn", "hidden")),
    ),
    _layer("mlp.linear_fc2.weight", Split.ROW_PARALLEL, ("mlp.down_proj.weight", ("hidden", "ffn"))),
)
_EXPERTS = (
    _layer("mlp.router.weight", Split.REPLICATED, ("mlp.gate.weight", ("experts", "hidden"))),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        Split.COLUMN_PARALLEL,
        ("mlp.experts.{expert}.gate_proj.weight", ("expert_ffn", "hidden")),
        ("mlp.experts.{expert}.up_proj.weight", ("expert_ffn", "hidden")),
    ),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        Split.ROW_PARALLEL,
        ("mlp.experts.{expert}.down_proj.weight", ("hidden", "expert_ffn")),
    ),
)
_QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        Split.QKV_PARALLEL,
        ("self_attn.q_proj.bias", ("query",)),
        ("self_attn.k_proj.bias", ("kv",)),
        ("self_attn.v_proj.bias", ("kv",)),
    ),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", Split.REPLICATED, ("self_attn.q_norm.weight", ("head_dim",))),
    _layer("self_attention.k_layernorm.weight", Split.REPLICATED, ("self_attn.k_norm.weight", ("head_dim",))),
)
_TOP = (
    _whole("decoder.final_layernorm.weight", Split.REPLICATED, "model.norm.weight", "hidden"),
    _whole("output_layer.weight", Split.VOCAB_PARALLEL, "lm_head.weight", "vocab", "hidden"),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", hf_class="LlamaForCausalLM", rules=_BOTTOM + _ATTENTION + _DENSE_MLP + _TOP),
        Family(name="qwen2", hf_class="Qwen2ForCausalLM", rules=_BOTTOM + _ATTENTION + _QKV_BIAS + _DENSE_MLP + _TOP),
        Family(name="qwen3", hf_class="Qwen3ForCausalLM", rules=_BOTTOM + _ATTENTION + _QK_NORM + _DENSE_MLP + _TOP),
        Family(
            name="qwen3_moe", hf_class="Qwen3MoeForCausalLM", rules=_BOTTOM + _ATTENTION + _QK_NORM + _EXPERTS + _TOP
        ),
    )
}

FUSED_NORM_ALIASES: dict[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's layer spec fuses these norms into the linear after it: its name -> the tables' name.

An alias holds only where the table has that linear: the norm before a mixture of experts is a module of its own.
"""
