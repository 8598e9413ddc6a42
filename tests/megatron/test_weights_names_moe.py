"""The parameters that Megatron really makes on each rank are those that the tables say, whole model and shapes alike."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.model import PolicyModel, build_chunks, transformer_config
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import local_parameter
from clipo_megatron.weights.names import global_name, layer_numbers, megatron_parameter_names, padded_vocab_size

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the scope is for machines without a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(
        tmp_path_factory.mktemp("moe"), "qwen3_moe", num_layers=4, num_experts=4, vocab_size=300, tokenizer_size=280
    )


def _chunks(arch: Architecture, layout: ParallelLayout) -> list[PolicyModel]:
    rank, precision = dist.get_rank(), PrecisionSettings()
    with cuda_means_cpu():
        make_groups(layout, seed=0)
        config = transformer_config(
            arch,
            layout,
            dtype=torch.float32,
            device="cpu",
            sequence_parallel=layout.tp > 1,
            recompute="none",
            precision=precision,
        )
        return build_chunks(config, arch, layout, rank=rank, device="cpu", precision=precision)


def _names_of_rank(folder: Path, layout: ParallelLayout) -> list[str]:
    """Global names of this rank's parameters; checks Megatron's own numbers and every shape on the way."""
    arch, rank = read_architecture(folder), dist.get_rank()
    assert arch.experts is not None
    first_expert = layout.ep_rank(rank) * (arch.experts.num_experts // layout.ep)
    names: list[str] = []
    for number, chunk in enumerate(_chunks(arch, layout)):
        layers = layer_numbers(
            arch.num_layers, pp=layout.pp, pp_rank=layout.pp_rank(rank), vpp=layout.vpp, vpp_rank=number
        )
        own = [cast("TransformerLayer", layer) for layer in chunk.decoder.layers]
        assert [layer.layer_number - 1 for layer in own] == list(layers)
        for layer in own:
            experts = cast("MoELayer", layer.mlp)
            assert experts.local_expert_indices[0] == first_expert
        with HFReader(folder) as reader:
            for local_name, parameter in chunk.named_parameters():
                name = global_name(local_name, first_layer=layers.start, first_expert=first_expert)
                share = local_parameter(
                    reader,
                    name,
                    arch,
                    tp=layout.tp,
                    tp_rank=layout.tp_rank(rank),
                    padded_vocab=padded_vocab_size(arch.vocab_size, layout.tp),
                    etp=layout.etp,
                    etp_rank=layout.etp_rank(rank),
                )
                assert parameter.shape == share.shape, name
                names.append(name)
    assert len(names) == len(set(names))
    return names


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(world_size=1),
        ParallelLayout(world_size=2, ep=2),
        ParallelLayout(world_size=2, etp=2),
        ParallelLayout(world_size=2, tp=2, ep=2),
        ParallelLayout(world_size=2, pp=2, vpp=2),
    ],
    ids=["one", "ep2", "etp2", "tp2-ep2", "pp2-vpp2"],
)
def test_megatrons_parameters_are_those_of_the_table(folder: Path, layout: ParallelLayout) -> None:
    of_ranks = run_ranks(_names_of_rank, folder, layout, world_size=layout.world_size)
    want = megatron_parameter_names(read_architecture(folder))
    assert {name for names in of_ranks for name in names} == set(want)
    if layout.world_size == 1:
        assert sorted(of_ranks[0]) == sorted(want)
