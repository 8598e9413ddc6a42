"""Laws of `clipo ckpt verify` and `inspect` for distributed checkpoints: layouts do not matter, every fault is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.dist_folders import import_tiny, read_keys, write_keys
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.checkpoint.verify import verify_folder, verify_folders
from clipo_megatron.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

EMBEDDING, FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.experts.experts.linear_fc1.weight"
VOCAB = 301
LAYOUTS = {"one": {}, "tp2_ep2": {"tp": 2, "ep": 2}, "tp4_pp2": {"tp": 4, "pp": 2}, "etp2": {"etp": 2}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    return make_tiny_hf(
        folder, "qwen3_moe", vocab_size=VOCAB, tokenizer_size=280, num_kv_heads=4, max_shard_size="100KB"
    )


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    return {name: import_tiny(source, root / name, **degrees) for name, degrees in LAYOUTS.items()}


@pytest.fixture
def tensors(imported) -> dict[str, Tensor]:
    return read_keys(imported["one"])


def _hf_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _differences(first: Path, second: Path, **keys) -> dict[str, str]:
    return {found.tensor: found.kind for found in verify_folders(first, second, **keys).differences}


@pytest.mark.parametrize(
    ("name", "slice_bytes"), [("tp2_ep2", 8), *((name, size) for name in LAYOUTS for size in (1000, 2**20))]
)
def test_a_model_equals_its_import_under_any_layout_and_slice(source, imported, name, slice_bytes):
    report = verify_folders(source, imported[name], slice_bytes=slice_bytes)
    assert report.is_clean
    assert report.num_tensors == len(_hf_tensors(source))
    assert report.bytes_read == 2 * sum(tensor.nbytes for tensor in _hf_tensors(source).values())
    assert verify_folder(imported[name], slice_bytes=slice_bytes).is_clean


def test_imports_of_two_layouts_are_equal_whatever_their_padding(imported, capsys):
    padded = {name: read_keys(folder)[EMBEDDING].shape[0] for name, folder in imported.items()}
    assert (padded["one"], padded["tp2_ep2"], padded["tp4_pp2"]) == (384, 512, 512)
    assert main(["ckpt", "verify", str(imported["one"]), str(imported["tp4_pp2"])]) == 0
    assert "equal: " in capsys.readouterr().out


def test_progress_tells_the_checksums_of_both_folders_to_their_last_byte_then_the_tensors(imported):
    told: list[tuple[str, int, int]] = []
    first, second = imported["one"], imported["tp4_pp2"]
    report = verify_folders(first, second, on_progress=lambda *now: told.append(now))
    for folder in (first, second):
        of_folder = [now for now in told if now[0].startswith(f"checksum of {folder}/")]
        size = sum(
            path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "conversion.json"
        )
        assert of_folder[-1][1:] == (size, size)
        assert [done for _, done, _ in of_folder] == sorted(done for _, done, _ in of_folder)
    assert told[-1][1:] == (report.bytes_read, report.bytes_read)


def test_a_checkpoint_without_config_is_read_with_the_other_folders(source, imported, tensors, tmp_path):
    bare = write_keys(tmp_path / "bare", tensors)
    for report in (
        verify_folders(source, bare),
        verify_folders(bare, imported["tp4_pp2"]),
        verify_folders(bare, bare, config=source),
        verify_folder(bare, config=source),
    ):
        assert report.is_clean
        assert not [note for note in report.notes if "--config" in note]
        assert report.num_tensors == len(_hf_tensors(source))
    alone = verify_folder(bare)
    assert alone.is_clean
    assert alone.num_tensors == len(tensors)
    assert "name the model's Hugging Face folder with --config" in alone.notes[0]


def test_changed_elements_are_placed_in_the_tensors_that_hugging_face_knows(source, tensors, tmp_path):
    # 4 heads and 4 groups of head_dim 32: a group is its query head, its key head, its value head.
    tensors[QKV][1, 2 * 96 + 32 + 5, 7] += 1
    tensors[FC1][0, 3, 64 + 9, 11] += 1
    tensors[EMBEDDING][VOCAB - 1, 3] += 1
    changed = write_keys(tmp_path / "changed", tensors, config=source)
    found = {item.tensor: item for item in verify_folders(source, changed).differences}
    assert {name: item.position for name, item in found.items()} == {
        "model.layers.1.self_attn.k_proj.weight": (2 * 32 + 5, 7),
        "model.layers.0.mlp.experts.3.up_proj.weight": (9, 11),
        "model.embed_tokens.weight": (VOCAB - 1, 3),
    }
    before = _hf_tensors(source)
    for name, item in found.items():
        assert (item.kind, item.num_differing, item.second_file) == ("bits", 1, "__0_0.distcp")
        assert str(before[name][item.position].item()) in item.detail


def test_number_formats_and_shapes_that_differ_are_named(source, tensors, tmp_path):
    half = write_keys(tmp_path / "half", tensors | {FINAL_NORM: tensors[FINAL_NORM].bfloat16()}, config=source)
    assert _differences(source, half) == {"model.norm.weight": "dtype"}
    first, second = (write_keys(tmp_path / name, values) for name, values in _two_shapes(tensors).items())
    assert _differences(first, second) == {FINAL_NORM: "shape", "decoder.extra": "only in second"}


def _two_shapes(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    few = {FINAL_NORM: tensors[FINAL_NORM]}
    return {"first": few, "second": {FINAL_NORM: torch.ones(3), "decoder.extra": torch.ones(1)}}


def test_keys_that_do_not_fit_config_json_are_named_and_nothing_is_compared(source, tensors, tmp_path, capsys):
    del tensors[FINAL_NORM]
    tensors["decoder.layers.mlp.shared_experts.linear_fc1.weight"] = torch.zeros(2, 4, 4)
    wrong = write_keys(tmp_path / "wrong", tensors)
    assert main(["ckpt", "verify", str(source), str(wrong)]) == 1
    out = capsys.readouterr().out
    assert f"no {FINAL_NORM}, which a qwen3_moe model has with shape (64,)" in out
    assert "shared_experts.linear_fc1.weight (2, 4, 4) is not known in a qwen3_moe model" in out


def test_padding_that_is_not_zero_is_a_fault_that_names_its_first_row(source, tensors, tmp_path):
    padded = torch.cat([tensors[EMBEDDING][:VOCAB], torch.zeros(19, 64)])
    sound = write_keys(tmp_path / "sound", tensors | {EMBEDDING: padded}, config=source)
    assert verify_folder(sound).is_clean
    padded[VOCAB + 4, 5] = 1.0
    padded[VOCAB + 9] = torch.inf
    wrong = write_keys(tmp_path / "wrong", tensors | {EMBEDDING: padded}, config=source)
    for report in (verify_folder(wrong), verify_folders(source, wrong)):
        assert report.differences == ()
        (fault,) = report.faults
        assert f"{EMBEDDING}: 2 of the 19 rows that pad the vocabulary are not zero, first row {VOCAB + 4}" in fault


def test_experts_that_hold_the_same_tensor_are_a_fault(source, tensors, tmp_path):
    tensors[FC1][1, 2, 64:] = tensors[FC1][1, 0, 64:]
    copied = write_keys(tmp_path / "copied", tensors, config=source)
    (fault,) = verify_folder(copied).faults
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    assert f"experts of one layer hold the same tensor: {name.format(0)}, {name.format(2)}" in fault


def test_values_that_are_not_finite_are_placed(source, tensors, tmp_path):
    tensors[FC1][0, 1, 2, 3] = torch.nan
    broken = write_keys(tmp_path / "broken", tensors, config=source)
    (fault,) = verify_folder(broken).faults
    assert "model.layers.0.mlp.experts.1.gate_proj.weight: 1 of 4096 elements are not finite, first at [2, 3]" in fault


def test_an_output_layer_fits_config_json_or_is_a_fault(source, tensors, tmp_path):
    config = json.loads((source / "config.json").read_text())
    for name, tied in (("tied", True), ("untied", False)):
        (tmp_path / f"config-{name}").mkdir()
        text = json.dumps(config | {"tie_word_embeddings": tied})
        (tmp_path / f"config-{name}" / "config.json").write_text(text)
    stored = write_keys(tmp_path / "stored", tensors)
    (fault,) = verify_folder(stored, config=tmp_path / "config-tied").faults
    assert "output_layer.weight" in fault
    assert "whose tie_word_embeddings is true" in fault
    left_out = write_keys(tmp_path / "left_out", {k: v for k, v in tensors.items() if k != "output_layer.weight"})
    assert verify_folder(left_out, config=tmp_path / "config-tied").is_clean
    (fault,) = verify_folder(left_out, config=tmp_path / "config-untied").faults
    assert "no output_layer.weight" in fault
    assert "set tie_word_embeddings to true" in fault


def test_two_training_states_are_compared_but_for_what_belongs_to_a_rank(source, tensors, tmp_path):
    def state(name: str, rows: int, rank: str, moment: float) -> Path:
        padded = torch.cat([tensors[EMBEDDING][:VOCAB], torch.zeros(rows, 64)])
        moments = torch.cat([torch.full((VOCAB, 64), moment), torch.zeros(rows, 64)])
        keys = {EMBEDDING: padded, f"optimizer.state.exp_avg.{EMBEDDING}": moments}
        keys |= {f"rank_state.{rank}.random.cpu": torch.arange(5), "contrastive_head.bias": torch.tensor(0.5)}
        return write_keys(tmp_path / name, tensors | keys, config=source)

    first, second, third = state("a", 3, "00000", 1.0), state("b", 515, "00001", 1.0), state("c", 3, "00000", 2.0)
    report = verify_folders(first, second)
    assert report.is_clean
    assert report.num_tensors == len(_hf_tensors(source)) + 2
    assert _differences(first, third) == {f"optimizer.state.exp_avg.{EMBEDDING}": "bits"}
    assert verify_folders(source, third).is_clean  # a model has no state to compare


def test_a_distributed_checkpoint_is_described_by_its_index_and_record(source, imported, tensors, tmp_path, capsys):
    assert main(["ckpt", "inspect", str(imported["tp2_ep2"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    count = sum(tensor.numel() for tensor in _hf_tensors(source).values())
    assert (found["kind"], found["family"], found["parameters"]) == ("imported model", "qwen3_moe", count)
    assert found["layout"] == {"tp": 2, "pp": 1, "vpp": 1, "ep": 2, "etp": 1}
    assert (found["source"], found["has_optimizer"], found["keys"]) == (str(source), False, len(tensors))
    assert set(found["versions"]) >= {"clipo_megatron", "torch"}
    bare = write_keys(tmp_path / "bare", tensors | {"optimizer.state.exp_avg.x": torch.ones(4)})
    assert main(["ckpt", "inspect", str(bare), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["has_optimizer"], found["chunks"]) == (
        "distributed checkpoint",
        True,
        len(tensors) + 1,
    )
    assert found["stored_parameters"] == sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert found["tensor_bytes_by_dtype"] == {"float32": 4 * found["stored_parameters"] + 16}
    assert found["files"] == {path.name: path.stat().st_size for path in bare.iterdir()}


def test_a_checkpoint_without_its_checksums_says_that_values_were_compared_with_nothing(source, tmp_path):
    folder = import_tiny(source, tmp_path / "imported")
    assert verify_folder(folder).notes == ()
    (folder / "conversion.json").unlink()
    [note] = verify_folder(folder).notes
    assert "neither conversion.json nor manifest.json" in note
    assert verify_folders(source, folder).notes == ()  # there every value is compared
