"""Starting a Ray of this machine, with another try where it does not come up in the time that it gives itself."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from clipo_megatron.errors import WorkerError
from clipo_megatron.slurm.ray_node import NO_SPARE_WORKERS

_TRIES = 3

logger = logging.getLogger(__name__)


def start_ray(**options: Any) -> None:  # noqa: ANN401 (Ray's own)
    """Start Ray here. It gives itself half a minute, which is too little on a busy machine: then it is tried again.

    Args:
        options: of `ray.init`, for a Ray of this machine without a dashboard.

    Raises:
        WorkerError: in none of the tries it came up.
    """
    os.environ.setdefault(*NO_SPARE_WORKERS)
    for tries_left in reversed(range(_TRIES)):
        try:
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options
            )
        except Exception as error:  # Ray raises no narrower one; what it has started ends with this process
            ray.shutdown()
            if not tries_left:
                raise WorkerError(
                    f"Ray can't be started on this machine, tried {_TRIES} times ({error}); see whether processors, memory or the "
                    "space of /tmp are used up by others"
                ) from error
            logger.warning("Ray did not start (%s); it is tried again", error)
        else:
            return
