"""What one rank of the layout check does: two training steps, then either keep what it saw or measure it against that.

Imports megatron; the process that starts the ranks imports `checks.parity` alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from clipo_megatron.checks.parity_batch import BatchShape, SyntheticBatch, draw_batch, without_right_rows
from clipo_megatron.policy.inspection import (
    Distance,
    Observed,
    distances,
    observe_step,
    observe_weights,
    set_head_eps,
)
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.weights.architecture import read_architecture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on a CPU Megatron tells at length what it does without
    from clipo_megatron.policy.packer import Packer
    from clipo_megatron.policy.worker import PolicyWorker

Measured = dict[str, dict[str, Distance]]
"""Quantity -> name -> how far it is from the one-rank run's."""


def run_rank(
    settings: PolicySettings, checked: PolicySettings, shape: BatchShape, folder: Path, *, is_reference: bool
) -> list[Measured]:
    """Build this rank's policy and measure it.

    Args:
        settings: of the policy to run.
        checked: of the layout that is checked; both runs get the batches that it asks for.
        shape: of the batches.
        folder: as in `measure`.
        is_reference: as in `measure`.

    Raises:
        ConfigError: the model folder or the layout can't be used.
    """
    worker = PolicyWorker(settings, rank=dist.get_rank())
    set_head_eps(worker, settings.optimizer.eps)  # the head's own would make steps of rounding noise, as the policy's
    return measure(worker, synthetic_batches(checked, shape), folder, is_reference=is_reference)


def measure(
    worker: PolicyWorker, batches: Sequence[SyntheticBatch], folder: Path, *, is_reference: bool
) -> list[Measured]:
    """Train on each batch in turn and compare all that can be seen.

    Args:
        worker: this rank's policy, fresh.
        batches: the same on all ranks and in both runs.
        folder: where the reference run leaves what it saw.
        is_reference: write there, as the one rank of the reference run; else read it.

    Returns:
        Of each step, then of the weights after the last: distances of what this rank holds.
    """
    measured: list[Measured] = []
    for number, observed in enumerate(_observe(worker, batches)):
        path = folder / f"observed_{number}.pt"
        if is_reference:
            torch.save(observed, path)
        wanted: Observed = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        measured.append(
            {quantity: distances(tensors, wanted.get(quantity, {})) for quantity, tensors in observed.items()}
        )
    return measured


def synthetic_batches(checked: PolicySettings, shape: BatchShape) -> list[SyntheticBatch]:
    """Two steps' rollouts; in the second, the last data parallel rank of the layout has no right one."""
    arch, layout = read_architecture(checked.model_path), checked.layout
    first, second = (draw_batch(shape, arch, seed=seed, with_routes=checked.routing_replay) for seed in (1, 2))
    if layout.dp == 1:
        return [first, second]
    last = layout.rank(tp=0, dp=layout.dp - 1, pp=0)
    packer = Packer(checked, arch, rank=last, device=torch.device("cpu"))
    micro_batches, _ = packer(second.batch, with_routes=False)
    rows = np.concatenate([micro_batch.row for micro_batch in micro_batches])
    one_sided = without_right_rows(second.batch, rows)
    return [first, SyntheticBatch(batch=one_sided, old_logprob_shift=second.old_logprob_shift)]


def _observe(worker: PolicyWorker, batches: Sequence[SyntheticBatch]) -> Iterator[Observed]:
    for number, synthetic in enumerate(batches, start=1):
        yield observe_step(worker, synthetic.batch, old_logprob_shift=synthetic.old_logprob_shift, step=number)
    yield observe_weights(worker)
