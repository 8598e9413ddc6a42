"""Laws of retention: which checkpoints stay, and that removing the others never leaves one that looks whole and is not."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import make_identity, write_checkpoint

from clipo_megatron.checkpoint.manifest import MANIFEST, Manifest, Progress, list_checkpoints
from clipo_megatron.checkpoint.retention import Retention, kept, remove_folder, remove_old


def _manifest(step: int, *, sound: bool = True, accuracy: float | None = None) -> Manifest:
    return Manifest(
        progress=Progress(step=step),
        fingerprint="",
        data_hash="",
        sound=sound,
        accuracy=accuracy,
        versions={},
        files={},
        checksums={},
    )


ACCURACIES = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
HISTORIES = st.dictionaries(st.integers(1, 60), st.tuples(st.booleans(), ACCURACIES), max_size=12).map(
    lambda found: [_manifest(step, sound=sound, accuracy=accuracy) for step, (sound, accuracy) in found.items()]
)
RETENTIONS = st.builds(
    Retention, keep=st.integers(1, 4), keep_every=st.sampled_from([0, 1, 5, 20]), keep_best=st.integers(0, 3)
)


def _steps(manifests):
    return sorted(manifest.progress.step for manifest in manifests)


@given(HISTORIES, RETENTIONS)
def test_what_stays_is_the_union_of_four_rules(history, retention):
    """Against loops that ask of each checkpoint how many there are before it."""
    want = set()
    for one in history:
        step, others = one.progress.step, [other for other in history if other is not one]
        newer = [other for other in others if other.progress.step > step]
        if len(newer) < retention.keep:
            want.add(step)
        if retention.keep_every and step % retention.keep_every == 0:
            want.add(step)
        if one.sound and not any(other.sound for other in newer):
            want.add(step)
        better = [
            other
            for other in others
            if one.accuracy is not None
            and other.accuracy is not None
            and (other.accuracy, other.progress.step) > (one.accuracy, step)
        ]
        if one.accuracy is not None and len(better) < retention.keep_best:
            want.add(step)
    assert kept(history, retention).keys() == want


@given(HISTORIES, RETENTIONS)
def test_the_newest_and_the_newest_sound_one_always_stay(history, retention):
    stays = kept(history, retention)
    if history:
        assert max(_steps(history)) in stays
    if good := _steps(manifest for manifest in history if manifest.sound):
        assert good[-1] in stays


@given(HISTORIES, RETENTIONS)
def test_removing_twice_removes_no_more_and_the_order_does_not_matter(history, retention):
    stays = kept(history, retention)
    left = [manifest for manifest in history if manifest.progress.step in stays]
    assert kept(left, retention).keys() == stays.keys()
    assert kept(reversed(history), retention) == stays


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 3))
def test_a_run_that_saves_step_by_step_never_loses_its_last_good_checkpoint(soundness, keep):
    there: list[Manifest] = []
    for step, sound in enumerate(soundness, start=1):
        there.append(_manifest(step, sound=sound))
        stays = kept(there, Retention(keep=keep))
        there = [manifest for manifest in there if manifest.progress.step in stays]
        good = [past for past, was_sound in enumerate(soundness[:step], start=1) if was_sound]
        assert not good or good[-1] in _steps(there)
        assert len(there) <= keep + 1


def test_the_folders_that_are_not_kept_go_and_the_log_says_which_are_pinned_and_why(tmp_path, caplog):
    run = make_identity(tmp_path / "run")
    folder = tmp_path / "checkpoints"
    accuracy = {1: 0.5, 2: 0.75, 3: 0.25, 4: None, 5: 0.5, 6: None, 7: None, 8: None}
    for step, value in accuracy.items():
        write_checkpoint(folder, step, run=run, accuracy=value, sound=step <= 3)
    with caplog.at_level(logging.INFO):
        remove_old(folder, Retention(keep=2, keep_every=5, keep_best=1))
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["2", "3", "5", "7", "8"]
    assert "step_00000002 stays: number 1 by pass@1, with 0.7500" in caplog.text
    assert "step_00000003 stays: the newest in which all losses and gradients were finite" in caplog.text
    assert "step_00000005 stays: a multiple of 5 steps" in caplog.text
    assert "step_00000008 stays" not in caplog.text
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_checkpoint_whose_manifest_can_not_be_read_stays_and_takes_no_place(tmp_path, caplog):
    run = make_identity(tmp_path / "run")
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(folder, step, run=run)
    (folder / "step_00000003" / MANIFEST).write_text("{")
    remove_old(folder, Retention(keep=1))
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["2", "3"]
    assert "step_00000003 stays: manifest.json can't be read" in caplog.text


def test_a_folder_loses_its_name_before_its_content(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "checkpoints", 1, run=make_identity(tmp_path / "run"))
    at_removal = []
    monkeypatch.setattr("shutil.rmtree", lambda folder, **_: at_removal.append((folder, path.exists())))
    remove_folder(path)
    assert at_removal[-1] == (path.with_name(".step_00000001.old"), False)
    assert list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("keep", [1, 3])
def test_without_other_rules_the_newest_stay(keep):
    assert kept([_manifest(step) for step in (1, 2, 9, 10)], Retention(keep=keep)).keys() == set([1, 2, 9, 10][-keep:])
