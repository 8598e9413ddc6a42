"""The trainer's layout as a recipe says it. Loads without torch."""

from __future__ import annotations

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.recipe import Recipe


def parallel_layout(recipe: Recipe) -> ParallelLayout:
    """How the recipe splits the trainer's ranks."""
    layout = recipe.layout
    return ParallelLayout(
        world_size=layout.world_size,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        cp=layout.cp,
        ep=layout.ep,
        etp=layout.etp,
    )
