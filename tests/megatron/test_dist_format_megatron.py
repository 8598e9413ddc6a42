"""Distributed checkpoints written here load through Megatron-core; those that Megatron-core writes are read here."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from safetensors.torch import load_file
from support.policy_cases import make_worker, weights_of
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.dist_index import WrittenFile, write_index
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.global_tensors import dist_tensor_shapes
from clipo_megatron.weights.names import padded_vocab_size

GRID = ParallelLayout(world_size=4, tp=2, pp=2)
OTHERS = {"pp2": ParallelLayout(world_size=2, pp=2), "tp2_ep2": ParallelLayout(world_size=2, tp=2, ep=2)}
# A save starts a server process for this queue, by spawn, which nobody ends; results stay in the process that saves.
RESULTS = "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    # 512 rows need no padding at tp 1 and 2: Megatron refuses to load another number of padded rows.
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_hf(folder, "qwen3_moe", num_layers=4, vocab_size=512, tokenizer_size=280)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> tuple[Path, Path]:
    """(written by Megatron, written here) of one model on a grid of 2 x 2."""
    theirs, ours = tmp_path_factory.mktemp("megatron"), tmp_path_factory.mktemp("ours")
    files = run_ranks(_save, model, theirs, ours, world_size=GRID.world_size)
    write_index(ours, files)
    return theirs, ours


def _sharded(worker: PolicyWorker) -> dict[str, Any]:
    return {f"chunk{index}": chunk.sharded_state_dict() for index, chunk in enumerate(worker._stage.chunks)}


def _sharded_tensors(worker: PolicyWorker) -> list[ShardedTensor]:
    state = _sharded(worker)
    apply_factories(state)
    return [part for part in nested_values(state) if isinstance(part, ShardedTensor)]


def _box_shape(part: ShardedTensor) -> tuple[int, ...]:
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


def _save(model: Path, theirs: Path, ours: Path) -> WrittenFile:
    worker = make_worker(model, GRID, contrastive=None)
    with cuda_means_cpu(), mock.patch(RESULTS, queue.Queue()):
        dist_checkpointing.save(_sharded(worker), str(theirs))
    writer = DistWriter(ours / f"__{dist.get_rank()}_0.distcp")
    for part in _sharded_tensors(worker):
        if is_main_replica(part.replica_id):
            writer.write(
                part.key,
                part.data,
                global_shape=part.global_shape,
                start=part.global_offset,
                shape=_box_shape(part),
            )
    with DistReader(theirs) as reader:
        for part in _sharded_tensors(worker):
            box = reader.read_box(part.key, start=part.global_offset, shape=_box_shape(part))
            assert torch.equal(box, part.data.detach().view(box.shape)), part.key
    return writer.finish()


def _load(model: Path, state: Path, layout: ParallelLayout) -> dict[str, torch.Tensor]:
    worker = make_worker(model, layout, contrastive=None)
    with torch.no_grad():
        for parameter in worker._stage.parameters():
            parameter.zero_()
    with cuda_means_cpu(), torch.no_grad():
        # Extra states of modules are no tensors and not written here: Megatron is told to go on without them.
        loaded = dist_checkpointing.load(_sharded(worker), str(state), strict="log_unexpected")
        for index, chunk in enumerate(worker._stage.chunks):
            left_out = chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)
            assert all(name.endswith("_extra_state") for name in left_out.missing_keys)
    return weights_of(worker)


def test_ranks_find_their_parts_in_what_megatron_saved(saved, model):
    architecture = read_architecture(model)
    shapes = dist_tensor_shapes(architecture, padded_vocab=padded_vocab_size(architecture.vocab_size, GRID.tp))
    with DistReader(saved[0]) as theirs:
        assert {key: theirs.shape(key) for key in theirs.keys()} == shapes  # noqa: SIM118  (no dict)


def test_the_same_model_written_here_and_by_megatron_reads_equal(saved):
    with DistReader(saved[0]) as theirs, DistReader(saved[1]) as ours:
        assert sorted(theirs.keys()) == sorted(ours.keys())
        for key in theirs.keys():  # noqa: SIM118  (no dict)
            whole = {"start": (0,) * len(theirs.shape(key)), "shape": theirs.shape(key)}
            assert theirs.dtype(key) == ours.dtype(key)
            assert torch.equal(theirs.read_box(key, **whole), ours.read_box(key, **whole)), key


@pytest.mark.parametrize("name", OTHERS)
def test_megatron_loads_what_is_written_here_on_another_layout(saved, model, name):
    layout = OTHERS[name]
    found = {}
    for stage in run_ranks(_load, model, saved[1], layout, world_size=layout.world_size):
        found |= stage
    wanted = load_file(model / "model.safetensors")
    assert sorted(found) == sorted(wanted)
    for tensor_name, tensor in wanted.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name
