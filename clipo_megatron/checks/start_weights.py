"""model.weights: a distributed checkpoint against the model whose run is to start from it. Reads all its bytes once, if it has checksums."""

from __future__ import annotations

from pathlib import Path

from clipo_megatron.checkpoint.dist_model import model_faults
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_tensors import damage
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.architecture import read_architecture


def weights_problems(weights: str, model_path: Path) -> list[str]:
    """All that keeps a run from starting from the weights in a folder.

    Args:
        weights: value of model.weights; empty: nothing to check.
        model_path: Hugging Face folder with the config.json of the model.
    """
    if not weights:
        return []
    try:
        architecture = read_architecture(model_path)
    except ConfigError:
        return []  # told with the model folder's faults
    folder = Path(weights)
    if not folder.is_dir():
        return [
            f"model.weights = {weights}: no such folder; give a folder made by `clipo ckpt import`, or the step folder of a "
            "checkpoint"
        ]
    if faults := damage(folder):
        return [f"model.weights: {fault}" for fault in faults]
    try:
        with DistReader(folder) as reader:
            faults = model_faults(reader, architecture, folder=folder)
    except CheckpointError as error:
        faults = [str(error)]
    return [f"model.weights: {fault}" for fault in faults]
