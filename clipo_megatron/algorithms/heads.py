"""The projection head between pooled states and contrastive embeddings. B rows, H hidden, D outputs of the head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


def build_head(kind: Literal["linear", "mlp"], *, hidden_size: int, head_size: int, seed: int) -> nn.Module:
    """A fresh head in float32 on the CPU: Linear(H, D), or Linear(H, H), ReLU, Linear(H, D); no biases.

    Weights are U(-1/sqrt(H), 1/sqrt(H)), torch's default for Linear, from a generator of its own: the same seed gives
    the same head on every rank, and the global generator is left alone. Parameters are named as in the published code.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "linear":
        return _Head(_linear(hidden_size, head_size, generator))
    first = _linear(hidden_size, hidden_size, generator)
    return _Head(nn.Sequential(first, nn.ReLU(), _linear(hidden_size, head_size, generator)))


def embed(head: nn.Module, h_BH: Tensor) -> Tensor:
    """Unit-norm embeddings z_i = g(h_i) / max(|g(h_i)|, 1e-12), float32 [B, D].

    Args:
        head: of `build_head`.
        h_BH: pooled states [B, H], any float format; hand them over detached where the policy must not see the loss.
    """
    return nn.functional.normalize(head(h_BH.float()), dim=-1, eps=1e-12)


class _Head(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, h_BH: Tensor) -> Tensor:
        return self.proj(h_BH)


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    # Built without storage: the usual constructor would draw from the global generator.
    linear = nn.Linear(num_inputs, num_outputs, bias=False, device="meta").to_empty(device="cpu").float()
    nn.init.uniform_(linear.weight, -(num_inputs**-0.5), num_inputs**-0.5, generator=generator)
    return linear
