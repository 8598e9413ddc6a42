"""How many policy ranks a node of a job gets, before there is a Ray to ask. Loads without torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from clipo_megatron.parallel.placement import Node, place_workers
from clipo_megatron.recipe import Recipe
from clipo_megatron.slurm.job_folder import NODES_VARIABLE
from clipo_megatron.slurm.ray_node import GPUS_VARIABLE, cpu_slots


def ranks_per_node(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> int:
    """Policy ranks of the node that gets most, placed as the run places them; nodes are taken to be as this one.

    Args:
        recipe: of the run.
        environment: of a job's step.

    Raises:
        ConfigError: the job's nodes are too few.
    """
    nodes = environment.get(NODES_VARIABLE) or environment.get("SLURM_JOB_NUM_NODES", "1")
    gpus = environment.get(GPUS_VARIABLE, "0")
    slots = int(gpus) if recipe.run.device != "cpu" and gpus.isdecimal() and int(gpus) else cpu_slots(environment)
    layout, rollout = recipe.layout, recipe.rollout
    placed = place_workers(
        [Node(name=str(number), address=f"node {number}", slots=slots) for number in range(int(nodes))],
        ranks=layout.world_size,
        ranks_together=layout.tp * layout.cp,
        engines=0 if rollout.colocate else rollout.engines,
        engine_ranks=rollout.tp,
    )
    return max(Counter(node.name for node in placed.policy).values())
