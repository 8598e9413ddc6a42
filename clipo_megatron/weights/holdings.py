"""Where a trainer rank's parameters lie in refined Hugging Face tensors; everything in them is an affine map.

Refined: q_proj, k_proj and v_proj have a dim of key/value groups in front, [groups, rows of one group, ...]; the experts of
a layer are one tensor, [experts, ...], with "*" for their number in its name. All others are as in the folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.names import OUTPUT_LAYER, find_rule
from clipo_megatron.weights.rules import Rule, Split, hf_shape, local_shape, pieces

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """A box of a refined tensor, and where its elements lie in contiguous parameters of one rank.

    Names are those of every layer at once: they hold {layer}, but for tensors of no layer.
    """

    tensor: str
    start: Shape
    """First element of the box in the refined tensor."""
    shape: Shape
    """Of the box."""
    parameters: tuple[str, ...]
    """One; or one for each step along dim 0: a trainer's experts are parameters of their own."""
    offset: int
    """Elements before the box's first in the parameter; the same in all `parameters`."""
    strides: Shape
    """Elements of the parameter between neighbours along each dim; 0 along dim 0 where it runs over `parameters`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldParameter:
    """A parameter of one rank and all of it that Hugging Face tensors fill; the rest is the vocabulary's padding."""

    names: tuple[str, ...]
    """One, but for a trainer's experts of a layer, in their order."""
    shape: Shape
    """Of each."""
    holdings: tuple[Holding, ...]
    rule: Rule


def trainer_parameters(
    arch: Architecture,
    *,
    tp: int,
    tp_rank: int,
    padded_vocab: int,
    ep: int = 1,
    ep_rank: int = 0,
    etp: int = 1,
    etp_rank: int = 0,
) -> list[HeldParameter]:
    """What a trainer rank with this place holds, if it held all layers; see `is_bottom`, `is_top` for the stages.

    A tied output layer is left out: the last stage's is a copy of the first stage's embedding.

    Args:
        arch: of the model.
        tp: tensor parallel degree.
        tp_rank: 0 <= tp_rank < tp.
        padded_vocab: rows of the embedding over all tp ranks.
        ep: expert parallel degree; the experts of a layer are dealt in contiguous runs.
        ep_rank: 0 <= ep_rank < ep.
        etp: tensor parallel degree of an expert.
        etp_rank: 0 <= etp_rank < etp.

    Returns:
        In the order of the family's table. Names as the tables write them; see `table_name`.

    Raises:
        ConfigError: a degree does not divide what it splits.
    """
    held: list[HeldParameter] = []
    for rule in rules_of(arch):
        degree, place = (etp, etp_rank) if rule.is_of_expert else (tp, tp_rank)
        shape = local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab)
        experts = _run_of_experts(arch, ep, ep_rank) if rule.is_of_expert else range(0)
        names = tuple(rule.megatron.replace("{expert}", str(expert)) for expert in experts) or (rule.megatron,)
        if rule.split is Split.QKV_PARALLEL:
            holdings = _interleaved(rule, arch, names, degree=degree, place=place)
        else:
            holdings = stacked_pieces(
                rule, arch, names, degree=degree, place=place, padded_vocab=padded_vocab, experts=experts, step=0
            )
        held.append(HeldParameter(names=names, shape=shape, holdings=tuple(holdings), rule=rule))
    return held


def stacked_pieces(
    rule: Rule,
    arch: Architecture,
    parameters: tuple[str, ...],
    *,
    degree: int,
    place: int,
    padded_vocab: int,
    experts: range,
    step: int,
) -> list[Holding]:
    """The pieces of one rank, one behind the other along the split dim: all splits but that of q, k and v.

    Args:
        rule: of the parameter.
        arch: of the model.
        parameters: names for the holdings.
        degree: number of ranks that split it.
        place: of the rank among them.
        padded_vocab: rows of the padded vocabulary.
        experts: run of experts that the holdings have as dim 0; used for an expert's rule only.
        step: elements between one expert and the next; 0 where they are parameters of their own.
    """
    strides = row_major(local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab))
    dim, offset = rule.split_dim or 0, 0
    holdings: list[Holding] = []
    for piece in pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=padded_vocab):
        length = piece.stop - piece.start
        tensor = rule.hf[piece.tensor]
        shape = [*hf_shape(tensor, arch.sizes)]
        start = [0] * len(shape)
        start[dim], shape[dim] = piece.start, length
        leading = ((experts.start,), (len(experts),), (step,)) if rule.is_of_expert else ((), (), ())
        if length:
            holdings.append(
                Holding(
                    tensor=refined_name(tensor.name),
                    start=(*leading[0], *start),
                    shape=(*leading[1], *shape),
                    parameters=parameters,
                    offset=offset * strides[dim],
                    strides=(*leading[2], *strides),
                )
            )
        offset += length
    return holdings


