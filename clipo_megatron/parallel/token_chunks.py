"""Chosen tokens' states in chunks, where the ranks of a group may split the tokens: never all of them on one rank.

Letters: T tokens of this rank, R chosen positions (c: of a chunk), H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.errors import CheckError


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some of the R positions, in order."""

    rows: slice
    pieces: list[tuple[int, slice]]
    """Its rows by the rank that holds their tokens; one piece, of rank 0, when the tokens are not split."""

    def cut(self, states_cH: Tensor, rows: slice) -> Tensor:
        """The view of a piece in the chunk's tensor."""
        return states_cH[rows.start - self.rows.start : rows.stop - self.rows.start]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChunks:
    """The chosen tokens of a group, and where this rank finds its own among them."""

    chunks: list[Chunk]
    local_R: Tensor
    """int64 [R] on the states' device: rows of this rank's states; meaningless for other ranks' tokens."""
    group: dist.ProcessGroup
    is_split: bool


def plan_chunks(
    position_R: Tensor, h_TH: Tensor, *, chunk_tokens: int, group: dist.ProcessGroup, is_split: bool
) -> TokenChunks:
    """Chunks of even size, at most `chunk_tokens` positions each; the same on all ranks.

    The host waits for the device only if `position_R` lies there.

    Args:
        position_R: int64 [R] strictly ascending, on the host or on h's device; counted over the whole group with
            `is_split`, where rank r holds tokens [r * T, (r + 1) * T).
        h_TH: this rank's states.
        chunk_tokens: >= 1.
        group: the ranks that take part.
        is_split: whether they split the tokens; else each holds all of them.

    Raises:
        CheckError: positions are not strictly ascending or not among the tokens.
    """
    size, num_local = (group.size() if is_split else 1), h_TH.shape[0]
    edges = torch.arange(size + 1, device=position_R.device) * num_local
    num_wrong = (position_R.diff() <= 0).sum() + (position_R < 0).sum() + (position_R >= size * num_local).sum()
    *ends, wrong = torch.cat([torch.searchsorted(position_R, edges), num_wrong[None]]).tolist()
    if wrong:
        raise CheckError(
            f"position_R: {wrong} of its {len(position_R)} entries break a rule: positions must be strictly ascending "
            f"and lie in [0, {size * num_local}), the tokens of the group; pass each chosen token once, in order"
        )
    num_rows, chunks = len(position_R), []
    num_chunks = -(-num_rows // chunk_tokens)
    for number in range(num_chunks):
        start, end = num_rows * number // num_chunks, num_rows * (number + 1) // num_chunks
        held = [slice(max(start, low), min(end, high)) for low, high in itertools.pairwise(ends)]
        pieces = [(rank, rows) for rank, rows in enumerate(held) if rows.start < rows.stop]
        chunks.append(Chunk(rows=slice(start, end), pieces=pieces))
    first_token = group.rank() * num_local if is_split else 0
    local_R = position_R.to(h_TH.device, non_blocking=True) - first_token
    return TokenChunks(chunks=chunks, local_R=local_R, group=group, is_split=is_split and group.size() > 1)


def gather_chunks(h_TH: Tensor, tokens: TokenChunks) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's states [c, H] on every rank; the next chunk travels while the caller works on one. No gradient.

    Collectives: when the tokens are split, one broadcast of h's dtype [piece, H] on the group per piece.
    """

    def start(chunk: Chunk) -> tuple[slice, Tensor, list[dist.Work | None]]:
        if not tokens.is_split:
            return chunk.rows, h_TH[tokens.local_R[chunk.rows]], []
        h_cH, works = h_TH.new_empty(chunk.rows.stop - chunk.rows.start, h_TH.shape[1]), []
        for owner, rows in chunk.pieces:
            piece = chunk.cut(h_cH, rows)
            if owner == tokens.group.rank():
                torch.index_select(h_TH, 0, tokens.local_R[rows], out=piece)
            works.append(dist.broadcast(piece, group=tokens.group, group_src=owner, async_op=True))
        return chunk.rows, h_cH, works

    ahead = start(tokens.chunks[0]) if tokens.chunks else None
    for following in [*tokens.chunks[1:], None]:
        if ahead is None:
            return
        rows, h_cH, works = ahead
        for work in works:
            if work is not None:
                work.wait()
        ahead = start(following) if following is not None else None
        yield rows, h_cH


class StateGradient:
    """Sums the chunks' gradients over the ranks into that of this rank's states, each while the next is computed."""

    def __init__(self, h_TH: Tensor, tokens: TokenChunks) -> None:
        self._grad_TH = torch.zeros_like(h_TH)
        self._tokens = tokens
        self._chunks = iter(tokens.chunks)
        self._pending: tuple[Chunk, Tensor, list[dist.Work | None]] | None = None

    def add(self, grad_cH: Tensor) -> None:
        """Start the sum of the next chunk's gradient, of which this rank gives its share, float32 [c, H].

        Collectives: one reduce(SUM) of float32 [piece, H] on the group per piece when the tokens are split; else one
        all_reduce(SUM) of float32 [c, H].
        """
        self._write()
        chunk, tokens, works = next(self._chunks), self._tokens, []
        if tokens.is_split:
            for owner, rows in chunk.pieces:
                piece = chunk.cut(grad_cH, rows)
                works.append(dist.reduce(piece, group=tokens.group, group_dst=owner, async_op=True))
        elif tokens.group.size() > 1:
            works.append(dist.all_reduce(grad_cH, group=tokens.group, async_op=True))
        self._pending = (chunk, grad_cH, works)

    def finish(self) -> Tensor:
        """The gradient of this rank's states [T, H]; zero for tokens that were not chosen."""
        self._write()
        return self._grad_TH

    def _write(self) -> None:
        if self._pending is None:
            return
        chunk, grad_cH, works = self._pending
        for work in works:
            if work is not None:
                work.wait()
        for owner, rows in chunk.pieces:
            if not self._tokens.is_split or owner == self._tokens.group.rank():
                self._grad_TH[self._tokens.local_R[rows]] = chunk.cut(grad_cH, rows).to(self._grad_TH.dtype)
        self._pending = None
