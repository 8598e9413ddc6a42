"""How much memory this machine has left, as the kernel estimates it."""

from __future__ import annotations

from pathlib import Path

_FILE = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; None where the system does not tell."""
    if not _FILE.exists():
        return None
    return next(
        int(line.split()[1]) * 1024 for line in _FILE.read_text().splitlines() if line.startswith("MemAvailable:")
    )
