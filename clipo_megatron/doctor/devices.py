"""Level node: GPUs as nvidia-smi and torch see them; where there is no nvidia-smi, that is what is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
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
_GRANTS = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")
"""Where SLURM says which GPUs a step has: the first is a number, the others are lists."""
_NONE = ("", "0", "-1", "NoDevFiles")
"""No GPUs, in the words of `SLURM_GPUS_ON_NODE` and `CUDA_VISIBLE_DEVICES`."""
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
    gpus = query_gpus()
    findings = gpu_findings(gpus, os.environ)
    if needs_torch:
        listed = "" if isinstance(gpus, str) or not gpus else f"nvidia-smi lists {len(gpus)} GPUs"
        findings += _torch_findings(recipe, gpus_there=granted_gpus(os.environ) or listed)
    return findings


def granted_gpus(environment: Mapping[str, str]) -> str:
    """The variable by which SLURM says that this step has GPUs, with its value; empty: it says of none."""
    for variable in _GRANTS:
        if variable == "CUDA_VISIBLE_DEVICES" and "SLURM_JOB_ID" not in environment:
            continue  # set by hand, on whatever machine
        # "0" is a number of GPUs in the first variable, and the name of one in the lists.
        value = environment.get(variable, "")
        if value not in _NONE or (value == "0" and variable != _GRANTS[0]):
            return f"{variable} = {value}"
    return ""


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


def gpu_findings(gpus: Sequence[Gpu] | str, environment: Mapping[str, str]) -> list[Finding]:
    """What is wrong with the GPUs of a host, for a run that may use them.

    Args:
        gpus: of the host, or why they are not known.
        environment: with SLURM's variables, which tell the GPUs that this host gives to the job.
    """
    name, expected = "GPUs", environment.get("SLURM_GPUS_ON_NODE", "")
    if isinstance(gpus, str):
        granted = granted_gpus(environment)
        if "no nvidia-smi" in gpus and granted:
            remedy = (
                "install NVIDIA's driver, or mount it into the container with its tools; without GPUs run.device=cpu"
            )
            return [fail(name, f"{gpus}, though {granted}", remedy)]
        if "no nvidia-smi" in gpus:
            return [skip(name, gpus)]
        return [fail(name, gpus, "drain the node and look at `dmesg` for Xid errors")]
    findings = []
    if expected.isdecimal() and len(gpus) < int(expected):
        cause = f"{len(gpus)} are seen, SLURM_GPUS_ON_NODE = {expected}"
        findings.append(fail(name, cause, "one has fallen off the bus, or gres.conf is wrong: drain the node"))
    gpus = _given(gpus, expected, environment)
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


def _given(gpus: Sequence[Gpu], expected: str, environment: Mapping[str, str]) -> Sequence[Gpu]:
    """Of GPUs that SLURM does not keep from a job's eyes (no ConstrainDevices), those that it has given to the job."""
    if not expected.isdecimal() or len(gpus) <= int(expected):
        return gpus
    given = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [gpu for gpu in gpus if gpu.index in given] or gpus


def smallest_gib() -> float | None:
    """Memory of this host's smallest GPU, in GiB; None where nvidia-smi tells of none."""
    gpus = query_gpus()
    return None if isinstance(gpus, str) or not gpus else min(gpu.total_mib for gpu in gpus) / 1024


def _torch_findings(recipe: Recipe, *, gpus_there: str) -> list[Finding]:
    name = "device"
    try:
        import torch

        from clipo_megatron.checks.preflight import device_problems

        if not torch.cuda.is_available() and gpus_there:
            return [_unused(recipe.run.device, gpus_there, torch.__version__)]
        said = "torch can use it" if torch.cuda.is_available() else "no GPU here: the run is on CPUs"
        return of_problems(name, device_problems(recipe), otherwise=f"run.device = {recipe.run.device}: {said}")
    except (ImportError, OSError, RuntimeError) as error:
        cause = f"torch does not work on this host ({str(error).splitlines()[0]})"
        return [fail(name, cause, "install the pinned requirements, or compare the driver with torch's CUDA version")]


def _unused(device: str, gpus_there: str, version: str) -> Finding:
    # auto means the CPU wherever torch sees no GPU: nothing else would tell that GPUs stand idle.
    ending = "would be on CPUs" if device == "auto" else "can't start"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f", CUDA_VISIBLE_DEVICES = {visible!r}"
    cause = f"run.device = {device}: torch {version} can't use CUDA here, though {gpus_there}{seen}: the run {ending}"
    remedy = "install a torch for CUDA that this driver knows, and hide no GPUs; or set run.device=cpu"
    return fail("device", cause, remedy)
