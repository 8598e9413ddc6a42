"""Rules between the keys of a recipe. Each yields every fault it finds; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.recipe.recipe import Recipe


def recipe_problems(recipe: Recipe) -> list[str]:
    """All faults between keys: the keys, the values found, the rule, what to do. Empty when the recipe can run."""
    return [problem for rule in _RULES for problem in rule(recipe)]


def _layout(recipe: Recipe) -> Iterator[str]:
    layout = recipe.layout
    model_ranks = layout.tp * layout.pp
    if layout.world_size % model_ranks:
        yield (
            f"layout.world_size = {layout.world_size}: must be a multiple of tp * pp = {layout.tp} * {layout.pp} = "
            f"{model_ranks}; use {model_ranks * max(1, round(layout.world_size / model_ranks))}"
        )
    if layout.sequence_parallel and layout.micro_batch_tokens % layout.tp:
        yield (
            f"layout.micro_batch_tokens = {layout.micro_batch_tokens}: sequence parallelism splits it between "
            f"layout.tp = {layout.tp} ranks, so it must be a multiple of {layout.tp}"
        )
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    if longest > layout.micro_batch_tokens:
        yield (
            f"layout.micro_batch_tokens = {layout.micro_batch_tokens}: the longest sequence has "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens and must fit into one micro-batch"
        )
    elif layout.world_size > model_ranks and 2 * longest > layout.micro_batch_tokens:
        # Below this, sequences can't always be dealt as equally many micro-batches to the data parallel ranks.
        yield (
            f"layout.micro_batch_tokens = {layout.micro_batch_tokens}: with data parallel ranks a micro-batch must hold two "
            f"sequences of data.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens; use at least "
            f"{2 * longest}"
        )


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
    prompts_per_update = algorithm.prompts_per_step // algorithm.updates_per_step
    if recipe.layout.world_size % (recipe.layout.tp * recipe.layout.pp) == 0:
        sequences = prompts_per_update * algorithm.group_size
        if sequences < recipe.dp:
            yield (
                f"algorithm: one update has {sequences} sequences for {recipe.dp} data parallel ranks, and each needs "
                "at least one; raise prompts_per_step or group_size"
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
    if section.head_frozen and section.warmup_steps:
        yield f"contrastive.warmup_steps = {section.warmup_steps}: a frozen head learns nothing in them; set it to 0"


def _gate(recipe: Recipe) -> Iterator[str]:
    run = recipe.run
    if run.gate_mean_logprob_difference > run.gate_max_logprob_difference:
        yield (
            f"run.gate_mean_logprob_difference = {run.gate_mean_logprob_difference}: above "
            f"run.gate_max_logprob_difference = {run.gate_max_logprob_difference}, so it could never trip"
        )


_RULES = (_layout, _batch, _contrastive, _gate)
