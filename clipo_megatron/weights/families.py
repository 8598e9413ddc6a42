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


@dataclass(frozen=True, slots=True)
class OnlyValue:
    """A key of config.json that changes the model, and the one value of it that the project can build."""

    key: str
    value: object
    """As in JSON. A missing key and null mean it too, unless `is_required`."""
    meaning: str = ""
    """Of the value, for the message; may be empty."""
    is_required: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertKeys:
    """What config.json calls the numbers of a mixture of experts."""

    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    """All names in use; those that a folder has must agree."""
    experts_per_token: str = "num_experts_per_tok"
    ffn_size: str = "moe_intermediate_size"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family: its class in transformers, its table, and what is special about its config.json."""

    name: str
    """As transformers' `model_type`."""
    hf_class: str
    """Entry of config.json's `architectures`."""
    rules: tuple[Rule, ...]
    expert_keys: ExpertKeys = ExpertKeys()
    """Of no meaning without experts."""
    only_values: tuple[OnlyValue, ...] = ()
    """Beyond those of all families."""
    is_sync_tested: bool = False
    """Whether planned syncs were compared bit by bit with what vLLM's own loaders make of whole tensors."""

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
_MIXTRAL_EXPERTS = (
    _layer("mlp.router.weight", Split.REPLICATED, ("block_sparse_moe.gate.weight", ("experts", "hidden"))),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        Split.COLUMN_PARALLEL,
        ("block_sparse_moe.experts.{expert}.w1.weight", ("expert_ffn", "hidden")),
        ("block_sparse_moe.experts.{expert}.w3.weight", ("expert_ffn", "hidden")),
    ),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        Split.ROW_PARALLEL,
        ("block_sparse_moe.experts.{expert}.w2.weight", ("hidden", "expert_ffn")),
    ),
)
_TOP = (
    _whole("decoder.final_layernorm.weight", Split.REPLICATED, "model.norm.weight", "hidden"),
    _whole("output_layer.weight", Split.VOCAB_PARALLEL, "lm_head.weight", "vocab", "hidden"),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            hf_class="LlamaForCausalLM",
            rules=_BOTTOM + _ATTENTION + _DENSE_MLP + _TOP,
            is_sync_tested=True,
        ),
        Family(
            name="qwen2",
            hf_class="Qwen2ForCausalLM",
            rules=_BOTTOM + _ATTENTION + _QKV_BIAS + _DENSE_MLP + _TOP,
            is_sync_tested=True,
        ),
        Family(
            name="qwen3",
            hf_class="Qwen3ForCausalLM",
            rules=_BOTTOM + _ATTENTION + _QK_NORM + _DENSE_MLP + _TOP,
            is_sync_tested=True,
        ),
        Family(
            name="qwen3_moe",
            hf_class="Qwen3MoeForCausalLM",
            is_sync_tested=True,
            rules=_BOTTOM + _ATTENTION + _QK_NORM + _EXPERTS + _TOP,
            only_values=(
                OnlyValue("norm_topk_prob", True, "weights of the chosen experts sum to 1", is_required=True),
                OnlyValue("decoder_sparse_step", 1, "experts in every layer"),
                OnlyValue("mlp_only_layers", [], "experts in every layer"),
            ),
        ),
        Family(
            name="mixtral",
            hf_class="MixtralForCausalLM",
            rules=_BOTTOM + _ATTENTION + _MIXTRAL_EXPERTS + _TOP,
            expert_keys=ExpertKeys(num_experts=("num_local_experts",), ffn_size="intermediate_size"),
            only_values=(OnlyValue("sliding_window", None, "every token sees all before it"),),
            is_sync_tested=True,
        ),
    )
}

ONLY_VALUES: tuple[OnlyValue, ...] = (
    OnlyValue("hidden_act", "silu"),
    # In transformers it also gives the output projection a bias, which the tables do not hold.
    OnlyValue("attention_bias", False),
    OnlyValue("mlp_bias", False),
    OnlyValue("use_sliding_window", False),
    OnlyValue("partial_rotary_factor", 1.0),
    OnlyValue("quantization_config", None),
)
"""Of all families."""

FUSED_NORM_ALIASES: dict[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's layer spec fuses these norms into the linear after it: its name -> the tables' name.

An alias holds only where the table has that linear: the norm before a mixture of experts is a module of its own.
"""
