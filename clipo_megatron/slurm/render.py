"""The batch script of a recipe: slurm/train.sbatch with the nodes, GPUs and time that it needs. Loads without torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.slurm.site_file import HOME

SCRIPT = HOME / "slurm" / "train.sbatch"
_TIME = re.compile(r"(?:[0-9]+-)?[0-9]+(?::[0-5][0-9]){0,2}")
_NAME = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a job asks SLURM for; memory is all that its nodes have."""

    nodes: int
    gpus_per_node: int
    """0: a run on CPUs."""
    time: str
    """As sbatch's --time."""
    spare_nodes: int = 0
    """More nodes, idle until one is lost."""


def needs_of(recipe: Recipe, *, nodes: int | None, gpus_per_node: int, time: str, spare_nodes: int = 0) -> Needs:
    """The least that a recipe's workers fit in, or as many nodes as were asked for.

    Args:
        recipe: of the run.
        nodes: None: as many as it needs.
        gpus_per_node: that each node of the cluster has.
        time: limit of the job, as sbatch's --time.
        spare_nodes: beside these.

    Raises:
        ConfigError: all that is wrong with them: too few nodes, no time.
    """
    workers = recipe.slots
    problems: list[str] = []
    if gpus_per_node < 1:
        problems.append(f"--gpus-per-node = {gpus_per_node}: must be >= 1")
    if spare_nodes < 0:
        problems.append(f"--spare-nodes = {spare_nodes}: must be >= 0")
    if not _TIME.fullmatch(time):
        problems.append(f"--time = {time}: must be minutes, H:MM:SS or D-HH:MM:SS, as sbatch takes it")
    is_cpu = recipe.run.device == "cpu"
    least = 1 if is_cpu else -(-workers // max(gpus_per_node, 1))
    if nodes is not None and nodes < least:
        needs = "layout.world_size" if recipe.rollout.colocate else "layout.world_size + rollout.engines * rollout.tp"
        problems.append(
            f"--nodes = {nodes}: {needs} = {workers} GPUs need {least} nodes of "
            f"{gpus_per_node}; ask for {least}, or take fewer workers"
        )
    if spare_nodes > 0 and (least if nodes is None else nodes) == 1:
        problems.append(
            f"--spare-nodes = {spare_nodes}: the run needs 1 node, which also runs the batch script: SLURM requeues a job that "
            "loses it; leave --spare-nodes out"
        )
    if problems:
        raise ConfigError(problems)
    return Needs(
        nodes=least if nodes is None else nodes,
        gpus_per_node=0 if is_cpu else min(gpus_per_node, workers) if least == 1 else gpus_per_node,
        time=time,
        spare_nodes=spare_nodes,
    )


def render(recipe_path: str, overrides: Sequence[str], *, name: str, needs: Needs) -> str:
    """The script as text, for `sbatch` in the project's folder: it holds no path but the recipe's.

    Args:
        recipe_path: as the job is to read it.
        overrides: key=value, after the recipe.
        name: of the run.
        needs: of the recipe.

    Raises:
        ConfigError: the project is installed without it.
    """
    options = {
        "job-name": "clipo-" + _NAME.sub("-", name),
        "nodes": str(needs.nodes + needs.spare_nodes),
        "gpus-per-node": str(needs.gpus_per_node),
        "time": needs.time,
    }
    try:
        lines = SCRIPT.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"{SCRIPT}: can't be read ({error.strerror}); clipo launch needs the project's folder: install it with pip install "
            "--editable, or set PYTHONPATH to it"
        ) from error
    for number, line in enumerate(lines):
        if found := re.fullmatch(r"#SBATCH --([a-z-]+)=.*", line):
            lines[number] = f"#SBATCH --{found[1]}={options.get(found[1], line.split('=', 1)[1])}"
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    words = " ".join(shlex.quote(word) for word in (recipe_path, *overrides))
    spare = ["#SBATCH --no-kill", f"export CLIPO_SPARE_NODES={needs.spare_nodes}"] if needs.spare_nodes else []
    return "\n".join([*lines[: last + 1], *spare, f"set -- {words}", *lines[last + 1 :]]) + "\n"
