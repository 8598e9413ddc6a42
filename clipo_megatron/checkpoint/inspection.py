"""What a folder holds, from headers and manifests alone: a model folder, a checkpoint, or a run with both.

The result is JSON types, for people and scripts. Contents are not read: `clipo ckpt verify` does that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from clipo_megatron.checkpoint.conversion_record import RECORD_FILE, file_faults, read_record
from clipo_megatron.checkpoint.dist_index import METADATA
from clipo_megatron.checkpoint.dist_model import is_model_key
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.manifest import MANIFEST, list_checkpoints
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.architecture import CONFIG_FILE, read_architecture, read_json_object
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.hf_folder import HFReader

Described = dict[str, object]

_RECIPE = "recipe.yaml"
_CHECKPOINTS, _EXPORTS = "checkpoints", "hf"
_POLICY = "policy.json"
_OPTIMIZER = "optimizer."
# Names under which folders are written, before they are renamed.
_UNFINISHED = re.compile(r"\.step_\d{8}\.tmp|.+\.partial|.+\.old")


def inspect_folder(folder: Path) -> Described:
    """Describe a folder.

    Args:
        folder: a Hugging Face model folder, a distributed checkpoint (an imported model, Megatron's own, or a training
            checkpoint's step folder), or a run's folder.

    Returns:
        JSON types; `kind` is "model folder", "imported model", "distributed checkpoint", "training checkpoint" or "run".

    Raises:
        ConfigError: none of these, or damaged so that its headers or its manifest can't be read; all faults.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; give a model folder, a checkpoint's step folder or a run's folder"
        )
    if (folder / MANIFEST).exists():
        return _describe_checkpoint(folder)
    if (folder / METADATA).exists():
        return _describe_imported(folder) if (folder / RECORD_FILE).exists() else _describe_dist(folder)
    if (folder / CONFIG_FILE).exists():
        return _describe_model(folder)
    if (folder / _RECIPE).exists() or (folder / _CHECKPOINTS).is_dir():
        return _describe_run(folder)
    raise ConfigError(
        f"{folder}: holds none of {CONFIG_FILE} (model folder), {METADATA} (distributed checkpoint), {MANIFEST} "
        f"(training checkpoint), {_RECIPE} (run); give one of these folders"
    )


def _describe_model(folder: Path) -> Described:
    problems: list[str] = []
    architecture = None
    try:
        architecture = read_architecture(folder)
    except ConfigError as error:
        problems += error.problems
    bytes_of_file: dict[str, int] = {}
    bytes_of_dtype: dict[str, int] = {}
    try:
        with HFReader(folder) as reader:
            names = reader.names()
            for name in names:
                path, stored = reader.stored(name)
                bytes_of_file[path.name] = path.stat().st_size
                bytes_of_dtype[stored.dtype] = bytes_of_dtype.get(stored.dtype, 0) + stored.num_bytes
    except ConfigError as error:
        problems += error.problems
        names = []
    if problems or architecture is None:
        raise ConfigError(problems)
    experts = architecture.experts
    return {
        "kind": "model folder",
        "family": architecture.family,
        "parameters": parameter_count(architecture),
        "tensors": len(names),
        "tensor_bytes_by_dtype": dict(sorted(bytes_of_dtype.items())),
        "bytes": sum(bytes_of_file.values()),
        "files": dict(sorted(bytes_of_file.items())),
        "layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "vocab_size": architecture.vocab_size,
        "tied": architecture.tied,
        "experts": 0 if experts is None else experts.num_experts,
        "experts_per_token": 0 if experts is None else experts.experts_per_token,
    }


def _describe_checkpoint(folder: Path) -> Described:
    manifest = read_json_object(folder / MANIFEST)
    where = f"{folder / MANIFEST}"
    progress = _object(manifest, "progress", where)
    sizes = _object(manifest, "files", where)
    described: Described = {
        "kind": "training checkpoint",
        "step": _value(progress, "step", where),
        "weights_version": _value(progress, "version", where),
        "prompts_taken": _value(progress, "prompts_taken", where),
        "recipe_fingerprint": _value(manifest, "fingerprint", where),
        "data_hash": _value(manifest, "data_hash", where),
        "sound": _value(manifest, "sound", where),
        "accuracy": _value(manifest, "accuracy", where),
        "versions": _value(manifest, "versions", where),
    }
    if faults := _size_faults(folder, sizes):
        raise ConfigError(faults)
    if _POLICY in sizes:
        described |= _describe_policy(folder / _POLICY)
    if METADATA in sizes:
        described |= _describe_tensors(folder)
    return described | {"bytes": sum(cast("int", size) for size in sizes.values()), "files": sizes}


