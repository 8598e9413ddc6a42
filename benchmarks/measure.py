"""Clock, machine and output that the benchmarks share: medians of ways that take turns, one JSON object a row, one table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

Way = Callable[[], object]
Number = float | int | str | None
WIDTH = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where a row was measured, and how busy it was."""

    device: str
    threads: int
    load: float
    """Processes that wanted a CPU, over the minute before the row was written; CPU figures are good below the number of
    cores."""
    cores: int
    torch: str
    python: str


def machine(device: torch.device) -> Machine:
    """This one, as it is at the moment."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        cores=os.cpu_count() or 0,
        torch=torch.__version__,
        python=platform.python_version(),
    )


def median_seconds(ways: Mapping[str, Way], *, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way. They take turns, so that a busy moment meets all; one turn more is run first, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            wait_for(device)
            start = time.perf_counter()
            way()
            wait_for(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def wait_for(device: torch.device) -> None:
    """Let a GPU finish; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_row(row: Mapping[str, object]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Number]]) -> None:
    """A table on standard error; the first column is text."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*[_text(value) for value in row])
    Console(stderr=True, width=WIDTH).print(table)


def _text(value: Number) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
