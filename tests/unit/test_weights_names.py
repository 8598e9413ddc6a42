"""Laws of the names: whose they are, how a rank's become the whole model's, which layers a chunk of it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.architectures import small_architecture
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    global_name,
    hf_tensor_specs,
    is_expert,
    layer_numbers,
    megatron_parameter_names,
    padded_vocab_size,
    split_dim,
)


def test_experts_alone_are_shared_out_over_ep() -> None:
    names = megatron_parameter_names(small_architecture("qwen3_moe", num_layers=1, num_experts=2))
    assert [name.removeprefix("decoder.layers.0.mlp.") for name in names if is_expert(name)] == [
        f"experts.local_experts.{expert}.linear_{linear}.weight" for expert in range(2) for linear in ("fc1", "fc2")
    ]
    assert is_expert("decoder.layers.0.mlp.experts.linear_fc1.weight0")
    assert not is_expert("decoder.layers.0.mlp.router.weight")
    assert not any(is_expert(name) for name in megatron_parameter_names(small_architecture("qwen3")))


@given(first_layer=st.integers(0, 90), first_expert=st.integers(0, 500), layer=st.integers(0, 9), e=st.integers(0, 60))
def test_only_the_numbers_of_layer_and_expert_are_shifted(
    first_layer: int, first_expert: int, layer: int, e: int
) -> None:
    def moved(local_name: str) -> str:
        return global_name(local_name, first_layer=first_layer, first_expert=first_expert)

    far, expert = layer + first_layer, e + first_expert
    local, whole = f"decoder.layers.{layer}.mlp.experts.", f"decoder.layers.{far}.mlp.experts."
    assert moved(f"{local}local_experts.{e}.linear_fc1.weight") == f"{whole}local_experts.{expert}.linear_fc1.weight"
    assert moved(f"{local}linear_fc2.weight{e}") == f"{whole}linear_fc2.weight{expert}"
    for name in ("mlp.router.weight", "mlp.linear_fc1.weight", "self_attention.linear_qkv.layer_norm_weight"):
        assert moved(f"decoder.layers.{layer}.{name}") == f"decoder.layers.{far}.{name}"
    for name in (EMBEDDING, OUTPUT_LAYER, "decoder.final_layernorm.weight"):
        assert moved(name) == name


def test_the_norm_before_experts_has_no_fused_name() -> None:
    arch = small_architecture("qwen3_moe")
    assert split_dim("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", arch) is None
    assert split_dim("decoder.layers.0.pre_mlp_layernorm.weight", arch) is None
    with pytest.raises(CheckError, match="no parameter of a qwen3_moe model"):
        split_dim("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", arch)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_names_and_shapes_are_those_that_transformers_writes(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_tiny_hf(tmp_path / family, family, tied=tied, num_layers=3, vocab_size=389)
    want = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert hf_tensor_specs(read_architecture(folder)) == want


@given(vocab_size=st.integers(1, 200_000), tp=st.integers(1, 16))
def test_the_padded_vocabulary_is_the_next_multiple_of_128_per_rank(vocab_size: int, tp: int) -> None:
    padded = padded_vocab_size(vocab_size, tp)
    assert padded % (128 * tp) == 0
    assert 0 <= padded - vocab_size < 128 * tp


@given(share=st.integers(1, 30), pp=st.integers(1, 8), vpp=st.integers(1, 4))
def test_a_token_that_passes_the_stages_vpp_times_meets_all_layers_once_in_order(share: int, pp: int, vpp: int) -> None:
    total = share * pp * vpp
    chunks = [
        layer_numbers(total, pp=pp, pp_rank=pp_rank, vpp=vpp, vpp_rank=vpp_rank)
        for vpp_rank in range(vpp)
        for pp_rank in range(pp)
    ]
    assert [layer for chunk in chunks for layer in chunk] == list(range(total))
    assert {len(chunk) for chunk in chunks} == {share}


def test_layers_that_chunks_do_not_share_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layout\.pp = 3: must divide the model's num_hidden_layers = 4"):
        layer_numbers(4, pp=3, pp_rank=0)
    with pytest.raises(ConfigError, match=r"layout\.pp \* layout\.vpp = 2 \* 2: must divide .* = 6"):
        layer_numbers(6, pp=2, pp_rank=0, vpp=2)
