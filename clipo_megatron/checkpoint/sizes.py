"""Numbers of bytes in words."""

from __future__ import annotations


def size_text(num_bytes: int, *, is_binary: bool = False) -> str:
    """Bytes in the largest unit of which there is at least one: "412 bytes", "3.60 MB", "61.1 GB".

    Args:
        num_bytes: >= 0.
        is_binary: memory, in powers of 1024: "3.74 GiB".
    """
    base, units = (1024, ("KiB", "MiB", "GiB", "TiB")) if is_binary else (1000, ("KB", "MB", "GB", "TB"))
    if num_bytes < base:
        return f"{num_bytes} bytes"
    value, unit = num_bytes / base, units[0]
    for larger in units[1:]:
        # What rounding would show as 1000 is told in the next unit.
        if value < base - 0.5:
            break
        value, unit = value / base, larger
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
