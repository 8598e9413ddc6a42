"""This rank's training state on disk: safetensors and JSON, no pickle. Restored bit for bit, on the same layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.errors import CheckpointError

Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Parameters and moments of an optimizer by position, as references: AdamW of torch or of Transformer Engine."""
    tensors: dict[str, Tensor] = {}
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            name = f"{prefix}.{group_number}.{number}"
            tensors[f"{name}.parameter"] = parameter.data
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value
    return tensors


def optimizer_steps(optimizer: torch.optim.Optimizer) -> list[Plain]:
    """Step counts of optimizers that keep them in their groups (Transformer Engine's); None where it is a tensor."""
    return [None if group.get("step") is None else int(group["step"]) for group in optimizer.param_groups]


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor], steps: list[int | None]
) -> None:
    """The inverse of `optimizer_tensors` and `optimizer_steps`, for tensors that `check_tensors` has passed."""
    for group_number, group in enumerate(optimizer.param_groups):
        if steps[group_number] is not None:
            group["step"] = steps[group_number]
        for number, parameter in enumerate(group["params"]):
            name = f"{prefix}.{group_number}.{number}."
            stored = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
            parameter.data.copy_(stored.pop("parameter"))
            # A step count stays on the host: torch's AdamW reads it there.
            state = {
                key: value.to(value.device if key == "step" else parameter.device) for key, value in stored.items()
            }
            if state:
                optimizer.state[parameter] = state
    if isinstance(optimizer, HybridDeviceOptimizer):
        # Its state is a view of those of the optimizers that it deals its parameters to.
        optimizer._sync_hdo_state_to_sub_optimizers()


def write_state(
    folder: Path, rank: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Plain]
) -> tuple[Path, Path]:
    """Write this rank's files into `folder`, which exists. Tensors are copied to the host first. Returns the files."""
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    tensor_file, plain_file = _files(folder, rank)
    save_file(copies, tensor_file)
    plain_file.write_text(json.dumps(plain, indent=1, sort_keys=True))
    return tensor_file, plain_file


def read_state(folder: Path, rank: int, *, identity: Mapping[str, Plain]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read this rank's files.

    Args:
        folder: of a checkpoint.
        rank: of this process.
        identity: what the state has to belong to (layout, dtype, architecture); compared with the stored `identity`.

    Raises:
        CheckpointError: files are missing or damaged, or belong to another layout, dtype or architecture.
    """
    tensor_file, plain_file = _files(folder, rank)
    try:
        plain = json.loads(plain_file.read_text())
        found = plain["identity"]
        wanted = json.loads(json.dumps(identity))
        differences = [
            f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
            for key in sorted({*found, *wanted})
            if found.get(key) != wanted.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{folder}: the training state belongs to another run: {'; '.join(differences)}. Resume with the same "
                "layout, dtype and model, or start from the exported Hugging Face folder"
            )
        with safe_open(tensor_file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}, plain  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{folder}: training state of rank {rank} can't be read: {error!r}") from error


def check_tensors(folder: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that all that the run holds is stored. A fresh optimizer has no moments yet, so more may be stored.

    Raises:
        CheckpointError: a tensor is missing or of another shape or dtype.
    """
    missing = sorted(set(expected) - set(stored))
    differing = sorted(
        name
        for name in set(stored) & set(expected)
        if (stored[name].shape, stored[name].dtype) != (expected[name].shape, expected[name].dtype)
    )
    if missing or differing:
        raise CheckpointError(
            f"{folder}: the training state does not fit: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(differing)} have another shape or dtype {differing[:3]}; the checkpoint is of another model"
        )


def _files(folder: Path, rank: int) -> tuple[Path, Path]:
    stem = f"policy_rank_{rank:05d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"
