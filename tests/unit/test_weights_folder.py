"""Laws of model folders: slices are what is stored, damage is found without loading, writing is all or nothing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.fingerprint import weights_fingerprint
from clipo_megatron.weights.folder_check import model_folder_problems
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.hf_writer import HFWriter, write_hf_folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("single"), "qwen3", tied=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("sharded"), "qwen2", max_shard_size="200KB")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_names_shapes_slices_and_tensors_are_those_of_the_files(request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    want = _tensors(folder)
    with HFReader(folder) as reader:
        assert reader.names() == sorted(want)
        for name, tensor in want.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == "float32"
            assert torch.equal(reader.read(name), tensor)
            assert torch.equal(reader.slice(name, dim=0, start=3, stop=17), tensor[3:17])
            reader.read(name).zero_()
            reader.slice(name, dim=0, start=0, stop=9).zero_()
            assert torch.equal(reader.read(name), tensor)  # what was read before is the caller's own
            if tensor.dim() == 2:
                assert torch.equal(reader.slice(name, dim=1, start=5, stop=40), tensor[:, 5:40])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_by_name(single: Path, share: float) -> None:
    whole = (single / "model.safetensors").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ConfigError, match=r"model\.safetensors.*copy the file again"):
            HFReader(Path(folder))


def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path / "inside")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = f"../{sharded.name}/{file}"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="must be a file name without folders"):
        HFReader(folder)


def test_a_truncated_shard_a_missing_shard_and_an_absent_tensor_are_reported_together(
    sharded: Path, tmp_path: Path
) -> None:
    folder = _copy(sharded, tmp_path / "broken")
    files = sorted(folder.glob("*.safetensors"))
    os.truncate(files[0], files[0].stat().st_size - 1)
    files[1].unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.weight"] = files[2].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError) as caught:
        HFReader(folder)
    first, second, third = caught.value.problems
    assert files[0].name in first
    assert "truncated" in first
    assert files[1].name in second
    assert "no such file" in second
    assert "model.layers.9.weight" in third


def test_a_git_lfs_pointer_and_trailing_bytes_are_refused(single: Path, tmp_path: Path) -> None:
    folder = _copy(single, tmp_path / "pointer")
    path = folder / "model.safetensors"
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match="too long"):
        HFReader(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        HFReader(folder)


def test_a_header_whose_offsets_do_not_fit_the_shape_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError, match="a: its bytes do not fit its shape"):
        HFReader(tmp_path)


@pytest.mark.parametrize("move", [-2, 2])
def test_a_header_whose_tensors_overlap_or_leave_a_gap_is_refused_as_by_the_library(tmp_path: Path, move: int) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps(
        {
            "a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [8 + move, 16 + move]},
        }
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16 + move))
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(ConfigError, match=r"model\.safetensors: b: its bytes overlap others or leave a gap"):
        HFReader(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.norm.bias"])
def test_a_tensor_that_a_second_file_holds_or_the_index_does_not_name_is_refused(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    folder = _copy(sharded, tmp_path / "twice")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index["model.norm.weight"])
    tensors = load_file(folder / other)
    save_file(tensors | {name: torch.zeros(3)}, folder / other, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{other}: also holds {name}, which .*(puts into|does not name)"):
        HFReader(folder)


def test_a_folder_without_or_with_two_sets_of_weights_is_refused(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save the model as safetensors"):
        HFReader(tmp_path)
    folder = _copy(sharded, tmp_path / "both")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="holds both"):
        HFReader(folder)


@pytest.mark.parametrize("max_shard_bytes", [1, 150_000, 2**30])
def test_a_written_folder_gives_transformers_the_same_model_and_tokenizer(
    sharded: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    writer = HFWriter(tmp_path / "out", source=sharded, max_shard_bytes=max_shard_bytes)
    for name, tensor in reversed(_tensors(sharded).items()):
        writer.add(name, tensor)
    out = writer.finish()
    assert out == tmp_path / "out"
    ids = torch.arange(3, 40)[None]
    chat = [{"role": "user", "content": "What is 3 + 4 ?"}]
    with torch.no_grad():
        want, got = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (sharded, out))
    assert torch.equal(got, want)
    old, new = (AutoTokenizer.from_pretrained(folder).apply_chat_template(chat) for folder in (sharded, out))
    assert old["input_ids"] == new["input_ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert model_folder_problems(out) == []
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    largest = max(tensor.nbytes for tensor in _tensors(sharded).values())
    for path in out.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= max(max_shard_bytes, largest)


def test_a_change_of_number_format_is_told_in_the_config(single: Path, tmp_path: Path) -> None:
    out = write_hf_folder(tmp_path / "half", _tensors(single).items(), source=single, dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in _tensors(out).items():
        assert torch.equal(tensor, _tensors(single)[name].bfloat16())


def _without_first(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return iter(list(tensors.items())[1:])


def _with_unknown(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    yield "lm_head.weight", torch.zeros(512, 64)  # the model is tied


def _with_one_twice(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, tensor
        yield name, tensor


def _with_padded_rows(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, torch.cat([tensor, tensor[:1]]) if "embed" in name else tensor


def _with_nan(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, tensor.index_fill(0, torch.tensor([5]), torch.nan) if "down" in name else tensor


@pytest.mark.parametrize(
    ("tampered", "message"),
    [
        (_without_first, "1 of 24 tensors were never given"),
        (_with_unknown, "lm_head.weight: no tensor of the model"),
        (_with_one_twice, "given twice"),
        (_with_padded_rows, r"shape \(513, 64\), not \(512, 64\)"),
        (_with_nan, "not finite"),
    ],
)
def test_a_wrong_set_of_tensors_leaves_nothing_behind(single: Path, tmp_path: Path, tampered, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_hf_folder(tmp_path / "out", tampered(_tensors(single)), source=single)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_does_not_disturb_the_next_one(single: Path, tmp_path: Path) -> None:
    killed = HFWriter(tmp_path / "out", source=single, max_shard_bytes=1)
    for name, tensor in list(_tensors(single).items())[:5]:
        killed.add(name, tensor)
    assert not (tmp_path / "out").exists()
    out = write_hf_folder(tmp_path / "out", _tensors(single).items(), source=single)
    assert model_folder_problems(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_replaced_only_when_asked_and_only_when_complete(single: Path, tmp_path: Path) -> None:
    out = write_hf_folder(tmp_path / "out", _tensors(single).items(), source=single)
    with pytest.raises(CheckpointError, match="exists"):
        HFWriter(out, source=single)
    doubled = {name: tensor * 2 for name, tensor in _tensors(single).items()}
    with HFWriter(out, source=single, overwrite=True) as writer:
        for name, tensor in doubled.items():
            writer.add(name, tensor)
        assert torch.equal(_tensors(out)["model.norm.weight"] * 2, doubled["model.norm.weight"])
        writer.finish()
    assert torch.equal(_tensors(out)["model.norm.weight"], doubled["model.norm.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_writer_keeps_its_own_copy_of_a_tensor(single: Path, tmp_path: Path) -> None:
    with HFWriter(tmp_path / "out", source=single) as writer:
        for name, tensor in _tensors(single).items():
            writer.add(name, tensor)
            tensor.zero_()
        writer.finish()
    assert all(torch.equal(tensor, _tensors(single)[name]) for name, tensor in _tensors(tmp_path / "out").items())


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(sharded, tmp_path):
    folder = _copy(sharded, tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    assert any(f"{shard}: is no regular file" in problem for problem in model_folder_problems(folder))


def test_a_fingerprint_is_that_of_the_weights_not_of_their_files_and_any_training_step_changes_it(single, tmp_path):
    folder = _copy(single, tmp_path / "model")
    tensors = _tensors(folder)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of_file in halves.items():
        save_file({name: tensors[name] for name in of_file}, folder / file)
    index = {"weight_map": {name: file for file, of_file in halves.items() for name in of_file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_fingerprint(folder) == weights_fingerprint(single)
    save_file({name: tensors[name] + 2**-6 for name in halves["b.safetensors"]}, folder / "b.safetensors")
    assert weights_fingerprint(folder) != weights_fingerprint(single)
