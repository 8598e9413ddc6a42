"""Laws of the global tensors: the ranks' boxes tile them, and through them a rank gets what it gets from the HF folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.architectures import small_architecture
from torch import Tensor

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.global_tensors import Box, boxes_of, dist_tensor_shapes, hf_places
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import hf_tensors_of, local_parameter
from clipo_megatron.weights.names import (
    OUTPUT_LAYER,
    hf_tensor_specs,
    is_expert,
    megatron_parameter_names,
    padded_vocab_size,
    split_dim,
)

MODELS = {
    "family": st.sampled_from(sorted(FAMILIES)),
    "tp": st.sampled_from([1, 2, 3, 4]),
    "groups_per_rank": st.integers(1, 3),
    "heads_per_group": st.integers(1, 3),
    "head_dim": st.integers(1, 5),
    "ffn_share": st.integers(1, 5),
    "hidden_size": st.integers(1, 7),
    "vocab_size": st.integers(1, 400),
    "num_layers": st.integers(1, 3),
    "tied": st.booleans(),
    "etp": st.sampled_from([1, 2, 3]),
    "expert_ffn_share": st.integers(1, 3),
    "num_experts": st.integers(1, 6),
}


def _architecture(
    family: str,
    tp: int,
    etp: int,
    groups_per_rank: int,
    ffn_share: int,
    expert_ffn_share: int,
    vocab_size: int,
    tied: bool,
    **sizes: int,
) -> Architecture:
    return small_architecture(
        family,
        vocab_size=vocab_size,
        tied=tied,
        num_kv_heads=groups_per_rank * tp,
        ffn_size=ffn_share * tp,
        expert_ffn_size=expert_ffn_share * etp,
        **sizes,
    )


def _whole_model(arch: Architecture, *, tp: int, etp: int) -> Iterator[tuple[str, list[list[Box]]]]:
    """A parameter's name -> its boxes on each rank that holds another part of it."""
    padded = padded_vocab_size(arch.vocab_size, tp)
    for name in megatron_parameter_names(arch):
        degree = 1 if split_dim(name, arch) is None else etp if is_expert(name) else tp
        yield (
            name,
            [
                boxes_of(
                    name,
                    arch,
                    tp=tp,
                    tp_rank=0 if is_expert(name) else rank,
                    padded_vocab=padded,
                    etp=etp,
                    etp_rank=rank if is_expert(name) else 0,
                )
                for rank in range(degree)
            ],
        )


