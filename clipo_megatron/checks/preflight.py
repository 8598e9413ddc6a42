"""Everything about a recipe that files can tell before anything starts: model folder, data, run folder, device.

Loads without torch, which only distributed checkpoints and the device need.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from clipo_megatron.data.prompts import PromptSet
from clipo_megatron.data.rows import read_rows_problems
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.sections import ExpertsSection
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.folder_check import model_folder_problems
from clipo_megatron.weights.layout_check import layout_problems

_FP8_SIZE = 16


def file_problems(recipe: Recipe) -> list[str]:
    """All faults of the files and folders that a recipe names. Reads headers only; takes a second or two."""
    return [
        *model_problems(recipe),
        *precision_problems(recipe),
        *read_rows_problems([*recipe.data.train, *recipe.data.evaluation]),
        *length_problems(recipe),
        *run_folder_problems(recipe),
        *tensorboard_problems(recipe),
    ]


def model_problems(recipe: Recipe) -> list[str]:
    """Faults of the model folder under the recipe's layouts, of `model.weights`, and of the section on experts."""
    problems = folder_problems(recipe)
    if recipe.model.weights:
        from clipo_megatron.checks.start_weights import weights_problems  # loads torch

        problems += weights_problems(recipe.model.weights, Path(recipe.model.path))
    return problems + expert_problems(recipe)


def folder_problems(recipe: Recipe) -> list[str]:
    """Faults of the model folder under the recipe's layouts."""
    return model_folder_problems(
        Path(recipe.model.path),
        tp=recipe.layout.tp,
        pp=recipe.layout.pp,
        vpp=recipe.layout.vpp,
        ep=recipe.layout.ep,
        etp=recipe.layout.etp,
        rollout_tp=recipe.rollout.tp,
    )


def layout_faults(recipe: Recipe, architecture: Architecture) -> list[str]:
    """Faults of the recipe's layouts against a model that need not be on this machine."""
    layout = recipe.layout
    return layout_problems(
        architecture,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        ep=layout.ep,
        etp=layout.etp,
        rollout_tp=recipe.rollout.tp,
    )


def device_problems(recipe: Recipe) -> list[str]:
    """What the recipe asks of the device, against what this machine has."""
    import torch  # slow to import, and not needed by the other checks

    from clipo_megatron.policy.precision import hardware_problems

    device = recipe.run.device
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return list(_cpu_engine_problems(recipe))
    if not torch.cuda.is_available():
        return ["run.device = cuda: no CUDA device is visible here; set run.device=cpu or auto"]
    problems = hardware_problems(recipe.precision.recipe)
    if recipe.model.dtype == "float32":
        problems.append(
            "model.dtype = float32: on a GPU Transformer Engine's attention of packed sequences needs 16 bits; set it to "
            "bfloat16"
        )
    return problems


def _cpu_engine_problems(recipe: Recipe) -> Iterator[str]:
    quantization = recipe.rollout.quantization
    if quantization == "fp8_per_block":
        yield (
            f"rollout.quantization = {quantization}: on a CPU vLLM multiplies such blocks with AMX only, and that was never run; "
            "set it to fp8_per_tensor or none"
        )
    config = Path(recipe.model.path) / "config.json"
    if quantization != "none" and config.is_file() and read_architecture(config.parent).experts is not None:
        yield (
            f"rollout.quantization = {quantization}: on a CPU vLLM multiplies FP8 experts with AMX only, and that was never run; "
            "set it to none"
        )


def data_problems(train: PromptSet, recipe: Recipe) -> list[str]:
    """What is known only once the prompts are tokenised: none left, or a checkpoint of other data."""
    problems: list[str] = []
    if not len(train):
        problems.append(
            f"data.train: no prompt has at most data.max_prompt_tokens = {recipe.data.max_prompt_tokens} tokens "
            f"({train.num_overlong} are longer); raise it"
        )
    elif len(train) < recipe.algorithm.prompts_per_step:
        problems.append(
            f"algorithm.prompts_per_step = {recipe.algorithm.prompts_per_step}: data.train has {len(train)} prompts, and a "
            "step must not hold a prompt twice; lower it or add data"
        )
    return problems + _resume_problems(recipe, data_hash=train.hash)


