"""AdamW of the policy: Megatron's distributed optimizer, a linear warm-up, and updates refused when not finite."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from clipo_megatron.parallel.collectives import reduce_max
from clipo_megatron.policy.settings import OptimizerSettings


def wrap_model(model: GPTModel, config: TransformerConfig) -> DistributedDataParallel:
    """The stage with its gradient buffers: float32, reduce-scattered over the data parallel ranks, summed."""
    config.finalize_model_grads_func = _finalize
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        model,
    )


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
        model: DistributedDataParallel,
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype,
        world: dist.ProcessGroup,
    ) -> None:
        self._model = model
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
                use_distributed_optimizer=True,
            ),
            [model],  # pyright: ignore[reportArgumentType]
            config_overrides={},
            use_gloo_process_groups=False,
        )

    @property
    def inner(self) -> torch.optim.Optimizer:
        """AdamW over this rank's shard of the (float32) parameters; what a checkpoint has to keep."""
        return self._optimizer.optimizer  # pyright: ignore[reportAttributeAccessIssue]

    def learning_rate(self) -> float:
        """Of the next update."""
        warmup = self._settings.warmup_updates
        return self._settings.learning_rate * min(1.0, (self.updates + 1) / max(1, warmup))

    def zero_grad(self) -> None:
        """Empty the gradient buffers."""
        self._model.zero_grad_buffer()
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
        return next(self._model.parameters()).device
