"""What a rank of a vLLM engine holds: names and shapes of its parameters in loading format, and their holdings.

Loading format: as vLLM's own loaders fill them, before any repacking for its kernels. Names are those of vLLM 0.32; what
differs in other releases is told in `live_name` alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from clipo_megatron.errors import ConfigError, EngineError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.holdings import (
    HeldParameter,
    Holding,
    Shape,
    refined_shape,
    row_major,
    rules_of,
    stacked_pieces,
)
from clipo_megatron.weights.rules import Rule, Split, hf_shape, local_shape

_VOCAB_MULTIPLE = 64
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""First of the tensors that vLLM stacks in one parameter -> the parameter."""
_EXPERTS_MODULE = "routed_experts."


def engine_parameters(
    arch: Architecture, *, tp: int, tp_rank: int, expert_parallel: bool = False
) -> list[HeldParameter]:
    """What one rank of an engine holds: embedding, layers, norm, output layer. A tied output layer is the embedding.

    q rows, then k rows, then v rows are one parameter, gate rows and then up rows another, the experts of a layer two more.
    With more ranks than key/value heads each rank has one such head, which tp / heads ranks share.

    Args:
        arch: of the model.
        tp: tensor parallel degree of the engine.
        tp_rank: 0 <= tp_rank < tp.
        expert_parallel: deal whole experts to the ranks, in contiguous runs, in place of a slice of each.

    Returns:
        In the order of the family's table; names hold {layer}, see `live_name`.

    Raises:
        ConfigError: the model can't be split so; all faults at once.
    """
    _check(arch, tp, expert_parallel)
    return [_parameter(rule, arch, tp=tp, tp_rank=tp_rank, expert_parallel=expert_parallel) for rule in rules_of(arch)]


def padded_engine_vocab(vocab_size: int) -> int:
    """Rows of an engine's embedding over all its ranks."""
    return -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def live_name(name: str, found: Collection[str]) -> str:
    """The name that a running engine has for a parameter.

    Older releases (seen in 0.24) keep the experts in their layer's `experts` itself.

    Args:
        name: of `engine_parameters`, its layer filled in.
        found: names of the engine's `named_parameters()`.

    Raises:
        EngineError: the engine has no such parameter.
    """
    for candidate in (name, name.replace(_EXPERTS_MODULE, "")):
        if candidate in found:
            return candidate
    raise EngineError(
        f"{name}: the engine has no such parameter among its {len(found)}; this vLLM release names or fuses it otherwise: "
        "send whole tensors, or add the name to weights/engine_parameters.py"
    )


def _parameter(rule: Rule, arch: Architecture, *, tp: int, tp_rank: int, expert_parallel: bool) -> HeldParameter:
    name = _name(rule)
    if rule.split is Split.QKV_PARALLEL:
        shape, holdings = _query_key_value(rule, arch, name, tp=tp, tp_rank=tp_rank)
        return HeldParameter(names=(name,), shape=shape, holdings=tuple(holdings), rule=rule)
    experts = range(0)
    degree, place = tp, tp_rank
    if rule.is_of_expert:
        experts = range(arch.sizes["experts"])
        if expert_parallel:
            share = len(experts) // tp
            experts, degree, place = experts[tp_rank * share : (tp_rank + 1) * share], 1, 0
    padded_vocab = padded_engine_vocab(arch.vocab_size)
    shape = local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab)
    holdings = stacked_pieces(
        rule,
        arch,
        (name,),
        degree=degree,
        place=place,
        padded_vocab=padded_vocab,
        experts=experts,
        step=math.prod(shape),
    )
    whole = (len(experts), *shape) if rule.is_of_expert else shape
    return HeldParameter(names=(name,), shape=whole, holdings=tuple(holdings), rule=rule)


def _name(rule: Rule) -> str:
    name = rule.hf[0].name
    if rule.is_of_expert:
        layer = name.partition("{expert}.")[0]
        return f"{layer}{_EXPERTS_MODULE}{'w13_weight' if len(rule.hf) == 2 else 'w2_weight'}"
    if len(rule.hf) == 1:
        return name
    module, _, kind = name.rpartition(".")
    stem, _, first = module.rpartition(".")
    return f"{stem}.{_FUSED[first]}.{kind}"


def _query_key_value(
    rule: Rule, arch: Architecture, name: str, *, tp: int, tp_rank: int
) -> tuple[Shape, list[Holding]]:
    """A rank has whole groups; or, with more ranks than groups, some query heads of one group and its key and value."""
    wholes = [refined_shape(rule, number, arch) for number in range(len(rule.hf))]
    row = math.prod(wholes[0][2:])
    ranks_of_group = max(1, tp // arch.num_kv_heads)
    groups = max(1, arch.num_kv_heads // tp)
    first_group = tp_rank // ranks_of_group * groups
    holdings: list[Holding] = []
    rows_before = 0
    for number, (tensor, whole) in enumerate(zip(rule.hf, wholes, strict=True)):
        rows, first_row = whole[1], 0
        if number == 0:  # the query heads are shared out also within a group
            rows //= ranks_of_group
            first_row = tp_rank % ranks_of_group * rows
        holdings.append(
            Holding(
                tensor=tensor.name,
                start=(first_group, first_row, *(0 for _ in whole[2:])),
                shape=(groups, rows, *whole[2:]),
                parameters=(name,),
                offset=rows_before * row,
                strides=(rows * row, *row_major(whole)[1:]),
            )
        )
        rows_before += groups * rows
    return (rows_before, *hf_shape(rule.hf[0], arch.sizes)[1:]), holdings


def _check(arch: Architecture, tp: int, expert_parallel: bool) -> None:
    problems = [
        f"rollout.tp = {tp}: must divide the model's {what} = {size}; choose another rollout.tp"
        for what, size in _split_sizes(arch, expert_parallel)
        if size % tp
    ]
    if arch.num_kv_heads % tp and tp % arch.num_kv_heads:
        problems.append(
            f"rollout.tp = {tp}: must divide the model's num_key_value_heads = {arch.num_kv_heads} or be a multiple of "
            "it; choose another rollout.tp"
        )
    if expert_parallel and arch.experts is None:
        problems.append(f"expert parallel engines: a {arch.family} model has no experts; leave it off")
    if problems:
        raise ConfigError(problems)


def _split_sizes(arch: Architecture, expert_parallel: bool) -> list[tuple[str, int]]:
    sizes = [
        ("num_attention_heads", arch.num_heads),
        (f"vocab_size padded to {_VOCAB_MULTIPLE}", padded_engine_vocab(arch.vocab_size)),
    ]
    if arch.experts is None:
        return [*sizes, ("intermediate_size", arch.ffn_size)]
    if expert_parallel:
        return [*sizes, ("number of experts", arch.experts.num_experts)]
    return [*sizes, ("width of an expert", arch.experts.ffn_size)]