def run_folder_problems(recipe: Recipe) -> list[str]:
    """A run folder that can't be written to, or holds what the run can't go on from."""
    return folder_use_problems(recipe) or _resume_problems(recipe)


def folder_use_problems(recipe: Recipe) -> list[str]:
    """A run folder that can't be written to, or that run.resume leaves alone. Reads no checkpoint."""
    folder = Path(recipe.run.folder) / recipe.run.name
    there = existing_folder(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return [f"run.folder = {recipe.run.folder}: {there} is no folder that can be written to; choose another one"]
    if recipe.run.resume == "never" and folder.is_dir() and any(folder.iterdir()):
        return [f"run.name = {recipe.run.name}: {folder} is not empty and run.resume = never; choose another run.name"]
    return []


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _resume_problems(recipe: Recipe, *, data_hash: str = "") -> list[str]:
    from clipo_megatron.checks.resume import resume_problems  # loads torch

    return resume_problems(recipe, data_hash=data_hash)


def expert_problems(recipe: Recipe) -> list[str]:
    """Keys against the kind of model: with a mixture of experts or without."""
    try:
        has_experts = read_architecture(Path(recipe.model.path)).experts is not None
    except ConfigError:
        return []  # told with the model folder's faults
    if not has_experts:
        return [
            f"experts.{key} = {str(value).lower()}: has an effect on mixture-of-experts models only, and this one is dense; remove it"
            for key, value in recipe.experts.model_dump().items()
            if value != getattr(ExpertsSection(), key)
        ]
    layout, problems = recipe.layout, []
    if layout.tp > 1 and not layout.sequence_parallel:
        problems.append(
            f"layout.sequence_parallel = false: with layout.tp = {layout.tp} Megatron refuses to train experts on tokens "
            "that are not split; set it to true"
        )
    if recipe.experts.routing_replay and not recipe.rollout.prefix_caching and recipe.run.device != "cpu":
        problems.append(
            "rollout.prefix_caching = false: on a GPU vLLM returns the experts of each token through its prefix cache; set "
            "it to true, or experts.routing_replay=false"
        )
    return problems


def precision_problems(recipe: Recipe) -> list[str]:
    """FP8 products need sizes that are multiples of 16 on each rank."""
    if recipe.precision.recipe == "none":
        return []
    try:
        architecture = read_architecture(Path(recipe.model.path))
    except ConfigError:
        return []  # told with the model folder's faults
    tp, experts = recipe.layout.tp, architecture.experts
    query_key_value = (architecture.num_heads + 2 * architecture.num_kv_heads) * architecture.head_dim
    sizes = {
        "hidden_size": (architecture.hidden_size, 1),
        "query, key and value heads' size": (query_key_value, tp),
        "num_attention_heads * head_dim": (architecture.num_heads * architecture.head_dim, tp),
    }
    if experts is None:
        sizes["intermediate_size"] = (architecture.ffn_size, tp)
    else:
        sizes[FAMILIES[architecture.family].expert_keys.ffn_size] = (experts.ffn_size, recipe.layout.etp)
    return [
        f"precision.recipe = {recipe.precision.recipe}: the model's {name} = {size}, split between {degree} ranks, must be a "
        "multiple of 16 on each; choose another degree or precision.recipe=none"
        for name, (size, degree) in sizes.items()
        if size % degree or size // degree % _FP8_SIZE
    ]


def length_problems(recipe: Recipe) -> list[str]:
    """A longest sequence that is longer than the model's positions."""
    try:
        positions = read_architecture(Path(recipe.model.path)).max_positions
    except ConfigError:
        return []  # told with the model folder's faults
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    if longest <= positions:
        return []
    return [
        f"rollout.max_response_tokens = {recipe.rollout.max_response_tokens}: with data.max_prompt_tokens = "
        f"{recipe.data.max_prompt_tokens} a sequence has up to {longest} tokens, and the model has {positions} positions "
        "(max_position_embeddings); lower one of them"
    ]


def tensorboard_problems(recipe: Recipe) -> list[str]:
    """`run.tensorboard` without the package."""
    if recipe.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        return ["run.tensorboard = true: the package tensorboard is not installed; install it or set it to false"]
    return []
