"""Laws of holdings: filled from them alone, a rank's parameters are those of the name tables, and of plain slicing."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.architectures import small_architecture
from support.plans import UNWRITTEN, Parameters, numbered_folder, sliced_engine_rank
from torch import Tensor

from clipo_megatron.errors import CheckError, ConfigError, EngineError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.engine_parameters import engine_parameters, live_name
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.holdings import (
    HeldParameter,
    is_bottom,
    is_top,
    refined_shape,
    rules_of,
    table_name,
    trainer_parameters,
)
from clipo_megatron.weights.mapping import local_parameter
from clipo_megatron.weights.names import EMBEDDING, OUTPUT_LAYER, padded_vocab_size

MODELS = {
    "family": st.sampled_from(sorted(FAMILIES)),
    "tp": st.sampled_from([1, 2, 3, 4, 8]),
    "kv_heads": st.sampled_from([1, 2, 3, 4, 6, 8]),
    "head_share": st.integers(1, 3),
    "head_dim": st.integers(1, 5),
    "ffn_share": st.integers(1, 5),
    "expert_ffn_share": st.integers(1, 3),
    "hidden_size": st.integers(1, 7),
    "vocab_size": st.integers(1, 400),
    "num_layers": st.integers(1, 2),
    "tied": st.booleans(),
    "expert_share": st.integers(1, 3),
}


def _architecture(
    tp: int, kv_heads: int, head_share: int, ffn_share: int, expert_ffn_share: int, num_experts: int, **sizes: int
) -> Architecture:
    """A model whose heads and widths `tp` divides."""
    assume(kv_heads % tp == 0 or tp % kv_heads == 0)
    return small_architecture(
        num_kv_heads=kv_heads,
        heads_per_group=head_share * tp // math.gcd(tp, kv_heads),
        ffn_size=ffn_share * tp,
        expert_ffn_size=expert_ffn_share * tp,
        num_experts=num_experts,
        **sizes,
    )


def _refined(arch: Architecture, hf: Parameters, layer: int) -> Parameters:
    """The refined tensors of one layer, and those of no layer."""
    refined = {}
    for rule in rules_of(arch):
        for number, tensor in enumerate(rule.hf):
            name = tensor.name.replace("{layer}", str(layer))
            if rule.is_of_expert:
                experts = range(arch.sizes["experts"])
                whole = torch.stack([hf[name.replace("{expert}", str(expert))] for expert in experts])
                refined[tensor.name.replace("{expert}", "*")] = whole
            else:
                refined[tensor.name] = hf[name].reshape(refined_shape(rule, number, arch))
    return refined


def _filled(parameter: HeldParameter, refined: Parameters, padding: float) -> Parameters:
    """A rank's parameter from its holdings, element by element of the affine map."""
    found = {name: torch.full(parameter.shape, padding) for name in parameter.names}
    for holding in parameter.holdings:
        box = refined[holding.tensor]
        for dim, (start, size) in enumerate(zip(holding.start, holding.shape, strict=True)):
            box = box.narrow(dim, start, size)
        if holding.strides[0]:
            (name,) = holding.parameters
            _put(found[name], box, holding.strides, holding.offset)
        else:
            for name, part in zip(holding.parameters, box, strict=True):
                _put(found[name], part, holding.strides[1:], holding.offset)
    return found


def _put(parameter: Tensor, box: Tensor, strides: tuple[int, ...], offset: int) -> None:
    parameter.as_strided(box.shape, strides, offset).copy_(box)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expert_parallel=st.booleans(), **MODELS)
