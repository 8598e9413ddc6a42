"""Rules between the keys of a recipe. Each yields every fault it finds; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.recipe.layout_rules import layout_problems
from clipo_megatron.recipe.recipe import Recipe
from clipo_megatron.recipe.sections import PrecisionSection


def recipe_problems(recipe: Recipe) -> list[str]:
    """All faults between keys: the keys, the values found, the rule, what to do. Empty when the recipe can run."""
    return layout_problems(recipe) + [problem for rule in _RULES for problem in rule(recipe)]


def _batch(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    if algorithm.group_size == 1:
        yield (
            f"algorithm.group_size = 1: advantage '{algorithm.advantage}' compares a rollout with the others of its "
            "prompt's group, so it needs at least 2"
        )
    if recipe.contrastive.enabled and algorithm.group_size < 3:
        yield (
            f"algorithm.group_size = {algorithm.group_size}: an anchor needs another right rollout and a wrong one in "
            "its group, so contrastive.enabled needs at least 3; raise it or set contrastive.enabled=false"
        )
    if algorithm.prompts_per_step % algorithm.updates_per_step:
        yield (
            f"algorithm.prompts_per_step = {algorithm.prompts_per_step}: must be a multiple of "
            f"algorithm.updates_per_step = {algorithm.updates_per_step}, so that each update has as many prompts"
        )


def _contrastive(recipe: Recipe) -> Iterator[str]:
    section = recipe.contrastive
    if not section.enabled:
        return
    if not section.skip_trivial and section.numerics == "exact":
        yield (
            "contrastive.skip_trivial = false: a row without a positive has no exact loss (the published formula's value "
            "is log(1e-8)); set it to true, or contrastive.numerics=reference to reproduce the published code"
        )
    if section.loss != "infonce":
        for key, default in (("positive", "sampled"), ("denominator", "all_but_self")):
            if getattr(section, key) != default:
                yield f"contrastive.{key} = {getattr(section, key)}: has an effect only with loss=infonce, found {section.loss}"
    if section.positive == "mean" and section.denominator != "all_but_self":
        yield (
            f"contrastive.denominator = {section.denominator}: needs a sampled positive; set contrastive.positive=sampled"
        )
    if section.constant_reward < section.reward_floor:
        yield (
            f"contrastive.constant_reward = {section.constant_reward}: below contrastive.reward_floor = "
            f"{section.reward_floor}, so every row would get the floor"
        )
    if section.warmup_steps >= recipe.run.steps:
        yield (
            f"contrastive.warmup_steps = {section.warmup_steps}: the policy would never learn in run.steps = "
            f"{recipe.run.steps} steps"
        )


def _frozen_head(recipe: Recipe) -> Iterator[str]:
    section = recipe.contrastive
    if not (section.enabled and section.head_frozen):
        return
    if section.head_learning_rate != type(section).model_fields["head_learning_rate"].default:
        yield (
            f"contrastive.head_learning_rate = {section.head_learning_rate}: has no effect on a frozen head; remove it, or "
            "set contrastive.head_frozen=false"
        )
    if section.warmup_steps:
        yield f"contrastive.warmup_steps = {section.warmup_steps}: a frozen head learns nothing in them; set it to 0"


def _contrastive_gradient(recipe: Recipe) -> Iterator[str]:
    section, updates = recipe.contrastive, recipe.algorithm.updates_per_step
    weight = section.policy_gradient_weight
    if not section.enabled:
        if section.gradient == "policy" or weight:
            yield (
                f"contrastive.gradient = {section.gradient}, contrastive.policy_gradient_weight = {weight}: have no effect "
                "with contrastive.enabled = false; remove them, or set it to true"
            )
        return
    if section.gradient == "head_only":
        if weight:
            yield (
                f"contrastive.policy_gradient_weight = {weight}: has an effect only with gradient=policy, found head_only; "
                "set it to 0"
            )
        return
    if weight == 0:
        yield (
            "contrastive.policy_gradient_weight = 0.0: with contrastive.gradient = policy nothing would reach the policy; "
            "set it above 0, or contrastive.gradient=head_only"
        )
    if updates > 1:
        yield (
            f"algorithm.updates_per_step = {updates}: with contrastive.gradient = policy the loss compares the rows of the "
            "whole step, so the step is one update; set it to 1, or contrastive.gradient=head_only"
        )


def _precision(recipe: Recipe) -> Iterator[str]:
    section, device = recipe.precision, recipe.run.device
    if section.recipe == "delayed" and section.first_last_layers_bf16:
        yield (
            "precision.first_last_layers_bf16 = true: Megatron refuses it with precision.recipe = delayed, whose maxima are "
            "reduced once for all layers; set it to false, or choose tensorwise or blockwise"
        )
    if section.recipe == "none" and section.first_last_layers_bf16:
        yield (
            "precision.first_last_layers_bf16 = true: has an effect only with FP8, found precision.recipe = none; set it to "
            "false or choose a recipe"
        )
    if section.recipe != "delayed" and section.amax_history != PrecisionSection().amax_history:
        yield (
            f"precision.amax_history = {section.amax_history}: has an effect only with precision.recipe = delayed, found "
            f"{section.recipe}; leave it out"
        )
    if recipe.model.dtype == "float32" and device == "cuda":
        # Transformer Engine has flash and fused kernels for packed sequences, and none of them takes 32 bits.
        yield (
            "model.dtype = float32: there is no attention kernel for packed sequences in float32 on a GPU; set it to "
            "bfloat16, or run.device=cpu"
        )
    if recipe.model.dtype == "float32" and device == "auto" and section.recipe != "none":
        yield (
            f"model.dtype = float32: precision.recipe = {section.recipe} replaces bfloat16 products on a GPU, and run.device "
            "= auto may find one; set it to bfloat16, or run.device=cpu to emulate FP8"
        )


def _offload(recipe: Recipe) -> Iterator[str]:
    if not recipe.optimizer.cpu_offload:
        return
    if recipe.run.device == "cpu":
        yield "optimizer.cpu_offload = true: has an effect only on a GPU, found run.device = cpu; set it to false"
    if not recipe.layout.distributed_optimizer:
        # Only the distributed optimizer hands its float32 masters to Megatron's hybrid optimizer.
        yield (
            "optimizer.cpu_offload = true: needs the distributed optimizer, found layout.distributed_optimizer = false; set "
            "that to true or cpu_offload to false"
        )


def _gate(recipe: Recipe) -> Iterator[str]:
    run = recipe.run
    if run.gate_mean_logprob_difference > run.gate_max_logprob_difference:
        yield (
            f"run.gate_mean_logprob_difference = {run.gate_mean_logprob_difference}: above "
            f"run.gate_max_logprob_difference = {run.gate_max_logprob_difference}, so it could never trip"
        )


def _retention(recipe: Recipe) -> Iterator[str]:
    checkpoint, evaluation = recipe.checkpoint, recipe.evaluation
    if checkpoint.keep_every and (not checkpoint.every or checkpoint.keep_every % checkpoint.every):
        yield (
            f"checkpoint.keep_every = {checkpoint.keep_every}: must be a multiple of checkpoint.every = {checkpoint.every}, "
            "above 0, for only its steps have a checkpoint"
        )
    if not checkpoint.keep_best:
        return
    if not recipe.data.evaluation or not evaluation.every or not checkpoint.every:
        yield (
            f"checkpoint.keep_best = {checkpoint.keep_best}: needs steps with an evaluation and a checkpoint, found "
            f"data.evaluation of {len(recipe.data.evaluation)} files, evaluation.every = {evaluation.every}, "
            f"checkpoint.every = {checkpoint.every}; set all three, or keep_best to 0"
        )
    elif checkpoint.every % evaluation.every and evaluation.every % checkpoint.every:
        yield (
            f"checkpoint.keep_best = {checkpoint.keep_best}: compares the steps that have an evaluation and a checkpoint, so "
            f"one of evaluation.every = {evaluation.every} and checkpoint.every = {checkpoint.every} must be a multiple of "
            "the other"
        )


def _colocation(recipe: Recipe) -> Iterator[str]:
    rollout, ranks = recipe.rollout, recipe.layout.world_size
    if rollout.colocate and rollout.engines * rollout.tp > ranks:
        yield (
            f"rollout.colocate = true: rollout.engines * rollout.tp = {rollout.engines * rollout.tp} engine ranks share the GPUs "
            f"of layout.world_size = {ranks} trainer ranks, one a GPU; take fewer or smaller engines, or more ranks"
        )


def _quantization(recipe: Recipe) -> Iterator[str]:
    quantization, dtype = recipe.rollout.quantization, recipe.model.dtype
    if quantization != "none" and dtype != "bfloat16":
        yield (
            f"rollout.quantization = {quantization}: vLLM quantises 16-bit weights only, found model.dtype = {dtype}; set that to "
            "bfloat16, or leave quantization out"
        )


_OTHER_DEVICE = {("shm", "cuda"): "ipc", ("gloo", "cuda"): "nccl", ("ipc", "cpu"): "shm", ("nccl", "cpu"): "gloo"}


def _sync(recipe: Recipe) -> Iterator[str]:
    section, device = recipe.sync, recipe.run.device
    if section.transport == "stream" and section.verify != "first":
        yield (
            f"sync.verify = {section.verify}: has an effect only on planned copies, found sync.transport = stream, whose "
            "buckets always have checksums; leave it out"
        )
    other = _OTHER_DEVICE.get((section.transport, device))
    if other is not None:
        yield f"sync.transport = {section.transport}: not on run.device = {device}; set it to {other}, auto or stream"
    if section.transport == "nccl" and recipe.rollout.colocate:
        yield (
            "sync.transport = nccl: NCCL does not connect two processes on one GPU, found rollout.colocate = true; set it to "
            "ipc, auto or stream"
        )


def _accepted(recipe: Recipe) -> Iterator[str]:
    run = recipe.run
    if run.accept and run.resume == "never":
        yield f"run.accept = {list(run.accept)}: has an effect only on a resume, found run.resume = never; leave one out"


_RULES = (
    _batch,
    _contrastive,
    _frozen_head,
    _contrastive_gradient,
    _precision,
    _offload,
    _gate,
    _retention,
    _colocation,
    _quantization,
    _sync,
    _accepted,
)
