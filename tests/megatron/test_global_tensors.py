"""Keys, shapes and places of `weights.global_tensors` are those of Megatron's own `sharded_state_dict` on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.model import build_chunks, transformer_config
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.stage import Stage
from clipo_megatron.policy.weight_io import load_hf_weights
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.global_tensors import boxes_of, dist_tensor_shapes
from clipo_megatron.weights.names import padded_vocab_size

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the scope is for machines without a GPU")

MODELS = {
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "llama": {"family": "llama"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "mixtral": {"family": "mixtral", "tied": True},
}
TP2, PP2 = ParallelLayout(world_size=2, tp=2), ParallelLayout(world_size=2, pp=2)
CASES = {
    1: [("qwen2_tied", ParallelLayout(world_size=1)), ("qwen3_moe", ParallelLayout(world_size=1))],
    2: [
        ("qwen2", TP2),
        ("qwen2_tied", TP2),
        ("qwen2_tied", PP2),
        ("llama", PP2),
        ("qwen3", ParallelLayout(world_size=2, pp=2, vpp=2)),
        ("qwen3_moe", TP2),
        ("qwen3_moe", ParallelLayout(world_size=2, ep=2)),
        ("mixtral", ParallelLayout(world_size=2, etp=2)),
    ],
    4: [
        ("qwen2_tied", ParallelLayout(world_size=4, tp=2, pp=2)),
        ("qwen3_moe", ParallelLayout(world_size=4, tp=2, pp=2, ep=2)),
        ("mixtral", ParallelLayout(world_size=4, tp=2, pp=2, vpp=2, etp=2)),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_hf(root / name, num_layers=4, vocab_size=300, tokenizer_size=280, **keys)
        for name, keys in MODELS.items()
    }


def _stage(folder: Path, arch: Architecture, layout: ParallelLayout) -> Stage:
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
        chunks = build_chunks(config, arch, layout, rank=rank, device="cpu", precision=precision)
    stage = Stage(chunks, arch, layout, rank=rank)
    load_hf_weights(stage, folder, arch, layout, rank=rank)
    return stage


def _megatrons_tensors(stage: Stage) -> Iterator[tuple[str, list[ShardedTensor]]]:
    """A parameter's name on this rank's chunk -> where Megatron puts it, in the order of its rows."""
    for chunk in stage.chunks:
        with cuda_means_cpu():
            sharded = chunk.sharded_state_dict(metadata={})
            apply_factories(sharded)
        for name, found in sharded.items():
            parts = found if isinstance(found, list) else [found]
            if all(isinstance(part, ShardedTensor) for part in parts):  # not a module's `_extra_state`
                yield name, parts


def _compare(folder: Path, layout: ParallelLayout) -> dict[str, tuple[int, ...]]:
    """Compares the boxes of all parameters of this rank; returns key -> global shape as Megatron sees it."""
    arch, rank = read_architecture(folder), dist.get_rank()
    stage = _stage(folder, arch, layout)
    padded_vocab = padded_vocab_size(arch.vocab_size, layout.tp)
    megatrons = list(_megatrons_tensors(stage))
    parameters = list(stage.named_parameters())
    # A rank's copy of a tied output layer and the embedding of a single stage are one parameter.
    assert len(megatrons) == len(parameters)
    shapes: dict[str, tuple[int, ...]] = {}
    unseen = {id(parameter): name for name, parameter in parameters}
    by_storage = {parameter.data_ptr(): (name, parameter) for name, parameter in parameters}
    for local_name, parts in megatrons:
        name, parameter = by_storage[parts[0].data.data_ptr()]
        boxes = boxes_of(
            name,
            arch,
            tp=layout.tp,
            tp_rank=layout.tp_rank(rank),
            padded_vocab=padded_vocab,
            etp=layout.etp,
            etp_rank=layout.etp_rank(rank),
        )
        assert [(box.key, box.global_shape, box.global_start, box.shape) for box in boxes] == [
            (part.key, part.global_shape, part.global_offset, tuple(part.local_shape)) for part in parts
        ], f"{local_name} = {name} under {layout}"
        for box, part in zip(boxes, parts, strict=True):
            own = parameter.detach()
            for dim, (start, length) in enumerate(zip(box.local_start, box.shape, strict=True)):
                own = own.narrow(dim, start, length)
            assert torch.equal(own, part.data), name
            assert len(box.global_extent) == len(box.global_shape)
            shapes[box.key] = part.global_shape
        del unseen[id(parameter)]
    assert not unseen
    return shapes


def _compare_all(folders: dict[str, Path], world_size: int) -> list[dict[str, tuple[int, ...]]]:
    return [_compare(folders[name], layout) for name, layout in CASES[world_size]]


@pytest.mark.parametrize("world_size", CASES)
def test_boxes_and_shapes_are_those_of_megatrons_sharded_state_dict(folders: dict[str, Path], world_size: int) -> None:
    of_ranks = run_ranks(_compare_all, folders, world_size, world_size=world_size)
    for case, (name, layout) in enumerate(CASES[world_size]):
        arch = read_architecture(folders[name])
        found = {key: shape for rank in of_ranks for key, shape in rank[case].items()}
        assert found == dist_tensor_shapes(arch, padded_vocab=padded_vocab_size(arch.vocab_size, layout.tp)), layout
