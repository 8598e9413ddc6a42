"""Where checks that run all ranks of a recipe on this machine run them."""

from __future__ import annotations

from typing import Literal

from clipo_megatron.recipe import Recipe


def local_device(recipe: Recipe) -> tuple[Literal["cpu", "cuda"], list[str]]:
    """The device of the ranks, and what is in the way. Without a GPU that is the CPU, whatever the recipe is for."""
    import torch

    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return "cpu", []
    count, world_size = torch.cuda.device_count(), recipe.layout.world_size
    if world_size <= count:
        return "cuda", []
    return "cuda", [
        f"layout.world_size = {world_size}: {count} GPUs are visible here, and every rank needs one; use a smaller layout, or "
        "run.device=cpu"
    ]