def refined_name(hf_name: str) -> str:
    """The name of the refined tensor that a Hugging Face tensor of the tables is, or is a part of."""
    return hf_name.replace("{expert}", "*")


def refined_shape(rule: Rule, number: int, arch: Architecture) -> Shape:
    """The shape of the refined tensor behind the rule's Hugging Face tensor number `number`."""
    shape = hf_shape(rule.hf[number], arch.sizes)
    if rule.split is Split.QKV_PARALLEL:
        return (arch.num_kv_heads, shape[0] // arch.num_kv_heads, *shape[1:])
    return (arch.sizes["experts"], *shape) if rule.is_of_expert else shape


def rules_of(arch: Architecture) -> tuple[Rule, ...]:
    """The family's rules, without the output layer of a tied model."""
    return tuple(rule for rule in FAMILIES[arch.family].rules if not (arch.tied and rule.megatron == OUTPUT_LAYER))


def is_bottom(rule: Rule, arch: Architecture) -> bool:
    """Whether the first pipeline stage holds the parameter: it is of no layer and stands before them in the table."""
    rules = FAMILIES[arch.family].rules
    return rules.index(rule) < min(number for number, other in enumerate(rules) if other.is_of_layer)


def is_top(rule: Rule, arch: Architecture) -> bool:
    """Whether the last pipeline stage holds the parameter: it is of no layer and stands behind them in the table."""
    return not rule.is_of_layer and not is_bottom(rule, arch)


def table_name(megatron_name: str, arch: Architecture) -> str:
    """The name that plans give to a parameter of the trainer, from its name in GPTModel.

    Args:
        megatron_name: with the numbers of layer and expert in the whole model, of local modules or Transformer Engine's.
        arch: of the model.

    Returns:
        The table's name with those numbers; empty for the output layer of a tied model, which no plan reads.

    Raises:
        CheckError: the family's table has no such parameter.
    """
    rule, where = find_rule(megatron_name, arch)
    return "" if arch.tied and megatron_name == OUTPUT_LAYER else where.fill(rule.megatron)


def row_major(shape: Shape) -> Shape:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _interleaved(
    rule: Rule, arch: Architecture, parameters: tuple[str, ...], *, degree: int, place: int
) -> list[Holding]:
    """Group by group: the group's query rows, its key rows, its value rows."""
    wholes = [refined_shape(rule, number, arch) for number in range(len(rule.hf))]
    of_rank = pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=arch.vocab_size)
    num_groups = len(of_rank) // len(rule.hf)
    first_group = of_rank[0].start // wholes[0][1]
    row = math.prod(wholes[0][2:])
    rows_of_group = sum(whole[1] for whole in wholes)
    holdings: list[Holding] = []
    rows_before = 0
    for tensor, whole in zip(rule.hf, wholes, strict=True):
        holdings.append(
            Holding(
                tensor=tensor.name,
                start=(first_group, *(0 for _ in whole[1:])),
                shape=(num_groups, *whole[1:]),
                parameters=parameters,
                offset=rows_before * row,
                strides=(rows_of_group * row, *row_major(whole)[1:]),
            )
        )
        rows_before += whole[1]
    return holdings


def _run_of_experts(arch: Architecture, ep: int, ep_rank: int) -> range:
    num_experts = arch.sizes["experts"]
    if num_experts % ep:
        raise ConfigError(f"layout.ep = {ep}: must divide the model's number of experts = {num_experts}")
    share = num_experts // ep
    return range(ep_rank * share, (ep_rank + 1) * share)
