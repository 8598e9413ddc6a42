"""Rules of the trainer's split into ranks and micro-batches. Each yields every fault it finds; nothing here reads a file.

What depends on the model (heads, layers, experts that a degree must divide) is checked with the model's folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from clipo_megatron.recipe.recipe import Recipe
from clipo_megatron.recipe.sections import LayoutSection

FP8_TOKENS = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}
"""By precision.recipe: a rank's share of a micro-batch's tokens must be a multiple of this."""


def layout_problems(recipe: Recipe) -> list[str]:
    """All faults of the layout and of what must fit to it: micro-batches and sequences of an update."""
    return [problem for rule in _RULES for problem in rule(recipe)]


def _ranks(recipe: Recipe) -> Iterator[str]:
    layout = recipe.layout
    if not _has_whole_replicas(layout):
        replica = layout.tp * layout.cp * layout.pp
        yield (
            f"layout.world_size = {layout.world_size}: must be a multiple of tp * cp * pp = {layout.tp} * {layout.cp} * "
            f"{layout.pp} = {replica}; use {replica * max(1, round(layout.world_size / replica))}"
        )


def _pipeline(recipe: Recipe) -> Iterator[str]:
    layout = recipe.layout
    if layout.vpp > 1 and layout.pp == 1:
        yield (
            f"layout.vpp = {layout.vpp}: only a pipeline stage is cut into model chunks; set layout.pp to 2 or more, or "
            "layout.vpp=1"
        )


def _experts(recipe: Recipe) -> Iterator[str]:
    layout = recipe.layout
    # Every stage deals its own ranks out to the experts, so their degrees may divide any of tp, cp and dp.
    if _has_whole_replicas(layout) and (layout.world_size // layout.pp) % (layout.ep * layout.etp):
        yield (
            f"layout.ep = {layout.ep}, layout.etp = {layout.etp}: ep * etp = {layout.ep} * {layout.etp} = {layout.ep * layout.etp} must divide the "
            f"world_size / pp = {layout.world_size} / {layout.pp} = {layout.world_size // layout.pp} ranks of a stage; "
            "lower layout.ep or layout.etp"
        )
    if layout.ep * layout.etp > 1 and layout.tp > 1 and not layout.sequence_parallel:
        yield (
            f"layout.sequence_parallel = false: with layout.tp = {layout.tp} Megatron refuses to train experts (layout.ep "
            f"= {layout.ep}, layout.etp = {layout.etp}) on tokens that are not split; set it to true"
        )


def _micro_batch(recipe: Recipe) -> Iterator[str]:
    layout = recipe.layout
    of_sequence, of_batch = token_multiples(recipe)
    budget = layout.micro_batch_tokens
    if budget % of_batch:
        yield (
            f"layout.micro_batch_tokens = {budget}: must be a multiple of {of_batch}, so that the split between "
            f"layout.cp = {layout.cp} and, under sequence parallelism, layout.tp = {layout.tp} ranks is even"
            + _fp8_reason(recipe)
            + f"; use {_round_up(budget, of_batch)}"
        )
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    padded = _round_up(longest, of_sequence)
    padding = f", {padded} with padding to a multiple of {of_sequence}" if padded > longest else ""
    sequence = f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens{padding}"
    if _round_up(padded, of_batch) > budget:
        yield (
            f"layout.micro_batch_tokens = {budget}: the longest sequence has {sequence}, and must fit into one micro-batch; "
            f"use at least {_round_up(padded, of_batch)}"
        )
    elif _unit(recipe) > 1 and _round_up(2 * padded, of_batch) > budget:
        # Below this, sequences can't always be dealt as equally many micro-batches to the data parallel ranks.
        yield (
            f"layout.micro_batch_tokens = {budget}: every data parallel rank needs as many micro-batches"
            f"{_schedule_reason(layout)}, so one must hold two sequences of {sequence}; use at least "
            f"{_round_up(2 * padded, of_batch)}"
        )


def _update(recipe: Recipe) -> Iterator[str]:
    algorithm, unit = recipe.algorithm, _unit(recipe)
    sequences = algorithm.prompts_per_step // algorithm.updates_per_step * algorithm.group_size
    if _has_whole_replicas(recipe.layout) and sequences < unit:
        yield (
            f"algorithm: one update has {sequences} sequences, and needs {unit}: one for each micro-batch of "
            f"{recipe.dp} data parallel ranks{_schedule_reason(recipe.layout)}; raise prompts_per_step or group_size"
        )


def token_multiples(recipe: Recipe) -> tuple[int, int]:
    """What (each sequence, each micro-batch) is padded to; the same as data.packing.alignment."""
    layout = recipe.layout
    of_sequence = 2 * layout.cp if layout.cp > 1 else 1
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    return of_sequence, math.lcm(of_sequence, split * FP8_TOKENS[recipe.precision.recipe])


def _unit(recipe: Recipe) -> int:
    """Micro-batches of all data parallel ranks together come in multiples of this."""
    layout = recipe.layout
    return max(1, recipe.dp) * (layout.pp if layout.vpp > 1 else 1)


def _has_whole_replicas(layout: LayoutSection) -> bool:
    return layout.world_size % (layout.tp * layout.cp * layout.pp) == 0


def _fp8_reason(recipe: Recipe) -> str:
    multiple = FP8_TOKENS[recipe.precision.recipe]
    if multiple == 1:
        return ""
    return f" and each share a multiple of {multiple} (precision.recipe = {recipe.precision.recipe})"


def _schedule_reason(layout: LayoutSection) -> str:
    if layout.vpp == 1:
        return ""
    return f", a multiple of layout.pp = {layout.pp} under layout.vpp = {layout.vpp}"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_RULES = (_ranks, _pipeline, _experts, _micro_batch, _update)
