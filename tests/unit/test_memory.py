"""The estimate of GPU memory: its arithmetic against published formulas, and that each key moves the right term."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.architectures import small_architecture

from clipo_megatron.checks import memory
from clipo_megatron.checks.activation_memory import LayerShare, layers_in_flight, saved_bytes
from clipo_megatron.checks.memory import RankMemory, estimate_memory
from clipo_megatron.cli.main import main
from clipo_megatron.parallel import linear_logprob
from clipo_megatron.recipe import Recipe
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.names import padded_vocab_size

DENSE = small_architecture("qwen3", num_layers=8, hidden_size=64, ffn_size=96)
EXPERTS = small_architecture("qwen3_moe", num_layers=8, hidden_size=64, num_experts=8)
TIED = small_architecture("qwen2", num_layers=8, hidden_size=64, tied=True)
LAYOUT = {"world_size": 8, "tp": 2, "pp": 2, "micro_batch_tokens": 8192}
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}


def recipe_of(layout: dict[str, object], **sections: dict[str, object]) -> Recipe:
    base = {"run": {"name": "try"}, "model": {"path": "policy"}, "data": {"train": ["train.parquet"]}}
    return Recipe.model_validate(base | {"layout": layout} | sections)


def stage(layout: dict[str, object], arch=DENSE, number: int = 0, **sections: dict[str, object]) -> RankMemory:
    return estimate_memory(recipe_of(layout, **sections), arch).stages[number]


def changed(one: RankMemory, other: RankMemory) -> set[str]:
    return {field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)}


def test_the_log_probs_buffers_are_those_of_the_function_itself():
    assert memory.CHUNK_TOKENS == linear_logprob._CHUNK_TOKENS
    assert memory.BLOCK_BYTES == linear_logprob._GPU_BLOCK_BYTES


@pytest.mark.parametrize("arch", [DENSE, EXPERTS, TIED], ids=lambda arch: arch.family)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_the_stages_hold_the_model_and_the_vocabulary_s_padding(arch, pp):
    stages = estimate_memory(recipe_of({"world_size": pp, "pp": pp, "micro_batch_tokens": 8192}), arch).stages
    ends = 1 if arch.tied and pp == 1 else 2
    padding = padded_vocab_size(arch.vocab_size, 1) - arch.vocab_size
    copy_of_tied = arch.vocab_size * arch.hidden_size if arch.tied and pp > 1 else 0
    expected = parameter_count(arch) + copy_of_tied + ends * padding * arch.hidden_size
    assert sum(one.weights for one in stages) == 2 * expected
    assert sum(one.gradients for one in stages) == 4 * expected
    assert sum(one.optimizer for one in stages) == 12 * expected


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_the_first_stage_holds_what_the_published_formulas_say(pp, vpp):
    num_layers = 48
    found = layers_in_flight(num_layers=num_layers, pp=pp, pp_rank=0, vpp=vpp)
    # arXiv 2205.05198, section 4.2.3: L layers for 1F1B, L (1 + (p - 1) / (p m)) for m chunks a stage.
    assert found == pytest.approx(num_layers * (1 + (pp - 1) / (pp * vpp)) if vpp > 1 else num_layers)


def test_the_last_stage_of_the_plain_schedule_holds_one_micro_batch():
    assert layers_in_flight(num_layers=48, pp=4, pp_rank=3, vpp=1) == 12


def test_a_layer_without_recompute_is_the_published_34_bytes_up_to_what_this_layer_has_otherwise():
    """Equation 1 of arXiv 2205.05198 without its 5 a s / h: 34 s b h, of which dropout masks are 2 and GELU's MLP 16."""
    hidden, tokens = 64, 100
    arch = dataclasses.replace(
        small_architecture("llama", hidden_size=hidden, num_kv_heads=4, head_dim=16, heads_per_group=1),
        ffn_size=4 * hidden,
    )
    share = LayerShare(arch=arch, tokens=tokens, tp=1, etp=1, cp=1, is_split=False, element_bytes=2, is_fp8=False)
    # Published: attention 11 (masks 1, QKV input 2, Q and K 4, V 2, projection input 2), MLP 19 (mask 1, input 2, GELU's
    # input 8 and output 8), norms 4. Here: no masks, SwiGLU keeps three tensors of the width where GELU keeps two.
    published = tokens * hidden * (34 - 2 + 8)
    statistics = tokens * 4 * arch.num_heads
    assert saved_bytes(share, recompute="none") == published + statistics
    assert saved_bytes(share, recompute="selective") == published
    assert saved_bytes(share, recompute="full") == 2 * tokens * hidden
    split = dataclasses.replace(share, tp=2, is_split=True)
    assert saved_bytes(split, recompute="none") == (published + statistics) // 2  # equation 4: everything over t
    whole = dataclasses.replace(share, tp=2)
    norms = 8 * tokens * hidden  # equation 2: norms' inputs and outputs are not divided
    assert saved_bytes(whole, recompute="none") == norms + (published + statistics - norms) // 2


