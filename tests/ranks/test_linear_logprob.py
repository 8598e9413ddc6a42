"""Log-probs straight from hidden states against loops in float64 over all tokens and the whole vocabulary.

Letters: T tokens of the group, R scored positions, V rows of the padded vocabulary, H hidden.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.linear_logprob import linear_logprob

NUM_TOKENS, PADDED, VOCAB_SIZE, WIDTH, TEMPERATURE = 12, 12, 8, 5, 0.7
"""At 4 ranks of 3 vocabulary rows the last one holds nothing but padding."""
POSITIONS = {
    "spread": [0, 1, 2, 4, 5, 7, 8, 11],
    "all on one rank": [9, 10, 11],
    "every token": list(range(NUM_TOKENS)),
    "none": [],
}
SIZES = {
    "one tile": {},
    "every token and column a tile": {"chunk_tokens": 1, "block_bytes": 4},
    "two tokens, three columns": {"chunk_tokens": 2, "block_bytes": 4 * 3 * WIDTH},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of the whole group."""

    h_TH: torch.Tensor
    weight_VH: torch.Tensor
    position_R: torch.Tensor
    label_R: torch.Tensor
    grad_R: torch.Tensor
    """Gradient of the loss with respect to the log-probs."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one rank, or of the oracle over the whole group."""

    logprob_R: torch.Tensor
    entropy_R: torch.Tensor
    grad_TH: torch.Tensor
    grad_VH: torch.Tensor


def _case(positions: list[int]) -> Case:
    generator = torch.Generator().manual_seed(0)
    h_TH = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    weight_VH = torch.randn(PADDED, WIDTH, generator=generator)
    h_TH[1] *= 1e4  # exp of its logits is inf without a maximum taken off
    h_TH[3] = torch.nan  # scored where every token is; else it must not matter
    if 3 in positions:
        h_TH[3] = 0.0
    weight_VH[VOCAB_SIZE:] = 50.0  # padding that would take all the probability
    num_scored = len(positions)
    return Case(
        h_TH=h_TH,
        weight_VH=weight_VH,
        position_R=torch.tensor(positions, dtype=torch.int64),
        label_R=torch.arange(num_scored) % VOCAB_SIZE,
        grad_R=torch.randn(num_scored, generator=generator),
    )


def _oracle(case: Case, *, vocab_size: int = VOCAB_SIZE, temperature: float = TEMPERATURE) -> Result:
    """One token and one column at a time."""
    h_TH, weight_VH = case.h_TH.double(), case.weight_VH.double()
    logprobs, entropies = [], []
    grad_TH, grad_VH = torch.zeros_like(h_TH), torch.zeros_like(weight_VH)
    for position, label, grad in zip(
        case.position_R.tolist(), case.label_R.tolist(), case.grad_R.tolist(), strict=True
    ):
        x = [float(h_TH[position].dot(weight_VH[v])) / temperature for v in range(vocab_size)]
        highest = max(x)
        log_sum = highest + math.log(sum(math.exp(value - highest) for value in x))
        p = [math.exp(value - log_sum) for value in x]
        logprobs.append(x[label] - log_sum)
        entropies.append(-sum(share * math.log(share) for share in p if share > 0))
        for v in range(vocab_size):
            grad_logit = grad * (float(v == label) - p[v]) / temperature
            grad_TH[position] += grad_logit * weight_VH[v]
            grad_VH[v] += grad_logit * h_TH[position]
    logprob_R, entropy_R = torch.tensor(logprobs).double(), torch.tensor(entropies).double()
    return Result(logprob_R=logprob_R, entropy_R=entropy_R, grad_TH=grad_TH, grad_VH=grad_VH)


def _run(
    case: Case,
    *,
    is_split: bool,
    temperature: float = TEMPERATURE,
    vocab_size: int = VOCAB_SIZE,
    **sizes: int,
) -> Result:
    """This rank's part of the case, forward and backward."""
    size, rank = dist.get_world_size(), dist.get_rank()
    h_TH = (case.h_TH.chunk(size)[rank] if is_split else case.h_TH).clone().requires_grad_()
    weight_VH = case.weight_VH.chunk(size)[rank].clone().requires_grad_()
    logprob_R, entropy_R = linear_logprob(
        h_TH,
        weight_VH,
        case.position_R,
        case.label_R,
        temperature=temperature,
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        is_split=is_split,
        **sizes,
    )
    assert not entropy_R.requires_grad
    (logprob_R * case.grad_R).sum().backward()
    return Result(logprob_R=logprob_R.detach(), entropy_R=entropy_R, grad_TH=h_TH.grad, grad_VH=weight_VH.grad)


def _all_cases(is_split: bool) -> dict[tuple[str, str], Result]:
    return {
        (positions, sizes): _run(_case(POSITIONS[positions]), is_split=is_split, **SIZES[sizes])
        for positions in POSITIONS
        for sizes in SIZES
    }


