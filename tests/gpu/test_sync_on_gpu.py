"""Planned copies out of another process's GPU memory: the same values as on a CPU, opened once, refused as there.

No GPU was at hand when these tests were written: they have not been run yet. A GPU of their own process each: spawned.
"""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.architectures import small_architecture
from support.plan_cases import Case, shards_of
from support.plans import UNWRITTEN, numbered_folder, shapes_by_layer, sliced_engine_rank
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clipo_megatron.checks.sync_speed import measure_sync_speed
from clipo_megatron.checks.sync_speed_result import SyncSpeed, SyncSpeedSettings
from clipo_megatron.errors import EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.executor import PlannedCopies
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.shared_parameters import SharedHandles, open_shared, reading, share
from clipo_megatron.weights.reduced import write_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
VERSIONS = 3


def _case() -> Case:
    arch = small_architecture("qwen3_moe", num_layers=3)
    placement = place_apart(trainer_ranks=2, engine_ranks=2, gpus_per_node=8)
    return Case(arch, ParallelLayout(world_size=2, tp=2, ep=2), EngineLayout(engines=1, tp=2), placement, 100)


def _owner(pipe: Connection, folder: Path) -> None:
    """Both trainer ranks; for each version asked for, all weights are the folder's times it."""
    first = {
        rank: {name: tensor.cuda() for name, tensor in shard.items()}
        for rank, shard in shards_of(_case(), folder).items()
    }
    live = {rank: {name: tensor.clone() for name, tensor in shard.items()} for rank, shard in first.items()}
    shared = [share(shard, owner=f"trainer rank {rank}") for rank, shard in live.items()]
    pipe.send([of_rank.handles.to_json() for of_rank in shared])
    while True:
        try:
            version = pipe.recv()
        except EOFError:
            return
        for rank, of_rank in enumerate(shared):
            of_rank.begin_change()
            for name, tensor in live[rank].items():
                torch.mul(first[rank][name], version, out=tensor)
            of_rank.end_change(version)
        pipe.send(None)


def test_an_engine_rank_pulls_its_slices_of_each_version(tmp_path: Path) -> None:
    case = _case()
    hf = numbered_folder(case.arch, tmp_path)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_owner, args=(other, tmp_path), daemon=True)
    process.start()
    other.close()
    opened = [open_shared(SharedHandles.from_json(text)) for text in pipe.recv()]
    sources = {rank: parameters.tensors for rank, parameters in enumerate(opened)}
    shapes = shapes_by_layer(case.plan.engine_shapes, case.arch.num_layers)
    for rank in range(2):
        targets = {name: torch.full(shape, -7.0, device="cuda") for name, shape in shapes.items()}
        bound = PlannedCopies(case.plan, sources, engine=0, engine_rank=rank).bind(targets)
        expected = sliced_engine_rank(case.arch, hf, tp=2, rank=rank, expert_parallel=False)
        for version in range(1 + VERSIONS * rank, 1 + VERSIONS * (rank + 1)):
            pipe.send(version)
            pipe.recv()
            with reading(opened, version):
                bound.run()
                bound.wait()
                bound.verify()
            for name, tensor in expected.items():
                assert torch.equal(targets[name].cpu(), torch.where(tensor == UNWRITTEN, 0.0, tensor * version)), name
    with pytest.raises(EngineError, match="are those of version"), reading(opened, 100):
        raise AssertionError("nothing must be read")
    del bound, sources
    for parameters in opened:
        parameters.close()
    pipe.close()
    process.join(30)


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32_768,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
"""Three gigabytes in bfloat16."""


def _measured(folder: Path, *, with_engine: bool) -> SyncSpeed:
    return measure_sync_speed(
        SyncSpeedSettings(
            model_path=folder,
            dtype="bfloat16",
            device="cuda",
            trainer=ParallelLayout(world_size=1),
            engine_tp=1,
            repeats=9,
            bucket_mib=256,
            with_engine=with_engine,
        )
    )


def test_planned_copies_of_three_gigabytes_take_at_most_ten_times_the_floor(tmp_path: Path) -> None:
    found = _measured(write_random_model(tmp_path / "model", CONFIG, seed=0), with_engine=False)
    assert found.of_floor > 0.1


def test_a_real_engine_is_updated_by_plan_and_by_vllm_itself_in_one_run(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", CONFIG, seed=0)
    words = Tokenizer(models.WordLevel({"end": 0, "unknown": 1}, unk_token="unknown"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end").save_pretrained(folder)
    found = _measured(folder, with_engine=True)
    print(json.dumps(found.as_dict(), indent=1))
    assert found.engine_planned_s is not None
    assert found.vllm_ipc_s is not None
    assert found.engine_planned_s > found.planned_s > 0.0
