"""What score and train never allocate, seen by recording every allocation; and that pooling gives up nothing for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.policy_cases import make_batch, make_worker, scored, share_scores
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipo_megatron.parallel.collectives import gather_shards
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.parallel.linear_logprob import linear_logprob
from clipo_megatron.policy import worker as policy_worker
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.records import RolloutBatch

HIDDEN, VOCABULARY = 64, 3000
COLUMNS = (1536, 3000 - 1536)
"""Of the two ranks' logits: the vocabulary is padded to 3,072, and padding is left out or not."""
LAYOUT = ParallelLayout(world_size=2, tp=2)
CHUNK = 128
"""Tokens; far fewer than those of the batch, as the default is far fewer than those of a real one."""


class Recorder(TorchDispatchMode):
    """Shapes of all tensors that get memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(leaf.shape))
        return result


def _long_batch() -> RolloutBatch:
    return make_batch(num_groups=4, group_size=4, longest_response=200)


def _record(folder: Path) -> dict[str, object]:
    """Shapes of the whole of score and train; and of what they do with the final states, backward included."""
    policy_worker.linear_logprob = functools.partial(linear_logprob, chunk_tokens=CHUNK)
    worker = make_worker(folder, LAYOUT, micro_batch_tokens=100_000)
    batch = _long_batch()
    of_states: list[tuple[int, ...]] = []
    token_scores, pooling = worker._token_scores, worker._pooling

    def watched(call: Callable, micro_batch: object, states: Tensor) -> object:
        with Recorder() as recorder:
            result = call(micro_batch, states)
        of_states.extend(recorder.shapes)
        return result

    def watched_with_backward(micro_batch: object, states: Tensor) -> tuple[Tensor, Tensor]:
        logprob, entropy = watched(token_scores, micro_batch, states)
        if logprob.requires_grad:
            recorder = Recorder()
            logprob.register_hook(lambda _gradient: recorder.__enter__() and None)
            states.register_hook(lambda _gradient: recorder.__exit__(None, None, None))
            backwards.append(recorder)
        return logprob, entropy

    backwards: list[Recorder] = []
    worker._token_scores = watched_with_backward
    worker._pooling = lambda micro_batch, states: watched(pooling, micro_batch, states)
    with Recorder() as everything:
        scores = share_scores(worker.score(batch, step=1, with_reference=True), LAYOUT)
        worker.train(scored(batch, scores), step=1)
    in_backward = [shape for recorder in backwards for shape in recorder.shapes]
    return {
        "tokens": len(batch.input_ids),
        "response_tokens": int(batch.response_lengths.sum()),
        "everything": everything.shapes,
        "of_states": of_states + in_backward,
        "backward": in_backward,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=VOCABULARY, tokenizer_size=280)


@pytest.fixture(scope="module")
def recorded(folder) -> list[dict[str, object]]:
    return run_ranks(_record, folder, world_size=2)


def test_logits_of_more_than_a_chunk_of_tokens_are_never_in_memory(recorded):
    for rank in recorded:
        assert rank["response_tokens"] > 4 * CHUNK
        # Either way round: for each column of the vocabulary at most a chunk of tokens.
        wide = [shape for shape in rank["everything"] if len(shape) > 1 and max(shape) >= min(COLUMNS)]
        assert CHUNK / 2 < max(int(np.prod(shape)) // max(shape) for shape in wide) <= CHUNK


def test_final_states_are_never_gathered(recorded):
    for rank in recorded:
        rows = [int(np.prod(shape)) // HIDDEN for shape in rank["of_states"] if shape and shape[-1] == HIDDEN]
        rows = [count for count in rows if count not in COLUMNS]  # the output layer's own gradient
        assert rank["backward"], "the backward pass must have been recorded"
        assert any(CHUNK / 2 < count <= CHUNK for count in rows), "chunks of both ranks' tokens must have been seen"
        # This rank's own half of the tokens at most, never those of both.
        assert max(rows) <= -(-rank["tokens"] // 2)


def _pooled_both_ways(folder: Path, layout: ParallelLayout) -> tuple[Tensor, Tensor]:
    worker: PolicyWorker = make_worker(folder, layout, micro_batch_tokens=100_000)
    groups, batch = worker._groups, make_batch()
    pooling, naive, fast = worker._pooling, [], []

    def both(micro_batch: object, states: Tensor) -> Tensor:
        fast.append(pooling(micro_batch, states))
        whole = torch.cat(gather_shards(states, groups.tp)) if layout.tp > 1 else states
        for row in range(len(micro_batch.row)):  # decode: the response's states without the last
            first, length = int(micro_batch.prompt_lengths[row]), int(micro_batch.lengths[row])
            offset = int(micro_batch.lengths[:row].sum())
            token = micro_batch.source - offset
            own = (token >= first) & (token < length - 1)
            parts = gather_shards(
                torch.nn.functional.pad(whole[own].double(), (0, 0, 0, 64 - int(own.sum()))), groups.cp
            )
            total = sum(part.sum(0) for part in parts)
            naive.append(total / max(length - 1 - first, 1))
        return fast[-1]

    worker._pooling = both
    worker.score(batch, step=1, with_reference=False)
    return torch.cat(fast).double(), torch.stack(naive)


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(world_size=1), LAYOUT, ParallelLayout(world_size=4, tp=2, cp=2)],
    ids=["one_rank", "tp2_sp", "tp2_sp_cp2"],
)
def test_pooled_states_are_those_of_a_naive_gather(folder, layout):
    for fast, naive in run_ranks(_pooled_both_ways, folder, layout, world_size=layout.world_size):
        torch.testing.assert_close(fast, naive, rtol=1e-6, atol=1e-6)
