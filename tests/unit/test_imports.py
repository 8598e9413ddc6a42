"""Laws of large imports: no garbage is looked for meanwhile, and afterwards it is as before."""

from __future__ import annotations

import gc

import pytest

from clipo_megatron.imports import large_imports


@pytest.fixture
def looks():
    """What the collector did, one entry a look."""
    seen = []
    gc.callbacks.append(note := lambda phase, info: seen.append(phase))
    yield seen
    gc.callbacks.remove(note)


def _many_objects() -> list[list[object]]:
    return [[] for _ in range(50 * gc.get_threshold()[0])]


def test_no_garbage_is_looked_for_within_the_block_and_it_is_again_after_it(looks):
    with large_imports():
        looks.clear()
        kept = _many_objects()
        assert looks == []
    kept += _many_objects()
    assert looks


def test_an_import_that_fails_leaves_the_collector_on():
    with pytest.raises(ImportError), large_imports():
        raise ImportError("no such library")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
