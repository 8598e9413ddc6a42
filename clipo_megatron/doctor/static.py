"""Level static: what a recipe and the files it names tell on a login node, in seconds. Loads without torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.checkpoint.manifest import list_checkpoints, read_manifest
from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.checks.memory import GIB, estimate_memory
from clipo_megatron.checks.preflight import (
    existing_folder,
    expert_problems,
    folder_problems,
    folder_use_problems,
    layout_faults,
    length_problems,
    precision_problems,
    tensorboard_problems,
)
from clipo_megatron.doctor.finding import Finding, fail, of_problems, ok, skip, warn
from clipo_megatron.doctor.static_data import check_data
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.weights.architecture import CONFIG_FILE, Architecture, read_architecture, read_json_object
from clipo_megatron.weights.counts import parameter_count

_MEMORY_WARN = 0.9
_DIST_METADATA = ".metadata"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticCase:
    """What the static checks look at."""

    recipe: Recipe
    gpu_gib: float = 80.0
    """Memory of one GPU, in GiB."""


def run_static(case: StaticCase) -> list[Finding]:
    """All static checks, in the order of `STATIC_CHECKS`."""
    return [finding for check in STATIC_CHECKS for finding in check(case)]


def check_model(case: StaticCase) -> list[Finding]:
    """Model folder: config, headers of all weights, tokenizer, and the layouts of trainer and engines against them."""
    recipe = case.recipe
    problems = [
        *folder_problems(recipe),
        *expert_problems(recipe),
        *precision_problems(recipe),
        *length_problems(recipe),
    ]
    name = "model folder"
    architecture = _architecture(recipe)
    if architecture is None:
        return of_problems(name, problems, otherwise="")
    billions = parameter_count(architecture) / 1e9
    said = f"{recipe.model.path}: {architecture.family}, {billions:.3g} G parameters"
    return of_problems(name, problems, otherwise=said)


def check_chat_template(case: StaticCase) -> list[Finding]:
    """The prompts are rendered by the model folder's chat template; base models come without one."""
    name, folder = "chat template", Path(case.recipe.model.path)
    if not folder.is_dir():
        return [skip(name, f"{folder}: no such folder")]
    if any((folder / file).is_file() for file in _TEMPLATE_FILES):
        return [ok(name, "in a file of its own")]
    config = folder / "tokenizer_config.json"
    try:
        if config.is_file() and read_json_object(config).get("chat_template"):
            return [ok(name, "in tokenizer_config.json")]
    except ConfigError as error:
        return of_problems(name, error.problems, otherwise="")
    return [fail(name, f"model.path = {folder}: the tokenizer has no chat template", "put a chat_template.jinja there")]


def check_start_weights(case: StaticCase) -> list[Finding]:
    """`model.weights` names a folder with a distributed checkpoint; its content is checked when the run starts."""
    name, weights = "start weights", case.recipe.model.weights
    if not weights:
        return [ok(name, "those of model.path")]
    if not (Path(weights) / _DIST_METADATA).is_file():
        return [
            fail(
                name,
                f"model.weights = {weights}: no distributed checkpoint there",
                "give a folder made by `clipo ckpt import`, or the step folder of a checkpoint",
            )
        ]
    return [ok(name, weights)]


def check_gpu_memory(case: StaticCase) -> list[Finding]:
    """The estimate of `clipo plan memory` against the GPU's memory."""
    name, recipe = "GPU memory", case.recipe
    if recipe.run.device == "cpu":
        return [skip(name, "run.device = cpu")]
    architecture = _architecture(recipe)
    if architecture is None or layout_faults(recipe, architecture):
        return [skip(name, "no model folder, or one that the layout does not fit")]
    estimate = estimate_memory(recipe, architecture)
    stage = estimate.worst_stage
    share = estimate.stages[stage].total / (case.gpu_gib * GIB)
    cause = (
        f"estimated {estimate.stages[stage].total / GIB:.1f} GiB a trainer rank of stage {stage}, {share:.0%} of "
        f"{case.gpu_gib:g} GiB"
    )
    remedy = "lower layout.micro_batch_tokens, recompute more, or raise tp, pp or ep; see `clipo plan memory`"
    if share > 1:
        return [fail(name, cause, remedy)]
    kept = max(stage.while_engines_generate for stage in estimate.stages) / GIB
    engine = recipe.rollout.gpu_memory_utilization * case.gpu_gib
    if recipe.rollout.colocate and kept + engine > case.gpu_gib:
        cause = (
            f"while engines generate: trainer {kept:.1f} GiB, engine {engine:.1f} GiB "
            f"(rollout.gpu_memory_utilization = {recipe.rollout.gpu_memory_utilization:g}) of {case.gpu_gib:g} GiB"
        )
        return [fail(name, cause, "lower rollout.gpu_memory_utilization, or share the weights out more")]
    return [warn(name, cause, remedy) if share > _MEMORY_WARN else ok(name, cause)]