@pytest.mark.parametrize(
    ("world_size", "is_split"), [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)]
)
def test_values_and_gradients_equal_float64_loops(world_size, is_split):
    ranks = run_ranks(_all_cases, is_split, world_size=world_size)
    for positions, sizes in ranks[0]:
        want = _oracle(_case(POSITIONS[positions]))
        results = [rank[positions, sizes] for rank in ranks]
        for result in results:
            torch.testing.assert_close(result.logprob_R.double(), want.logprob_R, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(result.entropy_R.double(), want.entropy_R, rtol=1e-5, atol=1e-5)
            assert torch.equal(result.logprob_R, results[0].logprob_R), "all ranks get the same bits"
            assert torch.equal(result.entropy_R, results[0].entropy_R)
        grads_TH = [torch.cat([result.grad_TH for result in results])] if is_split else [r.grad_TH for r in results]
        for grad_TH in grads_TH:
            torch.testing.assert_close(grad_TH.double(), want.grad_TH, rtol=1e-5, atol=1e-5)
        grad_VH = torch.cat([result.grad_VH for result in results])
        torch.testing.assert_close(grad_VH.double(), want.grad_VH, rtol=1e-5, atol=1e-5)
        assert (grad_VH[VOCAB_SIZE:] == 0).all()


def _wide(dtype: torch.dtype, chunk_tokens: int) -> tuple[Result, Result]:
    """(found, naive path in float64) of a case large enough for the CPU's fast matrix products."""
    generator = torch.Generator().manual_seed(1)
    position_R = torch.arange(96)[torch.rand(96, generator=generator) < 0.8]
    case = Case(
        h_TH=torch.randn(96, 256, generator=generator).to(dtype),
        weight_VH=(torch.randn(640, 256, generator=generator) / 4).to(dtype),
        position_R=position_R,
        label_R=torch.randint(0, 600, position_R.shape, generator=generator),
        grad_R=torch.randn(position_R.shape, generator=generator),
    )
    h_TH, weight_VH = case.h_TH.double().requires_grad_(), case.weight_VH.double().requires_grad_()
    log_p_RV = (h_TH[case.position_R] @ weight_VH[:600].T).log_softmax(1)
    logprob_R = log_p_RV.gather(1, case.label_R[:, None]).squeeze(1)
    (logprob_R * case.grad_R).sum().backward()
    entropy_R = -(log_p_RV.exp() * log_p_RV).sum(1)
    naive = Result(
        logprob_R=logprob_R.detach(), entropy_R=entropy_R.detach(), grad_TH=h_TH.grad, grad_VH=weight_VH.grad
    )
    sizes = {"chunk_tokens": chunk_tokens, "block_bytes": 4 * 256 * 128}
    return _run(case, is_split=False, temperature=1.0, vocab_size=600, **sizes), naive


def test_float32_equals_the_naive_path_in_float64():
    [(result, naive)] = run_ranks(_wide, torch.float32, 40, world_size=1)
    for name in ("logprob_R", "entropy_R", "grad_TH", "grad_VH"):
        found, want = getattr(result, name), getattr(naive, name)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert found.dtype == torch.float32


@pytest.mark.parametrize("chunk_tokens", [40, 4096])
def test_bfloat16_products_are_summed_in_float32(chunk_tokens):
    [(result, naive)] = run_ranks(_wide, torch.bfloat16, chunk_tokens, world_size=1)
    # Logits near 8 rounded to bfloat16 would be wrong by up to 2^-6.
    for name in ("logprob_R", "entropy_R"):
        torch.testing.assert_close(getattr(result, name).double(), getattr(naive, name), rtol=1e-5, atol=1e-4)
    # Two roundings, of the logits' gradient and of the result.
    for name in ("grad_TH", "grad_VH"):
        found, want = getattr(result, name), getattr(naive, name)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), want, rtol=2**-7, atol=2**-8 * float(want.abs().max()))


def _sum_of_many_chunks() -> torch.Tensor:
    weight_VH = torch.zeros(8, 4, dtype=torch.bfloat16).requires_grad_()
    logprob_R, _ = linear_logprob(
        torch.ones(1024, 4, dtype=torch.bfloat16),
        weight_VH,
        torch.arange(1024),
        torch.zeros(1024, dtype=torch.int64),
        temperature=1.0,
        vocab_size=8,
        group=dist.group.WORLD,
        is_split=False,
        chunk_tokens=1,
    )
    logprob_R.sum().backward()
    return weight_VH.grad[0]


def test_the_weights_gradient_does_not_stop_growing_over_chunks():
    [grad_H] = run_ranks(_sum_of_many_chunks, world_size=1)
    assert grad_H.tolist() == [1024 * (1 - 1 / 8)] * 4  # sums of 7/8 in bfloat16 end at 256


