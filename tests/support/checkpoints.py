"""Checkpoints of a small state on two ranks: real files, written by threads as the policy's ranks do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import WrittenFile
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.checkpoint.training import Progress, RunIdentity, close_checkpoint, open_checkpoint

POLICY = {"updates": 3, "layout": {"world_size": 2, "tp": 2, "pp": 1}}
RANKS = 2
RANK_FILES = [f"__{rank}_0.distcp" for rank in range(RANKS)]


class TwoRanks:
    """A state of one tensor, half of it on each rank. `update` changes it in place, as training does."""

    def __init__(self, *, elements: int = 100, before_writing: Callable[[int], None] = lambda _rank: None) -> None:
        self.values = torch.zeros(RANKS, elements)
        self.before_writing = before_writing
        self._pending: list[Future[WrittenFile]] = []
        self._threads = ThreadPoolExecutor(RANKS)

    def update(self, step: int) -> None:
        self.values.copy_(values_of(step, self.values.shape[1]))

    def begin_save(self, folder: Path) -> Mapping[str, object]:
        copy = self.values.clone()
        self._pending = [self._threads.submit(self._write, folder, rank, copy[rank]) for rank in range(RANKS)]
        return POLICY

    def is_saving(self) -> bool:
        return not all(future.done() for future in self._pending)

    def finish_save(self) -> list[WrittenFile]:
        pending, self._pending = self._pending, []
        return [future.result() for future in pending]

    def _write(self, folder: Path, rank: int, values: Tensor) -> WrittenFile:
        self.before_writing(rank)
        return write_rank(folder, rank, values)


def values_of(step: int, elements: int = 100) -> Tensor:
    """The state after a step, [2, elements]."""
    return torch.arange(RANKS * elements, dtype=torch.float32).reshape(RANKS, elements).remainder_(251).add_(step)


def write_rank(folder: Path, rank: int, values: Tensor) -> WrittenFile:
    """One rank's file."""
    writer = DistWriter(folder / RANK_FILES[rank])
    shape = (RANKS, len(values))
    writer.write("optimizer.state.exp_avg", values, global_shape=shape, start=(rank, 0), shape=(1, len(values)))
    return writer.finish()


def read_values(checkpoint: Path) -> Tensor:
    """What `write_rank` wrote on all ranks."""
    with DistReader(checkpoint) as reader:
        shape = tuple(reader.shape("optimizer.state.exp_avg"))
        return reader.read_box("optimizer.state.exp_avg", start=(0, 0), shape=shape)


def make_identity(
    folder: Path, *, recipe: str = "run: {}\n", fingerprint: str = "f", data_hash: str = "d"
) -> RunIdentity:
    """A run whose model folder, `folder`/model, has a configuration and a tokenizer."""
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"hidden_size": 8}))
        (model / "tokenizer.json").write_text("{}")
    return RunIdentity(fingerprint=fingerprint, data_hash=data_hash, recipe=recipe, model_path=model)


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    run: RunIdentity,
    sound: bool = True,
    accuracy: float | None = None,
    elements: int = 100,
    policy: Mapping[str, object] = POLICY,
) -> Path:
    """A whole checkpoint of `values_of(step)` in the checkpoint folder `folder`; nothing is removed."""
    beside = open_checkpoint(folder, step)
    files = [write_rank(beside, rank, values) for rank, values in enumerate(values_of(step, elements))]
    return close_checkpoint(
        beside,
        progress=Progress(step=step, version=step - 1, prompts_taken=8 * step),
        run=run,
        sound=sound,
        accuracy=accuracy,
        files=files,
        policy=policy,
    )[0]
