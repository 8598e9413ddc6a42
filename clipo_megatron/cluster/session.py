"""Ray on one machine: start, place the actors of a recipe, stop. Nothing survives the driver."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from clipo_megatron.cluster.engines import RayEngines
from clipo_megatron.cluster.policy import RayPolicy
from clipo_megatron.cluster.settings import Device, engine_settings, policy_settings, sync_settings
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.rollout.environment import engine_environment

OBJECT_STORE_BYTES = 512 << 20
"""Shared memory of a CPU run's object store; a bucket and a batch must fit."""


@contextmanager
def ray_session(recipe: Recipe, *, device: Device) -> Iterator[None]:
    """A Ray cluster of this machine, as large as the recipe's actors; stopped at the end of the block."""
    rollout = recipe.rollout
    processes = recipe.layout.world_size + rollout.engines * rollout.tp
    # Ray's sockets live in its temporary folder, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="clipo", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=processes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES + 4 * (recipe.sync.bucket_mib << 20) if device == "cpu" else None,
            _temp_dir=folder,
        )
        try:
            if device == "cuda":
                _check_gpus(needed=processes)
            yield
        finally:
            ray.shutdown()


def place(recipe: Recipe, *, device: Device, log_folder: Path) -> tuple[RayPolicy, RayEngines]:
    """Create and start all actors of a recipe on the running Ray cluster.

    Raises:
        WorkerError: an actor could not start; its log has the traceback.
    """
    rollout, gpus = recipe.rollout, 1 if device == "cuda" else 0
    policy = RayPolicy(
        policy_settings(recipe, device=device),
        actor_options=_options(cpus=1, gpus=gpus, environment=_TRAINER_ENVIRONMENT[device]),
        bucket_bytes=recipe.sync.bucket_mib << 20,
        timeout_s=recipe.run.worker_timeout_s,
        log_folder=log_folder,
    )
    engines = RayEngines(
        rollout.engines,
        engine_settings(recipe, device=device),
        actor_options=_options(
            cpus=rollout.tp, gpus=gpus * rollout.tp, environment=engine_environment(device, rollout.tp)
        ),
        log_folder=log_folder,
        timeout_s=recipe.run.worker_timeout_s,
        sync=sync_settings(recipe, device=device),
    )
    policy.start()
    engines.start()
    return policy, engines


# One queue of launches: Megatron counts on it that a collective begins before the product that overlaps it.
_TRAINER_ENVIRONMENT = {"cpu": {"OMP_NUM_THREADS": "1"}, "cuda": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}


def _options(*, cpus: int, gpus: int, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": 0,
        "runtime_env": {"env_vars": environment},
    }


def _check_gpus(*, needed: int) -> None:
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < needed:
        raise ConfigError(
            f"layout.world_size + rollout.engines * rollout.tp = {needed} GPUs are needed, {found} are here; trainer and "
            "engines each have GPUs of their own"
        )
