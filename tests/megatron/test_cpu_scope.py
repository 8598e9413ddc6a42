"""The scope that lets Megatron run without a GPU: needed today, gone without a trace afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.policy_cases import make_batch, make_worker
from support.ranks import RankFailure, run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy import cpu, worker
from clipo_megatron.policy.cpu import cuda_means_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the scope is for machines without a GPU")
ONE = ParallelLayout(world_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=300, tokenizer_size=280)


def _build(folder: Path) -> None:
    make_worker(folder, ONE)


def test_megatron_still_needs_the_scope(folder, monkeypatch):
    monkeypatch.setattr(worker, "cuda_means_cpu", nullcontext)
    with pytest.raises(RankFailure, match="Torch not compiled with CUDA enabled"):
        run_ranks(_build, folder, world_size=1)


def _fingerprint() -> list[object]:
    return [getattr(owner, name, None) for owner, name, _ in cpu._PATCHES]


def _score_and_look(folder: Path) -> bool:
    before = _fingerprint()
    policy = make_worker(folder, ONE)
    policy.score(make_batch(), step=1, with_reference=True)
    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        torch.zeros(1, device="cuda")
    return before == _fingerprint() and torch.zeros(1).type() == "torch.FloatTensor"


def test_torch_is_untouched_outside_the_scope(folder):
    assert run_ranks(_score_and_look, folder, world_size=1) == [True]


def test_the_scope_closes_after_a_failure():
    before = _fingerprint()
    with pytest.raises(TypeError, match="must be tuple of ints"), cuda_means_cpu():
        torch.zeros("not a size", device="cuda")
    assert _fingerprint() == before


def test_nothing_draws_from_the_generator_that_stands_in_for_cudas():
    with cuda_means_cpu():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        torch.rand(3)
        assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_megatron_out_of_the_window_is_refused(monkeypatch):
    monkeypatch.setattr(cpu.importlib.metadata, "version", lambda _name: "0.21.0")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.21\.0"):
        cpu.check_version()
