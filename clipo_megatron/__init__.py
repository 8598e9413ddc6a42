"""CLIPO: reinforcement learning of reasoning models at Megatron scale, with a contrastive reward."""

from clipo_megatron.errors import CheckError, CheckpointError, ClipoError, ConfigError, EngineError, WorkerError
from clipo_megatron.recipe import Recipe, load_recipe

__all__ = [
    "CheckError",
    "CheckpointError",
    "ClipoError",
    "ConfigError",
    "EngineError",
    "Recipe",
    "WorkerError",
    "load_recipe",
]
__version__ = "0.1.0"
