"""An engine with two tensor-parallel workers in processes of their own: same updates, same samples as one worker's."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.engines import SAMPLING, load_reference, perturbed, random_prompts, tiny_engine, update, worst_difference
from support.tiny_models import make_tiny_hf

from clipo_megatron.cluster.stack_dumps import _dump_on_this_node
from clipo_megatron.cluster.worker_log import DUMP_SIGNAL
from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.sync.bucket import pack_buckets


def _shared_memory(pids: list[int]) -> list[str]:
    """Lines of vLLM's shared memory in the processes' maps."""
    maps = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [line for line in maps if "/dev/shm/psm_" in line]


def test_an_engine_that_is_killed_leaves_no_shared_memory_behind(tmp_path: Path) -> None:
    folder, before = make_tiny_hf(tmp_path, "qwen3", tied=True), set(os.listdir("/dev/shm"))
    with tiny_engine(folder, tp=2) as engine:
        pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
        opened = _shared_memory(pids)
        names = {line.split("/dev/shm/")[1].removesuffix(" (deleted)") for line in opened}
        assert names
        assert all(line.endswith(" (deleted)") for line in opened)
        assert not names & set(os.listdir("/dev/shm"))
        groups = engine.generate(random_prompts((5, 200)), SAMPLING, version=None)
        assert worst_difference(load_reference(folder), groups) < 1e-4
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name in names]


def test_two_workers_sample_from_the_updated_weights_and_survive_a_bad_bucket(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3", tied=True)
    reference = load_reference(folder)
    sampling = replace(SAMPLING, samples=2, max_tokens=24)
    prompts = random_prompts((5, 200))
    with tiny_engine(folder, tp=2) as engine:
        assert worst_difference(reference, engine.generate(prompts, sampling, version=None)) < 1e-4
        for version in (1, 2):
            update(engine, version, perturbed(reference, seed=version))
            assert worst_difference(reference, engine.generate(prompts, sampling, version=version)) < 1e-4

        tensors = perturbed(reference, seed=3)
        (bucket,) = pack_buckets(tensors, version=3, bucket_bytes=1 << 24)
        bucket.payload[-1] ^= 1
        engine.begin_update(3)
        with pytest.raises(CheckError, match=r"worker 0 of 2.*CRC-32"):
            engine.load_bucket(bucket)
        with pytest.raises(EngineError, match="stale"):
            engine.generate(prompts, sampling, version=2)
        update(engine, 3, tensors)
        assert worst_difference(reference, engine.generate(prompts, sampling, version=3)) < 1e-4

        engine.write_stacks(DUMP_SIGNAL, tmp_path / "engine_0")
        stopped = next(
            child for child in psutil.Process().children(recursive=True) if "TP1" in "".join(child.cmdline())
        )
        stopped.suspend()
        try:
            dumps = {dump.worker: dump for dump in _dump_on_this_node({"engine_0": os.getpid()}, [])}
        finally:
            stopped.resume()
        assert dumps["engine_0 worker 0"].doing.startswith("is in ")
        assert dumps["engine_0 worker 0"].log == str(tmp_path / "engine_0.worker0.log")
        assert dumps["engine_0 worker 1"].doing == "is stopped (by a signal or a debugger) and writes no stack"
        assert worst_difference(reference, engine.generate(prompts, sampling, version=3)) < 1e-4
