"""Laws of the checkpoint folder: only whole checkpoints have a name, damage is found, a resume takes the newest."""

import json
import logging
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import POLICY, RANK_FILES, make_identity, read_values, values_of, write_checkpoint, write_rank

from clipo_megatron.checkpoint.checksum import file_checksum
from clipo_megatron.checkpoint.manifest import (
    MANIFEST,
    Progress,
    find_damage,
    list_checkpoints,
    read_manifest,
)
from clipo_megatron.checkpoint.training import close_checkpoint, discard_leftovers, find_resume, open_checkpoint
from clipo_megatron.errors import CheckpointError


@pytest.fixture
def run(tmp_path_factory):
    return make_identity(tmp_path_factory.mktemp("run"), recipe="run: {name: try}\n")


def _flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


def test_what_is_saved_is_what_is_read(tmp_path, run):
    path = write_checkpoint(tmp_path, 3, run=run, sound=False, accuracy=0.25)
    manifest = read_manifest(path)
    assert manifest.progress == Progress(step=3, version=2, prompts_taken=24)
    assert (manifest.fingerprint, manifest.data_hash, manifest.sound, manifest.accuracy) == ("f", "d", False, 0.25)
    assert torch.equal(read_values(path), values_of(3))
    assert (path / "recipe.yaml").read_text() == run.recipe
    assert json.loads((path / "policy.json").read_text()) == {**POLICY, "reference_hash": ""}
    assert (path / "config" / "config.json").read_bytes() == (run.model_path / "config.json").read_bytes()
    assert manifest.versions["torch"] == torch.__version__


def test_the_manifest_has_the_size_and_the_checksum_of_every_file_in_the_folder(tmp_path, run):
    path = write_checkpoint(tmp_path, 3, run=run)
    manifest = read_manifest(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    assert manifest.files == {name: file.stat().st_size for name, file in files.items() if name != MANIFEST}
    assert manifest.checksums == {name: file_checksum(file) for name, file in files.items() if name != MANIFEST}
    assert {*RANK_FILES, ".metadata", "metadata.json", "config/tokenizer.json"} <= manifest.files.keys()


def test_torchs_own_reader_finds_the_same_tensor(tmp_path, run):
    import torch.distributed.checkpoint as dcp

    path = write_checkpoint(tmp_path, 2, run=run)
    found = {"optimizer.state.exp_avg": torch.zeros(2, 100)}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    assert torch.equal(found["optimizer.state.exp_avg"], values_of(2))


def _close(beside, run, *, files, step=2):
    return close_checkpoint(
        beside,
        progress=Progress(step=step),
        run=run,
        sound=True,
        accuracy=None,
        files=files,
        policy=POLICY,
    )


def _write_ranks(beside):
    return [write_rank(beside, rank, values) for rank, values in enumerate(values_of(2))]


def test_a_folder_that_is_not_closed_is_no_checkpoint_and_does_not_stand_in_the_way(tmp_path, run):
    write_checkpoint(tmp_path, 1, run=run)
    _write_ranks(open_checkpoint(tmp_path, 2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert find_resume(tmp_path).progress.step == 1
    write_checkpoint(tmp_path, 2, run=run)
    assert len(list_checkpoints(tmp_path)) == 2


def test_files_that_the_driver_can_not_see_are_refused(tmp_path, run):
    write_checkpoint(tmp_path, 1, run=run)
    beside = open_checkpoint(tmp_path, 2)
    files = _write_ranks(beside)
    (beside / RANK_FILES[1]).unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: the driver finds no bytes .*all nodes share"):
        _close(beside, run, files=files)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_ranks_that_leave_a_hole_in_a_tensor_are_refused(tmp_path, run):
    beside = open_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.exp_avg"):
        _close(beside, run, files=[write_rank(beside, 0, values_of(2)[0])])
    assert list_checkpoints(tmp_path) == []


def test_a_driver_that_can_not_write_names_the_checkpoint_and_keeps_the_old_ones(tmp_path, run, file_size_limit):
    write_checkpoint(tmp_path, 1, run=run)
    large = replace(run, recipe="# long\n" * 20_000)
    beside = open_checkpoint(tmp_path, 2)
    files = _write_ranks(beside)
    with (
        file_size_limit(100_000),
        pytest.raises(CheckpointError, match=r"step_00000002: .*older checkpoints are untou"),
    ):
        _close(beside, large, files=files)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path, run, damage):
    path = write_checkpoint(tmp_path, 1, run=run)
    file = path / RANK_FILES[0]
    if damage == "truncate":
        file.write_bytes(b"short")
    elif damage == "remove":
        file.unlink()
    else:
        (path / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="manifest" if damage == "manifest" else r"__0_0\.distcp"):
        read_manifest(path)


def test_an_untouched_folder_passes_and_the_time_is_logged(tmp_path, run, caplog):
    assert find_resume(tmp_path) is None
    path = write_checkpoint(tmp_path, 4, run=run)
    with caplog.at_level(logging.INFO):
        resume = find_resume(tmp_path)
    assert (resume.checkpoint, resume.progress.step) == (path, 4)
    assert find_damage(path) == []
    assert re.search(r"checked .*step_00000004: \d+ files, [\d.]+ KB in \d+\.\d\d s", caplog.text)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.lists(st.integers(0, 1 << 20), min_size=10, max_size=10))
def test_one_flipped_bit_is_found_in_every_file(tmp_path, run, bits):
    path = write_checkpoint(tmp_path, 1, run=run)
    names = sorted([*read_manifest(path).files, MANIFEST])
    assert len(names) == len(bits)
    for name, bit in zip(names, bits, strict=True):
        undamaged = (path / name).read_bytes()
        _flip(path / name, bit)
        assert [fault.split()[0] for fault in find_damage(path)] == [name]
        with pytest.raises(CheckpointError, match=re.escape(name)):
            find_resume(tmp_path)
        (path / name).write_bytes(undamaged)
    assert find_damage(path) == []


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path, run):
    path = write_checkpoint(tmp_path, 1, run=run)
    manifest = path / MANIFEST
    for bit in range(8 * manifest.stat().st_size):
        _flip(manifest, bit)
        assert find_damage(path), f"bit {bit}"
        _flip(manifest, bit)


