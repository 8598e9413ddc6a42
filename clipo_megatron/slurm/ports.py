"""Free ports of this host: `python -m clipo_megatron.slurm.ports COUNT`.

Of those that `CLIPO_PORTS` names (FIRST-LAST), else of those below what the system gives out.
"""

from __future__ import annotations

import os
import random
import re
import socket
import sys
from pathlib import Path

PORTS_VARIABLE = "CLIPO_PORTS"
_LOWEST = 20000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_FIRST, _HIGHEST = 32768, 65535


def first_ephemeral_port() -> int:
    """The lowest port that the system gives to sockets which ask for any; another process may get it at any moment."""
    return int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _DEFAULT_FIRST


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on, no two alike, in random order so that jobs which share a host differ.

    Args:
        count: of ports.

    Raises:
        OSError: fewer are free, or `CLIPO_PORTS` is no range of ports.
    """
    first, last = _LOWEST, first_ephemeral_port() - 1
    if told := os.environ.get(PORTS_VARIABLE, ""):
        match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", told)
        if match is None or not 0 < int(match[1]) <= int(match[2]) <= _HIGHEST:
            raise OSError(f"{PORTS_VARIABLE} = {told}: must be FIRST-LAST, two ports of 1 to {_HIGHEST}")
        first, last = int(match[1]), int(match[2])
    candidates = list(range(first, last + 1))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if _is_free(port):
            found.append(port)
    if len(found) < count:
        raise OSError(f"{count} ports are needed, {len(found)} of {first} to {last} are free")
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
