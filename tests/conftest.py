"""Two lanes for tests that run side by side: those that start whole clusters, one after another, and all others."""

from __future__ import annotations

import pytest

CLUSTERS = ("end_to_end", "slurm")
"""Folders whose tests keep several processes busy, and wait for them with deadlines."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one group stay on one worker, in their order; files are handed out one by one."""
    for item in items:
        lane = "clusters" if item.path.parent.name in CLUSTERS else item.path.name
        item.add_marker(pytest.mark.xdist_group(lane))
