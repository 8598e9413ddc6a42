"""What the site's file (slurm/site.env, or CLIPO_SITE) sets, as slurm/train.sbatch reads it. Loads without torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import clipo_megatron
from clipo_megatron.errors import ConfigError

HOME = Path(clipo_megatron.__file__).parents[1]
"""Of the project."""
SITE_VARIABLE, HOME_VARIABLE = "CLIPO_SITE", "CLIPO_HOME"
_BASH_S = 30.0
_READ = 'bash -n "$1" || exit; set -a; . "$1" >/dev/null; printf %s "${!2-}"'
"""What fails in the file is no error here, for it may be there on compute nodes only; what is no bash is one."""


def site_value(name: str) -> str:
    """A variable as a job sees it: the site's file is read after the environment, so what it sets counts; empty: not set.

    Args:
        name: of the variable.

    Raises:
        ConfigError: CLIPO_SITE names no file that can be read, or bash can't run the file.
    """
    home = os.environ.get(HOME_VARIABLE) or str(HOME)
    named = os.environ.get(SITE_VARIABLE, "")
    path = Path(named or Path(home) / "slurm" / "site.env")
    if not os.access(path, os.R_OK):
        if named:
            raise ConfigError(f"{SITE_VARIABLE} = {named}: no such file; see slurm/site.env.example")
        return os.environ.get(name, "")
    # By bash, for only that agrees with the batch script on quotes, on other variables, and on what is decided in the file.
    command = ["bash", "-c", _READ, "bash", str(path.absolute()), name]
    try:
        done = subprocess.run(
            command,
            env={"SLURM_SUBMIT_DIR": str(Path.cwd()), **os.environ},
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            timeout=_BASH_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{path}: can't be run by bash ({error}); correct it, see slurm/site.env.example") from error
    if done.returncode:
        told = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"{path}: bash ends in it ({told}); correct it, see slurm/site.env.example")
    return done.stdout
