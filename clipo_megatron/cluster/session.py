"""Ray: start it on this machine or join the cluster of a job, place the actors of a recipe, stop. No actor survives the driver."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipo_megatron.cluster.engines import RayEngines
from clipo_megatron.cluster.policy import RayPolicy
from clipo_megatron.cluster.ray_start import start_ray
from clipo_megatron.cluster.settings import Device, engine_settings, policy_settings, sync_settings
from clipo_megatron.cluster.turns import DeviceTurns
from clipo_megatron.errors import WorkerError
from clipo_megatron.parallel.placement import Node, Placement, place_colocated, place_workers
from clipo_megatron.recipe import Recipe
from clipo_megatron.rollout.environment import engine_environment
from clipo_megatron.slurm.job_folder import ATTEMPT_VARIABLE, NODES_VARIABLE
from clipo_megatron.slurm.ray_node import address_of_head, start_timeout_s
from clipo_megatron.sync.placement import number_devices

OBJECT_STORE_BYTES = 512 << 20
"""Shared memory of a CPU run's object store; a bucket and a batch must fit."""

ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Of the cluster to join, HOST:PORT; Ray's own variable."""


@contextmanager
def ray_session(recipe: Recipe, *, device: Device) -> Iterator[None]:
    """A driver of the cluster at `RAY_ADDRESS`, or of one of this machine, as large as the recipe's actors.

    At the end of the block all actors are stopped, and a cluster that was started here too.

    Raises:
        WorkerError: the cluster can't be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address := _address():
        _join(address)
        try:
            _wait_for_nodes()
            yield
        finally:
            ray.shutdown()
        return
    with _local_ray(recipe, device=device):
        yield


def _join(address: str) -> None:
    """Connect to a cluster. A head that had to be started again meanwhile has other ports: it is tried there."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if (newer := _address()) != address:
            _join(newer)
            return
        raise WorkerError(
            f"no Ray cluster can be joined at {ADDRESS_VARIABLE} = {address} ({error}); start one there, or unset the "
            "variable to run on this machine alone"
        ) from error


def _address() -> str:
    """Of the cluster to join; empty: none."""
    if attempt := os.environ.get(ATTEMPT_VARIABLE):
        return address_of_head(Path(attempt), start_timeout_s())
    return os.environ.get(ADDRESS_VARIABLE, "")


def _wait_for_nodes() -> None:
    """Wait until as many nodes have joined as the job has.

    Raises:
        WorkerError: some have not in time; those that have are named.
    """
    wanted, timeout_s = int(os.environ.get(NODES_VARIABLE, "1")), start_timeout_s()
    deadline = time.monotonic() + timeout_s
    while len(alive := [node for node in ray.nodes() if node["Alive"]]) < wanted:
        if time.monotonic() > deadline:
            names = ", ".join(sorted(node["NodeManagerHostname"] for node in alive))
            raise WorkerError(
                f"{len(alive)} of {wanted} nodes have joined Ray after {timeout_s:.0f} s ({names}); look at ray-HOST.log of the "
                "others in the job's folder"
            )
        time.sleep(0.2)


@contextmanager
def _local_ray(recipe: Recipe, *, device: Device) -> Iterator[None]:
    # Ray's sockets live in its temporary folder, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="clipo", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start_ray(
            num_cpus=recipe.slots,
            object_store_memory=OBJECT_STORE_BYTES + 4 * (recipe.sync.bucket_mib << 20) if device == "cpu" else None,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def place(recipe: Recipe, *, device: Device, log_folder: Path) -> tuple[RayPolicy, RayEngines]:
    """Create and start all actors of a recipe on the running Ray cluster.

    Raises:
        ConfigError: the cluster has too few GPUs.
        WorkerError: an actor could not start; its log has the traceback.
    """
    rollout, gpus, layout = recipe.rollout, 1 if device == "cuda" else 0, recipe.layout
    find_places = place_colocated if rollout.colocate else place_workers
    placement = find_places(
        _nodes(device),
        ranks=layout.world_size,
        ranks_together=layout.tp * layout.cp,
        engines=rollout.engines,
        engine_ranks=rollout.tp,
    )
    policy = RayPolicy(
        policy_settings(recipe, device=device),
        actor_options=[
            _options(node, cpus=1, gpus=gpus, environment=_TRAINER_ENVIRONMENT[device]) for node in placement.policy
        ],
        bucket_bytes=recipe.sync.bucket_mib << 20,
        timeout_s=recipe.run.worker_timeout_s,
        start_timeout_s=recipe.run.start_timeout_s,
        log_folder=log_folder,
    )
    engines = RayEngines(
        engine_settings(recipe, device=device),
        actor_options=_engine_options(recipe, placement, device, policy.devices() if rollout.colocate else []),
        log_folder=log_folder,
        timeout_s=recipe.run.worker_timeout_s,
        start_timeout_s=recipe.run.start_timeout_s,
        sync=sync_settings(recipe, device=device, gpus=number_devices(placement, engine_ranks=rollout.tp)),
        max_restarts=rollout.max_restarts,
    )
    if not rollout.colocate:  # on devices of their own they load beside the policy
        engines.begin_start()
    policy.start()
    if rollout.colocate:
        policy.offload()
    engines.start()
    if rollout.colocate:
        DeviceTurns(policy, engines)
    return policy, engines


def _engine_options(
    recipe: Recipe, placement: Placement, device: Device, devices: Sequence[str]
) -> list[dict[str, Any]]:
    """Ray's options of each engine. One that shares devices asks for none: it is given those of its policy ranks by name."""
    tp = recipe.rollout.tp
    environment = engine_environment(device, tp)
    if not placement.shared:
        gpus = tp if device == "cuda" else 0
        return [_options(node, cpus=tp, gpus=gpus, environment=environment) for node in placement.engines]
    options = []
    for node, ranks in zip(placement.engines, placement.shared, strict=True):
        named = {_VISIBLE: ",".join(devices[rank] for rank in ranks)} if device == "cuda" else {}
        options.append(_options(node, cpus=0, gpus=0, environment=environment | named))
    return options


_VISIBLE = "CUDA_VISIBLE_DEVICES"

# One queue of launches: Megatron counts on it that a collective begins before the product that overlaps it.
_TRAINER_ENVIRONMENT = {"cpu": {"OMP_NUM_THREADS": "1"}, "cuda": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}


def _options(node: Node, *, cpus: int, gpus: int, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.name, soft=False),
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": 0,
        "runtime_env": {"env_vars": environment},
    }


def _nodes(device: Device) -> list[Node]:
    """The cluster's nodes, the driver's first and then by address."""
    resource, own = "GPU" if device == "cuda" else "CPU", ray.util.get_node_ip_address()
    found = [
        Node(name=node["NodeID"], address=node["NodeManagerAddress"], slots=int(node["Resources"].get(resource, 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address != own, [part.zfill(3) for part in node.address.split(".")]))
