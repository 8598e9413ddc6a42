"""One flipped bit in each of fifty files of a checkpoint: `clipo ckpt verify` names all fifty, and no other."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support.checkpoints import make_identity, write_checkpoint
from support.dist_folders import import_tiny
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.cli.main import main
from clipo_megatron.parallel.layout import ParallelLayout

FILES = 50


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face folder, imported in fifty files and more)."""
    root = tmp_path_factory.mktemp("models")
    source = make_tiny_hf(root / "hf", "qwen3_moe", num_layers=8, num_kv_heads=4)
    layout = ParallelLayout(world_size=16, tp=4, pp=4, ep=4)
    import_model(source, root / "imported", layout=layout, unit_bytes=50_000, block_elements=1 << 12)
    return source, root / "imported"


def _flip_bit(path: Path, rng: random.Random) -> int:
    """The place of the changed byte."""
    raw = bytearray(path.read_bytes())
    place = rng.randrange(len(raw))
    raw[place] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return place


def _verify(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, dict]:
    code = main(["ckpt", "verify", *map(str, folders), "--json"])
    return code, json.loads(capsys.readouterr().out)


def _named(report: dict, folder: Path, files: list[Path]) -> set[str]:
    """Those of `files` that a line of the report begins with."""
    return {
        path.relative_to(folder).as_posix()
        for path in files
        for fault in report["faults"]
        if fault.startswith((f"{path}: ", f"{folder}: {path.relative_to(folder).as_posix()} "))
    }


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_in_each_of_fifty_files_is_found_in_all_fifty(models, tmp_path, capsys, seed):
    source, imported = models
    broken = Path(shutil.copytree(imported, tmp_path / "broken"))
    rng = random.Random(seed)
    files = sorted(broken.glob("*.distcp"))
    assert len(files) > FILES
    flipped = {path: _flip_bit(path, rng) for path in rng.sample(files, FILES)}
    want = {path.name for path in flipped}
    for folders in ([broken], [source, broken], [broken, imported]):
        code, report = _verify(capsys, *folders)
        assert code == 1
        assert not report["clean"]
        assert _named(report, broken, files) == want


def test_differing_tensors_are_named_with_the_damaged_files_that_hold_them(models, tmp_path, capsys):
    source, imported = models
    broken = Path(shutil.copytree(imported, tmp_path / "broken"))
    with DistReader(broken) as reader:
        file, chunk = reader.chunks("decoder.layers.mlp.experts.experts.linear_fc2.weight")[5]
        layer, expert = chunk.start[:2]
        bits = reader.read_box(chunk.key, start=chunk.start, shape=chunk.shape).numpy().tobytes()
    raw = bytearray((broken / file).read_bytes())
    raw[raw.index(bits) + 2] ^= 1
    (broken / file).write_bytes(raw)
    code, report = _verify(capsys, source, broken)
    assert code == 1
    (difference,) = report["differences"]
    assert difference["tensor"] == f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    assert (difference["second_file"], difference["num_differing"]) == (file, 1)
    assert difference["position"] == list(chunk.start[2:])
    assert _named(report, broken, sorted(broken.glob("*.distcp"))) == {file}


def test_a_flipped_bit_in_any_small_file_is_found(models, tmp_path, capsys):
    _, imported = models
    rng = random.Random(7)
    small = [path.relative_to(imported) for path in sorted(imported.rglob("*")) if path.is_file()]
    small = [name for name in small if name.suffix != ".distcp"]
    assert {".metadata", "metadata.json", "common.pt", "conversion.json", "config/config.json"} <= {*map(str, small)}
    broken = Path(shutil.copytree(imported, tmp_path / "broken"))
    for name in small:
        for _ in range(3):
            _flip_bit(broken / name, rng)
            code, report = _verify(capsys, broken)
            assert code == 1
            assert _named(report, broken, [broken / name]) == {name.as_posix()}
            shutil.copyfile(imported / name, broken / name)
    assert main(["ckpt", "verify", str(broken)]) == 0


def test_a_missing_and_a_foreign_file_are_named(models, tmp_path, capsys):
    _, imported = models
    broken = Path(shutil.copytree(imported, tmp_path / "broken"))
    missing = sorted(broken.glob("*.distcp"))[3]
    missing.unlink()
    (broken / "notes.txt").write_text("mine")
    code, report = _verify(capsys, broken)
    assert code == 1
    assert _named(report, broken, [missing, broken / "notes.txt"]) == {missing.name, "notes.txt"}
    assert len(report["faults"]) == 2


def test_a_flipped_bit_in_any_file_of_a_training_checkpoint_is_found(tmp_path, capsys):
    step = write_checkpoint(tmp_path / "checkpoints", 3, run=make_identity(tmp_path / "run"))
    (step / "config" / "config.json").unlink()  # of no known family
    rng = random.Random(8)
    for path in [path for path in sorted(step.rglob("*")) if path.is_file()]:
        whole = path.read_bytes()
        _flip_bit(path, rng)
        code, report = _verify(capsys, step)
        assert code == 1
        assert any(path.relative_to(step).as_posix() in fault for fault in report["faults"]), path
        path.write_bytes(whole)


def test_without_a_manifest_only_another_folder_tells_a_flipped_bit(models, tmp_path, capsys):
    source, _ = models
    bare = import_tiny(source, tmp_path / "bare", tp=2)
    (bare / "conversion.json").unlink()
    assert main(["ckpt", "verify", str(source), str(bare)]) == 0
    with DistReader(bare) as reader:
        file, chunk = reader.chunks("decoder.final_layernorm.weight")[0]
        bits = reader.read_box(chunk.key, start=chunk.start, shape=chunk.shape).numpy().tobytes()
    raw = bytearray((bare / file).read_bytes())
    raw[raw.index(bits)] ^= 1
    (bare / file).write_bytes(raw)
    capsys.readouterr()
    code, report = _verify(capsys, bare)
    assert code == 0
    code, report = _verify(capsys, source, bare)
    assert code == 1
    assert [difference["tensor"] for difference in report["differences"]] == ["model.norm.weight"]