def _part(tensor: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A view of a rectangle; leading axes that `shape` lacks have length 1 and are left out."""
    shape = (1,) * (len(start) - len(shape)) + shape
    for dim, (first, length) in enumerate(zip(start, shape, strict=True)):
        tensor = tensor.narrow(dim, first, length)
    return tensor


def _random_folder(arch: Architecture, folder: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in hf_tensor_specs(arch).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _global_tensors(arch: Architecture, hf: Mapping[str, Tensor], padded_vocab: int) -> dict[str, Tensor]:
    """Built from the Hugging Face tensors by `hf_places` alone; what no place holds is 0."""
    wholes = {key: torch.zeros(shape) for key, shape in dist_tensor_shapes(arch, padded_vocab=padded_vocab).items()}
    for name, places in hf_places(arch).items():
        for place in places:
            part = _part(wholes[place.key], place.global_start, place.shape)
            part.copy_(_part(hf[name], place.hf_start, place.shape).reshape(part.shape))
    return wholes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**MODELS)
def test_the_boxes_of_all_ranks_tile_every_global_tensor_once(tp: int, etp: int, **model: int) -> None:
    arch = _architecture(tp=tp, etp=etp, **model)
    shapes = dist_tensor_shapes(arch, padded_vocab=padded_vocab_size(arch.vocab_size, tp))
    seen = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in shapes.items()}
    for name, of_ranks in _whole_model(arch, tp=tp, etp=etp):
        for boxes in of_ranks:
            assert sum(box.shape[0] for box in boxes) == boxes[-1].local_start[0] + boxes[-1].shape[0], name
            for box in boxes:
                assert box.global_shape == shapes[box.key]
                assert len(box.global_extent) == len(box.global_shape)
                _part(seen[box.key], box.global_start, box.global_extent).add_(1)
    for key, count in seen.items():
        assert torch.equal(count, torch.ones_like(count)), key


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**MODELS)
def test_the_places_of_the_hf_tensors_tile_every_global_tensor_but_the_vocabularys_padding(
    tp: int, etp: int, **model: int
) -> None:
    arch = _architecture(tp=tp, etp=etp, **model)
    padded = padded_vocab_size(arch.vocab_size, tp)
    ones = {name: torch.ones(shape) for name, shape in hf_tensor_specs(arch).items()}
    for key, whole in _global_tensors(arch, ones, padded).items():
        num_rows = arch.vocab_size if whole.shape[0] == padded else whole.shape[0]
        assert whole[:num_rows].eq(1).all(), key
        assert whole[num_rows:].eq(0).all(), key
    places = hf_places(arch)
    assert list(places) == list(ones)
    for name, tensor in ones.items():
        for place in places[name]:
            _part(tensor, place.hf_start, place.shape).sub_(1)
        assert tensor.eq(0).all(), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**MODELS)
def test_a_rank_gets_the_same_through_the_global_tensors_as_from_the_folder(tp: int, etp: int, **model: int) -> None:
    arch = _architecture(tp=tp, etp=etp, **model)
    padded = padded_vocab_size(arch.vocab_size, tp)
    with tempfile.TemporaryDirectory() as folder:
        hf = _random_folder(arch, Path(folder))
        reader = HFReader(Path(folder))
        wholes = _global_tensors(arch, hf, padded)
        for name, of_ranks in _whole_model(arch, tp=tp, etp=etp):
            shards: list[Tensor] = []
            for rank, boxes in enumerate(of_ranks):
                places = {"etp_rank": rank} if is_expert(name) else {"tp_rank": rank}
                want = local_parameter(
                    reader, name, arch, tp=tp, padded_vocab=padded, etp=etp, **({"tp_rank": 0} | places)
                )
                got = torch.full_like(want, torch.nan)
                for box in boxes:
                    part = _part(got, box.local_start, box.shape)
                    part.copy_(_part(wholes[box.key], box.global_start, box.global_extent).reshape(part.shape))
                assert torch.equal(got, want), f"{name} of rank {rank}"
                shards.append(got)
            for hf_name, tensor in hf_tensors_of(name, shards, arch):
                assert torch.equal(tensor, hf[hf_name]), hf_name
        reader.close()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tied_output_layer_lies_where_its_embedding_does(family: str) -> None:
    arch = small_architecture(family, tied=True)
    boxes = boxes_of(OUTPUT_LAYER, arch, tp=2, tp_rank=1, padded_vocab=256)
    assert boxes == boxes_of("embedding.word_embeddings.weight", arch, tp=2, tp_rank=1, padded_vocab=256)
    assert OUTPUT_LAYER not in dist_tensor_shapes(arch, padded_vocab=256)
    assert OUTPUT_LAYER in dist_tensor_shapes(small_architecture(family), padded_vocab=256)


def test_names_of_either_layer_spec_mean_the_same_boxes() -> None:
    dense, moe = small_architecture("qwen3"), small_architecture("mixtral")
    for arch, local, fused in [
        (dense, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        (dense, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        (moe, "mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"),
    ]:
        of_local, of_fused = (
            boxes_of(f"decoder.layers.1.{name}", arch, tp=2, tp_rank=0, padded_vocab=256) for name in (local, fused)
        )
        assert of_local == of_fused


def test_a_layout_that_does_not_divide_a_tensor_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"layout\.tp = 3 does not divide 4"):
        boxes_of(
            "decoder.layers.0.self_attention.linear_qkv.weight",
            small_architecture("qwen3"),
            tp=3,
            tp_rank=0,
            padded_vocab=384,
        )
