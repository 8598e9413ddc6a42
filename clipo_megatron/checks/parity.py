"""Layout check: a recipe's model under its layout against the same model on one rank, number by number.

Both runs score and train on the same two synthetic batches in processes of this machine. Errors are relative, in
Euclidean norms; those of weights and gradients are taken by kind: the same tensor of all layers and experts together.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.checks.local_ranks import run_local_ranks, start_server
from clipo_megatron.checks.parity_batch import BatchShape, batch_shape
from clipo_megatron.checks.parity_model import ModelChoice, check_memory, make_model
from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.inspection import (
    CONTRASTIVE_LOSS,
    ENTROPY,
    GRADIENT_NORM,
    HEAD_GRADIENT,
    HEAD_PARAMETERS,
    LOG_PROBS,
    PARAMETERS,
    POLICY_GRADIENT,
    POOLED_STATES,
    REFERENCE_LOG_PROBS,
    Distance,
    errors_of_kinds,
)
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.weights.architecture import read_architecture

if TYPE_CHECKING:
    from clipo_megatron.checks.parity_ranks import Measured

QUANTITIES = (
    LOG_PROBS,
    REFERENCE_LOG_PROBS,
    ENTROPY,
    POOLED_STATES,
    CONTRASTIVE_LOSS,
    HEAD_GRADIENT,
    GRADIENT_NORM,
    POLICY_GRADIENT,
    PARAMETERS,
    HEAD_PARAMETERS,
)
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-2}
"""By device. Float32 leaves errors near 1e-6; bfloat16 rounds to 4e-3, layer after layer (an estimate, not measured)."""
_THROUGH_COSINES = (CONTRASTIVE_LOSS, HEAD_GRADIENT, HEAD_PARAMETERS)
_TEMPERATURE = 0.05
"""Of the contrastive loss, the paper's; the tolerance of what goes through it grows below."""
_RANK_MODULE = "clipo_megatron.checks.parity_ranks"

