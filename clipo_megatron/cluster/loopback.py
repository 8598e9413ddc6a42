"""A run of one machine listens on the loopback interface alone, and its Ray asks for a token. Imports no Ray."""

from __future__ import annotations

import os
import secrets
import socket
import sys

from clipo_megatron.slurm.job_folder import ATTEMPT_VARIABLE

_LOOPBACK = "lo"


def keep_to_this_machine() -> None:
    """Set the variables that make it so, for this process and all that it starts. To be called before Ray is imported.

    Nothing is changed where a cluster is to be joined, nor what is set already.
    """
    if "ray" in sys.modules or os.environ.get("RAY_ADDRESS") or os.environ.get(ATTEMPT_VARIABLE):
        return
    # Ray's name for it speaks of other systems; it makes all of Ray's servers listen on 127.0.0.1.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if _LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # Without one Ray would make one for all runs and keep it in the home folder.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
