"""Two lanes for tests that run side by side: those that start whole clusters, one after another, and the files of all others."""

from __future__ import annotations

import pytest

CLUSTERS = ("tests/end_to_end/", "tests/slurm/")
"""Folders whose tests keep several processes busy, and wait for them with deadlines."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `pytest --numprocesses=2`: what is of one scope stays on one worker, in its order."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "clusters" if nodeid.startswith(CLUSTERS) else nodeid.partition("::")[0]

    return Lanes(config, log)
