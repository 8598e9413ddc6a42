"""Two lanes for tests that run side by side: those that train whole runs, one after another, and the files of all others."""

from __future__ import annotations

import pytest

ALONE = ("engine_restarts", "hung_workers", "security", "sync_faults")
RUNS = ("tests/slurm/", *(f"tests/end_to_end/test_{name}" for name in ALONE))
"""They keep several processes busy for minutes, and wait for them with deadlines."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `pytest --numprocesses=2`: what is of one scope stays on one worker, in its order."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "runs" if nodeid.startswith(RUNS) else nodeid.partition("::")[0]

    return Lanes(config, log)


def pytest_collection_modifyitems(config, items):
    """The lane of runs is the longest scope, so it is begun first; beside it those that need not wait for its trained policy."""

    def order(item: pytest.Item) -> int:
        starts = (RUNS, "tests/megatron/", "tests/end_to_end/")
        return next((place for place, start in enumerate(starts) if item.nodeid.startswith(start)), len(starts))

    if hasattr(config, "workerinput"):
        items.sort(key=order)
