"""Laws of the doctor's node level: each thing that a host can lack is found on a host that lacks it, and only there."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from support.tiny_models import make_tiny_hf

from clipo_megatron.cli.doctor import read_ports
from clipo_megatron.doctor import node, packages
from clipo_megatron.doctor.finding import Status
from clipo_megatron.doctor.job_time import Pace, check_time, read_pace
from clipo_megatron.doctor.node import NodeCase, run_node
from clipo_megatron.recipe import load_recipe
from clipo_megatron.slurm.ports import free_ports
from clipo_megatron.slurm.ray_node import own_address
from clipo_megatron.slurm.shares import ranks_per_node

GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def recipe_file(tmp_path, model):
    rows = [json.dumps({"question": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    content = {
        "run": {"name": "r", "folder": str(tmp_path / "runs"), "steps": 5, "device": "cpu"},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [str(tmp_path / "train.jsonl")]},
        "layout": {"micro_batch_tokens": 4096},
        "rollout": {"max_response_tokens": 256},
        "algorithm": {"prompts_per_step": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file)


def failed(case):
    findings, _ = run_node(case)
    assert all(finding.remedy for finding in findings if finding.status in (Status.WARN, Status.FAIL))
    return {finding.check for finding in findings if finding.status is Status.FAIL}


@contextlib.contextmanager
def small_file_system(folder, kind, options):
    """A file system of its own at `folder`; needs root and the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", kind, "-o", options, kind, folder], capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_sound_host_fails_nothing(recipe):
    assert failed(NodeCase(recipe=recipe)) == set()


def test_a_read_only_run_folder_is_found(recipe, tmp_path):
    with small_file_system(tmp_path / "runs", "tmpfs", "ro,size=1m"):
        findings, _ = run_node(NodeCase(recipe=recipe))
    told = [finding for finding in findings if finding.status is Status.FAIL]
    assert {finding.check for finding in told} == {"run folder"}
    assert "Read-only file system" in told[0].cause
    assert str(tmp_path / "runs") in told[0].cause


def test_a_read_only_log_folder_is_found(recipe, tmp_path):
    with small_file_system(tmp_path / "logs", "tmpfs", "ro,size=1m"):
        assert failed(NodeCase(recipe=recipe, log_folders=[tmp_path / "logs"])) == {"log folder"}


def test_a_full_temporary_folder_is_found(recipe, tmp_path, monkeypatch):
    with small_file_system(tmp_path / "tmp", "tmpfs", "size=64k"):
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
        with contextlib.suppress(OSError), (tmp_path / "tmp" / "full").open("wb") as file:
            file.write(b"\0" * (1 << 20))
        findings = [node.check_temporary(tmp_path / "tmp", holds_ray=False)]
        assert failed(NodeCase(recipe=recipe)) == {"temporary folder"}
    assert "No space left" in findings[0].cause


def test_a_small_temporary_folder_is_found_before_it_is_full(tmp_path):
    with small_file_system(tmp_path / "tmp", "tmpfs", "size=10m"):
        assert node.check_temporary(tmp_path / "tmp", holds_ray=False).status is Status.FAIL
    with small_file_system(tmp_path / "tmp", "tmpfs", "size=1g"):
        assert node.check_temporary(tmp_path / "tmp", holds_ray=False).status is Status.WARN


def test_no_variable_is_offered_that_would_not_move_a_full_folder(tmp_path):
    """TMPDIR moves the temporary files of Python; Ray's session is in /tmp, as a folder of that name in the code says."""
    missing = tmp_path / "none"
    of_ray, other = (node.check_temporary(missing, holds_ray=holds_ray) for holds_ray in (True, False))
    assert of_ray.status is other.status is Status.FAIL
    assert "set TMPDIR" not in of_ray.remedy
    assert "whatever TMPDIR says" in of_ray.remedy
    assert "set TMPDIR" in other.remedy
    for file in ("cluster/session.py", "slurm/ray_node.py"):
        assert f'"{node._SCRATCH}"' in (Path(node.__file__).parents[1] / file).read_text()


def test_too_little_shared_memory_is_found(tmp_path):
    with small_file_system(tmp_path / "shm", "tmpfs", "size=64m"):
        assert node.check_shared_memory(tmp_path / "shm", needed=32 << 20).status is Status.OK
        assert node.check_shared_memory(tmp_path / "shm", needed=65 << 20).status is Status.FAIL
    assert node.check_shared_memory(tmp_path / "none", needed=1).status is Status.FAIL


def test_a_temporary_folder_is_too_long_exactly_where_no_process_can_listen_in_it(recipe, monkeypatch, tmp_path):
    listen = "from multiprocessing.connection import Listener; Listener(family='AF_UNIX').close()"
    for length in (74, 75, 76, 77):
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="x" * (length - len("/tmp/") - 8)) as folder:
            assert len(folder) == length
            environment = {**os.environ, "TMPDIR": folder}
            ended = subprocess.run([sys.executable, "-c", listen], env=environment, capture_output=True, text=True)
        assert (ended.returncode == 0) == (node.check_socket_path(folder).status is Status.OK), ended.stderr
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    assert failed(NodeCase(recipe=recipe)) == {"socket path"}


