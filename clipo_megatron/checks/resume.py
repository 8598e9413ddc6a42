"""A run's newest checkpoint against its recipe and data: what would change the run's numbers without a word.

Each such change is refused with its key and both values, unless run.accept names its kind. Another layout is no change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import yaml
from pydantic import ValidationError

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.manifest import list_checkpoints, read_manifest, read_whole
from clipo_megatron.checkpoint.training import POLICY_FILE, RECIPE_FILE
from clipo_megatron.checks.resume_model import other_reference, tokenizer_faults, unfit_state
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.recipe import run_defining_keys
from clipo_megatron.recipe.sections import LayoutSection

_OPTIMIZER_KEYS = "optimizer."


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One way in which a resumed run would not be the run of its checkpoint."""

    kind: Literal["recipe", "data", "reference", "no_optimizer"]
    """What run.accept has to name."""
    found: str
    """In words, with both values."""


def resume_problems(recipe: Recipe, *, data_hash: str = "") -> list[str]:
    """What speaks against going on from the newest checkpoint of the run's folder, if there is one.

    Args:
        recipe: of the run that would go on.
        data_hash: of its training prompts; empty: they are not known yet, and not compared.
    """
    for checkpoint in list_checkpoints(checkpoint_folder(recipe))[-1:]:
        try:
            changes = find_changes(recipe, checkpoint, data_hash=data_hash)
        except (CheckpointError, ConfigError) as error:
            return [_damage(checkpoint) or str(error)]
        if data_hash:
            changes = [change for change in changes if change.kind == "data"]
        return [
            *([] if data_hash else [*_past_the_end(recipe, checkpoint), *unfit_state(recipe, checkpoint)]),
            *(
                f"run.name = {recipe.run.name}: {checkpoint} {change.found}; going on would mix two runs. Undo the change, "
                f"choose another run.name, or accept it with run.accept=[{change.kind}]"
                for change in changes
                if change.kind not in recipe.run.accept
            ),
        ]
    return []


def _past_the_end(recipe: Recipe, checkpoint: Path) -> list[str]:
    """A run that is further than it shall go: its end would be exported as that of a shorter run."""
    step = read_manifest(checkpoint).progress.step
    if step <= recipe.run.steps:
        return []
    return [
        f"run.steps = {recipe.run.steps}: {checkpoint} is at step {step} already; set it to {step} or more, or choose another "
        "run.name"
    ]


def resume_notes(recipe: Recipe, checkpoint: Path, *, data_hash: str) -> list[str]:
    """What a user should know of a run that goes on from a checkpoint: accepted changes, another layout.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: its index is.
    """
    notes = [
        f"accepted: {checkpoint} {change.found}" for change in find_changes(recipe, checkpoint, data_hash=data_hash)
    ]
    if change := layout_change(recipe, checkpoint):
        step = read_manifest(checkpoint).progress.step
        notes.append(f"resuming step {step} of {change}")
    return notes


def find_changes(recipe: Recipe, checkpoint: Path, *, data_hash: str = "") -> list[Change]:
    """All changes between a checkpoint and what would go on from it, accepted or not.

    Args:
        recipe: of the run that would go on.
        checkpoint: a step folder.
        data_hash: of its training prompts; empty: they are not compared.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: its index is.
    """
    manifest = read_manifest(checkpoint)
    changes: list[Change] = []
    if manifest.fingerprint != recipe.fingerprint:
        keys = (
            "; ".join(changed_keys(_saved_recipe(checkpoint), recipe))
            or "no key in its recipe.yaml, but the fingerprint"
        )
        changes.append(Change(kind="recipe", found=f"was made by another recipe ({keys})"))
    if data_hash and manifest.data_hash != data_hash:
        hashes = f"hash {manifest.data_hash[:12]} -> {data_hash[:12]}"
        changes.append(Change(kind="data", found=f"was trained on other prompts than those of data.train ({hashes})"))
    changes += [
        Change(kind="data", found=f"was trained with another tokenizer or chat template ({fault})")
        for fault in tokenizer_faults(recipe, checkpoint)
    ]
    if fault := other_reference(recipe, checkpoint):
        changes.append(Change(kind="reference", found=fault))
    if not has_optimizer(checkpoint):
        changes.append(
            Change(kind="no_optimizer", found="has no optimizer state, so that AdamW's moments would begin at 0")
        )
    return changes


def changed_keys(saved: Mapping[str, Mapping[str, object]], recipe: Recipe) -> list[str]:
    """`section.key: saved -> asked` of all keys that make it another run."""
    before, after = run_defining_keys(saved), run_defining_keys(recipe.model_dump(mode="json"))
    return [
        f"{key}: {_word(before, key)} -> {_word(after, key)}"
        for key in sorted({*before, *after})
        if key not in before or key not in after or before[key] != after[key]
    ]


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds masters or moments, or was written before the first update.

    Raises:
        CheckpointError: its policy.json can't be read.
        ConfigError: its index can't be read.
    """
    with DistReader(checkpoint) as reader:
        if any(key.startswith(_OPTIMIZER_KEYS) for key in reader.keys()):  # noqa: SIM118  not a dict
            return True
    path = checkpoint / POLICY_FILE
    try:
        return json.loads(path.read_text())["updates"] == 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: can't be read ({error!r}); take another checkpoint") from error


def layout_change(recipe: Recipe, checkpoint: Path) -> str:
    """In words, how the layout differs from the one that wrote a checkpoint; empty when it does not."""
    try:
        before = LayoutSection.model_validate(_saved_recipe(checkpoint).get("layout", {})).degrees
    except ValidationError:
        before = "an unknown layout"
    after = recipe.layout.degrees
    return "" if before == after else f"{before or 'one rank'} under {after or 'one rank'}"


def checkpoint_folder(recipe: Recipe) -> Path:
    """Folder of a run's checkpoints."""
    return Path(recipe.run.folder) / recipe.run.name / "checkpoints"


def _saved_recipe(checkpoint: Path) -> Mapping[str, Mapping[str, object]]:
    """Sections of the recipe that a checkpoint keeps.

    Raises:
        CheckpointError: it can't be read.
    """
    path = checkpoint / RECIPE_FILE
    try:
        sections = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); take another checkpoint") from error
    if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
        raise CheckpointError(f"{path}: holds no sections of keys; take another checkpoint")
    return cast("Mapping[str, Mapping[str, object]]", sections)


def _damage(checkpoint: Path) -> str:
    """What a reading of all bytes finds, with the older checkpoint to go back to; empty when nothing."""
    try:
        read_whole(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def _word(values: Mapping[str, object], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
