"""Which of the workers that were late at a deadline made the others wait, as their stack dumps tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from clipo_megatron.slurm.job_logs import Log

LATE = re.compile(r"(?P<phase>\w+): not done after (?P<seconds>\d+) s: (?P<names>\w+_\d+(?:, \w+_\d+)*)")
_DUMP = re.compile(r"^(?:Current t|T)hread 0x[0-9a-f]+ .*\(most recent call first\):")
_CURRENT = "Current thread"
_CALL = re.compile(r'^  File "(?P<file>[^"]+)", line \d+ in (?P<name>\S+)')
_WAITING = re.compile(r"/torch/distributed/|/ray/|(?:^|/)(?:threading|selectors)\.py$")
_INNERMOST = 6


def suspects(names: Sequence[str], logs: Mapping[str, Log]) -> list[str]:
    """The workers that others waited for: without a dump where others have one, else not in a collective.

    A stopped or dead process can't dump its stack; one that is stuck in its own work shows where. All of them where that does
    not tell them apart.

    Args:
        names: late workers.
        logs: of workers, by name.
    """
    stacks = {name: last_stack(logs[name].lines) if name in logs else [] for name in names}
    silent = [name for name in names if not stacks[name]]
    if silent and len(silent) < len(names):
        return silent
    busy = [name for name in names if stacks[name] and not _waits(stacks[name])]
    return busy or list(names)


def last_stack(lines: Sequence[str]) -> list[tuple[str, str]]:
    """(file, function) of the calls of the last dump, innermost first; of the thread that the dump calls its own if it does."""
    dumps: list[tuple[bool, list[tuple[str, str]]]] = []
    for line in lines:
        if _DUMP.match(line):
            dumps.append((line.startswith(_CURRENT), []))
        elif dumps and (call := _CALL.match(line)):
            dumps[-1][1].append((call["file"], call["name"]))
    own = [calls for is_current, calls in dumps if is_current]
    return own[-1] if own else dumps[-1][1] if dumps else []


def _waits(calls: Sequence[tuple[str, str]]) -> bool:
    return any(_WAITING.search(file) for file, _ in calls[:_INNERMOST])
