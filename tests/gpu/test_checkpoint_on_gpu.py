"""Training state of a policy on one GPU: copied to page-locked memory, written while it trains on, put back.

No GPU was at hand when this was written: it has not been run yet, but for its helper, on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.gpu_cases import make_folder, saved_and_restored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("fresh_engine"),
]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_checkpoint_holds_what_the_policy_held_when_it_was_begun(tmp_path: Path, name: str) -> None:
    (tmp_path / "state").mkdir()
    before, after, restored = saved_and_restored(
        make_folder(tmp_path / "model", name), tmp_path / "state", device="cuda"
    )
    assert restored.updates == before.updates == 1
    assert restored.optimizer.keys() == before.optimizer.keys()
    for wanted, found in ((before.weights, restored.weights), (before.optimizer, restored.optimizer)):
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert any(not torch.equal(after.weights[key], value) for key, value in before.weights.items())
