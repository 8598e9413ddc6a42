"""Laws of the import: each rank's boxes hold its parameters bit for bit, and the record tells every file."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.model_imports import BLOCK_ELEMENTS, SMALL_MODEL, UNIT_BYTES, file_bytes, small_import, small_model
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.checksum import content_faults, file_checksum
from clipo_megatron.checkpoint.conversion_plan import plan_import, smallest_layout
from clipo_megatron.checkpoint.conversion_record import RECORD_FILE, file_faults, read_record
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.errors import CheckpointError
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.global_tensors import Box, boxes_of
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import local_parameter
from clipo_megatron.weights.names import hf_tensor_specs, is_expert, megatron_parameter_names, padded_vocab_size

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    ("llama", {"tied": True}, {"tp": 2, "pp": 2}),
    ("qwen2", {"dtype": "bfloat16"}, {"tp": 4}),
    ("qwen3", {"dtype": "float16"}, {"pp": 2, "vpp": 2}),
    ("qwen3_moe", {"dtype": "bfloat16"}, {"tp": 2, "pp": 2, "ep": 4}),
    ("qwen3_moe", {}, {"tp": 4, "ep": 2, "etp": 2}),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The import of `source` that nothing disturbed."""
    return small_import(source, tmp_path_factory.mktemp("imports") / "whole", tp=2, pp=2).folder


# --- what is in the files ---


