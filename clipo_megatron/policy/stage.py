"""This rank's share of the policy: one model chunk, or several under the interleaved schedule.

Parameters go by their names in the whole model, so that ranks, checkpoints and tables speak of the same things.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.policy.model import PolicyModel
from clipo_megatron.policy.routing import RoutingReplay
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.names import global_name, layer_numbers


class Stage:
    """The model chunks of one rank, in the order of their layers."""

    def __init__(
        self, chunks: Sequence[PolicyModel], architecture: Architecture, layout: ParallelLayout, *, rank: int
    ) -> None:
        self.chunks = list(chunks)
        self.wrapped: list[DistributedDataParallel] = []
        """The chunks with their gradient buffers; the optimizer adds them once the weights are in place."""
        self.replay: RoutingReplay | None = None
        """The routers' source of experts; None where they decide by themselves."""
        self.is_last = layout.is_last_stage(rank)
        """Whether the last chunk gives the states after the final norm."""
        self._first_layers = [
            layer_numbers(
                architecture.num_layers, pp=layout.pp, pp_rank=layout.pp_rank(rank), vpp=layout.vpp, vpp_rank=number
            ).start
            for number in range(layout.vpp)
        ]
        experts = architecture.experts
        self._first_expert = 0 if experts is None else layout.ep_rank(rank) * (experts.num_experts // layout.ep)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the whole model, parameter), in the order of the network."""
        for chunk, first_layer in zip(self.chunks, self._first_layers, strict=True):
            for name, parameter in chunk.named_parameters():
                yield global_name(name, first_layer=first_layer, first_expert=self._first_expert), parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the whole model, buffer) of what a checkpoint has to keep besides parameters."""
        for chunk, first_layer in zip(self.chunks, self._first_layers, strict=True):
            kept = set(chunk.state_dict())
            for name, buffer in chunk.named_buffers():
                if name in kept:
                    yield global_name(name, first_layer=first_layer, first_expert=self._first_expert), buffer

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters of this rank."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    @property
    def output_weight(self) -> Tensor:
        """[V / tp, H] of the output layer, on the last stage."""
        last = self.chunks[-1]
        # A tied model of one stage has no weight of its own in the output layer.
        return (
            last.output_layer.weight
            if last.output_layer.weight is not None
            else last.shared_embedding_or_output_weight()
        )

    def train(self) -> None:
        """Switch to training mode."""
        for chunk in self.wrapped:
            chunk.train()

    def eval(self) -> None:
        """Switch to scoring mode."""
        for chunk in self.wrapped:
            chunk.eval()

    def forward(self, chunk: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
        """One of `wrapped` on a micro-batch: states for the next stage, or after the final norm, [tokens, 1, H]."""
        if self.replay is not None:
            routes = micro_batch.routes
            self.replay.set_routes(chunk, None if routes is None else routes.to(micro_batch.input_ids.device))
        return chunk(
            micro_batch.input_ids, micro_batch.position_ids, attention_mask=None, packed_seq_params=micro_batch.packed
        )
