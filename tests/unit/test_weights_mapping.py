"""Laws of the name tables: what a tp rank holds, and that export undoes import bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.families import FAMILIES, FUSED_NORM_ALIASES
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import hf_tensors_of, local_parameter
from clipo_megatron.weights.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    hf_tensor_specs,
    layer_range,
    megatron_parameter_names,
    padded_vocab_size,
    split_dim,
)


def _arch(
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
    )


def _random_folder(arch: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_tensor_specs(arch).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _shards(reader: HFReader, name: str, arch: Architecture, tp: int) -> list[Tensor]:
    padded = padded_vocab_size(arch.vocab_size, tp)
    return [local_parameter(reader, name, arch, tp=tp, tp_rank=rank, padded_vocab=padded) for rank in range(tp)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tp=st.sampled_from([1, 2, 3, 4]),
    groups_per_rank=st.integers(1, 3),
    heads_per_group=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    ffn_share=st.integers(1, 7),
    hidden_size=st.integers(1, 9),
    vocab_size=st.integers(1, 600),
    num_layers=st.integers(1, 3),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_export_of_the_shards_is_the_imported_folder_bit_for_bit(
    family: str,
    tp: int,
    groups_per_rank: int,
    ffn_share: int,
    vocab_size: int,
    tied: bool,
    dtype: torch.dtype,
    **sizes: int,
) -> None:
    arch = _arch(
        family, vocab_size=vocab_size, tied=tied, num_kv_heads=groups_per_rank * tp, ffn_size=ffn_share * tp, **sizes
    )
    with tempfile.TemporaryDirectory() as folder:
        want = _random_folder(arch, Path(folder), dtype)
        got: dict[str, Tensor] = {}
        with HFReader(Path(folder)) as reader:
            for name in megatron_parameter_names(arch):
                exported = dict(hf_tensors_of(name, _shards(reader, name, arch, tp), arch))
                assert not exported.keys() & got.keys()
                got |= exported
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("tp", [1, 3])
def test_qkv_rows_of_a_rank_are_its_groups_query_heads_then_key_then_value(tmp_path: Path, tp: int) -> None:
    arch = _arch("qwen2", num_kv_heads=3, heads_per_group=2, head_dim=5)
    hf = _random_folder(arch, tmp_path)
    groups = 3 // tp
    with HFReader(tmp_path) as reader:
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"model.layers.1.self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            shards = _shards(reader, f"decoder.layers.1.self_attention.linear_qkv.{kind}", arch, tp)
            for rank, shard in enumerate(shards):
                row = 0
                for group in range(rank * groups, (rank + 1) * groups):
                    for source, head in ((q, 2 * group), (q, 2 * group + 1), (k, group), (v, group)):
                        for offset in range(5):
                            assert torch.equal(shard[row], source[head * 5 + offset])
                            row += 1
                assert row == len(shard)


def test_a_rank_stacks_its_half_of_the_gate_on_its_half_of_the_up_projection(tmp_path: Path) -> None:
    arch = _arch("llama")
    hf = _random_folder(arch, tmp_path)
    gate, up = hf["model.layers.0.mlp.gate_proj.weight"], hf["model.layers.0.mlp.up_proj.weight"]
    with HFReader(tmp_path) as reader:
        shards = _shards(reader, "decoder.layers.0.mlp.linear_fc1.weight", arch, 2)
    for rank, shard in enumerate(shards):
        want = [gate[row] for row in range(rank * 10, rank * 10 + 10)] + [
            up[row] for row in range(rank * 10, rank * 10 + 10)
        ]
        assert torch.equal(shard, torch.stack(want))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_beyond_the_vocabulary_are_zero_on_import_and_gone_on_export(tmp_path: Path, tp: int) -> None:
    arch = _arch("qwen3", vocab_size=130)  # tp = 4 pads to 512: two ranks hold padding only
    hf = _random_folder(arch, tmp_path)
    for name, hf_name in ((EMBEDDING, "model.embed_tokens.weight"), (OUTPUT_LAYER, "lm_head.weight")):
        with HFReader(tmp_path) as reader:
            shards = _shards(reader, name, arch, tp)
        whole = torch.cat(shards)
        assert len(whole) == padded_vocab_size(130, tp)
        assert torch.equal(whole[:130], hf[hf_name])
        assert not whole[130:].any()
        whole[130:] = 7.0
        [(exported_name, exported)] = hf_tensors_of(name, whole.chunk(tp), arch)
        assert exported_name == hf_name
        assert torch.equal(exported, hf[hf_name])


def test_the_output_layer_of_a_tied_model_is_the_embedding_and_is_exported_once(tmp_path: Path) -> None:
    arch = _arch("qwen3", tied=True)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        output, embedding = _shards(reader, OUTPUT_LAYER, arch, 2), _shards(reader, EMBEDDING, arch, 2)
    assert all(torch.equal(a, b) for a, b in zip(output, embedding, strict=True))
    assert hf_tensors_of(OUTPUT_LAYER, output, arch) == []
    assert OUTPUT_LAYER not in megatron_parameter_names(arch)


@pytest.mark.parametrize(("fused", "plain"), FUSED_NORM_ALIASES.items())
def test_a_fused_norm_is_the_norm_under_another_name(tmp_path: Path, fused: str, plain: str) -> None:
    arch = _arch("qwen2")
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        got = _shards(reader, f"decoder.layers.1.{fused}", arch, 2)
        want = _shards(reader, f"decoder.layers.1.{plain}", arch, 2)
    assert torch.equal(got[1], want[0])
    assert (
        hf_tensors_of(f"decoder.layers.1.{fused}", got, arch)[0][0]
        == (hf_tensors_of(f"decoder.layers.1.{plain}", want, arch)[0][0])
    )
    assert split_dim(f"decoder.layers.1.{fused}", arch) is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_split_dim_is_where_the_shards_of_a_parameter_differ(tmp_path: Path, family: str) -> None:
    arch = _arch(family)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        for name in megatron_parameter_names(arch):
            dim = split_dim(name, arch)
            [whole], halves = _shards(reader, name, arch, 1), _shards(reader, name, arch, 2)
            if dim is None:
                assert torch.equal(halves[0], whole)
                assert torch.equal(halves[1], whole)
            else:
                assert not torch.equal(halves[0], halves[1])
                assert torch.cat(halves, dim).numel() >= whole.numel()  # more where the vocabulary is padded
                assert [n for d, n in enumerate(halves[0].shape) if d != dim] == (
                    [n for d, n in enumerate(whole.shape) if d != dim]
                )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_names_and_shapes_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_hf(tmp_path / family, family, tied=tied, num_layers=3, vocab_size=389)
    model = AutoModelForCausalLM.from_pretrained(folder)
    want = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a shared one comes once
    assert hf_tensor_specs(read_architecture(folder)) == want


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.{layer}.input_layernorm.weight",
        "output_layer.bias",
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(name: str) -> None:
    arch = _arch("llama", num_layers=2)
    with pytest.raises(CheckError, match=r"no parameter of a llama model with 2 layers"):
        split_dim(name, arch)
    with pytest.raises(CheckError):
        hf_tensors_of(name, [torch.zeros(1)], arch)


def test_shards_of_a_wrong_shape_are_refused() -> None:
    arch = _arch("llama")
    with pytest.raises(CheckError, match=r"linear_fc2.*\(12, 10\)"):
        hf_tensors_of("decoder.layers.0.mlp.linear_fc2.weight", [torch.zeros(12, 20)] * 2, arch)
    with pytest.raises(CheckError, match=r"word_embeddings"):
        hf_tensors_of(EMBEDDING, [torch.zeros(128, 12)], arch)


def test_a_tp_that_cuts_a_group_and_a_tensor_of_another_shape_are_refused(tmp_path: Path) -> None:
    arch = _arch("llama", num_kv_heads=3, heads_per_group=4)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        with pytest.raises(ConfigError, match=r"layout\.tp = 2 does not divide 3"):
            _shards(reader, "decoder.layers.0.self_attention.linear_qkv.weight", arch, 2)
        with pytest.raises(ConfigError, match=r"up_proj.*config\.json asks for \(22, 12\)|gate_proj"):
            _shards(reader, "decoder.layers.0.mlp.linear_fc1.weight", replace(arch, ffn_size=22), 1)


@given(vocab_size=st.integers(1, 200_000), tp=st.integers(1, 16))
def test_the_padded_vocabulary_is_the_next_multiple_of_128_per_rank(vocab_size: int, tp: int) -> None:
    padded = padded_vocab_size(vocab_size, tp)
    assert padded % (128 * tp) == 0
    assert 0 <= padded - vocab_size < 128 * tp


@given(share=st.integers(1, 30), pp=st.integers(1, 8))
def test_stages_hold_all_layers_once_in_order(share: int, pp: int) -> None:
    stages = [layer_range(share * pp, pp, pp_rank) for pp_rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(share * pp))
    assert {len(stage) for stage in stages} == {share}


def test_layers_that_stages_do_not_share_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layout\.pp = 3: must divide num_hidden_layers = 4"):
        layer_range(4, 3, 0)
