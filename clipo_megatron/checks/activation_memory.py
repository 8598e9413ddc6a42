"""Bytes of one layer's activations on a GPU, and how many layers' a pipeline schedule holds: arithmetic, no torch.

After arXiv 2205.05198, equations 1 to 4, with what differs here: no dropout, flash attention (no [T, T] matrix is
stored), grouped queries, SwiGLU, RMSNorm, Transformer Engine's modules, mixtures of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipo_megatron.weights.architecture import Architecture

_FLOAT32, _FP8 = 4, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShare:
    """What one rank computes of a layer for one micro-batch."""

    arch: Architecture
    tokens: int
    """Of the micro-batch on this cp rank: T / cp, padding included."""
    tp: int
    etp: int
    cp: int
    is_split: bool
    """Whether the tp ranks share out the tokens between the linear layers (sequence parallelism)."""
    element_bytes: int
    """Of the policy's dtype."""
    is_fp8: bool
    """Whether the linear layers keep their inputs quantised."""

    @property
    def shard_tokens(self) -> int:
        """Tokens between the linear layers."""
        return -(-self.tokens // self.tp) if self.is_split else self.tokens

    @property
    def pairs(self) -> int:
        """(token, expert) pairs that this rank's experts are given, if the router spreads the tokens evenly."""
        experts = self.arch.experts
        return 0 if experts is None else self.shard_tokens * self.etp * experts.experts_per_token


def layers_in_flight(*, num_layers: int, pp: int, pp_rank: int, vpp: int) -> int:
    """Layers of a stage, times the micro-batches whose activations each of them holds when most are held.

    Plain schedule (1F1B, arXiv 2104.04473 section 2.2.1): pp - p micro-batches of num_layers / pp layers; on the first
    stage that is all of num_layers. Interleaved (section 2.2.2, warm-up as Megatron-core counts it): 2 (pp - p - 1) +
    (vpp - 1) pp + 1 times num_layers / (pp vpp) layers; on the first stage num_layers (1 + (pp - 1) / (pp vpp)), as in
    arXiv 2205.05198 section 4.2.3. An update of fewer micro-batches holds less.
    """
    of_chunk = num_layers // (pp * vpp)
    if vpp == 1:
        return (pp - pp_rank) * of_chunk
    return (2 * (pp - pp_rank - 1) + (vpp - 1) * pp + 1) * of_chunk


def saved_bytes(share: LayerShare, *, recompute: Literal["none", "selective", "full"]) -> int:
    """What one layer keeps of one micro-batch until its backward pass.

    full: its input alone, e s H bytes: e of an element, s tokens between the linear layers, H hidden.
    selective: all but what attention keeps besides its inputs and output (and, in FP8, its output): with flash
    attention little is saved. none: the sum of `_attention_bytes` and `_mlp_bytes` or `_experts_bytes`.
    """
    arch, element = share.arch, share.element_bytes
    if recompute == "full":
        return element * share.shard_tokens * arch.hidden_size
    dropped = 0
    if recompute == "selective":
        dropped = _FLOAT32 * arch.num_heads + (element * arch.num_heads * arch.head_dim if share.is_fp8 else 0)
        dropped = dropped * share.tokens // share.tp
    mlp = _mlp_bytes(share) if arch.experts is None else _experts_bytes(share)
    return _attention_bytes(share) + mlp - dropped


def backward_bytes(share: LayerShare) -> int:
    """Gradients and gathered inputs that are alive at once while one layer goes backward; a rough upper estimate.

    Dense, with t tokens, s of them between the linear layers, F the width of the MLP: the MLP's input gathered over tp
    and its gradient, 2 e t H; gradients of SwiGLU's input and output, 3 e t F / tp; of the residual stream, 2 e s H.
    Experts: three copies of the (token, expert) pairs' states instead (permuted, sorted, gradient), 3 e n H, and
    3 e n F / etp. With cp > 1 each step of ring attention keeps an output: e cp t Q / tp.
    """
    arch, element, tokens = share.arch, share.element_bytes, share.tokens
    residual = 2 * element * share.shard_tokens * arch.hidden_size
    ring = element * share.cp * tokens * arch.num_heads * arch.head_dim // share.tp if share.cp > 1 else 0
    if arch.experts is None:
        gathered = 2 * element * tokens * arch.hidden_size
        return residual + ring + gathered + 3 * element * tokens * arch.ffn_size // share.tp
    of_pair = 3 * arch.hidden_size + 3 * arch.experts.ffn_size // share.etp
    return residual + ring + element * share.pairs * of_pair


def _attention_bytes(share: LayerShare) -> int:
    """Norm and attention: s H (e + i) + t / tp (e (Q + K) [with norms of q and k] + e (Q + 2 K) + e Q + 4 A).

    In the order of the terms: the norm's input and its output as the projection's input, of i bytes (1 in FP8, else e);
    inputs of the q and k norms; q, k and v as attention takes them; its output, which is the projection's input too (in
    FP8 that has a quantised copy of its own, + Q); one float32 statistic for each of A heads. Q and K: widths of the
    queries and of the keys.
    """
    arch, element = share.arch, share.element_bytes
    query, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    of_token = element * (query + 2 * kv) + element * query + _FLOAT32 * arch.num_heads
    if arch.qk_norm:
        of_token += element * (query + kv)
    if share.is_fp8:
        of_token += _FP8 * query
    norm = share.shard_tokens * arch.hidden_size * (element + _input_bytes(share))
    return norm + share.tokens * of_token // share.tp


def _mlp_bytes(share: LayerShare) -> int:
    """Dense MLP: s H (e + i) + t / tp F (2 e + i): norm as above, SwiGLU's input and its output."""
    arch, element = share.arch, share.element_bytes
    norm = share.shard_tokens * arch.hidden_size * (element + _input_bytes(share))
    return norm + share.tokens * arch.ffn_size * (2 * element + _input_bytes(share)) // share.tp


def _experts_bytes(share: LayerShare) -> int:
    """Experts: 2 e s H + s (4 (2 E + 1) + 16 k) + n (i H + (2 e + i) F / etp + 8), n = s etp k pairs.

    Norm's input and output, which the router keeps; the map of the permutation (Transformer Engine: 2 E + 1 int32 a
    token) and the k chosen experts with their weights; for each pair the expert's input, SwiGLU's input and output, and
    a weight and a place.
    """
    arch, element, shard = share.arch, share.element_bytes, share.shard_tokens
    assert arch.experts is not None
    experts = arch.experts
    router = shard * (_FLOAT32 * (2 * experts.num_experts + 1) + 16 * experts.experts_per_token)
    ffn = (2 * element + _input_bytes(share)) * experts.ffn_size // share.etp
    of_pair = _input_bytes(share) * arch.hidden_size + ffn + 8
    return 2 * element * shard * arch.hidden_size + router + share.pairs * of_pair


def _input_bytes(share: LayerShare) -> int:
    """Of an element of a linear layer's input, as kept for the weight's gradient."""
    return _FP8 if share.is_fp8 else share.element_bytes
