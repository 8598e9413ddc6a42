"""Level node: GPUs as nvidia-smi and torch see them; where there is no nvidia-smi, that is what is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from clipo_megatron.doctor.finding import Finding, fail, of_problems, ok, skip, warn
from clipo_megatron.recipe import Recipe

_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "persistence_mode",
    "clocks_throttle_reasons.hw_slowdown",
)
_TIMEOUT_S = 30.0
_USED_MIB = 1024
"""A GPU with more memory in use has another process on it, or the leftovers of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, as nvidia-smi tells it."""

    index: str
    name: str
    driver: str
    total_mib: int
    used_mib: int
    uncorrected: str
    """Uncorrected ECC errors since the driver was loaded; "[N/A]" without ECC."""
    persistence: str
    slowdown: str


def device_findings(recipe: Recipe, *, needs_torch: bool) -> list[Finding]:
    """GPUs against the recipe: by nvidia-smi, and by torch where it is asked for."""
    if recipe.run.device == "cpu":
        return [skip("GPUs", "run.device = cpu")]
    findings = gpu_findings(query_gpus(), expected=os.environ.get("SLURM_GPUS_ON_NODE", ""))
    if needs_torch:
        findings += _torch_findings(recipe)
    return findings


def device_facts() -> dict[str, str]:
    """Driver, kind and number of the GPUs; empty without any."""
    gpus = query_gpus()
    if isinstance(gpus, str) or not gpus:
        return {}
    names = sorted({gpu.name for gpu in gpus})
    return {"GPU driver": gpus[0].driver, "GPUs": f"{len(gpus)} x {', '.join(names)}"}


def query_gpus() -> list[Gpu] | str:
    """The GPUs, or why they are not known."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi on this host"
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    if done.returncode:
        return f"nvidia-smi failed: {(done.stderr or done.stdout).strip().splitlines()[-1:] or ['no message']}"
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu] | str:
    """The GPUs of nvidia-smi's lines."""
    gpus = []
    for line in filter(str.strip, text.splitlines()):
        fields = [part.strip() for part in line.split(",")]
        if len(fields) != len(_FIELDS) or not (fields[3].isdigit() and fields[4].isdigit()):
            return f"nvidia-smi failed: {line.strip()}"
        index, name, driver, total, used, uncorrected, persistence, slowdown = fields
        gpus.append(
            Gpu(
                index=index,
                name=name,
                driver=driver,
                total_mib=int(total),
                used_mib=int(used),
                uncorrected=uncorrected,
                persistence=persistence,
                slowdown=slowdown,
            )
        )
    return gpus


def gpu_findings(gpus: Sequence[Gpu] | str, *, expected: str) -> list[Finding]:
    """What is wrong with the GPUs of a host.

    Args:
        gpus: of the host, or why they are not known.
        expected: number of them that SLURM gave to the job here; empty: not told.
    """
    name = "GPUs"
    if isinstance(gpus, str):
        if "no nvidia-smi" in gpus:
            return [skip(name, gpus)]
        return [fail(name, gpus, "drain the node and look at `dmesg` for Xid errors")]
    findings = []
    if expected.isdigit() and len(gpus) != int(expected):
        cause = f"{len(gpus)} are seen, SLURM_GPUS_ON_NODE = {expected}"
        findings.append(fail(name, cause, "one has fallen off the bus, or gres.conf is wrong: drain the node"))
    for gpu in gpus:
        place = f"GPU {gpu.index} ({gpu.name})"
        if gpu.uncorrected.isdigit() and int(gpu.uncorrected):
            cause = f"{place}: {gpu.uncorrected} uncorrected ECC errors"
            findings.append(fail(name, cause, "drain the node and reset or replace the GPU"))
        if gpu.used_mib > _USED_MIB:
            cause = f"{place}: {gpu.used_mib} MiB in use before the run"
            findings.append(fail(name, cause, "end the processes that `nvidia-smi` lists, or use another node"))
        if gpu.slowdown == "Active":
            cause = f"{place}: slowed down by hardware (heat or power)"
            findings.append(warn(name, cause, "tell the site: every collective waits for the slowest GPU"))
        if gpu.persistence == "Disabled":
            cause = f"{place}: persistence mode is off"
            findings.append(warn(name, cause, "nvidia-smi -pm 1: each start takes seconds longer without"))
    return findings or [ok(name, f"{len(gpus)} of driver {gpus[0].driver}" if gpus else "none")]


def _torch_findings(recipe: Recipe) -> list[Finding]:
    from clipo_megatron.checks.preflight import device_problems

    try:
        return of_problems("device", device_problems(recipe), otherwise="torch can use it")
    except (ImportError, OSError, RuntimeError) as error:
        cause = f"torch does not work on this host ({str(error).splitlines()[0]})"
        return [
            fail("device", cause, "install the pinned requirements, or compare the driver with torch's CUDA version")
        ]
