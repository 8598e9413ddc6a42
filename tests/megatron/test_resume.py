"""Training state on disk: a run goes on as if it had not been interrupted, on its layout bit for bit, on another one
within rounding; a state that does not belong here is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gpu_cases import Held, make_folder, saved_and_restored
from support.policy_cases import (
    CONTRASTIVE,
    OPTIMIZER,
    errors_by_kind,
    head_weights,
    make_batch,
    make_worker,
    save_state,
    scored,
    share_scores,
    weights_of,
)
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.training import POLICY_FILE
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.worker import PolicyWorker

ONE, TWO = ParallelLayout(world_size=1), ParallelLayout(world_size=2)
GRID = ParallelLayout(world_size=4, tp=2, pp=2)
WARMUP = replace(OPTIMIZER, warmup_updates=5)
PLAIN = {"distributed_optimizer": False}
DELAYED = PrecisionSettings(recipe="delayed", amax_history=4)
SAVED_AFTER, STEPS = 3, 6


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
    columns = ("old_logprobs", "reference_logprobs", "contrastive_loss", "is_anchor")
    return {
        "scores": {name: torch.from_numpy(getattr(scores, name)) for name in columns},
        "metrics": None if report is None else dict(report.metrics),
        "head_metrics": dict(scores.contrastive_metrics),
        "weights": weights_of(worker),
        "head": head_weights(worker),
        "random": {"draw": torch.rand(4)},
    }


def _uninterrupted(model: Path, state: Path, layout: ParallelLayout, last: int, options: dict[str, object]) -> list:
    """Steps after the save, in the run that saved and went on."""
    torch.manual_seed(11)
    worker = make_worker(model, layout, optimizer=WARMUP, **options)
    for step in range(1, SAVED_AFTER + 1):
        _step(worker, layout, step)
    save_state(worker, state)
    return [_step(worker, layout, step) for step in range(SAVED_AFTER + 1, last + 1)]


def _resumed(model: Path, state: Path, layout: ParallelLayout, last: int, options: dict[str, object]) -> list:
    torch.manual_seed(99)
    worker = make_worker(model, layout, optimizer=WARMUP, **options)
    warnings = worker.load(state)
    steps = [_step(worker, layout, step) for step in range(SAVED_AFTER + 1, last + 1)]
    steps[0]["warnings"] = warnings
    return steps


def _assert_same(one: list[list[dict]], other: list[list[dict]]) -> None:
    """Rank by rank, step by step, bit by bit."""
    for of_rank, of_resumed in zip(one, other, strict=True):
        for uninterrupted, resumed in zip(of_rank, of_resumed, strict=True):
            assert uninterrupted["metrics"] == resumed["metrics"]
            assert uninterrupted["head_metrics"] == resumed["head_metrics"]
            for key in ("scores", "weights", "head", "random"):
                for name, tensor in uninterrupted[key].items():
                    assert torch.equal(tensor, resumed[key][name]), f"{key}: {name}"
        assert of_resumed[0]["warnings"] == []


def _assert_close(one: list[list[dict]], other: list[list[dict]]) -> None:
    """All ranks together, step by step, within 1e-5; which rows are anchors does not change at all."""
    for step in range(len(one[0])):
        wanted, found = ({key: {} for key in ("weights", "head")} for _ in range(2))
        for results, merged in ((one, wanted), (other, found)):
            for of_rank in results:
                for key, tensors in merged.items():
                    tensors.update(of_rank[step][key])
        for key in ("weights", "head"):
            assert wanted[key].keys() == found[key].keys()
            errors = errors_by_kind(found[key], wanted[key])
            assert max(errors.values()) < 1e-5, (step, errors)
        scores, resumed = one[0][step]["scores"], other[0][step]["scores"]
        assert torch.equal(scores["is_anchor"], resumed["is_anchor"])
        for name, column in scores.items():
            torch.testing.assert_close(resumed[name], column, rtol=1e-5, atol=1e-5)
        (metrics,) = [of_rank[step]["metrics"] for of_rank in one if of_rank[step]["metrics"] is not None]
        (again,) = [of_rank[step]["metrics"] for of_rank in other if of_rank[step]["metrics"] is not None]
        for name in metrics.keys() - {"padding_share", "imbalance"}:  # of the micro-batches, which the layout decides
            assert again[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


def _interrupt(model: Path, state: Path, layout: ParallelLayout, options: dict[str, object], *, last: int) -> tuple:
    """(uninterrupted, resumed) steps of all ranks."""
    arguments = (model, state, layout, last, options)
    return tuple(run_ranks(run, *arguments, world_size=layout.world_size) for run in (_uninterrupted, _resumed))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (ONE, {}),
        (ONE, {"dtype": "bfloat16"}),
        (ONE, {"dtype": "bfloat16", "precision": DELAYED}),
        (TWO, {}),
        (TWO, {"dtype": "bfloat16"}),
        (TWO, PLAIN),
        (TWO, PLAIN | {"dtype": "bfloat16"}),
        (ParallelLayout(world_size=2, cp=2), {}),
        (ParallelLayout(world_size=2, pp=2, vpp=2), {}),
        (ParallelLayout(world_size=4, tp=2), {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path, layout, options):
    _assert_same(*_interrupt(folder, tmp_path, layout, options, last=SAVED_AFTER + 1))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (ParallelLayout(world_size=2, ep=2), {}),
        (ParallelLayout(world_size=2, ep=2), PLAIN | {"dtype": "bfloat16"}),
        (ParallelLayout(world_size=2, pp=2), {"freeze_router": True}),
    ],
    ids=str,
)
def test_a_resumed_mixture_of_experts_goes_on_bit_for_bit(moe_folder, tmp_path, layout, options):
    _assert_same(*_interrupt(moe_folder, tmp_path, layout, options, last=SAVED_AFTER + 1))


@pytest.fixture(scope="module")
def grid_run(folder, tmp_path_factory) -> tuple[Path, list]:
    """Six steps under tp = 2, pp = 2, with a checkpoint after the third."""
    state = tmp_path_factory.mktemp("grid")
    return state, run_ranks(_uninterrupted, folder, state, GRID, STEPS, {}, world_size=4)


def test_three_more_steps_under_the_same_layout_are_the_same_bit_for_bit(folder, grid_run):
    state, uninterrupted = grid_run
    _assert_same(uninterrupted, run_ranks(_resumed, folder, state, GRID, STEPS, {}, world_size=4))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (TWO, {}),
        (TWO, PLAIN),
        (ONE, {}),
        (ParallelLayout(world_size=4, pp=2, vpp=2), {}),
        (ParallelLayout(world_size=4, tp=2, cp=2), {}),
    ],
    ids=str,
)
def test_three_more_steps_under_another_layout_are_the_same_within_rounding(folder, grid_run, layout, options):
    state, uninterrupted = grid_run
    resumed = run_ranks(_resumed, folder, state, layout, STEPS, options, world_size=layout.world_size)
    _assert_close(uninterrupted, resumed)
    assert "another layout: random states" in resumed[0][0]["warnings"][0]


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (ParallelLayout(world_size=4, ep=2), ParallelLayout(world_size=2, pp=2)),
        (ParallelLayout(world_size=2, tp=2, etp=1, ep=2), ParallelLayout(world_size=2, tp=2, etp=2)),
        (ONE, ParallelLayout(world_size=4, tp=2, ep=2, etp=2)),
    ],
    ids=str,
)
def test_a_mixture_of_experts_goes_on_under_another_layout(moe_folder, tmp_path, saved, resumed):
    arguments = (moe_folder, tmp_path)
    one = run_ranks(_uninterrupted, *arguments, saved, STEPS, {}, world_size=saved.world_size)
    other = run_ranks(_resumed, *arguments, resumed, STEPS, {}, world_size=resumed.world_size)
    _assert_close(one, other)


def _state_again(model: Path, state: Path, again: Path, layout: ParallelLayout, dtype: str) -> None:
    worker = make_worker(model, layout, optimizer=WARMUP, dtype=dtype)
    worker.load(state)
    save_state(worker, again)


def test_a_state_that_went_through_another_layout_is_the_same_bit_for_bit(folder, tmp_path):
    """bfloat16, so that masters are not the parameters; flat ranges end within rows under every layout here."""
    options = {"dtype": "bfloat16"}
    states = [tmp_path / name for name in ("first", "second", "third")]
    for state in states:
        state.mkdir()
    run_ranks(_uninterrupted, folder, states[0], ONE, SAVED_AFTER, options, world_size=1)
    other = ParallelLayout(world_size=4, pp=2, vpp=2)
    run_ranks(_state_again, folder, states[0], states[1], other, "bfloat16", world_size=4)
    run_ranks(_state_again, folder, states[1], states[2], ONE, "bfloat16", world_size=1)
    with DistReader(states[0]) as first, DistReader(states[2]) as third:
        assert first.keys() == third.keys()
        assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in first.keys()) == 9  # noqa: SIM118
        for key in first.keys():  # noqa: SIM118  no dict
            if not key.startswith("rank_state."):
                shape = first.shape(key)
                boxes = [reader.read_box(key, start=(0,) * len(shape), shape=shape) for reader in (first, third)]
                assert torch.equal(*boxes), key


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_checkpoint_holds_what_the_policy_held_when_it_was_begun(tmp_path, name):
    (tmp_path / "state").mkdir()
    model = make_folder(tmp_path / "model", name)
    ((before, after, restored),) = run_ranks(_saved_and_restored, model, tmp_path / "state", world_size=1)
    assert restored.updates == before.updates == 1
    for wanted, found in ((before.weights, restored.weights), (before.optimizer, restored.optimizer)):
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert any(not torch.equal(after.weights[key], value) for key, value in before.weights.items())


def _saved_and_restored(model: Path, state: Path) -> tuple[Held, Held, Held]:
    return saved_and_restored(model, state, device="cpu")


def _started_from(model: Path, state: Path, layout: ParallelLayout, dtype: str) -> dict[str, torch.Tensor]:
    return weights_of(make_worker(model, layout, dtype=dtype, weights=state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout", [ParallelLayout(world_size=2, tp=2), ParallelLayout(world_size=2, pp=2, vpp=2)], ids=str
)
def test_a_run_can_start_from_the_weights_of_a_checkpoint(folder, grid_run, layout, dtype):
    state, _ = grid_run
    (wanted,) = run_ranks(_restored, folder, state, world_size=1)
    found = run_ranks(_started_from, folder, state, layout, dtype, world_size=2)
    merged = {name: tensor for of_rank in found for name, tensor in of_rank.items()}
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(merged[name], tensor.to(getattr(torch, dtype))), name


def _restored(model: Path, state: Path) -> dict[str, torch.Tensor]:
    worker = make_worker(model, ONE)
    worker.load(state)
    return weights_of(worker)


def _moments_after_a_restart(model: Path, state: Path) -> tuple[dict, dict, int]:
    torch.manual_seed(1)
    worker = make_worker(model, ONE, dtype="bfloat16")
    worker.load(state, with_optimizer=False)
    fresh = make_worker(model, ONE, dtype="bfloat16")
    fresh._set_parameters([parameter.detach().clone() for parameter in worker._stage.parameters()])
    fresh._state._restart_optimizer()
    results = []
    for started in (worker, fresh):
        batch = make_batch(seed=7)
        scores = share_scores(started.score(batch, step=7, with_reference=False), ONE)
        started.train(scored(batch, scores).with_(reference_logprobs=scores.old_logprobs), step=7)
        results.append({name: tensor.clone() for name, tensor in weights_of(started).items()})
    return results[0], results[1], worker._optimizer.updates


def test_without_optimizer_state_adam_starts_afresh_from_the_loaded_weights(folder, tmp_path):
    run_ranks(_uninterrupted, folder, tmp_path, ONE, SAVED_AFTER, {"dtype": "bfloat16"}, world_size=1)
    ((loaded, fresh, updates),) = run_ranks(_moments_after_a_restart, folder, tmp_path, world_size=1)
    assert updates == 2
    for name, tensor in fresh.items():
        assert torch.equal(loaded[name], tensor), name


def _write(model: Path, state: Path) -> None:
    worker = make_worker(model, ONE)
    _step(worker, ONE, 1)
    save_state(worker, state)


def _refused(model: Path, state: Path, options: dict[str, object]) -> str:
    worker = make_worker(model, ONE, **options)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        worker.load(state)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    state = tmp_path_factory.mktemp("state")
    run_ranks(_write, folder, state, world_size=1)
    return state


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"contrastive": None}, "head"),
        ({"contrastive": replace(CONTRASTIVE, head_size=8)}, "head"),
    ],
    ids=["dtype", "no_head", "head_size"],
)
def test_a_state_of_another_run_is_refused(folder, saved, options, word):
    (message,) = run_ranks(_refused, folder, saved, options, world_size=1)
    assert word in message
    assert "belongs to another run" in message


def test_a_state_of_another_architecture_is_refused(saved, tmp_path):
    other = make_tiny_hf(tmp_path, "qwen3", vocab_size=300, tokenizer_size=280)
    assert "architecture" in run_ranks(_refused, other, saved, {}, world_size=1)[0]


def test_a_frozen_router_has_no_optimizer_state_to_go_on_with(moe_folder, tmp_path):
    run_ranks(_uninterrupted, moe_folder, tmp_path, ONE, SAVED_AFTER, {"freeze_router": True}, world_size=1)
    (message,) = run_ranks(_refused, moe_folder, tmp_path, {}, world_size=1)
    assert "no optimizer state optimizer.state.exp_avg.decoder.layers.mlp.router.weight" in message
    assert "no_optimizer" in message


@pytest.mark.parametrize("damage", ["truncated", "missing", "not_json", "no_plain"])
def test_a_damaged_state_is_refused(folder, saved, tmp_path, damage):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors, plain = tmp_path / "__0_0.distcp", tmp_path / POLICY_FILE
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no_plain":
        plain.write_text(json.dumps({"updates": 2}))
    else:
        plain.write_text("{")
    file = tensors if damage in ("truncated", "missing") else plain
    assert file.name in run_ranks(_refused, folder, tmp_path, {}, world_size=1)[0]
