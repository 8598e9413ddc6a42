"""An export that is killed leaves a whole folder or none; its memory does not grow with the tensors."""

from __future__ import annotations

import json
import multiprocessing as mp
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.model_export import export_model
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.checkpoint.verify import verify_folders
from clipo_megatron.cli.main import main
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.hf_writer import HFWriter
from clipo_megatron.weights.names import hf_tensor_specs

KILLS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("tiny"), "llama", tied=True, dtype="bfloat16")


def _noise_model(folder: Path, tiny: Path, **sizes: int) -> Path:
    """A model of the given sizes in `folder`, its weights noise."""
    config = shutil.copytree(tiny, folder.with_name("config"), ignore=shutil.ignore_patterns("model*"))
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | sizes))
    generator = torch.Generator().manual_seed(0)
    with HFWriter(folder, source=config, dtype="bfloat16") as writer:
        for name, shape in hf_tensor_specs(read_architecture(config)).items():
            writer.add(name, torch.randn(shape, generator=generator))
        return writer.finish()


def _imported_noise(root: Path, tiny: Path, *, vocab_size: int) -> tuple[Path, Path]:
    """(Hugging Face folder, imported)."""
    source = _noise_model(root / "hf", tiny, vocab_size=vocab_size)
    import_model(source, root / "imported", layout=ParallelLayout(world_size=1))
    return source, root / "imported"


def _export_in_child(source: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    raise SystemExit(main(["ckpt", "export", str(source), str(folder)]))


def test_a_kill_at_any_moment_leaves_a_whole_folder_or_none_and_a_repeated_export_is_right(tiny, tmp_path):
    source, imported = _imported_noise(tmp_path / "model", tiny, vocab_size=102_400)
    out = tmp_path / "out"
    want = load_file(source / "model.safetensors")
    started = time.perf_counter()
    export_model(imported, out)
    seconds = time.perf_counter() - started
    moments = random.Random(time.time_ns())
    kills = 0
    for _ in range(KILLS):
        shutil.rmtree(out, ignore_errors=True)
        # Forked: what is slow is imported already, so that a moment falls into the work.
        process = mp.get_context("fork").Process(target=_export_in_child, args=(imported, out))
        process.start()
        time.sleep(moments.uniform(0.0, 1.2 * seconds))
        kills += process.is_alive()
        process.kill()
        process.join()
        if out.exists():
            assert verify_folders(source, out).is_clean
    assert kills, "no export was killed: the machine is too uneven for this test"
    shutil.rmtree(out, ignore_errors=True)
    assert main(["ckpt", "export", str(imported), str(out)]) == 0
    assert all(torch.equal(tensor, want[name]) for name, tensor in load_file(out / "model.safetensors").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def _peak_growth(source: Path, folder: Path, results) -> None:
    """Bytes by which the resident memory of this process grows at most."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    export_model(source, folder / "out")
    results.put(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def test_memory_does_not_depend_on_the_largest_tensor(tiny, tmp_path):
    # An embedding of 105 MB.
    _, imported = _imported_noise(tmp_path / "model", tiny, vocab_size=409_600)
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_peak_growth, args=(imported, tmp_path, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert results.get() < 70e6  # three buffers of 8 MiB, and what a forked process copies of its parent