def check_disk(case: StaticCase) -> list[Finding]:
    """Room for all checkpoints that the run keeps, one that is being written, and the export."""
    name, recipe = "disk", case.recipe
    architecture = _architecture(recipe)
    if architecture is None:
        return [skip(name, "no model folder that tells sizes")]
    element = 2 if recipe.model.dtype == "bfloat16" else 4
    count = parameter_count(architecture)
    of_checkpoint = count * (element + 8 + (4 if element == 2 else 0))
    keeps = recipe.checkpoint.keep + recipe.checkpoint.keep_best + 1
    if recipe.checkpoint.keep_every:
        keeps += recipe.run.steps // recipe.checkpoint.keep_every
    exports = 1 + (recipe.run.steps // recipe.checkpoint.hf_every if recipe.checkpoint.hf_every else 0)
    num_kept = keeps if recipe.checkpoint.every else 0
    kept = list_checkpoints(_run_folder(recipe) / "checkpoints")
    needed = max(0, num_kept - len(kept)) * of_checkpoint + exports * count * element
    there = existing_folder(_run_folder(recipe))
    free = shutil.disk_usage(there).free
    cause = (
        f"run.folder = {recipe.run.folder}: {size_text(free)} free, about {size_text(needed)} needed ({num_kept} "
        f"checkpoints of {size_text(of_checkpoint)}, {exports} exports of {size_text(count * element)})"
    )
    if free < of_checkpoint + count * element:
        return [fail(name, cause, "free space, or choose another run.folder")]
    if free < needed:
        return [warn(name, cause, "free space, or lower checkpoint.keep or keep_best")]
    return [ok(name, cause)]


def check_run_folder(case: StaticCase) -> list[Finding]:
    """The run folder can be written to, and is new or belongs to this run."""
    name, recipe = "run folder", case.recipe
    folder = _run_folder(recipe)
    state = "there already" if folder.is_dir() and any(folder.iterdir()) else "new"
    return of_problems(name, folder_use_problems(recipe), otherwise=f"{folder}: {state}")


def check_resume(case: StaticCase) -> list[Finding]:
    """The newest checkpoint's manifest: whole, of this recipe, not past the end. Its content is checked at the start."""
    name, recipe = "resume", case.recipe
    checkpoints = list_checkpoints(_run_folder(recipe) / "checkpoints")
    if not checkpoints:
        return [ok(name, "no checkpoint: the run begins at step 0")]
    try:
        manifest = read_manifest(checkpoints[-1])
    except CheckpointError as error:
        return [fail(name, str(error), "restore the files, remove that folder, or choose another run.name")]
    if manifest.fingerprint != recipe.fingerprint and "recipe" not in recipe.run.accept:
        return [
            fail(
                name,
                f"run.name = {recipe.run.name}: {checkpoints[-1]} is of another recipe ({manifest.fingerprint}, not "
                f"{recipe.fingerprint})",
                "undo the change, choose another run.name, or set run.accept=[recipe]; `clipo train --check` names the keys",
            )
        ]
    if manifest.progress.step > recipe.run.steps:
        cause = f"run.steps = {recipe.run.steps}: {checkpoints[-1]} is further than that"
        return [fail(name, cause, "raise run.steps, or choose another run.name")]
    return [ok(name, f"goes on from {checkpoints[-1]}")]


def check_tensorboard(case: StaticCase) -> list[Finding]:
    """`run.tensorboard` needs its package."""
    return of_problems("tensorboard", tensorboard_problems(case.recipe), otherwise="not asked for, or installed")


def _data(case: StaticCase) -> list[Finding]:
    return check_data(case.recipe)


STATIC_CHECKS: Sequence[Callable[[StaticCase], list[Finding]]] = (
    check_model,
    check_chat_template,
    check_start_weights,
    _data,
    check_gpu_memory,
    check_disk,
    check_run_folder,
    check_resume,
    check_tensorboard,
)


def _architecture(recipe: Recipe) -> Architecture | None:
    """None where config.json is missing or has faults: those are told with the model folder's."""
    if not (Path(recipe.model.path) / CONFIG_FILE).is_file():
        return None
    try:
        return read_architecture(Path(recipe.model.path))
    except ConfigError:
        return None


def _run_folder(recipe: Recipe) -> Path:
    return Path(recipe.run.folder) / recipe.run.name
