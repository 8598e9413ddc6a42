"""Log-probs straight from hidden states on a GPU against the naive path in float64, and whether the host waits.

No GPU was at hand when these tests were written: they have not been run yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from clipo_megatron.parallel.linear_logprob import linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUM_TOKENS, VOCAB_SIZE, PADDED, WIDTH = 300, 1000, 1024, 256


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_TH = torch.randn(NUM_TOKENS, WIDTH, generator=generator).to("cuda", dtype)
    weight_VH = (torch.randn(PADDED, WIDTH, generator=generator) / 4).to("cuda", dtype)
    position_R = torch.arange(NUM_TOKENS)[torch.rand(NUM_TOKENS, generator=generator) < 0.8]
    label_R = torch.randint(0, VOCAB_SIZE, position_R.shape, generator=generator).cuda()
    return h_TH.requires_grad_(), weight_VH.requires_grad_(), position_R, label_R


def _logprob(h_TH: torch.Tensor, weight_VH: torch.Tensor, position_R: torch.Tensor, label_R: torch.Tensor):
    return linear_logprob(
        h_TH,
        weight_VH,
        position_R,
        label_R,
        temperature=0.7,
        vocab_size=VOCAB_SIZE,
        group=dist.group.WORLD,
        is_split=False,
        chunk_tokens=128,
        block_bytes=4 * 256 * 256,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_values_and_gradients_equal_the_naive_path_in_float64(dtype, tolerance, place):
    h_TH, weight_VH, position_R, label_R = _inputs(dtype)
    logprob_R, entropy_R = _logprob(h_TH, weight_VH, position_R.to(place), label_R)
    logprob_R.sum().backward()

    want_TH, want_VH = (tensor.detach().double().requires_grad_() for tensor in (h_TH, weight_VH))
    log_p_RV = (want_TH[position_R.cuda()] @ want_VH[:VOCAB_SIZE].T / 0.7).log_softmax(1)
    want_R = log_p_RV.gather(1, label_R[:, None]).squeeze(1)
    want_R.sum().backward()
    # Logits and sums are float32 for either dtype; a GPU's order of summation differs from run to run of a shape.
    torch.testing.assert_close(logprob_R.double(), want_R, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy_R.double(), -(log_p_RV.exp() * log_p_RV).sum(1), rtol=1e-5, atol=1e-4)
    for found, want in ((h_TH.grad, want_TH.grad), (weight_VH.grad, want_VH.grad)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=2 * tolerance, atol=tolerance * float(want.abs().max()))


def test_the_host_never_waits_when_positions_lie_on_it():
    inputs = _inputs(torch.bfloat16)
    _logprob(*inputs)[0].sum().backward()  # libraries may wait when they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        _logprob(*inputs)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
