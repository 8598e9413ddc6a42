"""Which model the layout check runs: the recipe's first layers, with its weights or random ones, or a small likeness."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clipo_megatron.checks.host_memory import allowed_bytes
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.recipe.sections import LayoutSection
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.layout_check import layout_problems
from clipo_megatron.weights.reduced import (
    first_layers_config,
    has_weights,
    link_model,
    shrunk_config,
    write_random_model,
)

Weights = Literal["real", "random"]

_LEAST_LAYERS = 4
_RANK_BYTES = 300 * 2**20
"""Of a process that has imported Megatron and holds no weight, beyond what ranks share."""
# Float32 weights, gradients, two moments, and a copy for the reference policy.
_BYTES_OF_PARAMETER = 4 * 5
# A copy of the gradients while they are compared, and the one-rank run's in the page cache.
_BYTES_COMPARED = 4 * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The model to run, derived from a model folder."""

    source: Path
    num_layers: int
    weights: Weights
    is_shrunk: bool
    """Narrower than `source`, of the same family and head ratio."""


def choose_model(
    source: Path, layout: LayoutSection, *, num_layers: int | None, weights: Weights | None, is_shrunk: bool
) -> tuple[ModelChoice | None, list[str]]:
    """What to run, as asked or by default, and all faults of it; None when there are any.

    Args:
        source: the recipe's model folder; config.json is enough for random weights.
        layout: to be checked.
        num_layers: None: the fewest from 4 on that pp * vpp divides.
        weights: None: real where the folder has them and the model is not shrunk.
        is_shrunk: run a small likeness.
    """
    try:
        arch = read_architecture(source)
    except ConfigError as error:
        return None, list(error.problems)
    if weights is None:
        weights = "real" if has_weights(source) and not is_shrunk else "random"
    chunks = layout.pp * layout.vpp
    if num_layers is None:
        num_layers = -(-_LEAST_LAYERS // chunks) * chunks
        if weights == "real" and num_layers > arch.num_layers >= chunks:
            num_layers = arch.num_layers // chunks * chunks
    choice = ModelChoice(source=source, num_layers=num_layers, weights=weights, is_shrunk=is_shrunk)
    problems = _choice_problems(choice, arch, chunks)
    problems += layout_problems(
        arch, tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep, etp=layout.etp, rollout_tp=1
    )
    return (None, problems) if problems else (choice, [])


def _choice_problems(choice: ModelChoice, arch: Architecture, chunks: int) -> list[str]:
    problems: list[str] = []
    if choice.num_layers % chunks:
        problems.append(
            f"--layers {choice.num_layers}: must be a multiple of layout.pp * layout.vpp = {chunks}; use "
            f"{-(-choice.num_layers // chunks) * chunks}"
        )
    if choice.weights == "random":
        return problems
    if choice.is_shrunk:
        problems.append(
            "--weights real: a shrunk model has other shapes than the weights; leave out --shrink or --weights"
        )
    if choice.num_layers > arch.num_layers:
        problems.append(
            f"--layers {choice.num_layers}: the model has {arch.num_layers}, and real weights for no more; use fewer, or "
            "--weights random"
        )
    try:
        HFReader(choice.source).close()
    except ConfigError as error:
        problems += error.problems
    return problems


def make_model(folder: Path, choice: ModelChoice, layout: ParallelLayout, *, seed: int) -> Path:
    """Make the model folder below `folder`, which exists; returns its path."""
    config = first_layers_config(choice.source, choice.num_layers)
    if choice.is_shrunk:
        config = shrunk_config(choice.source, choice.num_layers, tp=layout.tp, ep=layout.ep, etp=layout.etp)
    if choice.weights == "real":
        return link_model(folder / "model", config, source=choice.source)
    return write_random_model(folder / "model", config, seed=seed)


def check_memory(choice: ModelChoice, layout: ParallelLayout) -> None:
    """Refuse what the kernel would end halfway: all ranks are on this machine, with float32 weights in its memory.

    Raises:
        ConfigError: the model is too large, by a rough estimate.
    """
    available = allowed_bytes()
    if choice.is_shrunk or available is None:
        return
    count = parameter_count(replace(read_architecture(choice.source), num_layers=choice.num_layers))
    replicas = layout.dp * layout.cp
    needed = count * (_BYTES_OF_PARAMETER * replicas + _BYTES_COMPARED) + layout.world_size * _RANK_BYTES
    if needed > available:
        raise ConfigError(
            f"--layers {choice.num_layers}: {count / 1e9:.2f} G parameters in float32, {replicas} times, need about "
            f"{needed / 2**30:.0f} GiB, and this machine has {available / 2**30:.0f} GiB free; use --shrink, or fewer layers"
        )
