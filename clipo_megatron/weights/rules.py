"""What a rule of the name tables says, and its arithmetic: which rows or columns of which HF tensor a rank holds.

One list of pieces serves both directions: import concatenates them, export puts them back. So export is the inverse of
import by construction. Nothing here reads a file or holds a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from clipo_megatron.errors import ConfigError


class Split(StrEnum):
    """How the HF tensors of one Megatron parameter are dealt to the tp ranks; of an expert: to the etp ranks."""

    REPLICATED = "replicated"
    """One tensor, whole on every rank."""
    COLUMN_PARALLEL = "column parallel"
    """The rows of each tensor are cut evenly; a rank stacks its part of the first, of the second, ... (gate, up)."""
    ROW_PARALLEL = "row parallel"
    """One tensor, its columns cut evenly."""
    VOCAB_PARALLEL = "vocab parallel"
    """One tensor, its rows padded with zeros to the padded vocabulary, then cut evenly."""
    QKV_PARALLEL = "qkv parallel"
    """Three tensors, interleaved by key/value group: its query heads, its key head, its value head, next group."""


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A Hugging Face tensor: name, with {layer} and {expert} where it has them, and shape in names of `Sizes`."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter, with {layer} and {expert} as above, and the HF tensors that it is made of."""

    megatron: str
    split: Split
    hf: tuple[HFTensor, ...]

    @property
    def is_of_layer(self) -> bool:
        """Whether each layer has such a parameter."""
        return "{layer}" in self.megatron

    @property
    def is_of_expert(self) -> bool:
        """Whether each expert of a layer has such a parameter; then it is split over etp, not over tp."""
        return "{expert}" in self.megatron

    @property
    def split_dim(self) -> int | None:
        """The dim of the Megatron parameter that differs between the ranks that split it; None when replicated."""
        if self.split is Split.REPLICATED:
            return None
        return 1 if self.split is Split.ROW_PARALLEL else 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries [start, stop) along the split dim of HF tensor number `tensor` of a rule."""

    tensor: int
    start: int
    stop: int


Sizes = Mapping[str, int]
"""Numbers behind the names in `HFTensor.dims`: vocab, hidden, ffn, query, kv (heads * head_dim each), head_dim.

Where there are experts: experts (their number in a layer) and expert_ffn.
"""


def hf_shape(tensor: HFTensor, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor."""
    return tuple(sizes[dim] for dim in tensor.dims)


def pieces(rule: Rule, sizes: Sizes, *, degree: int, place: int, padded_vocab: int) -> list[Piece]:
    """What one rank holds, in the order in which it lies along the split dim of the rank's parameter.

    Args:
        rule: of the parameter.
        sizes: of the architecture.
        degree: number of ranks that split the parameter, >= 1: tp, or etp for an expert's.
        place: of the rank among them, 0 <= place < degree.
        padded_vocab: rows of the padded vocabulary, a multiple of `degree`; used by vocab parallel rules only. Rows of
            the vocabulary's padding are in no piece.

    Raises:
        ConfigError: the degree does not divide what is split.
    """
    shapes = [hf_shape(tensor, sizes) for tensor in rule.hf]
    match rule.split:
        case Split.REPLICATED:
            return [Piece(0, 0, shapes[0][0])]
        case Split.COLUMN_PARALLEL:
            return [_even_piece(rule, number, shape[0], degree, place) for number, shape in enumerate(shapes)]
        case Split.ROW_PARALLEL:
            return [_even_piece(rule, 0, shapes[0][1], degree, place)]
        case Split.VOCAB_PARALLEL:
            padded = _even_piece(rule, 0, padded_vocab, degree, place)
            rows = shapes[0][0]
            return [Piece(0, min(padded.start, rows), min(padded.stop, rows))]
        case Split.QKV_PARALLEL:
            num_groups = sizes["kv"] // sizes["head_dim"]
            own = _even_piece(rule, 0, num_groups, degree, place)
            rows_of = [shape[0] // num_groups for shape in shapes]
            return [
                Piece(number, group * rows, (group + 1) * rows)
                for group in range(own.start, own.stop)
                for number, rows in enumerate(rows_of)
            ]


def local_shape(rule: Rule, sizes: Sizes, *, degree: int, padded_vocab: int) -> tuple[int, ...]:
    """The shape of the Megatron parameter on each of the `degree` ranks that split it."""
    whole = list(hf_shape(rule.hf[0], sizes))
    if rule.split_dim is None:
        return tuple(whole)
    if rule.split is Split.VOCAB_PARALLEL:
        whole[0] = padded_vocab
    else:
        whole[rule.split_dim] = sum(hf_shape(tensor, sizes)[rule.split_dim] for tensor in rule.hf)
    whole[rule.split_dim] //= degree
    return tuple(whole)


def _even_piece(rule: Rule, number: int, size: int, degree: int, place: int) -> Piece:
    if size % degree:
        key = "etp" if rule.is_of_expert else "tp"
        raise ConfigError(
            f"{rule.megatron}: layout.{key} = {degree} does not divide {size} ({rule.split}); choose another {key}"
        )
    share = size // degree
    return Piece(number, place * share, (place + 1) * share)
