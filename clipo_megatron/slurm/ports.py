"""Free ports of this host below those that the system gives out: `python -m clipo_megatron.slurm.ports COUNT`."""

from __future__ import annotations

import random
import socket
import sys
from pathlib import Path

_LOWEST = 20000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_FIRST = 32768


def first_ephemeral_port() -> int:
    """The lowest port that the system gives to sockets which ask for any; another process may get it at any moment."""
    return int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _DEFAULT_FIRST


def free_ports(count: int, *, lowest: int = _LOWEST) -> list[int]:
    """Ports of this host that nobody listens on, no two alike, in random order so that jobs which share a host differ.

    Args:
        count: of ports.
        lowest: port to take.

    Raises:
        OSError: fewer are free.
    """
    candidates = list(range(lowest, first_ephemeral_port()))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if _is_free(port):
            found.append(port)
    if len(found) < count:
        raise OSError(f"{count} ports are needed, {len(found)} of {lowest} to {first_ephemeral_port() - 1} are free")
    return found


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    print(*free_ports(int(sys.argv[1])))