@pytest.mark.parametrize(
    ("layout", "terms"),
    [
        ({"sequence_parallel": False}, {"activations", "working"}),
        ({"recompute": "full"}, {"activations", "working"}),
        ({"distributed_optimizer": False}, {"optimizer"}),
        ({"world_size": 16}, {"optimizer"}),
        ({"cp": 2}, {"activations", "working"}),  # as many ranks share the optimizer: dp x cp stays
        ({"micro_batch_tokens": 16384}, {"activations", "working"}),
        ({"vpp": 2}, {"activations"}),
        ({"overlap_grad_reduce": False}, set()),
    ],
)
def test_each_key_of_the_layout_moves_its_terms(layout, terms):
    assert changed(stage(LAYOUT), stage(LAYOUT | layout)) == terms


@pytest.mark.parametrize(
    ("sections", "terms"),
    [
        ({"optimizer": {"cpu_offload": True}}, {"optimizer"}),
        ({"contrastive": {"enabled": False}}, {"head"}),
        ({"algorithm": {"kl": {"coefficient": 0.0}}}, set()),  # the reference policy is on the host
        ({"precision": {"recipe": "blockwise"}}, {"activations", "fp8_weights"}),
        ({"rollout": {"quantization": "fp8_per_block"}, "sync": {"transport": "nccl"}}, {"weights"}),
        ({"rollout": {"quantization": "fp8_per_block"}, "sync": {"transport": "stream"}}, set()),
    ],
)
def test_each_key_of_the_other_sections_moves_its_terms(sections, terms):
    assert changed(stage(LAYOUT, number=1), stage(LAYOUT, number=1, **sections)) == terms


def test_the_reference_policy_and_the_offloaded_optimizer_are_on_the_host():
    plain = estimate_memory(recipe_of(LAYOUT, algorithm={"kl": {"coefficient": 0.0}}), DENSE)
    with_reference = estimate_memory(recipe_of(LAYOUT), DENSE)
    offloaded = estimate_memory(recipe_of(LAYOUT, optimizer={"cpu_offload": True}), DENSE)
    assert plain.host_bytes == 0
    assert with_reference.host_bytes == 2 * max(one.weights for one in with_reference.stages)
    trained = max(one.weights for one in offloaded.stages) // 2
    assert offloaded.host_bytes == with_reference.host_bytes + 16 * trained // 2  # dp = 2
    assert not any(one.optimizer for one in offloaded.stages)
    assert all(one.optimizer for one in plain.stages)


