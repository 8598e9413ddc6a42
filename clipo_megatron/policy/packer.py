"""From a batch to this rank's micro-batches: planned alike on all ranks, packed, padded and split as the layout asks."""

from __future__ import annotations

from dataclasses import replace

import torch

from clipo_megatron.data.packing import MicroBatchPlan, alignment, least_rows, plan_micro_batches
from clipo_megatron.policy.micro_batch import MicroBatch, Padding, pack
from clipo_megatron.policy.precision import fp8_multiple
from clipo_megatron.policy.routing import micro_batch_routes
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.records import RolloutBatch, Routes
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.counts import active_parameters


class Packer:
    """Makes the micro-batches of one rank."""

    def __init__(
        self, settings: PolicySettings, architecture: Architecture, *, rank: int, device: torch.device
    ) -> None:
        layout = self._layout = settings.layout
        self._rank = rank
        self._device = device
        self._token_budget = settings.micro_batch_tokens
        self._experts = architecture.experts
        self._num_shards = layout.tp if is_sequence_split(settings) else 1
        sequence_multiple, batch_multiple = alignment(
            tp=layout.tp,
            cp=layout.cp,
            sequence_parallel=is_sequence_split(settings),
            fp8_multiple=fp8_multiple(settings.precision.recipe),
        )
        self._padding = Padding(sequence_multiple=sequence_multiple, batch_multiple=batch_multiple, cp=layout.cp)
        # All work of a layer that grows with the tokens, in units of causal attention's.
        self._linear_cost = active_parameters(architecture) / (architecture.num_heads * architecture.head_dim)
        self._count_multiple = layout.pp if layout.vpp > 1 else 1

    @property
    def least_rows(self) -> int:
        """Rows that a batch needs at least."""
        return least_rows(dp=self._layout.dp, count_multiple=self._count_multiple)

    def __call__(self, batch: RolloutBatch, *, with_routes: bool) -> tuple[list[MicroBatch], MicroBatchPlan]:
        """This rank's micro-batches, and the plan of all ranks.

        Args:
            batch: the same on all ranks.
            with_routes: give the micro-batches the batch's routed experts, if it has any.

        Raises:
            ConfigError: a sequence does not fit into a micro-batch, or there are too few of them.
        """
        plan = plan_micro_batches(
            batch.lengths,
            dp=self._layout.dp,
            token_budget=self._token_budget,
            sequence_multiple=self._padding.sequence_multiple,
            batch_multiple=self._padding.batch_multiple,
            count_multiple=self._count_multiple,
            linear_cost=self._linear_cost,
        )
        dp_rank = self._layout.dp_rank(self._rank)
        if self._layout.vpp > 1:  # the interleaved schedule sends tensors of one shape only
            plan = replace(plan, tokens=tuple((max(rank),) * len(rank) for rank in plan.tokens))
        columns = replace(batch, routed_experts=None)  # the largest one, and not packed with the others
        micro_batches = [
            pack(
                columns,
                rows,
                padding=self._padding,
                cp_rank=self._layout.cp_rank(self._rank),
                device=self._device,
                num_tokens=num_tokens,
            )
            for rows, num_tokens in zip(plan.rows[dp_rank], plan.tokens[dp_rank], strict=True)
        ]
        routes = batch.routed_experts if with_routes else None
        if routes is not None and self._experts is not None:
            micro_batches = [self._with_routes(micro_batch, routes) for micro_batch in micro_batches]
        return micro_batches, plan

    def _with_routes(self, micro_batch: MicroBatch, routes: Routes) -> MicroBatch:
        assert self._experts is not None
        shard = self._layout.tp_rank(self._rank) if self._num_shards > 1 else 0
        return replace(
            micro_batch,
            routes=micro_batch_routes(
                routes,
                micro_batch,
                num_experts=self._experts.num_experts,
                shard=shard,
                num_shards=self._num_shards,
            ),
        )


def is_sequence_split(settings: PolicySettings) -> bool:
    """Whether sequence parallelism has an effect: the tp ranks then share out the tokens between the layers."""
    return settings.sequence_parallel and settings.layout.tp > 1