def _inside(box: Box, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """Where a chunk lies in the rank's parameter, if it is a part of `box`."""
    begins = [at - begin for at, begin in zip(start, box.global_start, strict=True)]
    fits = zip(begins, shape, box.global_extent, strict=True)
    if not all(begin >= 0 and begin + length <= whole for begin, length, whole in fits):
        return None
    dims = len(box.shape)
    places = zip(begins[-dims:], box.local_start, shape[-dims:], strict=True)
    return tuple(slice(local + begin, local + begin + length) for begin, local, length in places)


@pytest.mark.parametrize(("family", "kind", "degrees"), CASES)
def test_each_chunk_of_a_rank_s_files_is_a_part_of_the_rank_s_parameter_bit_for_bit(family, kind, degrees, tmp_path):
    folder = make_tiny_hf(tmp_path / "hf", family, **(SMALL_MODEL | kind))
    target = small_import(folder, tmp_path / "target", **degrees).folder
    arch, layout = read_architecture(folder), smallest_layout(degrees)
    padded_vocab = padded_vocab_size(arch.vocab_size, layout.tp)
    with HFReader(folder) as hf, DistReader(target) as stored:
        chunks = [found for key in list(stored.keys()) for found in stored.chunks(key)]
        assert len({name for name, _ in chunks}) > layout.world_size  # several units
        for rank in range(layout.world_size):
            places = {"tp": layout.tp, "etp": layout.etp, "padded_vocab": padded_vocab}
            places |= {"tp_rank": layout.tp_rank(rank), "etp_rank": layout.etp_rank(rank)}
            own = [(name, chunk) for name, chunk in chunks if name.startswith(f"__{rank}_")]
            boxes: dict[str, list[tuple[Box, str]]] = {}
            for parameter in megatron_parameter_names(arch):
                if not is_expert(parameter) or _ep_rank(parameter, arch, layout) == layout.ep_rank(rank):
                    for box in boxes_of(parameter, arch, **places):
                        boxes.setdefault(box.key, []).append((box, parameter))
            for name, chunk in own:
                ((parameter, inside),) = [
                    (parameter, inside)
                    for box, parameter in boxes[chunk.key]
                    if (inside := _inside(box, chunk.start, chunk.shape)) is not None
                ]
                archive = (target / name).read_bytes()[chunk.offset : chunk.offset + chunk.length]
                found = torch.load(io.BytesIO(archive), weights_only=True)
                expected = local_parameter(hf, parameter, arch, **places)[inside]
                assert found.dtype == expected.dtype
                assert torch.equal(found.reshape(expected.shape), expected)


def _ep_rank(parameter: str, arch, layout) -> int:
    return int(parameter.split("local_experts.")[1].split(".")[0]) // (arch.experts.num_experts // layout.ep)


@pytest.mark.parametrize(("family", "kind", "degrees"), CASES)
def test_every_rank_s_parameter_reads_back_under_another_layout(family, kind, degrees, tmp_path):
    folder = make_tiny_hf(tmp_path / "hf", family, **(SMALL_MODEL | kind))
    target = small_import(folder, tmp_path / "target", **degrees).folder
    arch = read_architecture(folder)
    with HFReader(folder) as hf, DistReader(target) as stored:
        places = {"tp": 2, "padded_vocab": stored.shape("embedding.word_embeddings.weight")[0]}
        for tp_rank in range(2):
            for parameter in megatron_parameter_names(arch):
                expected = local_parameter(hf, parameter, arch, tp_rank=tp_rank, **places)
                found = torch.full_like(expected, torch.nan)
                for box in boxes_of(parameter, arch, tp_rank=tp_rank, **places):
                    inside = tuple(slice(at, at + n) for at, n in zip(box.local_start, box.shape, strict=True))
                    part = stored.read_box(box.key, start=box.global_start, shape=box.global_extent)
                    found[inside] = part.reshape(box.shape)
                assert torch.equal(found, expected)


def test_rows_that_pad_the_vocabulary_are_zeros(whole, source):
    vocab_size = read_architecture(source).vocab_size
    with DistReader(whole) as stored:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows, width = stored.shape(key)
            assert rows == padded_vocab_size(vocab_size, 2) > vocab_size
            assert not stored.read_box(key, start=(vocab_size, 0), shape=(rows - vocab_size, width)).any()


def test_a_number_format_is_converted_as_torch_does(source, tmp_path):
    target = small_import(source, tmp_path / "target", dtype="bfloat16", tp=2).folder
    arch = read_architecture(source)
    with HFReader(source) as hf, DistReader(target) as stored:
        for key in list(stored.keys()):
            assert stored.dtype(key) == "bfloat16"
        norm = stored.read_box("decoder.final_layernorm.weight", start=(0,), shape=(arch.hidden_size,))
        assert torch.equal(norm, hf.read("model.norm.weight").bfloat16())
        proj = stored.read_box(
            "decoder.layers.self_attention.linear_proj.weight", start=(3, 0, 0), shape=(1, arch.hidden_size, 48)
        )
        assert torch.equal(proj[0], hf.read("model.layers.3.self_attn.o_proj.weight").bfloat16())
    assert read_architecture(target / "config").dtype == "bfloat16"
    assert read_record(target).dtype == "bfloat16"


# --- what the folder says of itself ---


def test_the_record_tells_every_file_and_the_plan_told_its_size(whole, source):
    record = read_record(whole)
    assert file_faults(whole, record.files) == {}
    assert content_faults(whole, record.checksums) == {}
    assert record.files.keys() == record.checksums.keys() == file_bytes(whole).keys() - {RECORD_FILE}
    assert record.layout == {"tp": 2, "pp": 2, "vpp": 1, "ep": 1, "etp": 1}
    with DistReader(whole) as stored:
        dtypes = {key: stored.dtype(key) for key in list(stored.keys())}
    plan = plan_import(
        read_architecture(source),
        smallest_layout(record.layout),
        dtypes=dtypes,
        unit_bytes=UNIT_BYTES,
        block_elements=BLOCK_ELEMENTS,
    )
    for share in plan.shares():
        sizes = [size for name, size in record.files.items() if name.startswith(f"__{share.rank}_")]
        assert (len(sizes), sum(sizes)) == (share.num_files, share.num_bytes)
    assert record.architecture["padded_vocab"] == plan.padded_vocab


def test_the_folder_holds_the_source_s_config_and_tokenizer_byte_for_byte(whole, source):
    small = {path.name for path in source.iterdir()} - {path.name for path in source.glob("*safetensors*")}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= small
    assert file_bytes(whole / "config") == {name: (source / name).read_bytes() for name in small}


def test_an_import_depends_on_nothing_but_the_source_and_its_arguments(whole, source, tmp_path):
    again = small_import(source, tmp_path / "again", tp=2, pp=2).folder
    assert file_bytes(again) == file_bytes(whole)


def test_a_changed_byte_of_the_record_is_refused(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    path = folder / RECORD_FILE
    raw = path.read_bytes()
    for place in (len(raw) // 3, len(raw) // 2, len(raw) - 2):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(CheckpointError, match=RECORD_FILE):
            read_record(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read_record(folder)


def test_files_that_are_missing_cut_or_unknown_are_told(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (folder / "__0_0.distcp").unlink()
    os.truncate(folder / "config" / "tokenizer.json", 10)
    (folder / "config" / "notes.txt").write_text("x")
    faults = file_faults(folder, read_record(folder).files)
    assert list(faults) == ["__0_0.distcp", "config/tokenizer.json", "config/notes.txt"]
    for name, text in zip(faults, ("is missing", "has 10 bytes", "is not in"), strict=True):
        assert text in faults[name]


# --- the tool beside the command ---


def test_the_tool_is_the_command(source, whole, tmp_path):
    target = tmp_path / "target"
    command = [sys.executable, str(ROOT / "checkpoint_tools" / "hf_to_megatron.py"), str(source), str(target)]
    done = subprocess.run([*command, "--layout", "tp=2,pp=2"], capture_output=True, text=True, check=True)
    assert re.search(r"target: \d+ KB in \d", done.stdout)
    with DistReader(whole) as first, DistReader(target) as second:
        assert second.keys() == first.keys()
    assert file_checksum(target / "config" / "config.json") == file_checksum(source / "config.json")
    assert hf_tensor_specs(read_architecture(target / "config")) == hf_tensor_specs(read_architecture(source))
