"""A real SLURM of four nodes for all tests of this folder, and a small run that two of its nodes can train."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.prepared_run import ROOT, common_folder, prepared, write_recipe
from support.slurm_lab import SlurmLab, missing

__all__ = ["lab", "prepared", "submit_run", "write_recipe"]

SCRIPT = ROOT / "slurm" / "train.sbatch"
OVER_TWO_NODES = ("layout.world_size=2", "layout.tp=1", "rollout.engines=2")


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Iterator[SlurmLab]:
    if lacking := missing():
        pytest.skip(f"no SLURM here: {lacking}")
    folder = tmp_path_factory.mktemp("slurm")
    # Below the folder of all tests' files, which the nodes see as a cluster's file system.
    cluster = SlurmLab(folder, shared=common_folder(tmp_path_factory), nodes=4)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def submit_run(lab, write_recipe, tmp_path):
    """Submits the batch script as shipped, for two nodes; gives the job's number and its folder."""

    def submit(name: str, *overrides: str, options: tuple[str, ...] = (), **environment: str) -> tuple[str, Path]:
        recipe = write_recipe(tmp_path, name)
        settings = {
            "CLIPO_HOME": str(ROOT),
            "CLIPO_PYTHON": sys.executable,
            "CLIPO_JOBS_DIR": str(tmp_path / "jobs"),
            "CLIPO_RAY_CPUS": "2",  # of each node: one policy rank and one engine
            "CLIPO_RAY_OBJECT_STORE_BYTES": str(100 << 20),
            # Of a node, it measures the memory of the whole machine, which others use too.
            "RAY_memory_monitor_refresh_ms": "0",
            "CLIPO_FABRIC": "off",  # one test measures the links; in all of them it would take minutes
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            **environment,
        }
        output = f"--output={tmp_path / 'slurm-%j.out'}"
        lab.wait_until_idle(*lab.names)  # or the job would get other nodes than the first ones
        words = ("--nodes=2", output, *options, str(SCRIPT), str(recipe), *OVER_TWO_NODES, *overrides)
        job = lab.submit(*words, **settings)
        return job, tmp_path / "jobs" / job

    return submit


def told(job: str, folder: Path) -> str:
    """Everything that a job's parts have written, for a failure's message."""
    files = [folder.parent.parent / f"slurm-{job}.out", *sorted(folder.rglob("*.log"))]
    return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())


def metrics(run: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl without what depends on the clock or on how often the run was started."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    volatile = ("seconds/", "checkpoint/", "sync/", "throughput/")
    return [
        {key: value for key, value in row.items() if not key.startswith(volatile) and not key.endswith("_per_s")}
        for row in rows
    ]