Errors = dict[str, dict[str, float]]
"""Quantity -> kind of tensor -> relative error; the largest of both steps, infinite where it is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """What was run, and how far the layout's numbers are from one rank's."""

    settings: PolicySettings
    """As run under the layout."""
    model: ModelChoice
    shape: BatchShape
    errors: Errors
    """Only quantities that there are: no pooled states without a head, no reference without a KL loss."""
    tolerance: float

    def tolerance_of(self, quantity: str) -> float:
        """The largest error of a quantity that is not too large."""
        contrastive = self.settings.contrastive
        if contrastive is None or quantity not in _THROUGH_COSINES:
            return self.tolerance
        # The loss divides cosines by the temperature, and their rounding with them.
        return self.tolerance * max(1.0, _TEMPERATURE / contrastive.objective.temperature)

    def past_tolerance(self) -> list[tuple[str, str, float]]:
        """(quantity, kind, error) of each error that is too large, the largest first."""
        return sorted(
            (
                (quantity, kind, error)
                for quantity, kinds in self.errors.items()
                for kind, error in kinds.items()
                if not error <= self.tolerance_of(quantity)
            ),
            key=lambda entry: -entry[2],
        )


def prepare_ranks() -> None:
    """Begin importing what the ranks need, in the background."""
    start_server([_RANK_MODULE])


def check_parity(
    settings: PolicySettings,
    model: ModelChoice,
    *,
    tolerance: float | None,
    timeout_s: float,
    on_stage: Callable[[str], None],
) -> ParityReport:
    """Run both and compare.

    Args:
        settings: of the recipe's policy, under the layout to check. Learning rate, Adam's eps, updates of a step, dtype,
            precision and micro-batch size are replaced by the check's own.
        model: what to run in place of the recipe's model.
        tolerance: relative; None: the device's.
        timeout_s: deadline of each of the two runs.
        on_stage: told what begins.

    Raises:
        ConfigError: the model can't be run under this layout, or not here.
        WorkerError: a rank failed or was late.
        CheckError: values are not finite on one rank already, or a rank gave too few of them.
    """
    layout = settings.layout
    if settings.device == "cpu":
        check_memory(model, layout)
    with tempfile.TemporaryDirectory(prefix="clipo-parity-") as name:
        folder = Path(name)
        on_stage(f"{model.num_layers} layers, {model.weights} weights" + (", shrunk" if model.is_shrunk else ""))
        path = make_model(folder, model, layout, seed=settings.seed)
        shape = batch_shape(
            layout,
            sequence_parallel=settings.sequence_parallel,
            micro_batch_tokens=settings.micro_batch_tokens,
            max_positions=read_architecture(path).max_positions,
        )
        checked = _settings_of_check(settings, path, shape)
        on_stage("one rank")
        alone = run_local_ranks(
            _run_rank, _one_rank(checked), checked, shape, folder, True, world_size=1, device=settings.device,
            timeout_s=timeout_s,
        )  # fmt: skip
        on_stage(f"{layout.world_size} ranks")
        split = run_local_ranks(
            _run_rank, checked, checked, shape, folder, False, world_size=layout.world_size, device=settings.device,
            timeout_s=timeout_s,
        )  # fmt: skip
    return ParityReport(
        settings=checked,
        model=model,
        shape=shape,
        errors=merge_errors(alone[0], split),
        tolerance=TOLERANCE[settings.device] if tolerance is None else tolerance,
    )


def merge_errors(alone: Sequence[Measured], split: Sequence[Sequence[Measured]]) -> Errors:
    """The errors of all ranks, steps and tensors, as the largest of each kind.

    Args:
        alone: what the one rank measured of itself, stage by stage: names and norms of all there is.
        split: the same of each rank of the layout; each may hold a part, together they must hold all.

    Raises:
        CheckError: a tensor is on no rank, or holds values that are not finite on one rank.
    """
    errors: Errors = {quantity: {} for quantity in QUANTITIES}
    for stage, wanted in enumerate(alone):
        for quantity, names in wanted.items():
            merged = {
                name: _worst(quantity, name, norm, [rank[stage].get(quantity, {}).get(name) for rank in split])
                for name, (_, norm) in names.items()
            }
            for kind, error in errors_of_kinds(merged).items():
                finite = error if math.isfinite(error) else math.inf
                errors[quantity][kind] = max(finite, errors[quantity].get(kind, 0.0))
    return {quantity: kinds for quantity, kinds in errors.items() if kinds}


def _worst(quantity: str, name: str, norm: float, of_ranks: Sequence[Distance | None]) -> Distance:
    """The largest distance on any rank that holds the tensor."""
    found = [distance[0] for distance in of_ranks if distance is not None]
    if not found:
        raise CheckError(f"{quantity}: no rank of the layout gave {name}, which the one rank has; the split lost it")
    if not math.isfinite(norm):
        raise CheckError(f"{quantity}: {name} is not finite on one rank already; check the model's weights")
    return (max(found) if all(map(math.isfinite, found)) else math.inf), norm


def _settings_of_check(settings: PolicySettings, model_path: Path, shape: BatchShape) -> PolicySettings:
    return replace(
        settings,
        model_path=model_path,
        dtype="float32" if settings.device == "cpu" else "bfloat16",
        micro_batch_tokens=shape.micro_batch_tokens,
        precision=PrecisionSettings(),  # FP8 rounds by maxima that depend on the split
        # One update a step, so that its gradient can be read; dealing groups to updates does not depend on the layout.
        algorithm=replace(settings.algorithm, updates_per_step=1),
        # Steps large enough to change the second step's numbers. Adam divides by sqrt(v) + eps: with 1e-8 rounding noise
        # of 1e-9 on a gradient near zero would become a whole step.
        optimizer=replace(settings.optimizer, learning_rate=1e-3, eps=1e-3, warmup_updates=0, cpu_offload=False),
    )


def _one_rank(checked: PolicySettings) -> PolicySettings:
    """The plainest way to the same numbers: nothing is split, shared out, overlapped or computed again."""
    return replace(
        checked,
        layout=ParallelLayout(world_size=1),
        sequence_parallel=False,
        recompute="none",
        distributed_optimizer=False,
        overlap_grad_reduce=False,
    )


def _run_rank(
    settings: PolicySettings, checked: PolicySettings, shape: BatchShape, folder: Path, is_reference: bool
) -> list[Measured]:
    # In the rank's process: the caller's own never imports megatron.
    from clipo_megatron.checks.parity_ranks import run_rank

    return run_rank(settings, checked, shape, folder, is_reference=is_reference)
