"""Laws of the memory that a process may take: the least limit of its cgroup and of all above it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipo_megatron.checks.host_memory import allowed_bytes, available_bytes, cgroup_limit

UNLIMITED = "9223372036854771712"
"""What version 1 says where there is no limit."""
TREES = {
    "version 2": ("0::{path}\n", "sys/fs/cgroup", "memory.max", "max"),
    "version 1": ("5:devices:/\n4:cpu,memory:{path}\n", "sys/fs/cgroup/memory", "memory.limit_in_bytes", UNLIMITED),
    "both": ("4:memory:{path}\n0::/elsewhere\n", "sys/fs/cgroup/memory", "memory.limit_in_bytes", UNLIMITED),
}


def _system(root: Path, tree: str, path: str, limits: dict[str, int]) -> Path:
    """A system whose process is in the cgroup `path`, with limits by cgroup; all others have none."""
    line, mounted, file, unlimited = TREES[tree]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line.format(path=path))
    for cgroup in ("/", "/slurm", "/slurm/job_7", "/slurm/job_7/step_0", "/slurm/job_8"):
        folder = root / mounted / cgroup.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(f"{limits.get(cgroup, unlimited)}\n")
    return root


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("least", ["/", "/slurm", "/slurm/job_7", "/slurm/job_7/step_0"])
def test_the_least_limit_of_all_levels_counts(tree, least, tmp_path):
    limits = {"/": 900, "/slurm": 800, "/slurm/job_7": 700, "/slurm/job_7/step_0": 600, "/slurm/job_8": 1}
    system = _system(tmp_path, tree, "/slurm/job_7/step_0", limits | {least: 500})
    assert cgroup_limit(system) == 500


@pytest.mark.parametrize("tree", TREES)
def test_the_limit_of_a_job_holds_where_its_step_has_none(tree, tmp_path):
    assert cgroup_limit(_system(tmp_path, tree, "/slurm/job_7/step_0", {"/slurm/job_7": 700})) == 700


@pytest.mark.parametrize("path", ["/docker/0123", "/../../system.slice/x"])
def test_a_container_that_has_only_its_own_cgroup_mounted_is_under_its_limit(path, tmp_path):
    assert cgroup_limit(_system(tmp_path, "version 2", path, {"/": 300, "/slurm": 1})) == 300


def test_where_nothing_is_limited_the_machine_is_the_limit(tmp_path):
    assert cgroup_limit(_system(tmp_path, "version 2", "/slurm", {})) is None
    assert cgroup_limit(tmp_path / "no_system") is None
    available, allowed = available_bytes(), allowed_bytes()
    assert available is None or (allowed is not None and allowed <= available * 1.1)
