"""Starts the ranks of the fabric level: as one rank of a step of SLURM, or all of them on this machine."""

from __future__ import annotations

import datetime
import os
import socket
import time
from pathlib import Path

import torch
import torch.cuda.nccl
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from clipo_megatron.checks.local_ranks import run_local_ranks
from clipo_megatron.checks.trainer_layout import parallel_layout
from clipo_megatron.doctor.fabric import fabric_findings, measure_fabric
from clipo_megatron.doctor.finding import Finding, fail, host_name, ok, skip
from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.recipe import Recipe

_TIMEOUT_S = 180.0
_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def run_fabric(recipe: Recipe, *, folder: Path | None) -> list[Finding]:
    """Measure the groups of the recipe's layout.

    In a step of SLURM with as many tasks as the layout has ranks, each task calls this; rank 0's address goes through a
    file in `folder`. Elsewhere all ranks run on this machine.

    Args:
        recipe: whose layout counts.
        folder: that all ranks share; needed in a step of several tasks.
    """
    layout = parallel_layout(recipe)
    device = "cuda" if recipe.run.device != "cpu" and torch.cuda.is_available() else "cpu"
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if layout.world_size == 1:
        return [skip("fabric", "layout.world_size = 1: no link between ranks")]
    if "SLURM_PROCID" in os.environ and tasks > 1:
        return _as_task(layout, device, tasks, folder)
    if device == "cuda" and torch.cuda.device_count() < layout.world_size:
        cause = f"layout.world_size = {layout.world_size}, and {torch.cuda.device_count()} GPUs are here"
        return [skip("fabric", f"{cause}: measured in a job, by srun --ntasks={layout.world_size}")]
    try:
        results = run_local_ranks(
            _of_rank, layout, device, host_name(), world_size=layout.world_size, device=device, timeout_s=_TIMEOUT_S
        )
    except WorkerError as error:
        return [_of_failure(error)]
    return results[0]


def _as_task(layout: ParallelLayout, device: str, tasks: int, folder: Path | None) -> list[Finding]:
    if tasks != layout.world_size:
        cause = f"SLURM_NTASKS = {tasks}, layout.world_size = {layout.world_size}"
        return [fail("fabric", cause, f"start the step with srun --ntasks={layout.world_size}")]
    if folder is None:
        raise ConfigError(
            "--report: missing; give a folder that all nodes share, through which the ranks find each other"
        )
    rank, local = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_LOCALID", "0"))
    if device == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        store = _store(folder, rank, tasks)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=tasks,
            timeout=datetime.timedelta(seconds=_TIMEOUT_S),
        )
        try:
            return _of_rank(layout, device, host_name())
        finally:
            dist.destroy_process_group()
    except (RuntimeError, OSError) as error:
        return [_of_failure(error)]


def _store(folder: Path, rank: int, world_size: int) -> TCPStore:
    """The store that all ranks meet at; its address goes through a file of this step of the job."""
    step = "-".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    path = folder / f"fabric-{step}.address"
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    if rank == 0:
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(f"{host} {store.port}")
        partial.replace(path)
        return store
    deadline = time.monotonic() + _TIMEOUT_S
    while not path.is_file():
        if time.monotonic() > deadline:
            raise OSError(
                f"{path}: rank 0 has not written it in {_TIMEOUT_S:g} s; is the folder the same on all nodes?"
            )
        time.sleep(0.1)
    host, port = path.read_text().split()
    return TCPStore(host, int(port), world_size, is_master=False, timeout=timeout)


def _of_rank(layout: ParallelLayout, device: str, host: str) -> list[Finding]:
    """Measure as one rank; the same findings on all."""
    place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    facts: list[tuple[str, str]] = [("", "")] * layout.world_size
    dist.all_gather_object(facts, (host, _library_version(device)))
    pairs, groups = measure_fabric(layout, device=place, num_bytes=_BYTES[device])
    hosts = [found for found, _ in facts]
    return [_version_finding(facts), *fabric_findings(pairs, groups, hosts)]


def _library_version(device: str) -> str:
    if device == "cpu":
        return f"gloo of torch {torch.__version__}"
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def _version_finding(facts: list[tuple[str, str]]) -> Finding:
    """The library of collectives is the same on all ranks."""
    versions: dict[str, list[int]] = {}
    for rank, (_, version) in enumerate(facts):
        versions.setdefault(version, []).append(rank)
    if len(versions) == 1:
        return ok("collectives", f"{facts[0][1]} on {len(facts)} ranks")
    told = ", ".join(f"{version} on ranks {ranks[0]} ({facts[ranks[0]][0]}) ..." for version, ranks in versions.items())
    return fail("collectives", told, "install the same version on all nodes, or use the container")


def _of_failure(error: Exception) -> Finding:
    text = " ".join(str(error).split())
    remedy = "see which ranks are named: their node's network, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, a firewall"
    return fail("fabric", f"the ranks could not talk to each other ({text[:400]})", remedy)