def test_all_damaged_files_are_named_at_once(tmp_path, run):
    path = write_checkpoint(tmp_path, 1, run=run)
    (path / RANK_FILES[0]).write_bytes((path / RANK_FILES[0]).read_bytes()[:-1])
    (path / "config" / "tokenizer.json").unlink()
    _flip(path / "recipe.yaml", 77)
    (path / "config" / "stray").write_bytes(b"")
    for read in (find_resume, lambda folder: read_manifest(list_checkpoints(folder)[-1])):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        message = str(caught.value)
        assert re.search(r"__0_0\.distcp has \d+ bytes, its manifest says", message)
        assert "config/tokenizer.json is missing" in message
        assert "recipe.yaml has checksum" in message
        assert "config/stray is not in its manifest" in message
        assert RANK_FILES[1] not in message
        assert "No older checkpoint is undamaged" in message


def test_the_newest_undamaged_checkpoint_is_offered_and_can_be_resumed_from(tmp_path, run):
    paths = [write_checkpoint(tmp_path, step, run=run) for step in (1, 2, 3, 4)]
    for path in paths[2:]:
        _flip(path / RANK_FILES[0], 5)
    with pytest.raises(CheckpointError) as caught:
        find_resume(tmp_path)
    assert f"{paths[1]} is undamaged: remove or rename {paths[3]}, {paths[2]} to go on" in str(caught.value)
    for path in paths[2:]:
        path.rename(path.with_name(f"damaged_{path.name}"))
    assert find_resume(tmp_path).progress.step == 2


def test_a_manifest_of_an_earlier_format_is_refused_by_its_name(tmp_path, run):
    path = write_checkpoint(tmp_path, 1, run=run)
    content = json.loads((path / MANIFEST).read_text())
    del content["format"], content["sound"], content["manifest_checksum"]
    (path / MANIFEST).write_text(json.dumps(content, indent=1))
    with pytest.raises(CheckpointError, match="is of format 1, not 2: an earlier version of clipo_megatron wrote it"):
        read_manifest(path)


# --- the link to the newest ---


def test_latest_names_the_newest_complete_checkpoint(tmp_path, run):
    for step in (1, 2, 10):
        path = write_checkpoint(tmp_path, step, run=run)
        assert os.readlink(tmp_path / "latest") == path.name
    open_checkpoint(tmp_path, 11)
    assert (tmp_path / "latest").resolve() == path


def test_a_resume_takes_the_newest_folder_whatever_latest_says(tmp_path, run):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, run=run)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step_00000001")
    assert find_resume(tmp_path).progress.step == 2
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("gone")
    assert find_resume(tmp_path).progress.step == 2


def test_a_start_removes_what_was_unfinished_and_sets_latest_again(tmp_path, run):
    write_checkpoint(tmp_path, 1, run=run)
    newest = write_checkpoint(tmp_path, 2, run=run)
    _write_ranks(open_checkpoint(tmp_path, 3))
    shutil.copytree(newest, tmp_path / ".step_00000000.old")
    (tmp_path / ".latest.tmp").symlink_to("nowhere")
    (tmp_path / "latest").unlink()
    (tmp_path / "mine").mkdir()
    discard_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "mine", "step_00000001", "step_00000002"]
    assert (tmp_path / "latest").resolve() == newest
    shutil.rmtree(newest)
    discard_leftovers(tmp_path)
    assert os.readlink(tmp_path / "latest") == "step_00000001"
    shutil.rmtree(tmp_path / "step_00000001")
    discard_leftovers(tmp_path)
    assert not os.path.lexists(tmp_path / "latest")


def test_a_resume_from_a_checkpoint_behind_a_loss_that_was_not_finite_names_the_last_good_one(tmp_path, run, caplog):
    good = write_checkpoint(tmp_path, 1, run=run)
    write_checkpoint(tmp_path, 2, run=run, sound=False)
    assert find_resume(tmp_path).progress.step == 2
    assert f"{good} is the newest before that" in caplog.text
