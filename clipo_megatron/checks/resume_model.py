"""A checkpoint's model against that of the recipe that would go on from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clipo_megatron.checkpoint.companions import compare_companions
from clipo_megatron.checkpoint.conversion_record import CONFIG_FOLDER, RECORD_FILE
from clipo_megatron.checkpoint.manifest import MANIFEST
from clipo_megatron.checkpoint.training import POLICY_FILE, REFERENCE_HASH, policy_identity
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.weights.architecture import CONFIG_FILE, read_architecture
from clipo_megatron.weights.fingerprint import weights_fingerprint


def unfit_state(recipe: Recipe, checkpoint: Path) -> list[str]:
    """Why a checkpoint's state can't go on under a recipe, whatever run.accept says: another model, dtype or head.

    Empty where the model folder is at fault, or the checkpoint tells no identity: both are told elsewhere.

    Raises:
        CheckpointError: its policy.json can't be read.
    """
    try:
        architecture = read_architecture(Path(recipe.model.path))
    except ConfigError:
        return []
    found = _policy_value(checkpoint, "identity")
    if not isinstance(found, dict):
        return []
    contrastive = recipe.contrastive
    wanted = policy_identity(
        architecture,
        dtype=recipe.model.dtype,
        head=(contrastive.head, contrastive.head_size) if contrastive.enabled else None,
    )
    return [
        f"run.name = {recipe.run.name}: {checkpoint} has another {difference}; its state fits no other, run.accept does not "
        "help: undo the change, or start another run.name from the exported Hugging Face folder"
        for difference in _differences(found, wanted)
    ]


def tokenizer_faults(recipe: Recipe, checkpoint: Path) -> list[str]:
    """How the tokenizer or chat template that a checkpoint keeps differs from that of the recipe's model.

    Raises:
        ConfigError: a file is not JSON.
    """
    kept, own = checkpoint / CONFIG_FOLDER, Path(recipe.model.path)
    if not ((kept / CONFIG_FILE).exists() and (own / CONFIG_FILE).exists()):
        return []
    return list(compare_companions(kept, own).faults)


def reference_hash(recipe: Recipe) -> str:
    """Fingerprint of the weights that the KL loss refers to; empty without one, or where model.weights has no checksums.

    Raises:
        ConfigError: the model folder is damaged.
        OSError: a file can't be read.
    """
    if recipe.algorithm.kl.coefficient == 0:
        return ""
    if not recipe.model.weights:
        return weights_fingerprint(Path(recipe.model.path))
    # Both hold the checksums of all files beside them.
    for name in (MANIFEST, RECORD_FILE):
        if (path := Path(recipe.model.weights) / name).is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""


def other_reference(recipe: Recipe, checkpoint: Path) -> str:
    """In words, that a checkpoint's KL loss referred to other weights; empty where it did not, or either tells none.

    Raises:
        CheckpointError: the checkpoint's policy.json can't be read.
    """
    before = _policy_value(checkpoint, REFERENCE_HASH)
    try:
        after = reference_hash(recipe) if before else ""
    except (ConfigError, OSError):
        return ""  # the model folder's faults are told elsewhere
    if not after or before == after:
        return ""
    place = f"model.weights = {recipe.model.weights}" if recipe.model.weights else f"model.path = {recipe.model.path}"
    return f"was trained with other weights in {place}, which the KL loss refers to (fingerprint {str(before)[:12]} -> {after[:12]})"


def _policy_value(checkpoint: Path, key: str) -> object:
    path = checkpoint / POLICY_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: can't be read ({error!r}); take another checkpoint") from error


def _differences(found: dict[str, object], wanted: dict[str, object], prefix: str = "") -> list[str]:
    """`key (value there -> value here)` of all keys, those of nested objects by their own names."""
    told: list[str] = []
    for key in sorted({*found, *wanted}):
        there, here = found.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            told += _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            told.append(f"{prefix}{key} ({there!r} -> {here!r})")
    return told
