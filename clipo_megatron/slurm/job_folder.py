"""The folder of a SLURM job: what its parts leave there for each other and for people.

JOBS/<job>/job.json            recipe, overrides, run folder, number of nodes
           run_folder          the run folder's name alone, for the batch script
           attempt-<number>/   one for each time the run was started, by SLURM or on spare nodes
               batch.log phase nodes lost ports doctor-<host>.json ray-<host>.log driver.log
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clipo_megatron.doctor.finding import host_name
from clipo_megatron.errors import ConfigError
from clipo_megatron.slurm.site_file import site_value

PORTS_FILE, PHASE_FILE, JOB_FILE, RUN_FILE, LOST_FILE = "ports", "phase", "job.json", "run_folder", "lost"
JOBS_VARIABLE = "CLIPO_JOBS_DIR"
ATTEMPT_VARIABLE, NODES_VARIABLE = "CLIPO_ATTEMPT", "CLIPO_NODES"
"""Set by the batch script: the folder of the attempt at hand, and the number of nodes that it has."""
DEFAULT_JOBS = "slurm-jobs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What was submitted."""

    recipe: str
    overrides: tuple[str, ...]
    run_folder: str
    """Of the run: checkpoints, metrics."""
    nodes: int
    folder: str
    """In which the command was given; relative paths of the recipe start there."""
    policy_ranks: int = 1
    """Of the trainer."""
    ranks_per_node: int = 1
    """Policy ranks of the node that gets most."""


def write_beside(path: Path, text: str) -> None:
    """Write a file that others may read at any moment: they see the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def jobs_folder() -> Path:
    """In which the folders of all jobs are: as slurm/train.sbatch finds it, out of the site's file and the environment.

    Raises:
        ConfigError: the site's file can't be read.
    """
    return Path(site_value(JOBS_VARIABLE) or DEFAULT_JOBS)


def read_job(folder: Path) -> Job:
    """What was submitted.

    Args:
        folder: of the job.

    Raises:
        ConfigError: it has no readable job.json.
    """
    path = folder / JOB_FILE
    try:
        content = json.loads(path.read_text())
        return Job(**{**content, "overrides": tuple(content["overrides"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: can't be read ({error}); give the number of a job of slurm/train.sbatch, and set {JOBS_VARIABLE} as the "
            "job had it, here or in slurm/site.env"
        ) from error


def attempts(folder: Path) -> list[Path]:
    """Folders of a job's attempts, first to last."""
    found = [path for path in folder.glob("attempt-*") if path.name.removeprefix("attempt-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("attempt-")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write job.json; 2 and all faults of the recipe where it has some."""
    # pydantic takes a third of a second, which the other parts of this module need not wait for.
    from clipo_megatron.recipe.load import read_recipe
    from clipo_megatron.slurm.shares import ranks_per_node

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(arguments)
    try:
        recipe, problems = read_recipe(args.recipe, args.overrides)
        per_node = 0 if recipe is None or problems else ranks_per_node(recipe)
    except ConfigError as error:
        recipe, per_node, problems = None, 0, list(error.problems)
    if problems or recipe is None:
        print("\n".join(f"clipo: error: {host_name()}: checks: {problem}" for problem in problems), file=sys.stderr)
        return 2
    job = Job(
        recipe=str(args.recipe),
        overrides=tuple(args.overrides),
        run_folder=str((Path(recipe.run.folder) / recipe.run.name).absolute()),
        nodes=int(os.environ.get("SLURM_JOB_NUM_NODES", "1")),
        folder=str(Path.cwd()),
        policy_ranks=recipe.layout.world_size,
        ranks_per_node=per_node,
    )
    write_beside(args.folder / RUN_FILE, job.run_folder + "\n")
    write_beside(args.folder / JOB_FILE, json.dumps(asdict(job), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
