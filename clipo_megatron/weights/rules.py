"""What a rule of the name tables says, and its arithmetic: which rows or columns of which HF tensor a tp rank holds.

One list of pieces serves both directions: import concatenates them, export puts them back. So export is the inverse of
import by construction. Nothing here reads a file or holds a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from clipo_megatron.errors import ConfigError


class Split(StrEnum):
    """How the HF tensors of one Megatron parameter are dealt to the tp ranks."""

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
    """A Hugging Face tensor: name, with {layer} where it is one of a layer, and shape in names of `Sizes`."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter, with {layer} as above, and the HF tensors that it is made of."""

    megatron: str
    split: Split
    hf: tuple[HFTensor, ...]

    @property
    def split_dim(self) -> int | None:
        """The dim of the Megatron parameter that differs between tp ranks; None when replicated."""
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
"""Numbers behind the names in `HFTensor.dims`: vocab, hidden, ffn, query, kv (heads * head_dim each), head_dim."""


def hf_shape(tensor: HFTensor, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor."""
    return tuple(sizes[dim] for dim in tensor.dims)


def pieces(rule: Rule, sizes: Sizes, *, tp: int, tp_rank: int, padded_vocab: int) -> list[Piece]:
    """What one tp rank holds, in the order in which it lies along the split dim of the rank's parameter.

    Args:
        rule: of the parameter.
        sizes: of the architecture.
        tp: tensor parallel degree, >= 1.
        tp_rank: 0 <= tp_rank < tp.
        padded_vocab: rows of the padded vocabulary, a multiple of tp; used by vocab parallel rules only. Rows of the
            vocabulary's padding are in no piece.

    Raises:
        ConfigError: tp does not divide what is split.
    """
    shapes = [hf_shape(tensor, sizes) for tensor in rule.hf]
    match rule.split:
        case Split.REPLICATED:
            return [Piece(0, 0, shapes[0][0])]
        case Split.COLUMN_PARALLEL:
            return [_even_piece(rule, number, shape[0], tp, tp_rank) for number, shape in enumerate(shapes)]
        case Split.ROW_PARALLEL:
            return [_even_piece(rule, 0, shapes[0][1], tp, tp_rank)]
        case Split.VOCAB_PARALLEL:
            padded = _even_piece(rule, 0, padded_vocab, tp, tp_rank)
            rows = shapes[0][0]
            return [Piece(0, min(padded.start, rows), min(padded.stop, rows))]
        case Split.QKV_PARALLEL:
            num_groups = sizes["kv"] // sizes["head_dim"]
            own = _even_piece(rule, 0, num_groups, tp, tp_rank)
            rows_of = [shape[0] // num_groups for shape in shapes]
            return [
                Piece(number, group * rows, (group + 1) * rows)
                for group in range(own.start, own.stop)
                for number, rows in enumerate(rows_of)
            ]


def local_shape(rule: Rule, sizes: Sizes, *, tp: int, padded_vocab: int) -> tuple[int, ...]:
    """The shape of the Megatron parameter on each tp rank."""
    whole = list(hf_shape(rule.hf[0], sizes))
    if rule.split_dim is None:
        return tuple(whole)
    if rule.split is Split.VOCAB_PARALLEL:
        whole[0] = padded_vocab
    else:
        whole[rule.split_dim] = sum(hf_shape(tensor, sizes)[rule.split_dim] for tensor in rule.hf)
    whole[rule.split_dim] //= tp
    return tuple(whole)


def _even_piece(rule: Rule, number: int, size: int, tp: int, tp_rank: int) -> Piece:
    if size % tp:
        raise ConfigError(f"{rule.megatron}: layout.tp = {tp} does not divide {size} ({rule.split}); choose another tp")
    share = size // tp
    return Piece(number, tp_rank * share, (tp_rank + 1) * share)