@pytest.mark.parametrize(("limit", "status"), [(1024, "FAIL"), (20000, "WARN"), (65535, "OK"), (-1, "OK")])
def test_a_low_limit_of_open_files_is_found(limit, status):
    assert node.check_open_files(limit).status == status


def test_the_limit_that_is_looked_at_is_this_hosts(recipe, monkeypatch):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    findings, _ = run_node(NodeCase(recipe=recipe))
    told = next(finding for finding in findings if finding.check == "open files")
    assert told.cause == f"ulimit -Hn = {'unlimited' if hard < 0 else hard}"


@pytest.mark.parametrize(
    ("limit", "is_gpu", "status"), [(8 << 20, True, "WARN"), (8 << 20, False, "OK"), (-1, True, "OK")]
)
def test_little_locked_memory_is_told_where_nccl_may_need_it(limit, is_gpu, status):
    assert node.check_locked_memory(limit, is_gpu=is_gpu).status == status


ENVIRONMENTS = {
    "nothing set": ({}, "OK"),
    "expandable segments": ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "FAIL"),
    "expandable segments by the new name": ({"PYTORCH_ALLOC_CONF": "a:1,expandable_segments:True"}, "FAIL"),
    "a rank of another job": ({"RANK": "3"}, "WARN"),
    "a proxy": ({"http_proxy": "http://p:3128"}, "WARN"),
    "a proxy that spares the nodes": ({"http_proxy": "http://p:3128", "no_proxy": "n1,n2"}, "OK"),
    "no home": ({"HOME": "/nowhere"}, "WARN"),
}


@pytest.mark.parametrize("what", ENVIRONMENTS)
def test_variables_that_mislead_workers_are_found(what, tmp_path):
    variables, status = ENVIRONMENTS[what]
    findings = node.check_environment({"HOME": str(tmp_path)} | variables, is_gpu=True)
    assert [finding.status for finding in findings] == [status]


def test_a_name_that_leads_to_this_host_alone_is_told():
    assert node.check_address("localhost").status is Status.WARN
    assert node.check_address("no-such-host.invalid").status is Status.WARN
    assert node.check_address("10.77.0.1").status is Status.OK


def test_an_interface_that_a_host_lacks_is_found(recipe, monkeypatch):
    monkeypatch.setenv("CLIPO_INTERFACE", "lo")
    assert failed(NodeCase(recipe=recipe, find_address=own_address)) == set()
    monkeypatch.setenv("CLIPO_INTERFACE", "bond9")
    assert failed(NodeCase(recipe=recipe, find_address=own_address)) == {"address"}


def test_an_interface_that_can_not_be_looked_up_is_told(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPO_INTERFACE", "eth0")
    monkeypatch.setenv("PATH", str(tmp_path))  # an image without iproute2
    finding = node.check_own_address(own_address)
    assert finding.status is Status.FAIL
    assert "CLIPO_INTERFACE = eth0: its address can't be looked up" in finding.cause
    assert "iproute2" in finding.remedy


def test_a_taken_port_is_found_with_its_service(recipe, tmp_path):
    with socket.socket() as server, socket.socket() as probe:
        server.bind(("", 0))
        server.listen()
        probe.bind(("", 0))
        free = probe.getsockname()[1]
        probe.close()
        taken = server.getsockname()[1]
        (tmp_path / "ports").write_text(f"host=n1\nray={taken}\nother={free}\n")
        ports = read_ports(tmp_path / "ports")
        assert ports == {"ray": taken, "other": free}
        findings, _ = run_node(NodeCase(recipe=recipe, ports=ports))
        assert failed(NodeCase(recipe=recipe, ports={"other": free})) == set()
    told = [finding for finding in findings if finding.status is Status.FAIL]
    assert [finding.check for finding in told] == ["ports"]
    assert f"port {taken} of ray" in told[0].cause


def test_too_few_free_ports_are_found(recipe):
    def find(count):
        raise OSError(f"{count} ports are needed, 3 of 20000 to 20002 are free")

    assert failed(NodeCase(recipe=recipe, find_ports=find)) == {"free ports"}
    assert failed(NodeCase(recipe=recipe, find_ports=free_ports)) == set()


def test_workers_that_do_not_fit_on_the_jobs_nodes_are_found_and_the_others_are_shared(recipe):
    finding, ranks = node.find_ranks(recipe, lambda recipe: ranks_per_node(recipe, {"CLIPO_RAY_CPUS": "0"}))
    assert (finding.status, ranks) == (Status.FAIL, recipe.layout.world_size)
    assert "the 1 nodes of the cluster have 0 slots" in finding.cause
    assert "take more nodes or fewer workers" in finding.remedy
    finding, ranks = node.find_ranks(recipe, lambda recipe: ranks_per_node(recipe, {"CLIPO_RAY_CPUS": "99"}))
    assert (finding.status, ranks) == (Status.OK, recipe.layout.world_size)
    assert node.find_ranks(recipe, None)[0].status is Status.SKIP


def test_host_memory_below_what_the_ranks_need_is_found(recipe):
    needed = node.estimate_memory(recipe, node.read_architecture(Path(recipe.model.path))).host_bytes
    assert needed > 0
    assert node.check_host_memory(recipe, available=3 * needed - 1, ranks=3).status is Status.FAIL
    assert node.check_host_memory(recipe, available=3 * needed, ranks=3).status is Status.OK
    assert node.check_host_memory(recipe, available=None, ranks=3).status is Status.SKIP


def test_a_job_that_ends_before_one_step_and_its_save_would_is_found(recipe, tmp_path, monkeypatch):
    (tmp_path / "runs" / "r").mkdir(parents=True)
    rows = [
        {"step": 1, "seconds/step": 500.0},
        {"step": 2, "seconds/step": 20.0, "checkpoint/snapshot_seconds": 10.0, "checkpoint/write_seconds": 30.0},
    ]
    lines = [*(json.dumps(row) for row in rows), "[1]", '{"step": 3, "seconds/st']
    (tmp_path / "runs" / "r" / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 530))
    assert failed(NodeCase(recipe=recipe)) == {"job time"}
    assert read_pace(tmp_path / "runs" / "r" / "metrics.jsonl") == Pace(step_s=500.0, save_s=40.0)
    assert read_pace(tmp_path / "none") is None


