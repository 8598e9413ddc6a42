"""Laws of weight updates into a running engine: after a commit it samples as transformers does with these weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.engines import (
    BUCKET_BYTES,
    SAMPLING,
    greedy_ids,
    load_reference,
    perturbed,
    random_prompts,
    tiny_engine,
    update,
    worst_difference,
)
from support.tiny_models import make_tiny_hf
from transformers import PreTrainedModel

from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.records import RolloutGroup, VersionSpan, WeightBucket
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.sync.bucket import pack_buckets

TOLERANCE = 1e-4
"""Nats, float32 on both sides; the perturbations move log-probs by more than 1."""
Tensors = list[tuple[str, torch.Tensor]]


@dataclasses.dataclass
class Pair:
    """An engine and transformers with, after `step`, the same weights."""

    engine: RolloutEngine
    reference: PreTrainedModel
    version: int = 0

    def step(self) -> Tensors:
        """Perturb the reference; returns the tensors for the next version."""
        self.version += 1
        return perturbed(self.reference, seed=self.version)

    def update(self) -> Tensors:
        """A step whose weights are committed."""
        tensors = self.step()
        update(self.engine, self.version, tensors)
        return tensors

    def sample(self, *, temperature: float = 1.0, samples: int = 2, version: int | None = None) -> list[RolloutGroup]:
        return self.engine.generate(
            random_prompts((5, 300, 17)),
            dataclasses.replace(SAMPLING, samples=samples, temperature=temperature, max_tokens=24),
            version=self.version if version is None else version,
        )

    def assert_equal(self) -> None:
        groups = self.sample()
        assert worst_difference(self.reference, groups) < TOLERANCE
        for group in self.sample(temperature=0.0, samples=1):
            assert group.rollouts[0].response_ids.tolist() == greedy_ids(self.reference, group.prompt, max_tokens=24)

    def buckets(self, tensors: Tensors) -> list[WeightBucket]:
        return list(pack_buckets(tensors, version=self.version, bucket_bytes=BUCKET_BYTES))


@pytest.fixture(scope="module", params=["qwen3-tied", "qwen2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family, _, tied = request.param.partition("-")
    folder = make_tiny_hf(tmp_path_factory.mktemp(family), family, tied=bool(tied))
    with tiny_engine(folder) as engine:
        yield Pair(engine, load_reference(folder))


def test_the_engine_samples_from_the_weights_of_each_of_three_updates(pair: Pair) -> None:
    for _ in range(3):
        pair.update()
        assert pair.engine.version == pair.version
        pair.assert_equal()


def test_a_long_prompt_seen_before_the_update_follows_the_new_weights(pair: Pair) -> None:
    # 300 tokens: two blocks of 128 of it are in the prefix cache, computed with the old weights.
    pair.update()
    before = pair.sample(samples=4)[1]
    assert worst_difference(pair.reference, [before]) < TOLERANCE
    pair.update()
    after = pair.sample(samples=4)[1]
    assert worst_difference(pair.reference, [after]) < TOLERANCE
    assert worst_difference(pair.reference, [before]) > 0.1  # the step was large enough to be seen


def test_the_same_weights_again_give_the_same_bits(pair: Pair) -> None:
    tensors = pair.update()
    first = pair.sample()
    pair.version += 1
    update(pair.engine, pair.version, tensors)
    for one, two in zip(first, pair.sample(), strict=True):
        for a, b in zip(one.rollouts, two.rollouts, strict=True):
            assert np.array_equal(a.response_ids, b.response_ids)
            assert np.array_equal(a.sampled_logprobs, b.sampled_logprobs)


def test_every_rollout_carries_the_version_it_was_sampled_from(pair: Pair) -> None:
    pair.update()
    for group in pair.sample():
        for rollout in group.rollouts:
            assert rollout.policy_versions == (
                VersionSpan(version=pair.version, start=0, end=len(rollout.response_ids)),
            )


def test_a_version_that_is_not_held_is_refused(pair: Pair) -> None:
    pair.update()
    with pytest.raises(
        EngineError, match=f"asked for version {pair.version + 1}, but the engine holds version {pair.version}"
    ):
        pair.sample(version=pair.version + 1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_after_an_abort_only_a_whole_update_is_served(pair: Pair, share: float) -> None:
    pair.update()
    held = pair.version
    tensors = pair.step()
    doubled = [(name, 2 * tensor) for name, tensor in tensors]  # of which nothing may survive
    buckets = pair.buckets(doubled)
    pair.engine.begin_update(pair.version)
    for bucket in buckets[: round(share * len(buckets))]:
        pair.engine.load_bucket(bucket)
    with pytest.raises(EngineError, match=f"receiving version {pair.version}"):
        pair.sample(version=held)
    pair.engine.abort_update()
    for version in (held, pair.version):
        with pytest.raises(EngineError, match=f"asked for version {version}, but the engine is stale"):
            pair.sample(version=version)

    update(pair.engine, pair.version, tensors)
    pair.assert_equal()


def test_an_update_that_lacks_a_tensor_is_never_served(pair: Pair) -> None:
    tensors = pair.step()
    lacking = [(name, tensor) for name, tensor in tensors if not name.endswith("layers.1.self_attn.k_proj.weight")]
    assert len(lacking) == len(tensors) - 1
    with pytest.raises(
        EngineError, match=r"1 of the model's \d+ tensors did not come, first model.layers.1.self_attn.k_proj"
    ):
        update(pair.engine, pair.version, lacking)
    with pytest.raises(EngineError, match="stale"):
        pair.sample()
    update(pair.engine, pair.version, tensors)  # without an abort: a new update drops what the last one left
    pair.assert_equal()


def test_a_payload_that_changed_on_the_way_is_never_served(pair: Pair) -> None:
    tensors = pair.step()
    first, second, *_ = pair.buckets(tensors)
    pair.engine.begin_update(pair.version)
    pair.engine.load_bucket(first)
    second.payload[100] ^= 1
    with pytest.raises(CheckError, match=f"worker 0 of 1.*bucket 1 of version {pair.version}: CRC-32"):
        pair.engine.load_bucket(second)
    with pytest.raises(EngineError, match="stale"):
        pair.sample()
    update(pair.engine, pair.version, tensors)
    pair.assert_equal()


def test_a_bucket_out_of_order_ends_the_update(pair: Pair) -> None:
    tensors = pair.step()
    pair.engine.begin_update(pair.version)
    with pytest.raises(EngineError, match="out of order, expected bucket 0"):
        pair.engine.load_bucket(pair.buckets(tensors)[1])
    update(pair.engine, pair.version, tensors)
    pair.assert_equal()
