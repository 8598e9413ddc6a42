"""Laws of the routes that an engine returns: they are those that transformers' routers take on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from support.engines import SAMPLING, load_reference, perturbed, random_prompts, tiny_engine, update
from support.tiny_models import make_tiny_hf
from transformers import PreTrainedModel

from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.records import RolloutGroup
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.rollout.routes import rollout_routes

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
MARGIN = 1e-3
"""Where the last expert chosen and the first one not chosen are closer, float32 sums in another order may swap them."""


@dataclass
class Pair:
    """An engine and transformers with the same weights."""

    engine: RolloutEngine
    reference: PreTrainedModel
    version: int | None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    return make_tiny_hf(folder, "qwen3_moe", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, experts_per_token=TOP_K)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    # A cache of 5 blocks of 128 tokens: requests that outgrow it are thrown out and computed again.
    with tiny_engine(folder, return_routed_experts=True, kv_cache_mib=1) as engine:
        yield Pair(engine, load_reference(folder))


@torch.no_grad()
def _reference_routes(model: PreTrainedModel, ids: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sorted experts [tokens, layers, k] of transformers, and where they are chosen with a margin [tokens, layers]."""
    logits: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda gate, inputs, _: logits.append(torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight))
        )
        for layer in model.model.layers
    ]
    model(torch.from_numpy(ids).long()[None])
    for hook in hooks:
        hook.remove()
    top = torch.stack(logits, 1).topk(TOP_K + 1)
    is_clear = top.values[..., TOP_K - 1] - top.values[..., TOP_K] > MARGIN
    return top.indices[..., :TOP_K].sort().values.numpy(), is_clear.numpy()


def _assert_routes_are_the_references(pair: Pair, groups: list[RolloutGroup]) -> None:
    num_clear, num_all = 0, 0
    for group in groups:
        for rollout in group.rollouts:
            ids = np.concatenate([group.prompt.token_ids, rollout.response_ids])
            routes = rollout.routed_experts
            assert routes is not None
            assert routes.shape == (len(ids), NUM_LAYERS, TOP_K)
            assert routes.dtype == np.int16
            assert (routes[-1] == -1).all()
            expected, is_clear = _reference_routes(pair.reference, ids)
            is_clear[-1] = False
            assert np.array_equal(np.sort(routes)[is_clear], expected[is_clear])
            num_clear, num_all = num_clear + is_clear.sum(), num_all + is_clear[:-1].size
    assert num_clear > 0.98 * num_all


def test_every_token_but_the_last_has_the_experts_that_transformers_chooses(pair: Pair) -> None:
    groups = pair.engine.generate(random_prompts((5, 17, 60)), replace(SAMPLING, max_tokens=24), version=None)
    _assert_routes_are_the_references(pair, groups)


def test_routes_are_returned_only_where_the_sampling_asks_for_them(pair: Pair) -> None:
    prompts, sampling = random_prompts((9,)), replace(SAMPLING, max_tokens=4)
    (without,) = pair.engine.generate(prompts, replace(sampling, routed_experts=False), version=None)
    (group,) = pair.engine.generate(prompts, sampling, version=None)
    assert [rollout.routed_experts for rollout in without.rollouts] == [None] * SAMPLING.samples
    for one, other in zip(without.rollouts, group.rollouts, strict=True):
        assert np.array_equal(one.response_ids, other.response_ids)
    _assert_routes_are_the_references(pair, [group])


def test_prompt_tokens_from_the_prefix_cache_have_routes(pair: Pair) -> None:
    # Blocks of 128 tokens are shared by the four samples of a prompt; all but the first compute the rest only.
    groups = pair.engine.generate(random_prompts((300,)), replace(SAMPLING, max_tokens=8), version=None)
    _assert_routes_are_the_references(pair, groups)


def test_requests_that_were_thrown_out_of_the_cache_have_routes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    thrown_out: list[object] = []
    preempt = Scheduler._preempt_request

    def count(scheduler: Scheduler, request: Any, *arguments: Any, **options: Any) -> None:
        thrown_out.append(request)
        preempt(scheduler, request, *arguments, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    prompts = random_prompts((120,) * 7)
    groups = pair.engine.generate(prompts, replace(SAMPLING, samples=1, max_tokens=30), version=None)
    assert thrown_out
    _assert_routes_are_the_references(pair, groups)


def test_routes_follow_a_weight_update(pair: Pair, tmp_path: Path) -> None:
    prompts, sampling = random_prompts((40,)), replace(SAMPLING, samples=1, max_tokens=2)
    (before,) = pair.engine.generate(prompts, sampling, version=pair.version)
    pair.version = 1
    perturbed(pair.reference, seed=1, scale=0.1)
    pair.reference.save_pretrained(tmp_path)  # in memory, transformers holds all experts of a layer in one tensor
    update(pair.engine, 1, list(load_file(tmp_path / "model.safetensors").items()))
    (after,) = pair.engine.generate(prompts, sampling, version=1)
    _assert_routes_are_the_references(pair, [after])
    one, two = before.rollouts[0].routed_experts, after.rollouts[0].routed_experts
    assert one is not None
    assert two is not None
    assert (np.sort(one[:40]) != np.sort(two[:40])).any(-1).mean() > 0.05


def test_vllm_alone_returns_no_routes_on_a_cpu(folder: Path) -> None:
    # Where this fails, rollout/cpu_routes.py may no longer be needed.
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="AuxOutput Connector requires Model Runner V2"):
        EngineArgs(
            model=str(folder), skip_tokenizer_init=True, enable_return_routed_experts=True
        ).create_engine_config()


def test_another_vllm_release_is_refused_on_a_cpu(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(EngineError, match=r"vLLM 0\.33\.1 on a CPU: routed experts can be recorded in 0\.32 only"):
        pair.engine._workers.call("clipo_record_routes")


@pytest.mark.parametrize("fed", [None, np.zeros((3, 2, 2), np.uint8), np.zeros((5, 2), np.uint8)])
def test_missing_rows_are_refused(fed: NDArray[np.uint8] | None) -> None:
    with pytest.raises(CheckError, match=r"for a prompt and response of 5 tokens; \[4 or more, layers"):
        rollout_routes(fed, 5)


def test_a_row_for_the_last_token_is_not_used() -> None:
    fed = np.arange(10, dtype=np.uint8).reshape(5, 1, 2)
    assert rollout_routes(fed, 5).tolist() == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]], [[-1, -1]]]
    assert rollout_routes(fed[:4], 5).tolist() == rollout_routes(fed, 5).tolist()