def test_a_run_of_one_step_an_allocation_gets_its_second_attempt():
    pace, one_step, two_steps = Pace(step_s=31 * 60, save_s=60), 32 * 60, 63 * 60
    ends = {one_step - 1: "FAIL", one_step: "WARN", 3600: "WARN", two_steps - 1: "WARN", two_steps: "OK"}
    found = {end: check_time({"SLURM_JOB_END_TIME": str(end)}, pace, now=0.0).status for end in ends}
    assert found == ends
    assert check_time({"SLURM_JOB_END_TIME": "1"}, None, now=0.0).status is Status.OK


def test_a_missing_package_is_found(recipe, monkeypatch):
    versions = packages._versions()
    for name in ("ray", "torch"):
        without = {package: version for package, version in versions.items() if package != name}
        monkeypatch.setattr(packages, "_versions", lambda without=without: without)
        assert failed(NodeCase(recipe=recipe)) == {"packages"}


def test_another_version_and_other_code_change_the_facts(tmp_path):
    """Both looked at by a Python that finds a package's metadata, or the project's code, elsewhere first."""
    facts = packages.package_facts()
    info = tmp_path / "ray-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.1\n")
    code = "import json; from clipo_megatron.doctor.packages import package_facts; print(json.dumps(package_facts()))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    other = json.loads(done.stdout)
    assert {name for name in facts if facts[name] != other[name]} == {"package ray"}
    assert other["package ray"] == "0.1"


def test_other_model_files_weights_and_data_change_their_facts(recipe, recipe_file, tmp_path):
    before = run_node(NodeCase(recipe=recipe))[1]
    other = make_tiny_hf(tmp_path / "other", "qwen3", seed=1)
    changed = run_node(NodeCase(recipe=load_recipe(recipe_file, [f"model.path={other}"])))[1]
    assert {name for name in before if before[name] != changed[name]} - {"clock ahead", "recipe"} == {"model weights"}
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    changed = run_node(NodeCase(recipe=recipe))[1]
    assert {name for name in before if before[name] != changed[name]} - {"clock ahead"} == {"data"}
    missing = run_node(NodeCase(recipe=load_recipe(recipe_file, ["model.path=/nowhere"])))[1]
    assert missing["model weights"] == "missing"


def test_the_size_of_rays_object_store_is_the_clusters():
    from clipo_megatron.cluster.session import OBJECT_STORE_BYTES

    assert node._OBJECT_STORE == OBJECT_STORE_BYTES


def _on_a_gpu(recipe):
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cuda"})})


def test_a_package_that_crashes_is_named_on_its_host(recipe, tmp_path, monkeypatch):
    (tmp_path / "megatron.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    (finding,) = [finding for finding in run_node(NodeCase(recipe=_on_a_gpu(recipe)))[0] if finding.check == "imports"]
    assert finding.status is Status.FAIL
    assert finding.cause.startswith("megatron-core: exit code 1: OSError: libcudart.so.13")


def test_a_host_whose_kernel_takes_no_filter_is_told(recipe, tmp_path, monkeypatch):
    def found():
        return next(finding for finding in run_node(NodeCase(recipe=recipe))[0] if finding.check == "confinement")

    assert found().status is Status.OK
    (tmp_path / "sitecustomize.py").write_text("import platform\nplatform.machine = lambda: 'riscv64'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert found().status is Status.WARN
    assert "not confined on this host: a filter of system calls is written for Linux on x86_64 alone" in found().cause
