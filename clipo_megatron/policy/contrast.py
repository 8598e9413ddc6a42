"""The contrastive head on the last stage: from pooled states to one loss a row, and the head's own training.

Letters: B rows of the batch, b rows of this data parallel rank, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.algorithms.contrastive import ContrastiveResult, contrastive_loss
from clipo_megatron.algorithms.heads import build_head, embed
from clipo_megatron.algorithms.metrics import anchor_metrics, embedding_metrics
from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.collectives import gather_rows, reduce_gradients, reduce_sum
from clipo_megatron.policy.settings import ContrastiveSettings
from clipo_megatron.records import RolloutBatch

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ContrastiveHead:
    """One head, replicated in float32 over the last stage's ranks; the same bits on all of them."""

    def __init__(
        self,
        settings: ContrastiveSettings,
        *,
        hidden_size: int,
        seed: int,
        dp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._dp_group = dp_group
        self.module = build_head(settings.head, hidden_size=hidden_size, head_size=settings.head_size, seed=seed).to(
            device
        )
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=settings.head_learning_rate, weight_decay=settings.head_weight_decay
        )
        self.skipped = 0
        """Steps without an anchor or with a loss that was not finite."""
        self._state_gradient: tuple[NDArray[np.int64], Tensor] | None = None

    def score(
        self, batch: RolloutBatch, h_bH: Tensor, row_b: Tensor, *, step: int
    ) -> tuple[ContrastiveResult, dict[str, float]]:
        """Losses of the whole batch under the head as it is, then the head's step.

        Collectives: one all_reduce of the embeddings [B, D] and one of the head's gradient, on the data parallel group.

        Args:
            batch: the whole batch, the same on all ranks.
            h_bH: pooled states of this rank's rows, float32 [b, H].
            row_b: their row numbers, int64 [b].
            step: of the run; keys the drawn positives.

        Returns:
            (result in the batch's order, metrics).
        """
        settings, device = self._settings, h_bH.device
        reaches_policy = settings.policy_gradient_weight > 0
        h_bH = h_bH.detach().requires_grad_(reaches_policy)
        # Under decode a response of one token has no position, so its row is in no set.
        is_valid_B = torch.from_numpy(batch.response_lengths > (1 if settings.pool == "decode" else 0)).to(device)
        # Rows are taken in the order of their keys: sums do not depend on the order in which rollouts arrived.
        order = torch.from_numpy(np.argsort(batch.row_key, kind="stable")).to(device)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        group_id_B, is_correct_B, row_key_B = (
            torch.from_numpy(column).to(device)[order] for column in (batch.group_id, batch.is_correct, batch.row_key)
        )
        with torch.set_grad_enabled(reaches_policy or not settings.head_frozen):
            z_BD = gather_rows(
                embed(self.module, h_bH), place[row_b], num_rows=batch.num_sequences, group=self._dp_group
            )
            result = contrastive_loss(
                z_BD,
                settings.objective,
                group_id_B=group_id_B,
                is_correct_B=is_correct_B,
                row_key_B=row_key_B,
                seed=self._seed,
                step=step,
                is_valid_B=is_valid_B[order],
            )
        metrics = anchor_metrics(result.loss_B, result.is_anchor_B, is_correct_B)
        pairs = embedding_metrics(z_BD.detach(), group_id_B, is_correct_B, is_valid_B=is_valid_B[order])
        metrics |= {f"cosine_{name}": value for name, value in pairs.items()}
        metrics |= self._learn(result)
        if reaches_policy:
            self._keep_state_gradient(batch, h_bH, row_b)
        in_batch_order = ContrastiveResult(
            loss=result.loss.detach(),
            loss_B=result.loss_B[place],
            is_anchor_B=result.is_anchor_B[place],
            num_anchors=result.num_anchors,
            positive_B=torch.where(result.positive_B >= 0, order[result.positive_B.clamp(min=0)], -1)[place],
        )
        return in_batch_order, metrics

    @property
    def steps(self) -> int:
        """Steps that the head's AdamW has taken."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.module.parameters()]
        return max(int(state["step"]) if "step" in state else 0 for state in states)

    def tensors(self, *, with_moments: bool) -> dict[str, Tensor]:
        """The head's weights and AdamW's moments, as references; moments that do not exist yet as zeros."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            tensors[f"parameter.{name}"] = parameter.detach()
            state = self.optimizer.state.get(parameter, {})
            for moment in _MOMENTS if with_moments else ():
                tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter))
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], *, steps: int, skipped: int) -> None:
        """The inverse of `tensors`; without moments AdamW starts afresh.

        Args:
            tensors: of `tensors`, on any device.
            steps: that AdamW has taken.
            skipped: value of `skipped`.
        """
        self.skipped = skipped
        self.optimizer.state.clear()
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[f"parameter.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            if moments:
                state: dict[str, Tensor] = {key: value.to(parameter.device) for key, value in moments.items()}
                # On the host: torch's AdamW reads it there.
                self.optimizer.state[parameter] = state | {"step": torch.tensor(float(steps), dtype=torch.float32)}

    def _learn(self, result: ContrastiveResult) -> dict[str, float]:
        metrics = {"loss": float(result.loss.detach()), "head_steps_skipped": float(self.skipped)}
        if self._settings.head_frozen and not result.loss.requires_grad:
            return metrics
        # The loss is the same on all ranks, so all of them skip or none does.
        if result.num_anchors == 0 or not math.isfinite(metrics["loss"]):
            self.skipped += 1
            return metrics | {"head_steps_skipped": float(self.skipped)}
        self.optimizer.zero_grad()
        result.loss.backward()
        if self._settings.head_frozen:
            return metrics
        reduce_gradients(self.module.parameters(), self._dp_group)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        metrics["head_grad_norm"] = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        self.optimizer.step()
        return metrics

    def _keep_state_gradient(self, batch: RolloutBatch, h_bH: Tensor, row_b: Tensor) -> None:
        gradient_BH = h_bH.new_zeros(batch.num_sequences, h_bH.shape[1])
        if h_bH.grad is not None:
            gradient_BH[row_b] = h_bH.grad
        self._state_gradient = batch.row_key, reduce_sum(gradient_BH, self._dp_group)

    def take_state_gradient(self, row_key: NDArray[np.int64]) -> Tensor:
        """Gradient of the scored loss with respect to the pooled states of these rows, float32 [S, H].

        As policy and head were when the batch was scored, so it is exact for the first update after it. Zeros where the
        loss had no anchor or was not finite.

        Args:
            row_key: of rows of the batch scored last, int64 [S].

        Raises:
            CheckError: no batch was scored with `policy_gradient_weight` > 0, or a row was not in it.
        """
        if self._state_gradient is None:
            raise CheckError("the contrastive loss has no gradient for the policy yet: score the batch before training")
        known, gradient_BH = self._state_gradient
        order = np.argsort(known)
        place = np.searchsorted(known, row_key, sorter=order).clip(max=len(known) - 1)
        if not np.array_equal(known[order[place]], row_key):
            raise CheckError(
                "a row to train on was not in the batch scored last: score the batch before training on it"
            )
        return gradient_BH[torch.from_numpy(order[place]).to(gradient_BH.device)]
