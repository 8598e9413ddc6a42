"""Laws of an engine's versions: only whole updates are served, in rising order; a refusal names both versions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clipo_megatron.errors import EngineError
from clipo_megatron.records import WeightBucket
from clipo_megatron.sync.bucket import pack_buckets
from clipo_megatron.sync.state import SyncState

MANIFEST = {"a": (2,), "b": (3,), "c": (4,)}


def _buckets(version: int, names: str = "abc") -> list[WeightBucket]:
    tensors = [(name, torch.zeros(MANIFEST.get(name, (1,)))) for name in names]
    return list(pack_buckets(tensors, version=version, bucket_bytes=1))  # one tensor each


def _update(state: SyncState, version: int) -> None:
    state.begin(version, MANIFEST)
    for bucket in _buckets(version):
        state.receive(bucket)
    state.commit(version, 3)


def test_a_new_engine_serves_the_model_folder_and_nothing_else() -> None:
    state = SyncState()
    state.ready(None)
    with pytest.raises(EngineError, match=r"asked for version 4, but the engine holds the model folder"):
        state.ready(4)


def test_only_the_committed_version_is_served() -> None:
    state = SyncState()
    _update(state, 4)
    state.ready(4)
    for version in (3, 5):
        with pytest.raises(EngineError, match=f"asked for version {version}, but the engine holds version 4"):
            state.ready(version)
    with pytest.raises(EngineError, match=r"asked for the model folder.*but the engine holds version 4"):
        state.ready(None)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_nothing_is_served_during_an_update(version: int | None) -> None:
    state = SyncState()
    _update(state, 1)
    state.begin(2, MANIFEST)
    with pytest.raises(EngineError, match="receiving version 2"):
        state.ready(version)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_after_an_abort_nothing_is_served_until_a_whole_update_is_committed(version: int | None) -> None:
    state = SyncState()
    _update(state, 1)
    state.begin(2, MANIFEST)
    state.receive(_buckets(2)[0])
    state.abort()
    with pytest.raises(EngineError, match=r"stale.*newest version committed: 1"):
        state.ready(version)
    _update(state, 2)  # the same version again: it was never held
    state.ready(2)


def test_an_abort_without_an_update_changes_nothing() -> None:
    state = SyncState()
    state.abort()
    state.ready(None)
    _update(state, 1)
    state.abort()
    state.ready(1)


@pytest.mark.parametrize("version", [3, 2, -1])
def test_a_version_that_is_not_newer_is_refused(version: int) -> None:
    state = SyncState()
    _update(state, 3)
    with pytest.raises(EngineError, match=f"receive version {version}, but version 3"):
        state.begin(version, MANIFEST)
    state.ready(3)


def test_versions_may_skip_numbers() -> None:
    state = SyncState()
    for version in (0, 7, 8):
        _update(state, version)
    state.ready(8)


def test_a_second_update_cannot_begin_inside_the_first() -> None:
    state = SyncState()
    state.begin(1, MANIFEST)
    with pytest.raises(EngineError, match="receive version 2, but version 1 is under way"):
        state.begin(2, MANIFEST)


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        (_buckets(1)[1], "bucket 1 of version 1: out of order, expected bucket 0"),
        (_buckets(2)[0], "part of version 2 during the update to version 1"),
        (_buckets(1, "x")[0], "tensor x is not one of the model's 3"),
        (
            next(pack_buckets([("a", torch.zeros(2, 1))], version=1, bucket_bytes=1)),
            r"shape \[2, 1\], the model's has \[2\]",
        ),
    ],
)
def test_a_wrong_bucket_is_refused_and_leaves_the_engine_stale(bucket: WeightBucket, message: str) -> None:
    state = SyncState()
    state.begin(1, MANIFEST)
    with pytest.raises(EngineError, match=message):
        state.receive(bucket)
    with pytest.raises(EngineError, match="stale"):
        state.ready(None)


def test_a_tensor_that_comes_twice_is_refused() -> None:
    state = SyncState()
    state.begin(1, MANIFEST)
    state.receive(_buckets(1)[0])
    with pytest.raises(EngineError, match="tensor a came before"):
        state.receive(dataclasses.replace(_buckets(1)[0], index=1))


def test_a_bucket_without_an_update_is_refused() -> None:
    state = SyncState()
    with pytest.raises(EngineError, match="no update is under way"):
        state.receive(_buckets(1)[0])
    state.ready(None)


@pytest.mark.parametrize(
    ("sent", "counted", "message"),
    [(2, 2, "1 of the model's 3 tensors did not come, first c"), (3, 2, "3 tensors came, the sender says 2")],
)
def test_an_incomplete_update_is_never_committed(sent: int, counted: int, message: str) -> None:
    state = SyncState()
    state.begin(1, MANIFEST)
    for bucket in _buckets(1)[:sent]:
        state.receive(bucket)
    with pytest.raises(EngineError, match=message):
        state.commit(1, counted)
    with pytest.raises(EngineError, match="stale"):
        state.ready(1)


def test_a_commit_of_another_version_is_refused() -> None:
    state = SyncState()
    state.begin(1, MANIFEST)
    with pytest.raises(EngineError, match="part of version 2 during the update to version 1"):
        state.commit(2, 3)


def _pull(state: SyncState, version: int) -> None:
    state.begin_pull(version)
    state.require_pull(version)
    state.pulled(version)
    state.commit_pull(version)


def test_pulled_and_sent_versions_take_turns() -> None:
    state = SyncState()
    _pull(state, 1)
    state.ready(1)
    _update(state, 2)
    state.ready(2)
    _pull(state, 4)
    state.ready(4)
    with pytest.raises(EngineError, match="receive version 4, but version 4 has been held"):
        state.begin_pull(4)


def test_nothing_is_served_during_a_pull_nor_after_its_abort() -> None:
    state = SyncState()
    _pull(state, 1)
    state.begin_pull(2)
    for version in (None, 1, 2):
        with pytest.raises(EngineError, match="receiving version 2"):
            state.ready(version)
    state.pulled(2)
    state.abort()
    for version in (None, 1, 2):
        with pytest.raises(EngineError, match="stale"):
            state.ready(version)


def test_a_pull_that_has_not_come_to_its_end_is_never_committed() -> None:
    state = SyncState()
    state.begin_pull(1)
    with pytest.raises(EngineError, match="version 1 was not pulled to its end"):
        state.commit_pull(1)
    with pytest.raises(EngineError, match="no update is under way"):
        state.commit_pull(1)


@pytest.mark.parametrize("late", ["require_pull", "pulled", "check_pulled", "commit_pull"])
def test_late_messages_of_another_pull_are_refused_and_leave_the_engine_stale(late: str) -> None:
    state = SyncState()
    _pull(state, 1)
    state.begin_pull(3)
    with pytest.raises(EngineError, match="part of version 2 during the update to version 3"):
        getattr(state, late)(2)
    with pytest.raises(EngineError, match="stale"):
        state.ready(1)


def test_the_two_ways_of_an_update_are_not_mixed() -> None:
    state = SyncState()
    state.begin_pull(1)
    with pytest.raises(EngineError, match="a bucket of version 1, which is being pulled"):
        state.receive(_buckets(1)[0])
    state.begin(1, MANIFEST)
    with pytest.raises(EngineError, match="pull version 1, which is being sent in buckets"):
        state.pulled(1)
    with pytest.raises(EngineError, match="stale"):
        state.ready(None)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_an_engine_that_slept_serves_nothing_until_a_whole_update_is_committed(version: int | None) -> None:
    state = SyncState()
    _update(state, 1)
    state.sleep()
    state.sleep()
    for change in (lambda: None, lambda: state.begin(1, MANIFEST), state.abort):
        change()
        with pytest.raises(EngineError, match=r"weights are gone since it slept|receiving version 1"):
            state.ready(version)


@pytest.mark.parametrize("pulls", [False, True])
def test_after_a_sleep_the_version_that_was_held_may_come_again_once(pulls: bool) -> None:
    state = SyncState()
    _update(state, 3)
    state.sleep()
    with pytest.raises(EngineError, match="version 2, but version 3 has been held: too late"):
        state.begin_pull(2)
    state.begin(3, MANIFEST)  # given up: still asleep
    state.abort()
    if pulls:
        state.begin_pull(3)
        state.pulled(3)
        state.commit_pull(3)
    else:
        _update(state, 3)
    state.ready(3)
    with pytest.raises(EngineError, match="version 3, but version 3 has been held: too late"):
        state.begin(3, MANIFEST)


def test_an_engine_can_not_sleep_during_an_update() -> None:
    state = SyncState()
    state.begin(1, MANIFEST)
    with pytest.raises(EngineError, match="asked to sleep while version 1 is being received"):
        state.sleep()