def test_an_engine_rank_filled_from_its_holdings_is_what_slicing_gives(
    tp: int, expert_parallel: bool, expert_share: int, tied: bool, **model: int
) -> None:
    expert_parallel = expert_parallel and FAMILIES[model["family"]].has_experts
    arch = _architecture(tp, num_experts=expert_share * (tp if expert_parallel else 1), tied=tied, **model)
    assume(-(-arch.vocab_size // 64) * 64 % tp == 0)
    with tempfile.TemporaryDirectory() as folder:
        hf = numbered_folder(arch, Path(folder))
    for rank in range(tp):
        expected = sliced_engine_rank(arch, hf, tp=tp, rank=rank, expert_parallel=expert_parallel)
        found: Parameters = {}
        for parameter in engine_parameters(arch, tp=tp, tp_rank=rank, expert_parallel=expert_parallel):
            for layer in range(arch.num_layers if parameter.rule.is_of_layer else 1):
                filled = _filled(parameter, _refined(arch, hf, layer), UNWRITTEN)
                found |= {name.replace("{layer}", str(layer)): tensor for name, tensor in filled.items()}
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(etp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2, 3]), **MODELS)
def test_a_trainer_rank_filled_from_its_holdings_is_what_the_name_tables_give(
    tp: int, etp: int, ep: int, expert_share: int, kv_heads: int, expert_ffn_share: int, tied: bool, **model: int
) -> None:
    assume(kv_heads % tp == 0)
    arch = _architecture(
        tp,
        num_experts=expert_share * ep,
        kv_heads=kv_heads,
        expert_ffn_share=expert_ffn_share * etp,
        tied=tied,
        **model,
    )
    padded = padded_vocab_size(arch.vocab_size, tp)
    with tempfile.TemporaryDirectory() as folder:
        hf = numbered_folder(arch, Path(folder))
        layer = arch.num_layers - 1
        refined = _refined(arch, hf, layer)
        with HFReader(Path(folder)) as reader:
            for rank in range(max(tp, ep * etp)):
                degrees = {"tp": tp, "tp_rank": rank % tp, "padded_vocab": padded, "etp": etp, "etp_rank": rank % etp}
                for parameter in trainer_parameters(arch, **degrees, ep=ep, ep_rank=rank // etp % ep):
                    for name, tensor in _filled(parameter, refined, 0.0).items():
                        whole_name = name.replace("{layer}", str(layer))
                        assert torch.equal(tensor, local_parameter(reader, whole_name, arch, **degrees)), name


def test_the_stages_ends_hold_embedding_norm_and_output_layer() -> None:
    for family in FAMILIES:
        arch = small_architecture(family)
        rules = rules_of(arch)
        assert [rule.megatron for rule in rules if is_bottom(rule, arch)] == [EMBEDDING]
        assert [rule.megatron for rule in rules if is_top(rule, arch)] == [
            "decoder.final_layernorm.weight",
            OUTPUT_LAYER,
        ]


def test_transformer_engine_s_names_and_tied_copies_get_the_table_s_name() -> None:
    moe, dense = small_architecture("qwen3_moe"), small_architecture("qwen3", tied=True)
    expert = "decoder.layers.1.mlp.experts."
    assert table_name(expert + "linear_fc1.weight3", moe) == expert + "local_experts.3.linear_fc1.weight"
    norm = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert table_name(norm, dense) == "decoder.layers.0.input_layernorm.weight"
    assert table_name(OUTPUT_LAYER, dense) == ""
    with pytest.raises(CheckError, match="no parameter of a qwen3 model"):
        table_name("decoder.layers.7.input_layernorm.weight", dense)


def test_the_experts_have_two_names_among_the_releases_and_others_are_refused() -> None:
    new = "model.layers.0.mlp.experts.routed_experts.w13_weight"
    old = "model.layers.0.mlp.experts.w13_weight"
    assert live_name(new, {new, "model.norm.weight"}) == new
    assert live_name(new, [old]) == old
    with pytest.raises(EngineError, match=r"w13_weight: the engine has no such parameter among its 1"):
        live_name(new, {"model.norm.weight"})


@pytest.mark.parametrize(
    ("family", "tp", "expert_parallel", "rule"),
    [
        ("qwen3", 3, False, "rollout.tp = 3: must divide the model's num_attention_heads = 8"),
        ("qwen3", 16, False, "intermediate_size = 20"),
        ("qwen3_moe", 8, True, "number of experts = 4"),
        ("qwen3", 2, True, "a qwen3 model has no experts"),
    ],
)
def test_engines_that_the_model_can_t_be_split_for_are_refused(
    family: str, tp: int, expert_parallel: bool, rule: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        engine_parameters(small_architecture(family), tp=tp, tp_rank=0, expert_parallel=expert_parallel)
    assert rule in str(raised.value)


def test_a_run_of_experts_must_be_even() -> None:
    with pytest.raises(ConfigError, match=r"layout.ep = 3: must divide the model's number of experts = 4"):
        trainer_parameters(small_architecture("qwen3_moe"), tp=1, tp_rank=0, padded_vocab=256, ep=3)
