"""Laws of sampling from an engine that serves a model folder. The folder's generation_config.json is full of traps."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import (
    MAX_MODEL_LEN,
    SAMPLING,
    greedy_ids,
    load_reference,
    random_prompts,
    tiny_engine,
    tiny_settings,
    worst_difference,
)
from support.tiny_models import make_tiny_hf, tiny_tokenizer

from clipo_megatron.errors import EngineError
from clipo_megatron.records import Finish, RolloutGroup
from clipo_megatron.rollout.engine import RolloutEngine

EXTRA_STOP_ID = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_hf(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True)
    traps = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "repetition_penalty": 3.0, "min_p": 0.2}
    (folder / "generation_config.json").write_text(json.dumps(traps | {"eos_token_id": [2, EXTRA_STOP_ID]}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[RolloutEngine]:
    with tiny_engine(folder) as engine:
        yield engine


def _sample(
    engine: RolloutEngine, lengths: tuple[int, ...] = (5, 300, 17), *, version: int | None = None, **changes: float
) -> list[RolloutGroup]:
    return engine.generate(random_prompts(lengths), replace(SAMPLING, **changes), version=version)


def _ids(groups: list[RolloutGroup]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: RolloutEngine, folder: Path, temperature: float
) -> None:
    # float32 on both sides; the sums of a few hundred products differ in their order.
    groups = _sample(engine, temperature=temperature)
    assert worst_difference(load_reference(folder), groups, temperature=temperature) < 1e-4


def test_prompts_beyond_one_forwards_tokens_are_sampled_all_the_same(engine: RolloutEngine, folder: Path) -> None:
    # 16 prompts run at the same time, with more tokens than a forward takes: the last ones have to wait.
    groups = _sample(engine, (330,) * 16, samples=1, max_tokens=8)
    assert worst_difference(load_reference(folder), groups) < 1e-4


def test_temperature_zero_is_greedy(engine: RolloutEngine, folder: Path) -> None:
    groups = _sample(engine, samples=1, temperature=0.0, max_tokens=16)
    reference = load_reference(folder)
    for group in groups:
        expected = greedy_ids(reference, group.prompt, max_tokens=16)
        if EXTRA_STOP_ID in expected:
            expected = expected[: expected.index(EXTRA_STOP_ID) + 1]
        assert group.rollouts[0].response_ids.tolist() == expected


def test_tokens_are_drawn_as_often_as_their_probability_says(engine: RolloutEngine, folder: Path) -> None:
    # 512 draws of one token: the mean of -log p must be the entropy, within 5 standard errors.
    (group,) = _sample(engine, (9,), samples=512, max_tokens=1)
    with torch.no_grad():
        logits = load_reference(folder)(torch.from_numpy(group.prompt.token_ids).long()[None]).logits[0, -1]
    logprob, p = logits.log_softmax(-1), logits.softmax(-1)
    entropy = -(p * logprob).sum()
    deviation = ((p * logprob**2).sum() - entropy**2).sqrt()
    mean = -np.mean([rollout.sampled_logprobs[0] for rollout in group.rollouts])
    assert abs(mean - float(entropy)) < 5 * float(deviation) / 512**0.5


def test_the_same_call_gives_the_same_bits(engine: RolloutEngine) -> None:
    first, second = _sample(engine), _sample(engine)
    assert _ids(first) == _ids(second)
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one.rollouts, two.rollouts, strict=True):
            assert np.array_equal(a.sampled_logprobs, b.sampled_logprobs)


def test_samples_do_not_depend_on_the_other_prompts_of_the_call(engine: RolloutEngine) -> None:
    prompts = random_prompts((5, 300, 17, 60))
    sampling = replace(SAMPLING, samples=3, max_tokens=32)
    together = engine.generate(prompts, sampling, version=None)
    alone = [group for prompt in reversed(prompts) for group in engine.generate([prompt], sampling, version=None)][::-1]
    assert _ids(together) == _ids(alone)
    assert [group.prompt.index for group in alone] == [prompt.index for prompt in prompts]


def test_every_seed_step_prompt_and_sample_gives_its_own_response(engine: RolloutEngine) -> None:
    calls = [_sample(engine, (5, 5), seed=seed, step=step) for seed, step in ((0, 1), (1, 1), (0, 2), (1, 0))]
    responses = [tuple(ids) for groups in calls for ids in _ids(groups)]
    assert len(set(responses)) == len(responses) == 4 * 2 * 4


def test_a_response_ends_at_its_first_stop_id_or_at_the_limit(engine: RolloutEngine) -> None:
    stops = {2, EXTRA_STOP_ID}
    rollouts = [rollout for group in _sample(engine, samples=40, max_tokens=48) for rollout in group.rollouts]
    finishes = {rollout.finish for rollout in rollouts}
    assert finishes == {Finish.STOP, Finish.LENGTH}
    for rollout in rollouts:
        *inner, last = rollout.response_ids.tolist()
        assert not stops & set(inner)
        assert (last in stops) == (rollout.finish is Finish.STOP)
        assert rollout.finish is Finish.STOP or len(rollout.response_ids) == 48
        assert rollout.sampled_logprobs.shape == rollout.response_ids.shape
    ended = {int(rollout.response_ids[-1]) for rollout in rollouts if rollout.finish is Finish.STOP}
    assert ended == stops  # both the tokenizer's and generation_config.json's own


def test_text_is_the_response_without_special_tokens(engine: RolloutEngine) -> None:
    tokenizer = tiny_tokenizer()
    seen_unknown = False
    for group in _sample(engine):
        for rollout in group.rollouts:
            ids = rollout.response_ids.tolist()
            seen_unknown |= any(token >= len(tokenizer) for token in ids)
            plain = [token for token in ids if 3 <= token < len(tokenizer)]
            assert rollout.text == tokenizer.decode(plain)
    assert seen_unknown  # ids between the tokenizer's end and the vocabulary's are legal and decode to nothing


def test_the_folder_has_no_version(engine: RolloutEngine) -> None:
    assert engine.version is None
    assert _sample(engine, samples=1)[0].rollouts[0].policy_versions == ()
    with pytest.raises(EngineError, match="asked for version 3, but the engine holds the model folder's own weights"):
        _sample(engine, version=3)


def test_a_prompt_that_leaves_no_room_for_the_response_is_refused(engine: RolloutEngine) -> None:
    with pytest.raises(EngineError, match=f"prompt 10 has {MAX_MODEL_LEN - 10} tokens"):
        _sample(engine, (5, MAX_MODEL_LEN - 10), max_tokens=11)
    groups = _sample(engine, (5, MAX_MODEL_LEN - 10), max_tokens=10)
    assert max(len(rollout.response_ids) for rollout in groups[1].rollouts) == 10


def test_no_prompts_give_no_groups(engine: RolloutEngine) -> None:
    assert _sample(engine, ()) == []


def test_a_second_engine_in_the_process_is_refused(engine: RolloutEngine, folder: Path) -> None:
    with pytest.raises(EngineError, match="holds an engine already"), tiny_engine(folder):
        pass
    assert len(_sample(engine)) == 3


def test_close_frees_the_model_and_ends_the_engine(
    engine: RolloutEngine,
) -> None:  # last: it closes the module's engine
    (model,) = engine._workers.require().collective_rpc("get_model")
    model = weakref.ref(model)
    engine.close()
    assert model() is None
    assert not torch.distributed.is_initialized()
    with pytest.raises(EngineError, match="the engine is closed"):
        _sample(engine)
    engine.close()


def test_an_environment_that_does_not_suit_the_engine_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with pytest.raises(EngineError, match="VLLM_ENABLE_V1_MULTIPROCESSING is not set"):
        RolloutEngine(tiny_settings(folder))
