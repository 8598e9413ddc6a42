"""AdamW of the policy: Megatron's distributed optimizer, a linear warm-up, and updates refused when not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from clipo_megatron.parallel.collectives import reduce_max
from clipo_megatron.policy.settings import OptimizerSettings


def wrap_chunks(
    chunks: Sequence[GPTModel], config: TransformerConfig, *, distributed_optimizer: bool, overlap_grad_reduce: bool
) -> list[DistributedDataParallel]:
    """The chunks with their gradient buffers: float32, summed over the ranks with other tokens.

    The distributed optimizer reduce-scatters them; `overlap_grad_reduce` starts that during the backward pass. Parameters
    are gathered right after an update, not during the next forward: they are scored, exported or sent before that.
    """
    config.finalize_model_grads_func = _finalize
    wrapped = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=distributed_optimizer,
                overlap_grad_reduce=overlap_grad_reduce,
                grad_reduce_in_fp32=True,
            ),
            chunk,
            # Only the first chunk's buckets go out while another chunk is still at work.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    if overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def _finalize(
    model: list[torch.nn.Module],
    _num_tokens: Tensor | None,
    pg_collection: object = None,
    force_all_reduce: bool = False,
) -> None:
    # The loss already has its denominator, so Megatron's division by a token count is left out.
    finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)  # pyright: ignore


class PolicyOptimizer:
    """Steps the policy. Every rank calls each method, in the same order."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype,
        distributed_optimizer: bool,
        world: dist.ProcessGroup,
    ) -> None:
        self._chunks = list(chunks)
        self._settings = settings
        self._world = world
        self.updates = 0
        """Updates done so far; refused ones don't count."""
        # One group for all parameters: biases and norms decay like the rest, as in the published training.
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=distributed_optimizer,
                optimizer_cpu_offload=settings.cpu_offload,
                optimizer_offload_fraction=1.0 if settings.cpu_offload else 0.0,
                overlap_cpu_optimizer_d2h_h2d=settings.cpu_offload,
                # Without it the distributed optimizer keeps float32 masters of its own on the GPU.
                use_precision_aware_optimizer=settings.cpu_offload,
            ),
            self._chunks,  # pyright: ignore[reportArgumentType]
            config_overrides={},
            use_gloo_process_groups=False,
        )

    @property
    def chained(self) -> list[Any]:
        """Megatron's optimizers: one of the parameters that all ranks of a stage share out, one of the experts."""
        return self._optimizer.chained_optimizers  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def inner(self) -> list[torch.optim.Optimizer]:
        """AdamW over this rank's shard of the (float32) parameters, one for experts apart; what a checkpoint keeps."""
        return [optimizer.optimizer for optimizer in self.chained]

    def learning_rate(self) -> float:
        """Of the next update."""
        warmup = self._settings.warmup_updates
        return self._settings.learning_rate * min(1.0, (self.updates + 1) / max(1, warmup))

    def zero_grad(self) -> None:
        """Empty the gradient buffers."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, *, loss_is_finite: bool) -> tuple[bool, float]:
        """Clip the gradients by their global norm and update, unless a loss or the norm is not finite on any rank.

        Collectives: one all_reduce(MAX) of float32 [1] on the world, and the optimizer's own.

        Returns:
            (updated, norm): norm of the gradient before clipping.
        """
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        bad = torch.tensor([0.0 if loss_is_finite and math.isfinite(norm) else 1.0], device=self._device())
        if float(reduce_max(bad, self._world)) > 0:
            return False, norm
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self._optimizer.step()
        self.updates += 1
        return True, norm

    def _device(self) -> torch.device:
        return next(self._chunks[0].parameters()).device
