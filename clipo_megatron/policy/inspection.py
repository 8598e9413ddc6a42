"""What a policy did, laid open for comparison: scores, states, gradients and weights under names that no layout changes.

For checks and tests only: it reads a worker's insides and holds whole tensors. Loads without megatron.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.collectives import gather_shards
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import RolloutBatch, Scores

if TYPE_CHECKING:
    from clipo_megatron.policy.worker import PolicyWorker

Observed = dict[str, dict[str, Tensor]]
"""Quantity -> name -> tensor; ranks that hold the same tensor give it the same name."""
Name = TypeVar("Name", str, int)
Distance = tuple[float, float]
"""Euclidean norms of (found - wanted, wanted)."""

LOG_PROBS, REFERENCE_LOG_PROBS, ENTROPY = "log_probs", "reference_log_probs", "entropy"
POOLED_STATES, CONTRASTIVE_LOSS, HEAD_GRADIENT = "pooled_states", "contrastive_loss", "head_gradient"
GRADIENT_NORM, POLICY_GRADIENT = "gradient_norm", "policy_gradient"
PARAMETERS, HEAD_PARAMETERS = "parameters", "head_parameters"


def observe_step(
    worker: PolicyWorker, batch: RolloutBatch, *, old_logprob_shift: NDArray[np.float32], step: int
) -> Observed:
    """Score a batch and train on it; all that this rank can see of both.

    Collectives: those of `score`, `train` and `full_gradients`, one broadcast on the world; all ranks must call.

    Args:
        worker: whose step has one update, so that its gradient is that of the whole batch.
        batch: with advantages.
        old_logprob_shift: float32 [T], added to the old log-probs, so that some ratios leave the clipping range.
        step: keys the drawn positives.

    Raises:
        CheckError: the update was refused, as the loss or a gradient was not finite.
    """
    algorithm = worker._settings.algorithm
    with recorded_pooling(worker, batch) as pooled:
        own_scores = worker.score(batch, step=step, with_reference=algorithm.kl_coefficient > 0)
    scores = share_scores(own_scores, worker._layout)
    report = worker.train(
        batch.with_(
            old_logprobs=scores.old_logprobs + old_logprob_shift * batch.response_mask,
            reference_logprobs=scores.reference_logprobs,
        ),
        step=step,
    )
    if report is not None and report.skipped:
        raise CheckError(f"step {step}: the update was refused: its loss or a gradient is not finite")
    columns = {LOG_PROBS: scores.old_logprobs, ENTROPY: scores.entropy}
    if scores.reference_logprobs is not None:
        columns[REFERENCE_LOG_PROBS] = scores.reference_logprobs
    if worker._settings.contrastive is not None:
        columns[CONTRASTIVE_LOSS] = scores.contrastive_loss
    observed: Observed = {quantity: {quantity: torch.from_numpy(column)} for quantity, column in columns.items()}
    observed[POOLED_STATES] = {str(row): state for row, state in pooled.items()}
    observed[HEAD_GRADIENT] = head_gradients(worker)
    observed[GRADIENT_NORM] = {} if report is None else {GRADIENT_NORM: torch.tensor(report.metrics["grad_norm"])}
    observed[POLICY_GRADIENT] = full_gradients(worker)
    return observed


def observe_weights(worker: PolicyWorker) -> Observed:
    """This stage's weights and the head's. Collective over all ranks."""
    return {PARAMETERS: weights_of(worker), HEAD_PARAMETERS: head_weights(worker)}


@contextlib.contextmanager
def recorded_pooling(worker: PolicyWorker, batch: RolloutBatch) -> Iterator[dict[int, Tensor]]:
    """Within the block, what the head is given of `batch`: row -> pooled state [H] of this rank's rows; one score only."""
    pooled: dict[int, Tensor] = {}
    if worker._head is None:
        yield pooled
        return
    rows = [row for micro_batch in worker._packer(batch, with_routes=False)[0] for row in micro_batch.row]

    def keep(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pooled.update((int(row), state) for row, state in zip(rows, inputs[0].detach().clone(), strict=True))

    hook = worker._head.module.register_forward_pre_hook(keep)
    try:
        yield pooled
    finally:
        hook.remove()


def share_scores(scores: Scores | None, layout: ParallelLayout) -> Scores:
    """The scores of the rank that reports, on every rank: what the driver does in a run. Collective over all ranks."""
    box = [scores]
    dist.broadcast_object_list(box, src=layout.rank(tp=0, dp=0, pp=layout.pp - 1))
    assert box[0] is not None
    return box[0]


def full_gradients(worker: PolicyWorker) -> dict[str, Tensor]:
    """This stage's gradients of the last update, clipped, under Hugging Face names; zeros of frozen parameters.

    Collective over all ranks.
    """
    groups = worker._groups
    if worker._settings.distributed_optimizer:
        for chunk in worker._stage.wrapped:
            _gather_gradients(chunk.buffers, groups.dp_cp)  # pyright: ignore[reportArgumentType] (hides Module's)
            _gather_gradients(chunk.expert_parallel_buffers, groups.expert_dp)
    # Gradients take the way of the weights: for as long as it lasts, they are the weights.
    parameters: list[Any] = list(worker._stage.parameters())
    own = [(parameter, parameter.data) for parameter in parameters]
    for parameter, weights in own:
        parameter.data = parameter.main_grad.clone() if parameter.requires_grad else torch.zeros_like(weights)
    try:
        return {name: gradient.clone() for name, gradient in worker.hf_tensors()}
    finally:
        for parameter, weights in own:
            parameter.data = weights


def _gather_gradients(buffers: list[Any], group: dist.ProcessGroup) -> None:
    """Reduce-scattered buffers: each rank holds the sums of its own part of each bucket."""
    for buffer in buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            bucket.grad_data.copy_(torch.cat(gather_shards(own, group)))


def weights_of(worker: PolicyWorker) -> dict[str, Tensor]:
    """This stage's weights, copied. Collective over the ranks of a stage."""
    return {name: tensor.clone() for name, tensor in worker.hf_tensors()}


def head_weights(worker: PolicyWorker) -> dict[str, Tensor]:
    """The head's weights, copied; empty before the last stage."""
    head = worker._head
    return {} if head is None else {name: weight.detach().clone() for name, weight in head.module.named_parameters()}


def head_gradients(worker: PolicyWorker) -> dict[str, Tensor]:
    """The head's gradient of its last step, copied; empty before the last stage and where it has none."""
    head = worker._head
    gradients = {} if head is None else {name: weight.grad for name, weight in head.module.named_parameters()}
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def set_head_eps(worker: PolicyWorker, eps: float) -> None:
    """Replace the eps of the head's AdamW, for comparisons of the head after its steps."""
    if worker._head is not None:
        for group in worker._head.optimizer.param_groups:
            group["eps"] = eps


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, Euclidean norms."""
    return _ratio([_distance(found, wanted)])


def errors_by_kind(found: Mapping[Name, Tensor], wanted: Mapping[Name, Tensor]) -> dict[str, float]:
    """Relative error of each kind of tensor: the same one of all layers and experts, taken together."""
    return errors_of_kinds(distances(found, wanted))


def distances(found: Mapping[Name, Tensor], wanted: Mapping[Name, Tensor]) -> dict[Name, Distance]:
    """How far each tensor of `found` is from that of its name in `wanted`.

    Raises:
        CheckError: `wanted` has none of that name, or one of another shape.
    """
    for name, tensor in found.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            there = f"of shape {tuple(wanted[name].shape)}" if name in wanted else "missing"
            raise CheckError(
                f"{name}: has shape {tuple(tensor.shape)}, and is {there} in what it is compared with; compare runs of the "
                "same model and batch"
            )
    return {name: _distance(tensor, wanted[name]) for name, tensor in found.items()}


def errors_of_kinds(distance_of: Mapping[Name, Distance]) -> dict[str, float]:
    """`errors_by_kind` of tensors that were measured one by one; a kind is a name without its numbers."""
    kinds: dict[str, list[Distance]] = {}
    for name, distance in distance_of.items():
        kinds.setdefault(re.sub(r"\d+", "*", str(name)), []).append(distance)
    return {kind: _ratio(of_kind) for kind, of_kind in kinds.items()}


def _distance(found: Tensor, wanted: Tensor) -> Distance:
    wanted = wanted.to(found.device, torch.float64)
    return float((found.double() - wanted).norm()), float(wanted.norm())


def _ratio(of_kind: list[Distance]) -> float:
    difference, wanted = np.linalg.norm(np.array(of_kind), axis=0).tolist()
    return difference / max(wanted, 1e-30)