def test_experts_are_shared_out_by_their_own_degrees():
    whole = stage({"world_size": 8, "micro_batch_tokens": 8192}, EXPERTS)
    shared = stage({"world_size": 8, "ep": 4, "micro_batch_tokens": 8192}, EXPERTS)
    assert EXPERTS.experts is not None
    experts = 8 * EXPERTS.experts.num_experts * 3 * EXPERTS.hidden_size * EXPERTS.experts.ffn_size
    assert whole.weights - shared.weights == 2 * (experts - experts // 4)
    # Before, 8 ranks shared each expert's optimizer; with ep = 4 only the 2 ranks that have the expert do.
    assert whole.optimizer == pytest.approx(shared.optimizer, abs=24)
    frozen = stage({"world_size": 8, "micro_batch_tokens": 8192}, EXPERTS, experts={"freeze_router": True})
    routers = 8 * EXPERTS.experts.num_experts * EXPERTS.hidden_size
    assert (whole.gradients - frozen.gradients, whole.weights - frozen.weights) == (4 * routers, 0)


def test_fp8_keeps_two_bytes_a_weight_for_each_micro_batch_in_flight():
    layout = LAYOUT | {"world_size": 4, "tp": 1, "pp": 4}
    stages = estimate_memory(recipe_of(layout, precision={"recipe": "tensorwise"}), DENSE).stages
    kept = [one.fp8_weights for one in stages]
    assert kept == [kept[-1] * in_flight for in_flight in (4, 3, 2, 1)]
    ends = estimate_memory(
        recipe_of(layout, precision={"recipe": "tensorwise", "first_last_layers_bf16": True}), DENSE
    ).stages
    assert [one.fp8_weights * 2 for one in (ends[0], ends[-1])] == [kept[0], kept[-1]]  # one of two layers each
    assert ends[1] == stages[1]


# --- the command ---


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "recipe.yaml").write_text(
        f"run: {{name: try}}\nmodel: {{path: {tmp_path / 'policy'}}}\ndata: {{train: [train.parquet]}}\n"
        "layout: {world_size: 4, tp: 2, pp: 2, micro_batch_tokens: 4096}\n"
    )
    return tmp_path


def test_the_command_prints_what_the_function_estimates(files, capsys):
    assert main(["plan", "memory", str(files / "recipe.yaml"), "layout.recompute=full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["over"], len(found["stages"])) == ("estimate", False, 2)
    terms = [field.name for field in dataclasses.fields(RankMemory)]
    assert all(one["total"] == sum(one[term] for term in terms) for one in found["stages"])


def test_the_table_is_labelled_an_estimate_and_warns_above_90_percent_alone(files, capsys):
    assert main(["plan", "memory", str(files / "recipe.yaml")]) == 0
    text = capsys.readouterr().out
    assert "ESTIMATE" in text
    assert "WARN" not in text
    # 3 GiB are fixed, so the worst rank is between 90 and 100 % of 3.3 GiB.
    assert main(["plan", "memory", str(files / "recipe.yaml"), "--gpu-gib", "3.3"]) == 0
    assert "WARN" in capsys.readouterr().out


def test_without_the_model_folder_the_error_says_what_to_do(files, capsys):
    recipe = str(files / "recipe.yaml")
    config = files / "policy" / "config.json"
    absent = ["plan", "memory", recipe, "model.path=nowhere"]
    assert main(absent) == 2
    error = capsys.readouterr().err
    assert "model.path = nowhere: no config.json" in error
    assert "--config" in error
    for given in (config, config.parent):
        assert main([*absent, "--config", str(given)]) == 0
    assert main([*absent, "--config", str(files / "recipe.yaml")]) == 2
    assert "--config" in capsys.readouterr().err


def test_faults_of_the_recipe_and_of_the_layout_are_told_together(files, capsys):
    recipe = str(files / "recipe.yaml")
    assert main(["plan", "memory", recipe, "layout.pp=3", "layout.world_size=6", "layout.tpp=2"]) == 2
    error = capsys.readouterr().err
    assert "layout.tpp" in error
    assert "layout.pp = 3: must divide the model's num_hidden_layers = 4" in error
    assert main(["plan", "memory", recipe, "--gpu-gib", "0"]) == 2
    assert "--gpu-gib" in capsys.readouterr().err


def test_on_shared_devices_the_engine_s_share_and_the_trainer_s_weights_are_weighed_together(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {{name: r}}\nmodel: {{path: {tmp_path}}}\ndata: {{train: [x.jsonl]}}\n")

    def planned(*overrides: str) -> dict[str, object]:
        assert main(["plan", "memory", str(recipe), "--json", *overrides]) == 0
        return json.loads(capsys.readouterr().out)

    assert planned()["colocated"] is None
    found = planned("rollout.colocate=true", "rollout.gpu_memory_utilization=0.5")
    (stage,) = found["stages"]
    assert found["colocated"] == {
        "trainer": stage["weights"] + stage["head"] + stage["fixed"],
        "engine": 40 * memory.GIB,
        "over": False,
    }
    assert planned("rollout.colocate=true", "rollout.gpu_memory_utilization=0.99")["colocated"]["over"] is True
    assert found["host"] - planned()["host"] == stage["optimizer"]
