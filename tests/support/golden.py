"""Reading the golden vectors of the published code, from CLIPO_GOLDEN_DIR or the copy in tests/golden."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from clipo_megatron.algorithms.contrastive import ContrastiveResult, Objective, contrastive_loss

LOSSES = {
    "infonce_loss": "infonce",
    "supcon_loss_in": "supcon_in",
    "supcon_loss_out": "supcon_out",
    "soft_nn_loss": "soft_nn",
}
SIMILARITIES = {"cosine_distance": "cosine", "-cosine_distance": "negative_cosine", "l2_distance": "l2"}


@functools.cache
def golden(name: str) -> Any:
    """One file of the golden folder, parsed; `name` without ".json"."""
    folder = Path(os.environ.get("CLIPO_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
    return json.loads((folder / f"{name}.json").read_text())


def golden_ids(case: dict[str, Any]) -> str:
    """A readable test id."""
    keys = ("scenario", "loss_type", "level", "masked_label", "skip_trivial", "temperature", "distance_measure")
    return "-".join(str(case[key]) for key in keys if key in case)


def objective_of(case: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `contrastive_loss` that a golden case stands for, sampled positives included."""
    settings = defaults | {key: value for key, value in case.items() if value is not None}
    sampled = case.get("sampled")
    return {
        "loss": LOSSES[settings["loss_type"]],
        "level": settings["level"].removesuffix("_level"),
        "similarity": SIMILARITIES[settings["distance_measure"]],
        "temperature": settings["temperature"],
        "masked_label": settings["masked_label"],
        "skip_trivial": settings["skip_trivial"],
        "numerics": "reference",
        "positive": "sampled",
        "denominator": "all_but_self",
        "seed": 0,
        "step": 0,
        "positive_B": None if sampled is None else torch.tensor(sampled),
    }


def split_arguments(arguments: dict[str, Any]) -> tuple[Objective, dict[str, Any]]:
    """The objective among the keyword arguments of a case, and the rest."""
    names = {field.name for field in dataclasses.fields(Objective)}
    settings = {key: value for key, value in arguments.items() if key in names}
    return Objective(**settings), {key: value for key, value in arguments.items() if key not in names}


def loss_of(z_BD: torch.Tensor, **arguments: Any) -> ContrastiveResult:
    """`contrastive_loss` with the objective's fields among the keyword arguments."""
    objective, rest = split_arguments(arguments)
    return contrastive_loss(z_BD, objective, **rest)


def rows_of(uid: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    """Group, verdict and key columns of a golden scenario."""
    return {
        "group_id_B": torch.tensor(uid),
        "is_correct_B": torch.tensor(labels, dtype=torch.bool),
        "row_key_B": torch.arange(len(uid)),
    }
