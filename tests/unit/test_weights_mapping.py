"""Laws of the name tables: what a rank holds, and that export undoes import bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.architectures import small_architecture
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
    is_expert,
    megatron_parameter_names,
    padded_vocab_size,
    split_dim,
)


def _random_folder(arch: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_tensor_specs(arch).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _shards(reader: HFReader, name: str, arch: Architecture, tp: int, etp: int = 1) -> list[Tensor]:
    """The shares of all ranks that split the parameter."""
    padded = padded_vocab_size(arch.vocab_size, tp)
    places = [(0, rank) for rank in range(etp)] if is_expert(name) else [(rank, 0) for rank in range(tp)]
    return [
        local_parameter(reader, name, arch, tp=tp, tp_rank=tp_rank, padded_vocab=padded, etp=etp, etp_rank=etp_rank)
        for tp_rank, etp_rank in places
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
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
    etp=st.sampled_from([1, 2, 3]),
    expert_ffn_share=st.integers(1, 3),
    num_experts=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_export_of_the_shards_is_the_imported_folder_bit_for_bit(
    family: str,
    tp: int,
    groups_per_rank: int,
    ffn_share: int,
    vocab_size: int,
    tied: bool,
    etp: int,
    expert_ffn_share: int,
    dtype: torch.dtype,
    **sizes: int,
) -> None:
    arch = small_architecture(
        family,
        vocab_size=vocab_size,
        tied=tied,
        num_kv_heads=groups_per_rank * tp,
        ffn_size=ffn_share * tp,
        expert_ffn_size=expert_ffn_share * etp,
        **sizes,
    )
    with tempfile.TemporaryDirectory() as folder:
        want = _random_folder(arch, Path(folder), dtype)
        got: dict[str, Tensor] = {}
        with HFReader(Path(folder)) as reader:
            for name in megatron_parameter_names(arch):
                exported = dict(hf_tensors_of(name, _shards(reader, name, arch, tp, etp), arch))
                assert not exported.keys() & got.keys()
                got |= exported
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("etp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_experts_that_transformers_wrote_come_back_bit_for_bit(tmp_path: Path, tp: int, etp: int) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3_moe", num_heads=8, num_kv_heads=4, num_experts=3, dtype="bfloat16")
    arch, want = read_architecture(folder), load_file(folder / "model.safetensors")
    with HFReader(folder) as reader:
        got = dict(
            pair
            for name in megatron_parameter_names(arch)
            for pair in hf_tensors_of(name, _shards(reader, name, arch, tp, etp), arch)
        )
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in want.items())


@pytest.mark.parametrize("tp", [1, 3])
def test_qkv_rows_of_a_rank_are_its_groups_query_heads_then_key_then_value(tmp_path: Path, tp: int) -> None:
    arch = small_architecture("qwen2", num_kv_heads=3, heads_per_group=2, head_dim=5)
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
    arch = small_architecture("llama")
    hf = _random_folder(arch, tmp_path)
    gate, up = hf["model.layers.0.mlp.gate_proj.weight"], hf["model.layers.0.mlp.up_proj.weight"]
    with HFReader(tmp_path) as reader:
        shards = _shards(reader, "decoder.layers.0.mlp.linear_fc1.weight", arch, 2)
    for rank, shard in enumerate(shards):
        want = [gate[row] for row in range(rank * 10, rank * 10 + 10)] + [
            up[row] for row in range(rank * 10, rank * 10 + 10)
        ]
        assert torch.equal(shard, torch.stack(want))


@pytest.mark.parametrize("name", ["local_experts.{}.linear_{}.weight", "linear_{1}.weight{0}"])
def test_an_expert_is_split_over_etp_by_its_own_width_whatever_the_tp(tmp_path: Path, name: str) -> None:
    arch = small_architecture("qwen3_moe", num_experts=12, expert_ffn_size=6)
    hf = _random_folder(arch, tmp_path)
    gate, up, down = (hf[f"model.layers.1.mlp.experts.11.{part}_proj.weight"] for part in ("gate", "up", "down"))
    megatron = "decoder.layers.1.mlp.experts." + name
    with HFReader(tmp_path) as reader:
        fc1 = _shards(reader, megatron.format(11, "fc1"), arch, 4, 2)
        fc2 = _shards(reader, megatron.format(11, "fc2"), arch, 4, 2)
    assert len(fc1) == len(fc2) == 2
    for rank in range(2):
        rows = range(3 * rank, 3 * rank + 3)
        assert torch.equal(fc1[rank], torch.stack([gate[row] for row in rows] + [up[row] for row in rows]))
        assert torch.equal(fc2[rank], torch.stack([down[:, row] for row in rows], 1))


def test_experts_have_one_parameter_under_two_names() -> None:
    arch = small_architecture("qwen3_moe", num_experts=12)
    for linear, dim, size in (("fc1", 0, (16, 12)), ("fc2", 1, (12, 8))):
        plain = f"decoder.layers.0.mlp.experts.local_experts.10.linear_{linear}.weight"
        grouped = f"decoder.layers.0.mlp.experts.linear_{linear}.weight10"
        assert split_dim(plain, arch) == split_dim(grouped, arch) == dim
        shards = [torch.randn(size)]
        exported = hf_tensors_of(plain, shards, arch)
        assert [name for name, _ in exported] == [name for name, _ in hf_tensors_of(grouped, shards, arch)]
        assert all(name.startswith("model.layers.0.mlp.experts.10.") for name, _ in exported)
        assert plain in megatron_parameter_names(arch)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_beyond_the_vocabulary_are_zero_on_import_and_gone_on_export(tmp_path: Path, tp: int) -> None:
    arch = small_architecture("qwen3", vocab_size=130)  # tp = 4 pads to 512: two ranks hold padding only
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
    arch = small_architecture("qwen3", tied=True)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        output, embedding = _shards(reader, OUTPUT_LAYER, arch, 2), _shards(reader, EMBEDDING, arch, 2)
    assert all(torch.equal(a, b) for a, b in zip(output, embedding, strict=True))
    assert hf_tensors_of(OUTPUT_LAYER, output, arch) == []
    assert OUTPUT_LAYER not in megatron_parameter_names(arch)


@pytest.mark.parametrize(("fused", "plain"), FUSED_NORM_ALIASES.items())
def test_a_fused_norm_is_the_norm_under_another_name(tmp_path: Path, fused: str, plain: str) -> None:
    arch = small_architecture("qwen2")
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
    arch = small_architecture(family)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        for name in megatron_parameter_names(arch):
            dim = split_dim(name, arch)
            [whole], halves = _shards(reader, name, arch, 1), _shards(reader, name, arch, 2, 2)
            if dim is None:
                assert torch.equal(halves[0], whole)
                assert torch.equal(halves[1], whole)
            else:
                assert not torch.equal(halves[0], halves[1])
                assert torch.cat(halves, dim).numel() >= whole.numel()  # more where the vocabulary is padded
                assert [n for d, n in enumerate(halves[0].shape) if d != dim] == (
                    [n for d, n in enumerate(whole.shape) if d != dim]
                )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "decoder.layers.2.input_layernorm.weight"),
        ("llama", "decoder.layers.0.mlp.linear_fc3.weight"),
        ("llama", "decoder.layers.0.self_attention.linear_qkv.bias"),
        ("llama", "decoder.layers.{layer}.input_layernorm.weight"),
        ("llama", "output_layer.bias"),
        ("llama", "decoder.layers.0.mlp.router.weight"),
        ("llama", "decoder.layers.0.mlp.experts.linear_fc1.weight0"),
        ("qwen3_moe", "decoder.layers.0.mlp.linear_fc1.weight"),
        ("qwen3_moe", "decoder.layers.0.mlp.experts.linear_fc1.weight4"),
        ("qwen3_moe", "decoder.layers.0.mlp.experts.linear_fc1.weight"),
        ("qwen3_moe", "decoder.layers.0.mlp.experts.local_experts.4.linear_fc2.weight"),
        ("qwen3_moe", "decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc2.weight"),
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(family: str, name: str) -> None:
    arch = small_architecture(family, num_layers=2)
    with pytest.raises(CheckError, match=rf"no parameter of a {family} model with 2 layers"):
        split_dim(name, arch)
    with pytest.raises(CheckError):
        hf_tensors_of(name, [torch.zeros(1)], arch)


def test_shards_of_a_wrong_shape_are_refused() -> None:
    arch = small_architecture("llama")
    with pytest.raises(CheckError, match=r"linear_fc2.*\(12, 10\)"):
        hf_tensors_of("decoder.layers.0.mlp.linear_fc2.weight", [torch.zeros(12, 20)] * 2, arch)
    with pytest.raises(CheckError, match=r"word_embeddings"):
        hf_tensors_of(EMBEDDING, [torch.zeros(128, 12)], arch)


def test_a_tp_that_cuts_a_group_and_a_tensor_of_another_shape_are_refused(tmp_path: Path) -> None:
    arch = small_architecture("llama", num_kv_heads=3, heads_per_group=4)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader:
        with pytest.raises(ConfigError, match=r"layout\.tp = 2 does not divide 3"):
            _shards(reader, "decoder.layers.0.self_attention.linear_qkv.weight", arch, 2)
        with pytest.raises(ConfigError, match=r"up_proj.*config\.json asks for \(22, 12\)|gate_proj"):
            _shards(reader, "decoder.layers.0.mlp.linear_fc1.weight", replace(arch, ffn_size=22), 1)


def test_an_etp_that_does_not_divide_an_expert_is_refused(tmp_path: Path) -> None:
    arch = small_architecture("qwen3_moe", expert_ffn_size=8)
    _random_folder(arch, tmp_path)
    with HFReader(tmp_path) as reader, pytest.raises(ConfigError, match=r"layout\.etp = 3 does not divide 8"):
        _shards(reader, "decoder.layers.0.mlp.experts.linear_fc1.weight0", arch, 1, 3)
