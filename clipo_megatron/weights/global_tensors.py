"""Where each rank's parameter lies in the global tensors of Megatron's distributed checkpoints ("torch_dist").

A global tensor is one kind of parameter of the whole model: [layers, ...], of experts [layers, experts, ...], named as by
Transformer Engine's modules. It does not depend on the layout: ranks hold boxes of it. Only its vocabulary is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES, FUSED_NORM_ALIASES
from clipo_megatron.weights.names import OUTPUT_LAYER, Where, find_rule, hf_tensor_specs, megatron_parameter_names
from clipo_megatron.weights.rules import Piece, Rule, Split, hf_shape, local_shape, pieces

_LAYER, _EXPERT = ".{layer}.", ".local_experts.{expert}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A rectangular part of one rank's parameter, and its place in a global tensor."""

    key: str
    """Of the global tensor."""
    global_shape: tuple[int, ...]
    """Of the global tensor, with the leading axes of layers and experts where it has them."""
    global_start: tuple[int, ...]
    """First element in the global tensor."""
    local_start: tuple[int, ...]
    """First element in the rank's parameter, which has no leading axes."""
    shape: tuple[int, ...]
    """Of the part, without leading axes."""

    @property
    def global_extent(self) -> tuple[int, ...]:
        """Shape of the part with leading axes of length 1."""
        return (1,) * (len(self.global_shape) - len(self.shape)) + self.shape


@dataclass(frozen=True, kw_only=True, slots=True)
class HFPlace:
    """A rectangular part of a Hugging Face tensor, and its place in a global tensor."""

    key: str
    global_start: tuple[int, ...]
    """First element in the global tensor, with leading axes."""
    hf_start: tuple[int, ...]
    """First element in the Hugging Face tensor."""
    shape: tuple[int, ...]
    """Of the part, without leading axes."""


def boxes_of(
    megatron_name: str,
    arch: Architecture,
    *,
    tp: int,
    tp_rank: int,
    padded_vocab: int,
    etp: int = 1,
    etp_rank: int = 0,
) -> list[Box]:
    """The parts of one rank's parameter: one, but for gate and up projections stacked on a rank, which are apart.

    Args:
        megatron_name: as in GPTModel, with the numbers of layer and expert in the whole model. The output layer of a tied
            model lies where its embedding does.
        arch: of the model.
        tp: tensor parallel degree.
        tp_rank: 0 <= tp_rank < tp.
        padded_vocab: rows of the embedding over all tp ranks.
        etp: tensor parallel degree of an expert.
        etp_rank: 0 <= etp_rank < etp.

    Raises:
        CheckError: the family's table has no such parameter.
        ConfigError: tp (etp) does not divide it.
    """
    rule, where = find_rule(megatron_name, arch)
    degree, place = (etp, etp_rank) if rule.is_of_expert else (tp, tp_rank)
    key, leading = _key(rule, arch), _leading(rule, where)
    of_rank = pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=padded_vocab)
    share = local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab)
    global_shape = _global_shape(rule, arch, padded_vocab)
    dim = rule.split_dim
    if dim is None:
        parts = [(0, 0, share)]
    elif rule.split is Split.COLUMN_PARALLEL:
        parts = [
            (whole_start + piece.start, local_start, _with(share, 0, piece.stop - piece.start))
            for piece, whole_start, local_start in _stacked(rule, arch, of_rank)
        ]
    else:
        parts = [(place * share[dim], 0, share)]
    dim = dim or 0
    return [
        Box(
            key=key,
            global_shape=global_shape,
            global_start=(*leading, *_with((0,) * len(share), dim, start)),
            local_start=_with((0,) * len(share), dim, local_start),
            shape=shape,
        )
        for start, local_start, shape in parts
    ]


def dist_tensor_shapes(arch: Architecture, *, padded_vocab: int) -> dict[str, tuple[int, ...]]:
    """Key -> shape of all global tensors of the model, in the order of the network."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in FAMILIES[arch.family].rules:
        if not (arch.tied and rule.megatron == OUTPUT_LAYER):
            shapes[_key(rule, arch)] = _global_shape(rule, arch, padded_vocab)
    return shapes


def hf_places(arch: Architecture) -> dict[str, list[HFPlace]]:
    """Hugging Face name -> the parts of the global tensors that hold the tensor, in the order of its rows.

    The vocabulary's padding is in no part. Names are in the order of the network.
    """
    places: dict[str, list[HFPlace]] = {name: [] for name in hf_tensor_specs(arch)}
    for megatron_name in megatron_parameter_names(arch):
        rule, where = find_rule(megatron_name, arch)
        dim, offset = rule.split_dim or 0, 0
        for piece in pieces(rule, arch.sizes, degree=1, place=0, padded_vocab=arch.vocab_size):
            tensor = rule.hf[piece.tensor]
            origin = (0,) * len(tensor.dims)
            length = piece.stop - piece.start
            places[where.fill(tensor.name)].append(
                HFPlace(
                    key=_key(rule, arch),
                    global_start=(*_leading(rule, where), *_with(origin, dim, offset)),
                    hf_start=_with(origin, dim, piece.start),
                    shape=_with(hf_shape(tensor, arch.sizes), dim, length),
                )
            )
            offset += length
    return places


def _key(rule: Rule, arch: Architecture) -> str:
    name = rule.megatron.replace(_LAYER, ".").replace(_EXPERT, ".experts.")
    for fused, plain in FUSED_NORM_ALIASES.items():
        if name.endswith("." + plain) and FAMILIES[arch.family].has(fused.replace("layer_norm_weight", "weight")):
            return name.removesuffix(plain) + fused
    return name


def _leading(rule: Rule, where: Where) -> tuple[int, ...]:
    return ((where.layer,) if rule.is_of_layer else ()) + ((where.expert,) if rule.is_of_expert else ())


def _global_shape(rule: Rule, arch: Architecture, padded_vocab: int) -> tuple[int, ...]:
    num_experts = 0 if arch.experts is None else arch.experts.num_experts
    leading = ((arch.num_layers,) if rule.is_of_layer else ()) + ((num_experts,) if rule.is_of_expert else ())
    return leading + local_shape(rule, arch.sizes, degree=1, padded_vocab=padded_vocab)


def _stacked(rule: Rule, arch: Architecture, of_rank: Sequence[Piece]) -> Iterator[tuple[Piece, int, int]]:
    """Each HF tensor's piece, where the tensor begins in the global tensor, where the piece begins on the rank."""
    rows = [hf_shape(tensor, arch.sizes)[0] for tensor in rule.hf]
    whole_starts = accumulate(rows, initial=0)
    local_starts = accumulate((piece.stop - piece.start for piece in of_rank), initial=0)
    return zip(of_rank, whole_starts, local_starts, strict=False)


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
