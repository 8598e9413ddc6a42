"""Laws of the checkpoint folder: only whole checkpoints have a name, damage is found, retention keeps the newest."""

import pytest

from clipo_megatron.checkpoint.training import Progress, list_checkpoints, read_manifest, save_checkpoint
from clipo_megatron.errors import CheckpointError


def _save(folder, step, *, keep=2, write=None):
    def write_ranks(path):
        (path / "rank_0.safetensors").write_bytes(bytes([step]) * 100)

    return save_checkpoint(
        folder,
        Progress(step=step, version=step - 1, prompts_taken=8 * step),
        write_ranks=write or write_ranks,
        fingerprint="f",
        data_hash="d",
        keep=keep,
    )


def test_what_is_saved_is_what_is_read(tmp_path):
    path = _save(tmp_path, 3)
    manifest = read_manifest(path)
    assert manifest.progress == Progress(step=3, version=2, prompts_taken=24)
    assert (manifest.fingerprint, manifest.data_hash) == ("f", "d")
    assert manifest.files == {"rank_0.safetensors": 100}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10):
        _save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]


def test_a_save_that_fails_leaves_no_checkpoint_and_keeps_the_old_ones(tmp_path):
    _save(tmp_path, 1)

    def fails(path):
        (path / "rank_0.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        _save(tmp_path, 2, write=fails)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    _save(tmp_path, 2)  # the half-written folder does not stand in the way
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path, damage):
    path = _save(tmp_path, 1)
    file = path / "rank_0.safetensors"
    if damage == "truncate":
        file.write_bytes(b"short")
    elif damage == "remove":
        file.unlink()
    else:
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest" if damage == "manifest" else r"rank_0\.safetensors"):
        read_manifest(path)
