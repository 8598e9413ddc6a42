"""What the policy needs to know of a run, as small frozen records. Fields are named as in the recipe's sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clipo_megatron.algorithms.contrastive import Objective
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.weights.fp8_parameters import Fp8


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmSettings:
    """The policy loss."""

    updates_per_step: int = 1
    """Optimizer steps of one training step; whole groups are dealt among them."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    kl_coefficient: float = 0.0
    """Weight of the KL loss; 0 runs without a reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveSettings:
    """The contrastive head and its loss."""

    objective: Objective = field(default_factory=Objective)
    head: Literal["linear", "mlp"] = "linear"
    head_size: int = 512
    head_learning_rate: float = 1e-3
    head_weight_decay: float = 0.01
    head_frozen: bool = False
    pool: Literal["decode", "response", "predictors"] = "decode"
    policy_gradient_weight: float = 0.0
    """Weight of the loss as an auxiliary loss of the policy; 0: it trains the head alone, as in the paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW of the policy; constant learning rate after a linear warm-up."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    warmup_updates: int = 0
    """Optimizer steps of linear warm-up."""
    cpu_offload: bool = False
    """Masters and moments in host memory. GPU only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySettings:
    """What all ranks of a policy share."""

    model_path: Path
    """Hugging Face folder: the policy to start from, and the reference policy."""
    weights: Path | None = None
    """Megatron checkpoint to take the weights from, in place of model_path's."""
    layout: ParallelLayout
    """How the ranks are split."""
    dtype: Literal["float32", "bfloat16"]
    """Of the parameters; master weights and moments are float32."""
    device: Literal["cpu", "cuda"]
    """Where it runs. On "cuda" the process's current device must be its rank's."""
    sequence_parallel: bool
    """Split activations along the tokens between the tp ranks; no effect at tp = 1."""
    micro_batch_tokens: int
    """Packed tokens of one forward at most."""
    recompute: Literal["none", "selective", "full"]
    """selective recomputes attention alone; full stores only each layer's input."""
    distributed_optimizer: bool
    """Share out masters and moments among the dp x cp ranks."""
    overlap_grad_reduce: bool
    """Reduce gradients during the backward pass."""
    precision: PrecisionSettings
    """Of the matrix products."""
    routing_replay: bool
    """Send tokens to the experts that the batch names. No effect on a dense policy."""
    freeze_router: bool
    """Leave the routers as they are. No effect on a dense policy."""
    temperature: float
    """Of the sampling; logits are divided by it."""
    algorithm: AlgorithmSettings
    contrastive: ContrastiveSettings | None
    """None runs the plain baseline, without a head."""
    optimizer: OptimizerSettings
    seed: int
    """Of the head's start and of the drawn positives."""
    engine_fp8: Fp8 = "none"
    """What engines hold in FP8: in planned syncs they are given these matrices so."""
