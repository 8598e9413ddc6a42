"""Laws of reading a model's shape: published models, both styles of config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import Experts, Llama3RopeScaling, read_architecture
from clipo_megatron.weights.counts import active_parameters, parameter_count
from clipo_megatron.weights.families import FAMILIES

QWEN2P5_3B: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151643,
}
QWEN3_8B = QWEN2P5_3B | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "sliding_window": None,
}
LLAMA3P1_8B = QWEN3_8B | {
    "architectures": ["LlamaForCausalLM"],
    "mlp_bias": False,
    "head_dim": None,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN3_30B_A3B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
MIXTRAL_8X7B: dict[str, object] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "router_aux_loss_coef": 0.02,
}


def _write(folder: Path, config: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (QWEN2P5_3B, 3_085_938_688),
        (QWEN3_8B, 8_190_735_360),
        (LLAMA3P1_8B, 8_030_261_248),
        (QWEN3_30B_A3B, 30_532_122_624),
        (MIXTRAL_8X7B, 46_702_792_704),
    ],
    ids=["Qwen2.5-3B", "Qwen3-8B", "Llama-3.1-8B", "Qwen3-30B-A3B", "Mixtral-8x7B"],
)
def test_the_number_of_parameters_is_the_published_one(
    tmp_path: Path, config: dict[str, object], published: int
) -> None:
    assert parameter_count(read_architecture(_write(tmp_path, config))) == published


def test_a_token_meets_3_billion_of_30_billion_parameters(tmp_path: Path) -> None:
    arch = read_architecture(_write(tmp_path, QWEN3_30B_A3B))
    norms = 2 * 2048 + 2 * 128
    embedding_and_output = 2 * 151936 * 2048
    # Published as "3.3B activated".
    assert 3.3e9 < 48 * (active_parameters(arch) + norms) + 2048 + embedding_and_output < 3.4e9


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_active_parameters_are_those_of_the_matrix_products_of_one_token(tmp_path: Path, family: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = make_tiny_hf(tmp_path, family, num_experts=5, experts_per_token=3, expert_ffn_size=24, num_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.tensor([[5]]))
    arch = read_architecture(folder)
    head, attention = 2 * 512 * arch.hidden_size, 2 * 2 * arch.num_heads * arch.head_dim  # of one token, one key
    assert counter.get_total_flops() == 3 * (2 * active_parameters(arch) + attention) + head


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_architecture_is_what_transformers_reads(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_hf(tmp_path / family, family, num_kv_heads=1, tied=family == "qwen3", rope_base=5e5)
    arch, model = read_architecture(folder), AutoModelForCausalLM.from_pretrained(folder)
    config, attention = model.config, model.model.layers[0].self_attn
    assert arch.family == config.model_type
    assert arch.head_dim == attention.head_dim
    assert arch.qkv_bias is (attention.q_proj.bias is not None)
    assert arch.qk_norm is hasattr(attention, "q_norm")
    assert arch.tied is config.tie_word_embeddings
    assert arch.num_heads // arch.num_kv_heads == attention.num_key_value_groups
    assert arch.rope_base == config.rope_parameters["rope_theta"] == 5e5
    assert arch.rope_scaling is None
    assert (arch.rms_eps, arch.max_positions) == (config.rms_norm_eps, config.max_position_embeddings)
    assert (arch.num_layers, arch.ffn_size) == (config.num_hidden_layers, config.intermediate_size)
    assert (arch.eos_ids, arch.dtype) == ((config.eos_token_id,), "float32")
    assert (arch.experts is not None) is hasattr(config, "num_experts")
    if arch.experts is not None:
        assert arch.experts.num_experts == config.num_experts == len(model.model.layers[0].mlp.experts.down_proj)
        assert arch.experts.experts_per_token == model.model.layers[0].mlp.gate.top_k
        assert arch.experts.ffn_size == model.model.layers[0].mlp.experts.down_proj.shape[2]


def test_both_keys_for_the_number_of_experts_mean_the_same(tmp_path: Path) -> None:
    old = read_architecture(_write(tmp_path, QWEN3_30B_A3B))
    assert old.experts == Experts(num_experts=128, experts_per_token=8, ffn_size=768)
    new = {key: value for key, value in QWEN3_30B_A3B.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert read_architecture(_write(tmp_path, new)) == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob = false: only true is supported"),
        ({"norm_topk_prob": None}, "norm_topk_prob = null: only true is supported"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2: only 1 is supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]: only \[\] is supported"),
        ({"num_experts": 7}, "num_experts_per_tok = 8: must be <= num_experts = 7"),
        ({"num_experts": None}, "num_experts = null: must be a whole number"),
        ({"num_local_experts": 64}, "num_local_experts = 64: differs from num_experts = 128"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size = 0: must be a whole number >= 1"),
    ],
)
def test_experts_that_can_not_be_built_are_refused_by_their_key(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_architecture(_write(tmp_path, QWEN3_30B_A3B | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window = 4096: only null is supported"),
        ({"num_local_experts": None}, "num_local_experts = null: must be a whole number"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9: must be <= num_local_experts = 8"),
        ({"intermediate_size": 0}, "intermediate_size = 0: must be a whole number >= 1"),
    ],
)
def test_a_family_names_its_own_keys(tmp_path: Path, change: dict[str, object], message: str) -> None:
    mixtral = read_architecture(_write(tmp_path, MIXTRAL_8X7B))
    assert mixtral.experts == Experts(num_experts=8, experts_per_token=2, ffn_size=14336)
    with pytest.raises(ConfigError, match=message):
        read_architecture(_write(tmp_path, MIXTRAL_8X7B | change))


def test_old_and_new_style_of_rope_and_dtype_keys_mean_the_same(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "llama", llama3_rope=True)
    new = read_architecture(folder)
    assert new.rope_scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"]
    assert read_architecture(_write(folder, config | {"rope_scaling": rope})) == new
    rope["type"] = rope.pop("rope_type")
    assert read_architecture(_write(folder, config | {"rope_scaling": rope})) == new


def test_end_tokens_are_those_of_the_generation_config_where_it_has_any(tmp_path: Path) -> None:
    _write(tmp_path, QWEN2P5_3B)
    generation = tmp_path / "generation_config.json"
    assert read_architecture(tmp_path).eos_ids == (151643,)
    generation.write_text('{"do_sample": true}')
    assert read_architecture(tmp_path).eos_ids == (151643,)
    generation.write_text('{"eos_token_id": [151645, 151643]}')
    assert read_architecture(tmp_path).eos_ids == (151645, 151643)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures = .*Gemma.*must be one of LlamaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"use_sliding_window": True}, "use_sliding_window = true: only false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias = true: only false"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": only "silu"'),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 'rope_scaling: type = "yarn": only default and llama3'),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear"}}, 'rope_type = "linear"'),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_theta = 1000000.0: differs from"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_theta": None}, "rope_theta = null: must be a number > 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 16"),
        ({"num_attention_heads": 15, "num_key_value_heads": 3}, "head_dim is missing: hidden_size = 2048"),
        ({"hidden_size": "2048"}, 'hidden_size = "2048": must be a whole number'),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"eos_token_id": "<eos>"}, "eos_token_id"),
    ],
)
def test_a_model_that_can_not_be_built_is_refused_by_its_key(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_architecture(_write(tmp_path, QWEN2P5_3B | change))
    assert all(str(tmp_path) in problem for problem in caught.value.problems)


def test_architectures_and_model_type_must_name_the_same_family(tmp_path: Path) -> None:
    """transformers builds what model_type names: without norms of query and key here."""
    assert read_architecture(_write(tmp_path, QWEN3_8B | {"model_type": "qwen3"})).family == "qwen3"
    with pytest.raises(
        ConfigError, match=r'model_type = "llama": must be qwen3, as architectures = \[Qwen3ForCausalLM\]'
    ):
        read_architecture(_write(tmp_path, QWEN3_8B | {"model_type": "llama"}))


def test_all_faults_of_a_config_are_reported_together(tmp_path: Path) -> None:
    config = {key: value for key, value in QWEN2P5_3B.items() if key not in ("rms_norm_eps", "intermediate_size")}
    with pytest.raises(ConfigError) as caught:
        read_architecture(_write(tmp_path, config | {"use_sliding_window": True}))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["", "[]", "{", '"config"'])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_architecture(tmp_path)
