"""When a line of a log was written: from the line itself, else from its neighbours, else from the file."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import datetime

_FULL = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?(Z|[+-]\d\d:?\d\d)?")
"""Of Python's logging, of Ray's ([2026-01-31 12:00:00,123 E ...), of `date -Is`, of SLURM."""
_SHORT = re.compile(r"\b(?:ERROR|WARNING|INFO) (\d\d)-(\d\d) (\d\d:\d\d:\d\d)")
"""Of vLLM: month and day."""
_GLOG = re.compile(r"\b[EWIF](\d\d)(\d\d) (\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?")
"""Of torch's C++ code: [rank3]:[E1124 04:00:00.123456 ...]."""
_LEAP_YEAR = 2024
_HEAD = 120
"""Characters of a line in which its own time stands."""


def line_times(lines: Sequence[str], *, written: float) -> list[float]:
    """Unix time of each line.

    A line without a time was written before the next one that has one, and after nothing that is later: it gets that
    one's, so that a cause without a time does not look earlier than it was; the last lines get the file's.

    Args:
        lines: of a file, in order.
        written: when the file was last written to.
    """
    year = time.localtime(written).tm_year
    times, following = [0.0] * len(lines), written
    for number in range(len(lines) - 1, -1, -1):
        found = line_time(lines[number], year=year)
        following = following if found is None else found
        times[number] = following
    return times


def is_dated(line: str) -> bool:
    """Whether a line tells a time of its own."""
    return line_time(line, year=_LEAP_YEAR) is not None


def line_time(line: str, *, year: int) -> float | None:
    """Unix time that a line tells; local time where it names no zone.

    Args:
        line: of a log.
        year: of times that have none.
    """
    head = line[:_HEAD]
    if match := _FULL.search(head):
        date, clock, fraction, zone = match.groups()
    elif match := _SHORT.search(head):
        date, clock, fraction, zone = f"{year}-{match[1]}-{match[2]}", match[3], None, None
    elif match := _GLOG.search(head):
        date, clock, fraction, zone = f"{year}-{match[1]}-{match[2]}", match[3], match[4], None
    else:
        return None
    text = f"{date}T{clock}.{(fraction or '0').ljust(6, '0')}{(zone or '').replace('Z', '+00:00')}"
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
