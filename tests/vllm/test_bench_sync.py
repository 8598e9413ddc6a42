"""The sync benchmark with a real engine: both of its update paths are timed."""

from __future__ import annotations

from pathlib import Path

from support.tiny_models import make_tiny_hf

from clipo_megatron.checks.sync_speed import SyncSpeedSettings, measure_sync_speed
from clipo_megatron.parallel.layout import ParallelLayout


def test_both_ways_into_a_real_engine_are_measured(tmp_path: Path) -> None:
    found = measure_sync_speed(
        SyncSpeedSettings(
            model_path=make_tiny_hf(tmp_path, "qwen3"),
            dtype="float32",
            device="cpu",
            trainer=ParallelLayout(world_size=2, tp=2),
            engine_tp=1,
            repeats=2,
            bucket_mib=1,
            with_engine=True,
        )
    )
    assert found.engine_whole_s is not None
    assert found.engine_planned_s is not None
    assert found.engine_whole_over_planned == found.engine_whole_s / found.engine_planned_s
    assert found.engine_whole_over_copies == found.engine_whole_s / found.planned_s
    # Whatever the machine does meanwhile: the engine repacks what it has copied, so it can't be the faster one.
    assert found.engine_planned_s > found.planned_s
