"""A policy and an engine take turns on one GPU: the memory of either returns in every cycle, and the numbers agree.

No GPU was at hand when this test was written: it has not been run yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.tiny_models import make_tiny_hf

ROOT = Path(__file__).parents[2]
STEPS = 10
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("transport", ["ipc", "stream"])
def test_ten_colocated_steps_return_to_the_same_memory_and_pass_the_step_0_gate(transport: str, tmp_path: Path) -> None:
    model = make_tiny_hf(tmp_path / "model", "qwen3", num_layers=4, hidden_size=1024, ffn_size=4096)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(64)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    recipe = tmp_path / "recipe.yaml"
    content = {
        "run": {"name": "run", "folder": str(tmp_path), "steps": STEPS, "device": "cuda"},
        "model": {"path": str(model), "dtype": "bfloat16"},
        "data": {"train": [str(tmp_path / "train.parquet")], "max_prompt_tokens": 64},
        "rollout": {"colocate": True, "gpu_memory_utilization": 0.5, "max_response_tokens": 64},
        "algorithm": {"prompts_per_step": 8, "group_size": 4},
        "sync": {"transport": transport, "verify": "always"},
    }
    recipe.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "clipo_megatron.cli", "train", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        print({key: value for key, value in row.items() if key.startswith(("colocation/", "sync/", "seconds/"))})
    for phase in ("generate", "idle", "train"):
        used = [row[f"colocation/{phase}_mib"] for row in found[2:]]
        assert max(used) - min(used) < 64, (phase, used)
    total_mib = torch.cuda.mem_get_info()[1] / 2**20
    assert found[-1]["colocation/generate_mib"] - found[-1]["colocation/idle_mib"] > 0.4 * total_mib