def _describe_policy(path: Path) -> Described:
    """What the trainer says of the policy beside its tensors."""
    policy = read_json_object(path)
    identity = _object(policy, "identity", f"{path}")
    architecture = _object(identity, "architecture", f"{path}: identity")
    return {
        "layout": _object(policy, "layout", f"{path}"),
        "dtype": _value(identity, "dtype", f"{path}: identity"),
        "family": _value(architecture, "family", f"{path}: identity.architecture"),
        "layers": _value(architecture, "num_layers", f"{path}: identity.architecture"),
    }


def _describe_imported(folder: Path) -> Described:
    try:
        record = read_record(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if faults := file_faults(folder, record.files):
        raise ConfigError([f"{folder / name}: {fault}; import the model again" for name, fault in faults.items()])
    return {
        "kind": record.kind,
        "source": record.source,
        "layout": record.layout,
        "dtype": record.dtype,
        **record.architecture,
        "versions": record.versions,
        **_describe_tensors(folder),
        "bytes": sum(record.files.values()),
        "files": record.files,
    }


def _describe_dist(folder: Path) -> Described:
    """A checkpoint without a manifest: Megatron's own."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    described = {"kind": "distributed checkpoint", **_describe_tensors(folder)}
    return described | {"bytes": sum(sizes.values()), "files": sizes}


def _describe_tensors(folder: Path) -> Described:
    """What the index of a distributed checkpoint says."""
    bytes_of_dtype: dict[str, int] = {}
    try:
        with DistReader(folder) as reader:
            keys = reader.keys()
            for key in keys:
                dtype = reader.dtype(key)
                num_bytes = math.prod(reader.shape(key)) * getattr(torch, dtype).itemsize
                bytes_of_dtype[dtype] = bytes_of_dtype.get(dtype, 0) + num_bytes
            return {
                "keys": len(keys),
                "chunks": sum(len(reader.chunks(key)) for key in keys),
                "has_optimizer": any(key.startswith(_OPTIMIZER) for key in keys),
                "stored_parameters": sum(math.prod(reader.shape(key)) for key in keys if is_model_key(key)),
                "tensor_bytes_by_dtype": dict(sorted(bytes_of_dtype.items())),
            }
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _describe_run(folder: Path) -> Described:
    exports = folder / _EXPORTS
    unfinished = [
        path.relative_to(folder).as_posix()
        for parent in (folder / _CHECKPOINTS, exports)
        for path in _folders(parent)
        if _UNFINISHED.fullmatch(path.name)
    ]
    return {
        "kind": "run",
        "name": folder.resolve().name,
        "recipe": (folder / _RECIPE).exists(),
        "checkpoints": {path.name: _in_short(path) for path in list_checkpoints(folder / _CHECKPOINTS)},
        "exports": {path.name: _in_short(path) for path in _folders(exports) if not _UNFINISHED.fullmatch(path.name)},
        "unfinished": unfinished,
    }


def _in_short(folder: Path) -> Described:
    """A run's checkpoint or export without its lists of files. A damaged one does not hide the others."""
    try:
        return {key: value for key, value in inspect_folder(folder).items() if key not in ("kind", "files")}
    except ConfigError as error:
        return {"damaged": list(error.problems)}


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _size_faults(folder: Path, sizes: Mapping[str, object]) -> list[str]:
    faults: list[str] = []
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            faults.append(f"{file}: no such file, {MANIFEST} says {size} bytes; copy the folder again")
        elif found != size:
            faults.append(f"{file}: has {found} bytes, {MANIFEST} says {size}; copy the folder again")
    return faults


def _value(values: Mapping[str, object], key: str, where: str) -> object:
    if key not in values:
        raise ConfigError(f"{where}: {key} is missing; copy the folder again")
    return values[key]


def _object(values: Mapping[str, object], key: str, where: str) -> Described:
    value = _value(values, key, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} must be an object; copy the folder again")
    return cast("Described", value)
