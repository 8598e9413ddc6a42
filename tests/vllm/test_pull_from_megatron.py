"""Laws of planned syncs between real Megatron ranks and a real vLLM engine; transformers is the oracle of the weights."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from support.engines import (
    SAMPLING,
    greedy_ids,
    load_reference,
    perturbed,
    random_prompts,
    tiny_engine,
    worst_difference,
)
from support.policy_ranks import PolicyRanks, policy_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture

TOLERANCE = 1e-4
"""Nats, float32 on both sides; the perturbations move log-probs by more than 1."""
TIMEOUT_S = 60.0
SYNCS = 5
CASES = {
    "dense tied from tp2 x pp2": ({"family": "qwen3", "tied": True}, {"world_size": 4, "tp": 2, "pp": 2}),
    "dense untied from tp2 x dp2": ({"family": "qwen2"}, {"world_size": 4, "tp": 2}),
    "mixture from pp2 x dp2 x ep2": ({"family": "qwen3_moe"}, {"world_size": 4, "pp": 2, "ep": 2}),
}


def _open(engine: RolloutEngine, ranks: PolicyRanks, folder: Path, layout: ParallelLayout, tp: int) -> None:
    apart = place_apart(trainer_ranks=layout.world_size, engine_ranks=tp, gpus_per_node=8)
    plan = plan_sync(
        read_architecture(folder), layout, EngineLayout(engines=1, tp=tp), apart, dtype="float32", cut_elements=1024
    )
    engine.open_plan(to_json(plan), 0, ranks.handles())


def _update(engine: RolloutEngine, version: int) -> None:
    engine.begin_pull(version, timeout_s=TIMEOUT_S)
    engine.pull(version, verify=version % 2 == 1, timeout_s=TIMEOUT_S)
    engine.commit_pull(version, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("case", CASES)
def test_after_each_of_five_syncs_the_engine_is_transformers_with_these_weights(case: str, tmp_path: Path) -> None:
    model, trainer = CASES[case]
    folder, layout = make_tiny_hf(tmp_path / "start", **model), ParallelLayout(**trainer)
    prompts, version = random_prompts((5, 150)), 0
    with policy_ranks(folder, layout) as ranks:
        for tp in (1, 2):
            reference = load_reference(folder)
            with tiny_engine(folder, tp=tp, kv_cache_mib=16) as engine:
                _open(engine, ranks, folder, layout, tp)
                for _ in range(SYNCS):
                    version += 1
                    perturbed(reference, seed=version)
                    reference.save_pretrained(tmp_path / f"changed_{version}")
                    ranks.hold(tmp_path / f"changed_{version}", version)
                    _update(engine, version)
                    sampling = replace(SAMPLING, samples=1, max_tokens=12)
                    groups = engine.generate(prompts, sampling, version=version)
                    assert worst_difference(reference, groups) < TOLERANCE
                    greedy = engine.generate(prompts, replace(sampling, temperature=0.0), version=version)
                    for group in greedy:
                        expected = greedy_ids(reference, group.prompt, max_tokens=12)
                        assert group.rollouts[0].response_ids.tolist() == expected


@dataclass
class Pair:
    """An engine of two workers, at version 1 of two trainer ranks."""

    engine: RolloutEngine
    ranks: PolicyRanks
    folder: Path

    def worker(self) -> psutil.Process:
        """The engine's worker of rank 1."""
        children = psutil.Process().children(recursive=True)
        (found,) = [child for child in children if "Worker_TP1" in " ".join(child.cmdline())]
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    folder, layout = make_tiny_hf(tmp_path, "qwen3"), ParallelLayout(world_size=2, pp=2)
    with policy_ranks(folder, layout) as ranks, tiny_engine(folder, tp=2, kv_cache_mib=16) as engine:
        _open(engine, ranks, folder, layout, 2)
        ranks.hold(folder, 1)
        _update(engine, 1)
        yield Pair(engine, ranks, folder)


def test_a_worker_that_is_late_in_the_transfer_is_named_and_the_engine_serves_nothing_more(pair: Pair) -> None:
    pair.ranks.hold(pair.folder, 2)
    worker = pair.worker()
    pair.engine.begin_pull(2, timeout_s=TIMEOUT_S)
    worker.suspend()
    try:
        with pytest.raises(EngineError, match="engine worker 1 of 2: clipo_pull: not done after 2 s"):
            pair.engine.pull(2, verify=False, timeout_s=2.0)
    finally:
        worker.resume()
    for version in (1, 2):
        with pytest.raises(EngineError, match="lost its workers"):
            pair.engine.generate(random_prompts((5,)), SAMPLING, version=version)


def test_a_worker_killed_in_the_transfer_is_named_and_the_engine_serves_nothing_more(pair: Pair) -> None:
    pair.ranks.hold(pair.folder, 2)
    pair.engine.begin_pull(2, timeout_s=TIMEOUT_S)
    worker = pair.worker()
    worker.suspend()
    threading.Timer(1.0, lambda: os.kill(worker.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match="engine worker 1 of 2: clipo_pull: died"):
        pair.engine.pull(2, verify=False, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match="lost its workers"):
        pair.engine.generate(random_prompts((5,)), SAMPLING, version=1)


def test_weights_of_a_trainer_that_dies_in_the_transfer_are_whole_or_refused(pair: Pair) -> None:
    reference = load_reference(pair.folder)
    pair.ranks.hold(pair.folder, 2)
    pair.engine.begin_pull(2, timeout_s=TIMEOUT_S)
    for process in pair.ranks.processes:
        process.kill()
    pair.engine.pull(2, verify=True, timeout_s=TIMEOUT_S)  # opened memory lives as long as one has it open
    pair.engine.commit_pull(2, timeout_s=TIMEOUT_S)
    groups = pair.engine.generate(random_prompts((5,)), SAMPLING, version=2)
    assert worst_difference(reference, groups) < TOLERANCE
    pair.engine.begin_pull(3, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match="trainer rank 0 are those of version 2"):
        pair.engine.pull(3, verify=False, timeout_s=TIMEOUT_S)
    with pytest.raises(EngineError, match="stale"):
        pair.engine.generate(random_prompts((5,)), SAMPLING, version=2)
