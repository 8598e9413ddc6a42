"""Laws of an engine that sleeps between updates: its memory is free meanwhile, and it wakes as if it had not slept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import SAMPLING, load_reference, perturbed, random_prompts, tiny_engine, update, worst_difference
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import EngineError
from clipo_megatron.records import RolloutGroup
from clipo_megatron.rollout.engine import RolloutEngine

CACHE_MIB = 512
CYCLES = 10
TOLERANCE = 1e-4


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("sleep"), "qwen3")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[RolloutEngine]:
    with tiny_engine(folder, kv_cache_mib=CACHE_MIB, sleeps=True) as engine:
        yield engine


def sampled(engine: RolloutEngine, version: int) -> list[RolloutGroup]:
    return engine.generate(random_prompts((5, 300, 17)), SAMPLING, version=version)


def test_an_engine_wakes_with_the_weights_of_the_update_and_its_memory_returns_in_every_cycle(
    engine: RolloutEngine, folder: Path
) -> None:
    reference = load_reference(folder)
    awake, asleep = [], []
    for version in range(1, CYCLES + 1):
        update(engine, version, perturbed(reference, seed=version, scale=0.01))
        groups = sampled(engine, version)
        assert worst_difference(reference, groups) < TOLERANCE
        awake.append(resident_mib())
        engine.sleep()
        asleep.append(resident_mib())
        with pytest.raises(EngineError, match=f"asked for version {version}, but the engine's weights are gone since"):
            sampled(engine, version)
    # All of the cache has been written to (made of zeros), so all of it comes back.
    freed = [before - after for before, after in zip(awake, asleep, strict=True)]
    assert all(0.95 * CACHE_MIB < mib < 1.1 * CACHE_MIB for mib in freed[1:]), freed
    assert abs(asleep[-1] - asleep[1]) < 8, asleep
    assert abs(awake[-1] - awake[1]) < 8, awake


def test_the_same_version_after_a_sleep_gives_the_same_samples(engine: RolloutEngine, folder: Path) -> None:
    reference = load_reference(folder)
    version = 100
    tensors = perturbed(reference, seed=version)
    update(engine, version, tensors)
    before = sampled(engine, version)
    engine.sleep()
    engine.sleep()
    engine.begin_update(version)  # an update that is given up leaves it stale
    engine.abort_update()
    with pytest.raises(EngineError, match="since it slept"):
        sampled(engine, version)
    assert engine._updates._sleep.asleep == {"kv_cache"}
    engine.sleep()  # the weights that were woken for it are given back as well
    assert engine._updates._sleep.asleep == {"weights", "kv_cache"}
    update(engine, version, tensors)
    after = sampled(engine, version)
    for old, new in zip(before, after, strict=True):
        for first, second in zip(old.rollouts, new.rollouts, strict=True):
            assert first.response_ids.tolist() == second.response_ids.tolist()
            assert first.sampled_logprobs.tolist() == second.sampled_logprobs.tolist()


def test_an_engine_that_was_not_started_for_it_refuses_to_sleep_and_goes_on(
    folder: Path, engine: RolloutEngine
) -> None:
    engine.close()
    with tiny_engine(folder) as other:
        before = other.generate(random_prompts((5,)), SAMPLING, version=None)
        with pytest.raises(EngineError, match=r"start it with sleeps=True \(recipes: rollout.colocate\)"):
            other.sleep()
        after = other.generate(random_prompts((5,)), SAMPLING, version=None)
    assert [r.response_ids.tolist() for r in before[0].rollouts] == [r.response_ids.tolist() for r in after[0].rollouts]
