"""A checkpoint that Megatron-core saved itself exports to the Hugging Face folder that the model was loaded from."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from support.policy_cases import make_worker
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.verify import verify_folder, verify_folders
from clipo_megatron.checks.local_ranks import start_server
from clipo_megatron.cli.main import main
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the scope is for machines without a GPU")

CASES = {
    "qwen3_moe": (ParallelLayout(world_size=2, tp=2, ep=2), {"vocab_size": 391}),
    "qwen2": (ParallelLayout(world_size=2, pp=2), {"vocab_size": 391, "tied": True, "num_layers": 2}),
}
# A save starts a server process for this queue, by spawn, which nobody ends; results stay in the process that saves.
RESULTS = "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue"


def _save(model: Path, folder: Path, layout: ParallelLayout) -> None:
    worker = make_worker(model, layout, contrastive=None)
    with cuda_means_cpu(), mock.patch(RESULTS, queue.Queue()):
        chunks = {f"chunk{index}": chunk.sharded_state_dict() for index, chunk in enumerate(worker._stage.chunks)}
        dist_checkpointing.save(chunks, str(folder))


@pytest.mark.parametrize("family", CASES)
def test_what_megatron_saved_exports_to_the_weights_that_it_was_given(tmp_path, family):
    layout, keys = CASES[family]
    model = make_tiny_hf(tmp_path / "hf", family, **keys)
    saved, out = tmp_path / "iter_0000003", tmp_path / "out"
    saved.mkdir()
    run_ranks(_save, model, saved, layout, world_size=layout.world_size)
    assert main(["ckpt", "export", str(saved), str(out), "--config", str(model)]) == 0
    want, got = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert verify_folders(model, saved).is_clean
    assert verify_folder(saved, config=model).is_clean


def test_another_number_format_is_a_difference_but_none_of_forward_passes(tmp_path, capsys):
    start_server(["clipo_megatron.policy.logits"])
    model = make_tiny_hf(tmp_path / "hf", "llama", vocab_size=307, tokenizer_size=280)
    imported, rounded = str(tmp_path / "imported"), str(tmp_path / "rounded")
    assert main(["ckpt", "import", str(model), imported, "--layout", "tp=2"]) == 0
    assert main(["ckpt", "export", imported, rounded, "--dtype", "bfloat16"]) == 0
    assert main(["ckpt", "verify", imported, rounded]) == 1
    capsys.readouterr()
    assert main(["ckpt", "verify", imported, rounded, "--logits", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clean"]
    assert report["logits"]["rounded_to"] == "bfloat16"
    assert {difference["kind"] for difference in report["differences"]} == {"dtype"}
    assert main(["ckpt", "verify", imported, "--logits"]) == 2
    other = make_tiny_hf(tmp_path / "other", "llama", vocab_size=307, tokenizer_size=280, num_layers=1)
    assert main(["ckpt", "verify", imported, str(other), "--logits"]) == 1
    assert "forward passes were not compared" in capsys.readouterr().out
