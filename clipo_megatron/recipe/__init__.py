"""The run's configuration. No torch in here: a recipe is checked in milliseconds on any machine."""

from clipo_megatron.recipe.load import load_recipe
from clipo_megatron.recipe.recipe import Recipe

__all__ = ["Recipe", "load_recipe"]
