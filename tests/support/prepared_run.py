"""What tests that train share: the quickstart's warm-started policy, and a small recipe on it."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

ROOT = Path(__file__).parents[2]
_made: list[Path] = []
"""One policy serves all folders of tests, each of which has its own fixtures."""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder with policy/, train.parquet and heldout.parquet, as the quickstart's but with shorter problems."""
    if _made:
        return _made[0]
    # Beside it another process may run tests: one of them makes the policy, and the other waits for it.
    folder = common_folder(tmp_path_factory) / "quickstart" / "prepared"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder.parent / "whole").exists():
            _prepare(folder)
            (folder.parent / "whole").touch()
    _made.append(folder)
    return folder


def common_folder(tmp_path_factory) -> Path:
    """The folder of all tests' files, those of other processes of the same pytest too."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _prepare(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "quickstart" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module
    spec.loader.exec_module(module)
    module.NUM_TERMS, module.STOP_AT = 3, 0.4
    module.NUM_TRAIN, module.NUM_HELD_OUT, module.NUM_WARM_START, module.NUM_STOP = 256, 64, 900, 200
    module.prepare(folder, seed=0, console=Console(stderr=True))


@pytest.fixture(scope="session")
def write_recipe(prepared):
    """Writes a small recipe on the warm-started policy: tp = 2 with sequence parallelism, 8 prompts x 4 rollouts."""

    def write(folder, name, **run):
        content = {
            "run": {
                "name": name,
                "folder": str(folder),
                "device": "cpu",
                "gate_max_logprob_difference": 1e-3,
                "gate_mean_logprob_difference": 1e-4,
                "worker_timeout_s": 120,
                "start_timeout_s": 300,
                **run,
            },
            "model": {"path": str(prepared / "policy"), "dtype": "float32"},
            "data": {"train": [str(prepared / "train.parquet")], "max_prompt_tokens": 64},
            "layout": {"world_size": 2, "tp": 2, "micro_batch_tokens": 2048},
            "rollout": {"max_response_tokens": 64, "kv_cache_mib": 64, "max_num_seqs": 32},
            "algorithm": {"prompts_per_step": 8, "group_size": 4, "updates_per_step": 2, "kl": {"coefficient": 0.01}},
            "contrastive": {"head_size": 32},
            "rewards": {"workers": 1},
            "optimizer": {"learning_rate": 1e-4},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