def _precision_after_a_call_and_after_a_failure() -> list[str]:
    matmul = torch.backends.mkldnn.matmul
    found = [matmul.fp32_precision]
    _wide(torch.bfloat16, 40)
    found.append(matmul.fp32_precision)
    case = _case(POSITIONS["spread"])
    narrow = Case(
        h_TH=case.h_TH.bfloat16(),
        weight_VH=case.weight_VH[:, 1:].bfloat16(),
        position_R=case.position_R,
        label_R=case.label_R,
        grad_R=case.grad_R,
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _run(narrow, is_split=False)
    return [*found, matmul.fp32_precision]


def test_the_precision_switch_of_the_process_is_put_back():
    [found] = run_ranks(_precision_after_a_call_and_after_a_failure, world_size=1)
    assert len(set(found)) == 1


class _Recorder(TorchDispatchMode):
    """Collects (shape, storage's bytes) of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.append((tuple(tensor.shape), tensor.untyped_storage().nbytes()))
        return result


BOUND, CHUNK = 1 << 14, 32
"""Bytes of a tile: 32 tokens by 128 columns. All 1,024 states take twice as much, all logits 16 MiB."""


def _recorded(is_split: bool) -> tuple[int, list[int]]:
    """(tiles computed, bytes of all storages but those of the inputs' size)."""
    num_tokens, rows, width, size = 1024, 4096, 8, dist.get_world_size()
    h_TH = torch.ones(num_tokens // (size if is_split else 1), width).requires_grad_()
    weight_VH = torch.ones(rows // size, width).requires_grad_()
    with _Recorder() as recorder:
        logprob_R, _ = linear_logprob(
            h_TH,
            weight_VH,
            torch.arange(num_tokens),
            torch.arange(num_tokens),
            temperature=0.5,
            vocab_size=rows,
            group=dist.group.WORLD,
            is_split=is_split,
            chunk_tokens=CHUNK,
            block_bytes=BOUND,
        )
        logprob_R.sum().backward()
    num_tiles = sum(shape == (CHUNK, BOUND // 4 // CHUNK) for shape, _ in recorder.seen)
    return num_tiles, [size for _, size in recorder.seen if size not in {h_TH.nbytes, weight_VH.nbytes}]


@pytest.mark.parametrize(("world_size", "is_split"), [(1, False), (2, True), (2, False)])
def test_no_tensor_but_the_gradients_is_larger_than_a_tile(world_size, is_split):
    for num_tiles, sizes in run_ranks(_recorded, is_split, world_size=world_size):
        assert num_tiles >= 2 * (1024 // CHUNK) * (4096 // 128 // world_size), "the recorder sees both passes"
        assert max(sizes) <= BOUND


def _collectives(is_split: bool) -> list[dict[str, int]]:
    found = []
    for positions in POSITIONS.values():
        with CommDebugMode() as mode:
            _run(_case(positions), is_split=is_split, chunk_tokens=2)
        found.append({str(op): count for op, count in mode.get_comm_counts().items()})
    return found


@pytest.mark.parametrize("is_split", [False, True])
def test_every_rank_takes_part_in_the_collectives_of_every_piece(is_split):
    want = []
    for positions in POSITIONS.values():
        num_chunks = -(-len(positions) // 2)
        cuts = [len(positions) * number // num_chunks for number in range(num_chunks)] + [len(positions)]
        chunks = [positions[start:end] for start, end in itertools.pairwise(cuts)]
        num_pieces = sum(len({position // 3 for position in chunk}) for chunk in chunks)
        counts = {"c10d.allreduce_": 2}
        if is_split:
            counts |= {"c10d.broadcast_": 2 * num_pieces, "c10d.reduce_": num_pieces}
        else:
            counts["c10d.allreduce_"] += num_chunks
        want.append({op: count for op, count in counts.items() if count})
    assert run_ranks(_collectives, is_split, world_size=4) == [want] * 4


def _scored_only() -> tuple[torch.Tensor, torch.Tensor, bool]:
    case = _case(POSITIONS["every token"])
    h_TH, weight_VH = case.h_TH.requires_grad_(), case.weight_VH.requires_grad_()
    options = {"temperature": TEMPERATURE, "vocab_size": VOCAB_SIZE, "group": dist.group.WORLD, "is_split": False}
    with torch.no_grad():
        scored_R, _ = linear_logprob(h_TH, weight_VH, case.position_R, case.label_R, **options)
    trained_R, _ = linear_logprob(h_TH, weight_VH.detach(), case.position_R, case.label_R, **options)
    trained_R.sum().backward()
    assert weight_VH.grad is None
    return scored_R, trained_R.detach(), scored_R.requires_grad


def test_scoring_gives_the_bits_of_training_and_a_frozen_weight_gets_no_gradient():
    [(scored_R, trained_R, requires_grad)] = run_ranks(_scored_only, world_size=1)
    assert torch.equal(scored_R, trained_R)
    assert not requires_grad


def _refusal(positions: list[int], is_split: bool) -> str:
    with pytest.raises(CheckError) as refusal:
        _run(_case(positions), is_split=is_split)
    return str(refusal.value)


@pytest.mark.parametrize("positions", [[1, 0], [2, 2], [-1, 0], [0, NUM_TOKENS]])
def test_positions_out_of_order_or_range_are_refused(positions):
    [message] = run_ranks(_refusal, positions, True, world_size=1)
    assert message.startswith("position_R: 1 of its 2 entries")
