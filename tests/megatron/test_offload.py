"""Laws of a policy that gives its training memory back between steps: nothing but the memory changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.policy_cases import ALGORITHM, make_batch, make_worker, scored, share_scores, weights_of
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.worker import PolicyWorker

ONE_UPDATE = replace(ALGORITHM, updates_per_step=1)
CASES = {
    "float32, distributed optimizer, dp 2": ("qwen2", ParallelLayout(world_size=2), {}),
    "bfloat16, distributed optimizer, tp 2": ("qwen3", ParallelLayout(world_size=2, tp=2), {"dtype": "bfloat16"}),
    "bfloat16, plain optimizer, pp 2": (
        "qwen3",
        ParallelLayout(world_size=2, pp=2),
        {"dtype": "bfloat16", "distributed_optimizer": False},
    ),
    "experts, ep 2": ("qwen3_moe", ParallelLayout(world_size=2, ep=2), {}),
}


def _step(worker: PolicyWorker, layout: ParallelLayout, step: int, between: Callable[[], None]) -> None:
    batch = make_batch(seed=step)
    scores = share_scores(worker.score(batch, step=step, with_reference=True), layout)
    between()
    worker.train(scored(batch, scores), step=step)


def _trained(folder: Path, layout: ParallelLayout, options: dict[str, object], offloads: bool) -> list[dict]:
    worker = make_worker(folder, layout, algorithm=ONE_UPDATE, **options)
    weights = []
    for step in range(3):
        if offloads:  # before moments exist, with them, and with the scores of a policy that is offloaded
            assert worker.memory.offload() > 0
        _step(worker, layout, step, worker.memory.onload)
        weights.append(weights_of(worker))
    return weights


@pytest.mark.parametrize("case", CASES)
def test_a_policy_that_was_offloaded_trains_bit_for_bit_as_another(case: str, tmp_path: Path) -> None:
    family, layout, options = CASES[case]
    folder = make_tiny_hf(tmp_path, family, vocab_size=300, tokenizer_size=280)
    want = run_ranks(_trained, folder, layout, options, False, world_size=2)
    found = run_ranks(_trained, folder, layout, options, True, world_size=2)
    for of_rank, wanted in zip(found, want, strict=True):
        assert any(not torch.equal(of_rank[0][name], of_rank[-1][name]) for name in of_rank[0])
        for step, weights in enumerate(of_rank):
            for name, tensor in weights.items():
                assert torch.equal(tensor, wanted[step][name]), (step, name)


def _saved(folder: Path, layout: ParallelLayout, options: dict[str, object], target: Path) -> None:
    worker = make_worker(folder, layout, algorithm=ONE_UPDATE, **options)
    _step(worker, layout, 0, lambda: None)
    for name in ("loaded", "offloaded"):
        if name == "offloaded":
            worker.memory.offload()
        worker.begin_save(target / name)
        worker.finish_save()


@pytest.mark.parametrize("case", CASES)
def test_a_save_while_offloaded_holds_the_same_bytes(case: str, tmp_path: Path) -> None:
    family, layout, options = CASES[case]
    folder = make_tiny_hf(tmp_path / "model", family, vocab_size=300, tokenizer_size=280)
    for name in ("loaded", "offloaded"):
        (tmp_path / name).mkdir()
    run_ranks(_saved, folder, layout, options, tmp_path, world_size=2)
    for rank in range(2):
        loaded, offloaded = (tmp_path / name / f"__{rank}_0.distcp" for name in ("loaded", "offloaded"))
        assert loaded.stat().st_size > 100_000
        assert loaded.read_bytes() == offloaded.read_bytes()


def _memory(folder: Path, layout: ParallelLayout) -> dict[str, int]:
    worker = make_worker(folder, layout, algorithm=ONE_UPDATE, dtype="bfloat16")
    _step(worker, layout, 0, lambda: None)
    trained = {
        name: sum(parameter.numel() for parameter in worker._stage.parameters() if parameter.requires_grad)
        for name in ("parameters",)
    }
    sizes = []
    for _ in range(3):
        sizes.append(worker.memory.offload())
        left = sum(
            tensor.untyped_storage().nbytes()
            for optimizer in worker._optimizer.inner
            for values in optimizer.state.values()
            for tensor in values.values()
            if isinstance(tensor, torch.Tensor) and tensor.dim()
        )
        left += sum(buffer.grad_data.untyped_storage().nbytes() for buffer in worker._stage.wrapped[0].buffers)
        assert left == 0
        with pytest.raises(CheckError, match="train: gradients and optimizer state are offloaded"):
            worker.train(make_batch(), step=1)
        with pytest.raises(CheckError, match="load: gradients and optimizer state are offloaded"):
            worker.load(folder)
        worker.memory.onload()
        worker.memory.onload()
    return trained | {"freed": sizes[0], "again": sizes[-1]}


def test_gradients_masters_and_moments_are_what_is_given_back(tmp_path: Path) -> None:
    """On one rank: 4 bytes of gradient and 12 of masters and moments a parameter, each time."""
    folder = make_tiny_hf(tmp_path, "qwen3", vocab_size=300, tokenizer_size=280)
    (found,) = run_ranks(_memory, folder, ParallelLayout(world_size=1), world_size=1)
    assert found["freed"] == found["again"]
    assert 16 * found["parameters"] <= found["freed"] <= 1.01 * 16 * found["parameters"] + 4096
