"""Training state on disk: an interrupted run goes on bit for bit, and a state that does not belong here is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.policy_cases import (
    CONTRASTIVE,
    OPTIMIZER,
    head_weights,
    make_batch,
    make_worker,
    scored,
    share_scores,
    weights_of,
)
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import CheckpointError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.state import (
    optimizer_steps,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    write_state,
)
from clipo_megatron.policy.worker import PolicyWorker

ONE = ParallelLayout(world_size=1)
WARMUP = replace(OPTIMIZER, warmup_updates=5)
PLAIN = {"distributed_optimizer": False}
DELAYED = PrecisionSettings(recipe="delayed", amax_history=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_hf(folder, "qwen2", tied=True, num_layers=4, vocab_size=300, tokenizer_size=280)


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("moe"), "qwen3_moe", vocab_size=300, tokenizer_size=280)


def _step(worker: PolicyWorker, layout: ParallelLayout, step: int) -> dict[str, object]:
    batch = make_batch(seed=step)
    scores = share_scores(worker.score(batch, step=step, with_reference=True), layout)
    report = worker.train(scored(batch, scores), step=step)
    return {
        "scores": {name: torch.from_numpy(getattr(scores, name)) for name in ("old_logprobs", "reference_logprobs")},
        "metrics": None if report is None else report.metrics,
        "head_metrics": scores.contrastive_metrics,
        "weights": weights_of(worker),
        "head": head_weights(worker),
        "random": {"draw": torch.rand(4)},
    }


def _interrupted(
    model: Path, state: Path, layout: ParallelLayout, dtype: str, options: dict[str, object]
) -> tuple[dict, dict]:
    """The third step of a run, and the same step after a resume in a fresh worker."""
    torch.manual_seed(11)
    worker = make_worker(model, layout, dtype=dtype, optimizer=WARMUP, **options)
    for step in (1, 2):
        _step(worker, layout, step)
    worker.save(state)
    uninterrupted = _step(worker, layout, 3)
    torch.manual_seed(99)
    resumed = make_worker(model, layout, dtype=dtype, optimizer=WARMUP, **options)
    resumed.load(state)
    return uninterrupted, _step(resumed, layout, 3)


def _assert_same(results: list[tuple[dict, dict]]) -> None:
    for uninterrupted, resumed in results:
        assert uninterrupted["metrics"] == resumed["metrics"]
        assert uninterrupted["head_metrics"] == resumed["head_metrics"]
        for key in ("scores", "weights", "head", "random"):
            for name, tensor in uninterrupted[key].items():
                assert torch.equal(tensor, resumed[key][name]), f"{key}: {name}"


@pytest.mark.parametrize(
    ("layout", "dtype", "options"),
    [
        (ONE, "float32", {}),
        (ONE, "bfloat16", {}),
        (ONE, "bfloat16", {"precision": DELAYED}),
        (ParallelLayout(world_size=2), "float32", {}),
        (ParallelLayout(world_size=2), "bfloat16", {}),
        (ParallelLayout(world_size=2), "float32", PLAIN),
        (ParallelLayout(world_size=2), "bfloat16", PLAIN),
        (ParallelLayout(world_size=2, cp=2), "float32", {}),
        (ParallelLayout(world_size=2, pp=2, vpp=2), "float32", {}),
        (ParallelLayout(world_size=4, tp=2, pp=2), "float32", {}),
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path, layout, dtype, options):
    _assert_same(run_ranks(_interrupted, folder, tmp_path, layout, dtype, options, world_size=layout.world_size))


@pytest.mark.parametrize(
    ("layout", "dtype", "options"),
    [
        (ParallelLayout(world_size=2, ep=2), "float32", {}),
        (ParallelLayout(world_size=2, ep=2), "bfloat16", PLAIN),
        (ParallelLayout(world_size=2, pp=2), "float32", {"freeze_router": True}),
    ],
    ids=str,
)
def test_a_resumed_mixture_of_experts_goes_on_bit_for_bit(moe_folder, tmp_path, layout, dtype, options):
    _assert_same(run_ranks(_interrupted, moe_folder, tmp_path, layout, dtype, options, world_size=layout.world_size))


class _GroupStepOptimizer(torch.optim.Optimizer):
    """Counts its steps in the groups, as Transformer Engine's AdamW on a GPU does; torch's has a tensor a parameter."""

    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = state.get("exp_avg", torch.zeros_like(parameter)) + group["step"]
                parameter.data.sub_(state["exp_avg"])


@pytest.mark.parametrize("steps", [0, 3])
def test_optimizers_that_count_steps_in_their_groups_are_restored(tmp_path, steps):
    def fresh() -> tuple[list[torch.nn.Parameter], _GroupStepOptimizer]:
        parameters = [torch.nn.Parameter(torch.ones(2) * number) for number in range(12)]
        return parameters, _GroupStepOptimizer([{"params": parameters[:11]}, {"params": parameters[11:]}], {})

    parameters, optimizer = fresh()
    for _ in range(steps):
        optimizer.step()
    plain = {"identity": {}, "steps": optimizer_steps(optimizer)}
    write_state(tmp_path, 0, optimizer_tensors(optimizer, "policy"), plain)

    restored_parameters, restored = fresh()
    tensors, plain = read_state(tmp_path, 0, identity={})
    restore_optimizer(restored, "policy", tensors, plain["steps"])
    optimizer.step()
    restored.step()
    for one, other in zip(parameters, restored_parameters, strict=True):
        assert torch.equal(one, other)


def _save(model: Path, state: Path) -> None:
    worker = make_worker(model, ONE)
    _step(worker, ONE, 1)
    worker.save(state)


def _load(model: Path, state: Path, layout: ParallelLayout, options: dict[str, object]) -> str:
    worker = make_worker(model, layout, **options)
    with pytest.raises(CheckpointError) as caught:
        worker.load(state)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    state = tmp_path_factory.mktemp("state")
    run_ranks(_save, folder, state, world_size=1)
    return state


@pytest.mark.parametrize(
    ("layout", "options", "word"),
    [
        (ParallelLayout(world_size=2), {}, "layout"),
        (ONE, {"dtype": "bfloat16"}, "dtype"),
        (ONE, {"precision": DELAYED}, "precision"),
        (ONE, PLAIN, "distributed_optimizer"),
        (ONE, {"freeze_router": True}, "freeze_router"),
        (ONE, {"contrastive": None}, "head"),
        (ONE, {"contrastive": replace(CONTRASTIVE, head_size=8)}, "head"),
    ],
    ids=["layout", "dtype", "precision", "optimizer", "router", "no_head", "head_size"],
)
def test_a_state_of_another_run_is_refused(folder, saved, layout, options, word):
    messages = run_ranks(_load, folder, saved, layout, options, world_size=layout.world_size)
    assert word in messages[0]
    assert "Resume with the same layout" in messages[0]


def test_a_state_of_another_architecture_is_refused(saved, tmp_path):
    other = make_tiny_hf(tmp_path, "qwen3", vocab_size=300, tokenizer_size=280)
    assert "architecture" in run_ranks(_load, other, saved, ONE, {}, world_size=1)[0]


@pytest.mark.parametrize("damage", ["truncated", "missing", "not_json"])
def test_a_damaged_state_is_refused(folder, saved, tmp_path, damage):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors, plain = sorted(tmp_path.iterdir(), key=lambda file: file.suffix, reverse=True)
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    else:
        plain.write_text("{")
    assert "can't be read" in run_ranks(_load, folder, tmp_path, ONE, {}, world_size=1)[0]
