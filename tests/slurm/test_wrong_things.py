"""Laws of a job that can't run: what a new user gets wrong ends it within a minute, and `clipo why` tells first where and why."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from conftest import told
from support.prepared_run import ROOT

WITHIN_S = 60


def why(job, folder):
    """The first three lines of `clipo why`: node, cause, remedy."""
    done = subprocess.run(
        [sys.executable, "-m", "clipo_megatron.cli", "why", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr + told(job, folder)
    assert [line.partition(":")[0] for line in lines[:3]] == ["node", "cause", "remedy"]
    return lines[:3]


def ends(lab, job, folder, *, within_s=WITHIN_S):
    """Wait for the failure of a job; its node, cause and remedy as `clipo why` tells them."""
    started = time.monotonic()
    state = lab.wait(job, "FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", timeout_s=within_s)["JobState"]
    assert state == "FAILED", told(job, folder)
    print(f"ended after {time.monotonic() - started:.0f} s")
    return why(job, folder)


@contextmanager
def mounted(lab, node, script, undo):
    """Change a node's files for a while."""
    lab.on_node(node, "bash", "-c", script)
    try:
        yield
    finally:
        lab.on_node(node, "bash", "-c", undo)


def test_a_model_folder_that_one_node_lacks_is_told_of_that_node(lab, submit_run, prepared):
    model = prepared / "policy"
    with mounted(lab, "n2", f"mount -t tmpfs tmpfs {model}", f"umount {model}"):
        node, cause, remedy = ends(lab, *submit_run("model", CLIPO_DOCTOR="on"))
    assert "n2, in phase checks" in node
    assert f"{model}: no config.json in it" in cause
    assert "give the folder of a Hugging Face model" in remedy


def test_a_full_tmp_is_told_of_its_node(lab, submit_run):
    fill = "mount -t tmpfs -o size=64k tmpfs /var/tmp; mount -o remount,size=1m /tmp; head -c 2m /dev/zero >/tmp/full || true"
    with mounted(lab, "n2", fill, "rm -f /tmp/full; mount -o remount,size=50% /tmp; umount /var/tmp"):
        node, cause, remedy = ends(lab, *submit_run("tmp", CLIPO_DOCTOR="on"))
    assert "n2, in phase checks" in node
    assert "/tmp: can't be written to (No space left on device)" in cause
    assert "free space in /tmp" in remedy


def test_a_log_folder_that_is_read_only_on_a_node_is_told_of_it(lab, submit_run, tmp_path):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    with mounted(lab, "n2", f"mount --bind {jobs} {jobs}; mount -o remount,ro,bind {jobs}", f"umount {jobs}"):
        node, cause, remedy = ends(lab, *submit_run("logs", CLIPO_DOCTOR="on"))
    assert "n2" in node
    assert "ead-only file system" in cause
    assert str(jobs) in cause
    assert "writ" in remedy


def test_a_run_folder_that_is_read_only_on_a_node_is_told_of_it(lab, submit_run, tmp_path):
    (tmp_path / "runs").mkdir()
    script = f"mount --bind {tmp_path}/runs {tmp_path}/runs; mount -o remount,ro,bind {tmp_path}/runs"
    with mounted(lab, "n2", script, f"umount {tmp_path}/runs"):
        node, cause, remedy = ends(lab, *submit_run("ro", f"run.folder={tmp_path}/runs", CLIPO_DOCTOR="on"))
    assert "n2, in phase checks" in node
    assert f"{tmp_path}/runs is no folder that can be written to" in cause
    assert "choose another one" in remedy


def test_a_typo_in_the_recipe_is_told_with_the_nearest_key(lab, submit_run):
    node, cause, remedy = ends(lab, *submit_run("typo", "layout.wold_size=2", CLIPO_DOCTOR="on"))
    assert "n1, in phase checks" in node
    assert "layout.wold_size: unknown key" in cause
    assert "did you mean 'layout.world_size'?" in remedy


def test_another_version_of_a_package_on_one_node_is_told_with_both(lab, submit_run, tmp_path):
    installed = Path(str(metadata.distribution("ray")._path)) / "METADATA"
    version = metadata.version("ray")
    other = tmp_path / "METADATA"
    other.write_text(installed.read_text().replace(f"\nVersion: {version}\n", "\nVersion: 2.9.9\n", 1))
    with mounted(lab, "n2", f"mount --bind {other} {installed}", f"umount {installed}"):
        node, cause, remedy = ends(lab, *submit_run("version", CLIPO_DOCTOR="on"))
    assert "n2, in phase checks" in node
    assert f"package ray: 2.9.9 on this host, {version} on n1" in cause
    assert "install the same version on all nodes" in remedy


def test_a_node_without_a_free_port_is_told(lab, submit_run):
    """Ray's ports lie below those that the system gives to anyone; here the system gives away all of them."""
    setting = "/proc/sys/net/ipv4/ip_local_port_range"
    before = lab.on_node("n2", "cat", setting)
    with mounted(lab, "n2", f"echo 20010 60999 >{setting}", f"echo {before} >{setting}"):
        node, cause, remedy = ends(lab, *submit_run("ports", CLIPO_DOCTOR="on"))
    assert "n2, in phase checks" in node
    assert "ports are needed" in cause
    assert "ss -ltnp" in remedy


def test_a_rank_that_hangs_is_told_with_its_node(lab, submit_run, tmp_path):
    job, folder = submit_run(
        "hung",
        "run.steps=1000",
        "run.worker_timeout_s=30",
        "sync.timeout_s=20",
        "checkpoint.every=0",
        CLIPO_DOCTOR="off",
    )
    metrics, log = tmp_path / "hung" / "metrics.jsonl", tmp_path / "hung" / "logs" / "policy_1.log"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline, told(job, folder)
        assert lab.job(job)["JobState"] in ("PENDING", "RUNNING"), told(job, folder)
        time.sleep(0.5)
    named = re.search(r"rank 1 is process (\d+) on (\S+)", log.read_text())
    assert named is not None
    pid, host = named.groups()
    lab.on_node(host, "kill", "-STOP", pid)
    node, cause, remedy = ends(lab, job, folder)
    assert host in node
    assert f"policy_1 on {host} did not answer" in cause
    # 30 s: of a phase of the run, or of links and the 10 s more that their driver waits; 20 s: of other parts of a sync.
    assert re.search(r"was not done after [23]0 s", cause)
    assert str(log) in remedy
