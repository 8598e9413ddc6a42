"""Laws of `clipo ckpt`: every changed bit is found and placed, files may be cut anyhow, damage is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.checkpoint.manifest import Progress
from clipo_megatron.checkpoint.tensor_slices import nonfinite_elements, unequal_elements
from clipo_megatron.checkpoint.training import RunIdentity, close_checkpoint, open_checkpoint
from clipo_megatron.checkpoint.verify import verify_folder, verify_folders
from clipo_megatron.cli.main import main
from clipo_megatron.weights.hf_writer import write_hf_folder

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
GATE = "model.layers.1.mlp.experts.{}.gate_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small folder of several shards for each family; llama is tied and bfloat16."""
    kinds = {"llama": {"tied": True, "dtype": "bfloat16"}}
    return {
        family: make_tiny_hf(tmp_path_factory.mktemp(family), family, max_shard_size="100KB", **kinds.get(family, {}))
        for family in FAMILIES
    }


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder and store them as one file, as a careless script would."""
    tensors = _tensors(folder)
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _flip_bit(path: Path, rng: random.Random) -> tuple[str, int]:
    """Flip one bit of one tensor of a file; (name of the tensor, flat index of the element)."""
    raw = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    place = rng.randrange(header_end, len(raw))
    raw[place] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    header = json.loads(raw[8:header_end])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] <= place - header_end < entry["data_offsets"][1]:
            width = {"F32": 4, "BF16": 2}[entry["dtype"]]
            return name, (place - header_end - entry["data_offsets"][0]) // width
    raise AssertionError("the byte belongs to no tensor")


def _verify_json(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, dict]:
    code = main(["ckpt", "verify", *map(str, folders), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_flipped_bit_in_each_file_is_found_and_placed_in_every_file(folders, family, tmp_path, capsys):
    broken = _copy(folders[family], tmp_path / "broken")
    rng = random.Random(FAMILIES.index(family))
    files = sorted(broken.glob("*.safetensors"))
    assert len(files) >= 5
    flipped = {path.name: _flip_bit(path, rng) for path in files}
    code, report = _verify_json(capsys, folders[family], broken)
    assert code == 1
    found = {difference["second_file"]: difference for difference in report["differences"]}
    assert found.keys() == flipped.keys()
    before, after = _tensors(folders[family]), _tensors(broken)
    for file, (name, index) in flipped.items():
        difference = found[file]
        assert (difference["tensor"], difference["kind"], difference["num_differing"]) == (name, "bits", 1)
        place = tuple(int(along) for along in torch.unravel_index(torch.tensor(index), before[name].shape))
        assert tuple(difference["position"]) == place
        assert str(before[name][place].item()) in difference["detail"]
        assert str(after[name][place].item()) in difference["detail"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_equals_itself_cut_and_ordered_otherwise(folders, family, tmp_path, capsys):
    again = write_hf_folder(tmp_path / "again", reversed(_tensors(folders[family]).items()), source=folders[family])
    assert main(["ckpt", "verify", str(folders[family]), str(again)]) == 0
    assert f"equal: {len(_tensors(again))} tensors" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(again)]) == 0
    assert "no faults" in capsys.readouterr().out


@pytest.mark.parametrize("slice_bytes", [8, 1000, 2**16])
def test_the_report_does_not_depend_on_the_slices(folders, tmp_path, slice_bytes):
    broken = _copy(folders["llama"], tmp_path / "broken")
    rng = random.Random(5)
    for path in sorted(broken.glob("*.safetensors"))[:4] * 3:
        _flip_bit(path, rng)
    whole = verify_folders(folders["llama"], broken)
    assert len(whole.differences) >= 4
    assert verify_folders(folders["llama"], broken, slice_bytes=slice_bytes) == whole
    assert verify_folder(folders["llama"], slice_bytes=slice_bytes) == verify_folder(folders["llama"])


@pytest.mark.parametrize("places", [[], [0], [700_001], [262_143, 262_144, 786_431]])
def test_elements_are_counted_and_the_first_is_placed_anywhere_in_a_large_slice(places):
    before = torch.zeros(786_432)  # three blocks of 1 MiB
    after = before.index_fill(0, torch.tensor(places, dtype=torch.int64), torch.nan)
    first, second = (memoryview(bytearray(values.numpy().tobytes())) for values in (before, after))
    want = (len(places), min(places, default=-1))
    assert unequal_elements(first, second, width=4) == want
    assert nonfinite_elements(second, dtype="float32") == want


def test_progress_ends_at_the_bytes_that_were_announced(folders, tmp_path):
    other = _copy(folders["qwen3_moe"], tmp_path / "other")
    _rewrite(other, lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}))
    told: list[tuple[str, int, int]] = []
    report = verify_folders(folders["qwen3_moe"], other, on_progress=lambda *now: told.append(now))
    assert told[-1][1:] == (report.bytes_read, report.bytes_read)
    assert {total for _, _, total in told} == {report.bytes_read}


def test_memory_is_two_slices_however_large_the_tensor(tmp_path):
    first = make_tiny_hf(tmp_path / "a", "llama", vocab_size=2**17, hidden_size=64, num_layers=1)
    largest = max(tensor.nbytes for tensor in _tensors(first).values())
    assert largest == 32 * 2**20
    slice_bytes = 2**20
    verify_folders(first, first, slice_bytes=slice_bytes)  # what is allocated once, such as imports
    tracemalloc.start()
    try:
        assert verify_folders(first, first, slice_bytes=slice_bytes).is_clean
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * slice_bytes < peak < 2 * slice_bytes + 2 * 2**20


def test_bits_are_compared_not_values(folders, tmp_path):
    """NaN equals the same NaN; 0.0 does not equal -0.0."""
    first, second = (_copy(folders["qwen3"], tmp_path / name) for name in "ab")

    def change(zero: float) -> Callable[[dict[str, Tensor]], None]:
        def set_values(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"][3] = torch.nan
            tensors["model.norm.weight"][7] = zero

        return set_values

    _rewrite(first, change(0.0))
    _rewrite(second, change(-0.0))
    (difference,) = verify_folders(first, second).differences
    assert (difference.tensor, difference.position, difference.num_differing) == ("model.norm.weight", (7,), 1)
    assert "0.0 (0x00000000) and -0.0 (0x80000000)" in difference.detail
    assert verify_folders(first, first).is_clean


def test_a_dtype_a_shape_a_missing_and_an_extra_tensor_are_all_named(folders, tmp_path, capsys):
    other = _copy(folders["qwen2"], tmp_path / "other")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
        tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], torch.zeros(1, 128)])
        del tensors["model.layers.1.input_layernorm.weight"]
        tensors["model.layers.9.input_layernorm.weight"] = torch.ones(128)

    _rewrite(other, change)
    code, report = _verify_json(capsys, folders["qwen2"], other)
    assert code == 1
    kinds = {difference["tensor"]: difference["kind"] for difference in report["differences"]}
    assert kinds == {
        "model.norm.weight": "dtype",
        "lm_head.weight": "shape",
        "model.layers.1.input_layernorm.weight": "only in first",
        "model.layers.9.input_layernorm.weight": "only in second",
    }
    assert "lm_head.weight has 513 rows: vocab_size = 512" in "".join(report["faults"])
    assert main(["ckpt", "verify", str(folders["qwen2"]), str(other)]) == 1
    out = capsys.readouterr().out
    assert "model.norm.weight: dtype: float32 and bfloat16" in out
    assert "lm_head.weight: shape: (512, 128) and (513, 128)" in out


@pytest.mark.parametrize("is_pair", [True, False])
def test_an_expert_that_is_a_copy_of_another_is_named(folders, tmp_path, capsys, is_pair):
    other = _copy(folders["qwen3_moe"], tmp_path / "other")
    _rewrite(other, lambda tensors: tensors.update({GATE.format(3): tensors[GATE.format(1)].clone()}))
    code, report = _verify_json(capsys, other, *([other] if is_pair else []))
    assert code == 1
    (fault,) = report["faults"]
    assert f"{GATE.format(1)}, {GATE.format(3)}" in fault
    assert report["differences"] == []


def test_a_copied_expert_is_found_also_where_the_other_folder_has_another_dtype(folders, tmp_path):
    other = _copy(folders["qwen3_moe"], tmp_path / "other")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[GATE.format(3)] = tensors[GATE.format(1)] = tensors[GATE.format(1)].bfloat16()
        tensors[GATE.format(3)] = tensors[GATE.format(3)].clone()

    _rewrite(other, change)
    report = verify_folders(folders["qwen3_moe"], other)
    assert sorted(difference.tensor for difference in report.differences) == [GATE.format(1), GATE.format(3)]
    assert GATE.format(3) in "".join(report.faults)


def test_a_tied_model_with_an_output_layer_of_its_own_is_told(folders, tmp_path):
    same, own = (_copy(folders["llama"], tmp_path / name) for name in ("same", "own"))
    embedding = "model.embed_tokens.weight"
    _rewrite(same, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    _rewrite(own, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1}))
    assert verify_folders(same, same).is_clean
    (fault,) = verify_folders(own, own).faults
    assert "tie_word_embeddings = true" in fault
    report = verify_folders(folders["llama"], own)
    assert [(found.tensor, found.kind) for found in report.differences] == [("lm_head.weight", "only in second")]


def test_a_config_that_makes_another_model_of_the_same_weights_is_told(folders, tmp_path):
    other = _copy(folders["qwen3"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(config))
    report = verify_folders(folders["qwen3"], other)
    assert report.differences == ()
    assert "rms_eps is 1e-06" in report.faults[0]


def test_values_that_are_not_finite_are_placed(folders, tmp_path, capsys):
    other = _copy(folders["llama"], tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][2, 5] = torch.nan
        tensors[name][4, 1] = torch.inf

    _rewrite(other, change)
    assert main(["ckpt", "verify", str(other)]) == 1
    out = capsys.readouterr().out
    assert f"{name}: 2 of " in out
    assert "first at [2, 5]: nan" in out


def test_folders_that_cannot_be_read_are_refused_with_all_their_faults(folders, tmp_path, capsys):
    broken = _copy(folders["qwen3"], tmp_path / "broken")
    files = sorted(broken.glob("*.safetensors"))
    os.truncate(files[0], files[0].stat().st_size - 1)
    files[1].unlink()
    assert main(["ckpt", "verify", str(broken), str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err
    for words in (f"{files[0].name}: truncated", f"{files[1].name}: no such file", "nowhere: no such folder"):
        assert words in errors
    assert main(["ckpt", "verify", str(broken)]) == 2
    assert main(["ckpt", "inspect", str(broken)]) == 2


def test_a_model_folder_is_described_by_its_headers(folders, capsys):
    folder = folders["qwen3_moe"]
    assert main(["ckpt", "inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = _tensors(folder)
    assert (found["kind"], found["family"], found["experts"]) == ("model folder", "qwen3_moe", 4)
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["tensor_bytes_by_dtype"] == {"float32": sum(tensor.nbytes for tensor in tensors.values())}
    assert found["files"] == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert main(["ckpt", "inspect", str(folders["llama"])]) == 0
    assert "tied: yes" in capsys.readouterr().out.splitlines()


@pytest.fixture
def run_folder(folders, tmp_path) -> Path:
    """A run with two checkpoints, the older one damaged, an export, and what a kill left."""
    identity = {"dtype": "float32", "architecture": {"family": "qwen3", "num_layers": 2}}
    policy = {"layout": {"world_size": 2, "tp": 2, "pp": 1}, "identity": identity}
    run = tmp_path / "run"
    for step in (2, 4):
        beside = open_checkpoint(run / "checkpoints", step)
        files = []
        for rank in range(2):
            writer = DistWriter(beside / f"__{rank}_0.distcp")
            writer.write(
                "decoder.final_layernorm.weight", torch.ones(5), global_shape=(10,), start=(5 * rank,), shape=(5,)
            )
            files.append(writer.finish())
        close_checkpoint(
            beside,
            progress=Progress(step=step, version=step - 1, prompts_taken=8 * step),
            run=RunIdentity(fingerprint="f00d", data_hash="beef", recipe="", model_path=folders["qwen3"]),
            sound=True,
            accuracy=None,
            files=files,
            policy=policy,
        )
    os.truncate(run / "checkpoints" / "step_00000002" / "__1_0.distcp", 7)
    (run / "checkpoints" / ".step_00000006.tmp").mkdir()
    (run / "recipe.yaml").write_text("")
    _copy(folders["qwen3"], run / "hf" / "final")
    return run


def test_a_training_checkpoint_is_described_by_its_manifest(run_folder, capsys):
    checkpoint = run_folder / "checkpoints" / "step_00000004"
    assert main(["ckpt", "inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["weights_version"], found["prompts_taken"]) == (4, 3, 32)
    assert (found["recipe_fingerprint"], found["data_hash"]) == ("f00d", "beef")
    assert (found["keys"], found["chunks"], found["tensor_bytes_by_dtype"]) == (1, 2, {"float32": 40})
    assert found["layout"] == {"world_size": 2, "tp": 2, "pp": 1}
    on_disk = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert found["files"] == on_disk
    assert found["bytes"] == sum(on_disk.values())
    assert main(["ckpt", "inspect", str(checkpoint)]) == 0
    assert "accuracy: not measured" in capsys.readouterr().out.splitlines()
    assert main(["ckpt", "inspect", str(checkpoint.with_name("step_00000002"))]) == 2
    assert "__1_0.distcp: has 7 bytes" in capsys.readouterr().err


def test_a_run_is_described_with_its_damaged_and_unfinished_folders(run_folder, tmp_path, capsys):
    assert main(["ckpt", "inspect", str(run_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "run"
    assert found["checkpoints"].keys() == {"step_00000002", "step_00000004"}
    assert "has 7 bytes" in found["checkpoints"]["step_00000002"]["damaged"][0]
    assert found["checkpoints"]["step_00000004"]["step"] == 4
    assert found["exports"]["final"]["family"] == "qwen3"
    assert found["unfinished"] == ["checkpoints/.step_00000006.tmp"]
    assert main(["ckpt", "inspect", str(tmp_path)]) == 2
    assert "holds none of config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("tool", "number"), [("verify", 2), ("inspect", 1)])
def test_the_scripts_are_the_commands(folders, capsys, tool, number):
    arguments = [*[str(folders["qwen3"])] * number, "--json"]
    script = [sys.executable, str(ROOT / "checkpoint_tools" / f"{tool}.py"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    assert main(["ckpt", tool, *arguments]) == 0
    assert done.stdout == capsys.readouterr().out
