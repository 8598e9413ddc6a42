"""Packed sequences take one of Transformer Engine's attention kernels, and its slow path is noticed.

No GPU was at hand when these tests were written: they have not been run yet.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.gpu_cases import FAMILIES, ONE, TOKENS, gpu_batch, make_folder
from support.policy_cases import make_worker, scored

from clipo_megatron.policy.attention_path import last_path, probe_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("fresh_engine"),
]
# The modules that do the work inside Transformer Engine's DotProductAttention.
PATHS = {"FlashAttention": "flash", "FusedAttention": "fused", "UnfusedDotProductAttention": "unfused"}


def _count_calls(chunks: list[torch.nn.Module]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for chunk in chunks:
        for module in chunk.modules():
            path = PATHS.get(type(module).__name__)
            if path is not None:
                module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    return calls


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scoring_and_training_take_a_kernel(tmp_path: Path, name: str, recompute: str) -> None:
    worker = make_worker(
        make_folder(tmp_path, name),
        ONE,
        device="cuda",
        dtype="bfloat16",
        micro_batch_tokens=TOKENS,
        recompute=recompute,
    )
    calls, batch = _count_calls([*worker._stage.chunks]), gpu_batch()
    scores = worker.score(batch, step=0, with_reference=True)
    assert scores is not None
    assert last_path() in ("flash", "fused")
    worker.train(scored(batch, scores), step=0)
    assert last_path() in ("flash", "fused")
    print(f"{torch.cuda.get_device_name()}, {name}: {dict(calls)}")
    assert calls.total() > 0
    assert calls["unfused"] == 0
    assert calls[last_path()] > 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_probe_finds_no_fault_in_the_heads_of_the_supported_models(head_dim: int) -> None:
    problem = probe_attention(num_heads=8, num_kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16)
    assert problem is None, problem


def test_the_slow_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    # Lengths of its own: Transformer Engine chooses anew only where they differ from the last attention's.
    problem = probe_attention(num_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16, lengths=(33, 77))
    assert problem is not None
    assert "unfused" in problem
