"""How much memory this machine has left, and how much of it this process may take."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

_FILE = Path("/proc/meminfo")
_ROOT = Path("/")


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; None where the system does not tell."""
    if not _FILE.exists():
        return None
    return next(
        int(line.split()[1]) * 1024 for line in _FILE.read_text().splitlines() if line.startswith("MemAvailable:")
    )


def allowed_bytes() -> int | None:
    """Memory that this process may take: what the machine has left, or its cgroup's limit where that is less."""
    return min((found for found in (available_bytes(), cgroup_limit()) if found is not None), default=None)


def cgroup_limit(root: Path = _ROOT) -> int | None:
    """The least limit of memory of this process's cgroup and all above it, in bytes; None: no limit.

    A scheduler limits a job and its steps, whose cgroups lie far below the one that is mounted.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    listing = root / "proc" / "self" / "cgroup"
    if not listing.is_file():
        return None
    limits = []
    for line in listing.read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        # Of version 2 there is one tree for all controllers; in version 1 memory has its own, beside it or alone.
        if not controllers:
            limits += _limits(root / "sys" / "fs" / "cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "sys" / "fs" / "cgroup" / "memory", path, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits(mounted: Path, path: str, file: str) -> list[int]:
    parts = PurePosixPath(path).parts[1:]
    # A container sees its cgroup under the host's path, or one that begins with "..", and has only its own mounted.
    if ".." in parts:
        parts = ()
    found = []
    for depth in range(len(parts) + 1):
        limit = mounted.joinpath(*parts[:depth], file)
        text = limit.read_text().strip() if limit.is_file() else ""
        found += [int(text)] if text.isdigit() else []  # the other word is "max"
    return found
