"""Runs micro-batches through the pipeline with Megatron's schedules: forward only, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from clipo_megatron.policy.micro_batch import MicroBatch

Result = TypeVar("Result")


class FinalStates:
    """Catches the states after the final norm of each forward on the last stage."""

    def __init__(self, model: GPTModel) -> None:
        self._states: Tensor | None = None
        if model.post_process:
            model.decoder.final_layernorm.register_forward_hook(self._keep)  # pyright: ignore[reportOptionalMemberAccess]

    def take(self) -> Tensor:
        """[T, H], or [T / tp, H] under sequence parallelism, of the forward that just ran."""
        assert self._states is not None
        states, self._states = self._states, None
        return states[:, 0]

    def drop(self) -> None:
        """Let go of the states, so that training does not keep them."""
        self._states = None

    def _keep(self, _module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        self._states = output.detach()


@torch.no_grad()
def run_forward(
    model: DistributedDataParallel,
    micro_batches: Sequence[MicroBatch],
    on_last_stage: Callable[[MicroBatch, Tensor], Result],
) -> list[Result]:
    """Forward all micro-batches through the stages.

    Collectives: the pipeline's sends and the model's own; all ranks must call with as many micro-batches.

    Args:
        model: this rank's stage.
        micro_batches: of this rank's data parallel share.
        on_last_stage: takes a micro-batch and its logits [T, V / tp].

    Returns:
        What `on_last_stage` gave for each micro-batch; empty on other stages.
    """

    def forward_step(batches: Iterator[MicroBatch], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Result]]:
        micro_batch = next(batches)

        def collect(logits: Tensor, *, non_loss_data: bool) -> Result:
            return on_last_stage(micro_batch, logits[0])

        return _forward(stage, micro_batch), collect

    model.eval()
    return _run(model, micro_batches, forward_step, forward_only=True)


def run_backward(
    model: DistributedDataParallel,
    micro_batches: Sequence[MicroBatch],
    loss_of: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Forward and backward of all micro-batches; gradients are summed over micro-batches and data parallel ranks.

    Collectives: as in `run_forward`, and the reduction of the gradients.

    Args:
        model: this rank's stage.
        micro_batches: of this rank's data parallel share.
        loss_of: takes a micro-batch and its logits [T, V / tp], gives (its share of the loss, numbers to report).
            Shares are summed, never averaged.

    Returns:
        The numbers of each micro-batch on the last stage; empty on other stages.
    """

    def forward_step(batches: Iterator[MicroBatch], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., object]]:
        micro_batch = next(batches)

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            share, numbers = loss_of(micro_batch, logits[0])
            # With three values Megatron neither averages over micro-batches nor divides by the (ignored) token count.
            return share, torch.zeros((), dtype=torch.int, device=share.device), numbers

        return _forward(stage, micro_batch), loss

    model.train()
    return _run(model, micro_batches, forward_step, forward_only=False)


def _forward(stage: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    return stage(
        micro_batch.input_ids, micro_batch.position_ids, attention_mask=None, packed_seq_params=micro_batch.packed
    )


def _run(
    model: DistributedDataParallel,
    micro_batches: Sequence[MicroBatch],
    forward_step: Callable[[Iterator[MicroBatch], torch.nn.Module], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=max(micro_batch.num_tokens for micro_batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
