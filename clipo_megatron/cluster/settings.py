"""What the actors need to start, taken out of the recipe on the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clipo_megatron.algorithms.contrastive import Objective
from clipo_megatron.checks.trainer_layout import parallel_layout
from clipo_megatron.cluster.planned_sync import SyncSettings
from clipo_megatron.policy.precision import PrecisionSettings
from clipo_megatron.policy.settings import AlgorithmSettings, ContrastiveSettings, OptimizerSettings, PolicySettings
from clipo_megatron.recipe import Recipe
from clipo_megatron.rollout.settings import EngineSettings
from clipo_megatron.sync.placement import Placement
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.fp8_parameters import FP8_OF_QUANTIZATION

Device = Literal["cpu", "cuda"]


def policy_settings(recipe: Recipe, *, device: Device) -> PolicySettings:
    """The trainer's side of a recipe."""
    algorithm, contrastive, optimizer = recipe.algorithm, recipe.contrastive, recipe.optimizer
    return PolicySettings(
        model_path=Path(recipe.model.path).resolve(),
        weights=Path(recipe.model.weights).resolve() if recipe.model.weights else None,
        layout=parallel_layout(recipe),
        dtype=recipe.model.dtype,
        device=device,
        sequence_parallel=recipe.layout.sequence_parallel and recipe.layout.tp > 1,
        micro_batch_tokens=recipe.layout.micro_batch_tokens,
        recompute=recipe.layout.recompute,
        distributed_optimizer=recipe.layout.distributed_optimizer,
        overlap_grad_reduce=recipe.layout.overlap_grad_reduce,
        precision=PrecisionSettings(
            recipe=recipe.precision.recipe,
            first_last_layers_bf16=recipe.precision.first_last_layers_bf16,
            amax_history=recipe.precision.amax_history,
        ),
        routing_replay=recipe.experts.routing_replay,
        freeze_router=recipe.experts.freeze_router,
        temperature=recipe.rollout.temperature,
        algorithm=AlgorithmSettings(
            updates_per_step=algorithm.updates_per_step,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            aggregation=algorithm.aggregation,
            kl_coefficient=algorithm.kl.coefficient,
            kl_estimator=algorithm.kl.estimator,
        ),
        contrastive=_contrastive_settings(recipe) if contrastive.enabled else None,
        optimizer=OptimizerSettings(
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            warmup_updates=optimizer.warmup_updates,
            cpu_offload=optimizer.cpu_offload,
        ),
        seed=recipe.run.seed,
        engine_fp8=FP8_OF_QUANTIZATION[recipe.rollout.quantization],
    )


def _contrastive_settings(recipe: Recipe) -> ContrastiveSettings:
    contrastive = recipe.contrastive
    return ContrastiveSettings(
        objective=Objective(
            loss=contrastive.loss,
            level=contrastive.level,
            similarity=contrastive.similarity,
            temperature=contrastive.temperature,
            masked_label=contrastive.masked_label,
            skip_trivial=contrastive.skip_trivial,
            numerics=contrastive.numerics,
            positive=contrastive.positive,
            denominator=contrastive.denominator,
        ),
        head=contrastive.head,
        head_size=contrastive.head_size,
        head_learning_rate=contrastive.head_learning_rate,
        head_weight_decay=contrastive.head_weight_decay,
        head_frozen=contrastive.head_frozen,
        pool=contrastive.pool,
        policy_gradient_weight=contrastive.policy_gradient_weight,
    )


def engine_settings(recipe: Recipe, *, device: Device) -> EngineSettings:
    """The rollout side of a recipe."""
    rollout = recipe.rollout
    has_experts = read_architecture(Path(recipe.model.path)).experts is not None
    return EngineSettings(
        model_path=str(Path(recipe.model.path).resolve()),
        dtype=recipe.model.dtype,
        device=device,
        tp=rollout.tp,
        max_model_len=recipe.data.max_prompt_tokens + rollout.max_response_tokens,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_mib=rollout.kv_cache_mib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        prefix_caching=rollout.prefix_caching,
        seed=recipe.run.seed,
        sleeps=rollout.colocate,
        quantization=rollout.quantization,
        return_routed_experts=recipe.experts.routing_replay and has_experts,
    )


def sync_settings(recipe: Recipe, *, device: Device, gpus: Placement) -> SyncSettings:
    """How a recipe's weights come from the trainer to the engines."""
    return SyncSettings(
        transport=recipe.sync.transport,
        verify=recipe.sync.verify,
        timeout_s=recipe.sync.timeout_s,
        bucket_bytes=recipe.sync.bucket_mib << 20,
        model_path=Path(recipe.model.path).resolve(),
        dtype=recipe.model.dtype,
        trainer=parallel_layout(recipe),
        engines=EngineLayout(engines=recipe.rollout.engines, tp=recipe.rollout.tp),
        fp8=FP8_OF_QUANTIZATION[recipe.rollout.quantization],
        device=device,
        gpus=gpus,
    )
