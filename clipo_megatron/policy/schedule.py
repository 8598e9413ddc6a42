"""Runs micro-batches through the pipeline with Megatron's schedules: forward only, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.policy.stage import Stage

Result = TypeVar("Result")
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Callable[..., Any]]]


@torch.no_grad()
def run_forward(
    stage: Stage, micro_batches: Sequence[MicroBatch], on_last_stage: Callable[[MicroBatch, Tensor], Result]
) -> list[Result]:
    """Forward all micro-batches through the stages.

    Collectives: the pipeline's sends and the model's own; all ranks must call with as many micro-batches.

    Args:
        stage: this rank's share of the model.
        micro_batches: of this rank's data parallel share.
        on_last_stage: takes a micro-batch and the states after the final norm, [T, H] or, under sequence parallelism,
            [T / tp, H].

    Returns:
        What `on_last_stage` gave for each micro-batch; empty on other stages.
    """

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Result]]:
        micro_batch = next(batches)

        def collect(states: Tensor, *, non_loss_data: bool) -> Result:
            return on_last_stage(micro_batch, states[:, 0])

        return stage.forward(chunk, micro_batch), collect

    stage.eval()
    return _run(stage, micro_batches, forward_step, forward_only=True)


def run_backward(
    stage: Stage, micro_batches: Sequence[MicroBatch], loss_of: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Forward and backward of all micro-batches; gradients are summed over micro-batches and data parallel ranks.

    Collectives: as in `run_forward`, and the reduction of the gradients.

    Args:
        stage: this rank's share of the model.
        micro_batches: of this rank's data parallel share.
        loss_of: takes a micro-batch and the states after the final norm, as in `run_forward` but with graph; gives (this
            rank's share of the loss, numbers to report). Shares are summed, never averaged.

    Returns:
        The numbers of each micro-batch on the last stage; empty on other stages.
    """

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., object]]:
        micro_batch = next(batches)

        def loss(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            share, numbers = loss_of(micro_batch, states[:, 0])
            # With three values Megatron neither averages over micro-batches nor divides by the (ignored) token count.
            return share, torch.zeros((), dtype=torch.int, device=share.device), numbers

        return stage.forward(chunk, micro_batch), loss

    stage.train()
    return _run(stage, micro_batches, forward_step, forward_only=False)


def _run(
    stage: Stage, micro_batches: Sequence[MicroBatch], forward_step: ForwardStep, *, forward_only: bool
) -> list[Any]:
    chunks: list[torch.nn.Module] = [*stage.wrapped]
    iterators = [iter(micro_batches) for _ in chunks]
    is_interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if is_interleaved else iterators[0],
        model=chunks if is_interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=max(micro_batch.num_tokens for micro_batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
