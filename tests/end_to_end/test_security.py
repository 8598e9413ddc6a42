"""Laws of what a run lays open: who listens and to whom, who may speak to its Ray, and where secrets do not go."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, start_clipo

TABLE = re.compile(r"^\| `(?P<who>[^`]+)`", re.MULTILINE)
SECRETS = {"WANDB_API_KEY": "wandb-0123456789abcdef", "HF_TOKEN": "hf_0123456789abcdefghij"}


def _listeners(family: list[psutil.Process]) -> set[tuple[str, str]]:
    """(who, address) of all TCP and UDP sockets that wait for others."""
    found = set()
    for process in family:
        try:
            name = _who(process)
            for socket in process.net_connections(kind="inet"):
                if socket.status == psutil.CONN_LISTEN or (socket.status == psutil.CONN_NONE and not socket.raddr):
                    found.add((name, socket.laddr.ip))
        except psutil.NoSuchProcess:
            continue
    return found


def _who(process: psutil.Process) -> str:
    line = process.cmdline()
    words = " ".join(line)
    if words.startswith("VLLM::Worker"):
        return "VLLM::Worker"
    for name in ("PolicyActor", "EngineActor", "RuntimeEnvAgent", "DashboardAgent", "IDLE"):
        if f"ray::{name}" in words:
            return name
    for name in ("gcs_server", "raylet"):
        if line and Path(line[0]).name == name:
            return name
    for name in ("autoscaler", "runtime_env", "log_monitor", "clipo_megatron.cli"):
        if name in words:
            return name
    return words


@pytest.fixture(scope="module")
def running(write_recipe, tmp_path_factory):
    """A run in its second step or later: its family and its folder. It ends with the module."""
    folder = tmp_path_factory.mktemp("security")
    # Ray leaves its settings in the environment of a process that used it, as this one may have.
    of_ray = {key: None for key in os.environ if key.startswith("RAY_AUTH_")}
    before = {key: os.environ.get(key) for key in SECRETS | of_ray}
    for key in of_ray:
        del os.environ[key]
    os.environ.update(SECRETS)
    try:
        process = start_clipo("train", write_recipe(folder, "run", steps=1000), "rollout.tp=2")
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    run = folder / "run"
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    yield process, run
    process.terminate()
    process.communicate(timeout=120)


def test_every_listener_of_a_run_is_on_the_loopback_interface_and_in_the_table_of_the_docs(running):
    process, _ = running
    leader = psutil.Process(process.pid)
    found = _listeners([leader, *leader.children(recursive=True)])
    assert {"gcs_server", "raylet", "PolicyActor"} <= {who for who, _ in found}
    for who, address in found:
        ip = ipaddress.ip_address(address)
        mapped = getattr(ip, "ipv4_mapped", None)
        assert (mapped or ip).is_loopback, f"{who} listens on {address}"
    told = set(TABLE.findall((ROOT / "docs" / "security.md").read_text()))
    assert {who for who, _ in found} <= told


def test_nobody_without_the_runs_token_can_speak_to_its_ray(running):
    process, _ = running
    leader = psutil.Process(process.pid)
    [gcs] = [child for child in leader.children(recursive=True) if _who(child) == "gcs_server"]
    token = next(value for key, value in gcs.environ().items() if key == "RAY_AUTH_TOKEN")
    assert len(token) == 64
    [raylet] = [child for child in leader.children(recursive=True) if _who(child) == "raylet"]
    port = int(re.search(r"--gcs-address=[\d.]+:(\d+)", " ".join(raylet.cmdline()))[1])
    assert _can_join(port, token)
    assert not _can_join(port, "0" * 64)
    assert not _can_join(port, None)


def _can_join(port: int, token: str | None) -> bool:
    """Whether a Python of its own gets the list of nodes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= (
        {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    )
    code = (
        "import sys; from ray._raylet import GcsClient; "
        f"print(len(GcsClient(address='127.0.0.1:{port}').get_all_node_info()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode == 0 and done.stdout.strip() == "1"


def test_secrets_of_the_environment_are_in_no_file_of_the_run(running):
    _, run = running
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix not in (".distcp", ".safetensors")]
    assert {"recipe.yaml", "driver.log", "policy_0.log", "engine_0.log"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, path


def test_a_rendered_job_script_has_no_secret_of_the_environment(write_recipe, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "clipo_megatron.cli",
            "launch",
            str(write_recipe(tmp_path, "run")),
            "--nodes",
            "2",
            "--render",
        ],
        env=os.environ | SECRETS,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH" in done.stdout
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
