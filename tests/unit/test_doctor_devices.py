"""Laws of the doctor's look at GPUs: faults that nvidia-smi tells, and GPUs that are there and would stand idle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml

from clipo_megatron.cli.main import main
from clipo_megatron.doctor import node, static
from clipo_megatron.doctor.devices import device_findings, gpu_findings, parse_gpus, query_gpus
from clipo_megatron.doctor.finding import Finding, Status
from clipo_megatron.recipe import load_recipe
from clipo_megatron.slurm.render import HOME

GOOD = "0, NVIDIA H100 80GB HBM3, 550.54, 81559, 4, 0, Enabled, Not Active"
GPUS = {
    "sound": ([GOOD], "OK"),
    "uncorrected errors": ([GOOD.replace("4, 0,", "4, 2,")], "FAIL"),
    "memory in use": ([GOOD.replace("81559, 4,", "81559, 30000,")], "FAIL"),
    "slowed down": ([GOOD.replace("Not Active", "Active")], "WARN"),
    "no persistence": ([GOOD.replace("Enabled", "Disabled")], "WARN"),
    "without ECC": ([GOOD.replace("4, 0,", "4, [N/A],")], "OK"),
    "one too few": ([], "FAIL"),
    "a lost GPU": (["Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost"], "FAIL"),
}


@pytest.mark.parametrize("what", GPUS)
def test_faults_of_gpus_are_found_in_what_nvidia_smi_tells(what):
    lines, status = GPUS[what]
    findings = gpu_findings(parse_gpus("\n".join(lines)), {"SLURM_GPUS_ON_NODE": "1"})
    assert [finding.status for finding in findings] == [status]


def test_gpus_that_slurm_did_not_give_to_the_job_are_no_concern_of_it():
    """Where devices are not confined a job sees all of a node."""
    lines = [GOOD.replace("0, NVIDIA", f"{index}, NVIDIA") for index in range(8)]
    lines[5] = lines[5].replace("81559, 4,", "81559, 30000,")
    gpus = parse_gpus("\n".join(lines))
    mine = {"SLURM_GPUS_ON_NODE": "3", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert [found.status for found in gpu_findings(gpus, mine)] == [Status.OK]
    others = {"SLURM_GPUS_ON_NODE": "3", "CUDA_VISIBLE_DEVICES": "4,5,6"}
    assert "GPU 5 (NVIDIA H100 80GB HBM3): 30000 MiB in use" in gpu_findings(gpus, others)[0].cause


def test_a_jobs_gpus_are_as_large_as_its_node_says_and_a_login_nodes_do_not_count(tmp_path, monkeypatch, capsys):
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "{GOOD.replace("81559", "143771")}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seen = []
    monkeypatch.setattr(static, "run_static", lambda case: seen.append(case.gpu_gib) or [])
    monkeypatch.setattr(node, "run_node", lambda case: ([], {}))
    recipe = str(HOME / "examples" / "quickstart" / "recipe.yaml")
    for options in (["--level", "node"], ["--level", "static"], ["--level", "node", "--gpu-gib", "64"]):
        main(["doctor", recipe, *options, "--quiet"])
    assert seen == [143771 / 1024, 80.0, 64.0]


def test_a_gpu_is_asked_for_by_the_fields_that_are_read(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi answers only the query that the parser understands."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$(echo "$1" | tr , "\\n" | wc -l)" = 8 ] && echo "{GOOD}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpus = query_gpus()
    assert [gpu.name for gpu in gpus] == ["NVIDIA H100 80GB HBM3"]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert gpu_findings(query_gpus(), {})[0].status is Status.FAIL


GRANTS = {
    "none": ({}, "SKIP"),
    "no GPU": ({"SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_ID": "7"}, "SKIP"),
    "eight": ({"SLURM_GPUS_ON_NODE": "8"}, "FAIL"),
    "a list for the job": ({"SLURM_JOB_GPUS": "0,1"}, "FAIL"),
    "the first one for the step": ({"SLURM_STEP_GPUS": "0"}, "FAIL"),
    "those visible to the step": ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": "7"}, "FAIL"),
}


@pytest.mark.parametrize("what", GRANTS)
def test_a_host_without_nvidia_smi_is_not_looked_at_unless_slurm_gave_its_gpus(what, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    variables, status = GRANTS[what]
    (finding,) = gpu_findings(query_gpus(), variables)
    assert finding.status == status
    first = next((f"{variable} = {value}" for variable, value in variables.items()), "")
    assert first in finding.cause or status == "SKIP"


def test_gpus_that_are_visible_outside_of_a_job_are_no_grant(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert [found.status for found in gpu_findings(query_gpus(), {"CUDA_VISIBLE_DEVICES": "0"})] == [Status.SKIP]


def _device(recipe_file: Path, device: str) -> Finding | None:
    """What is said of the device; None: nothing."""
    recipe = load_recipe(recipe_file, [f"run.device={device}"])
    return next((found for found in device_findings(recipe, needs_torch=True) if found.check == "device"), None)


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    run = {"name": "r", "folder": str(tmp_path / "runs"), "steps": 5}
    path.write_text(yaml.safe_dump({"run": run, "model": {"path": "/m"}, "data": {"train": ["/t.jsonl"]}}))
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that can't use CUDA")
@pytest.mark.parametrize("by", ["nvidia-smi", "SLURM"])
def test_gpus_that_torch_can_not_use_are_found_unless_the_run_wants_none(by, recipe_file, tmp_path, monkeypatch):
    for variable in ("SLURM_JOB_ID", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = _device(recipe_file, "auto")
    assert told is not None
    assert (told.status, told.cause) == (Status.OK, "run.device = auto: no GPU here: the run is on CPUs")
    if by == "SLURM":
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    else:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f'echo "{GOOD}"\n' for _ in range(8)))
        (tmp_path / "nvidia-smi").chmod(0o755)
    for device in ("auto", "cuda"):
        told = _device(recipe_file, device)
        assert told is not None
        assert told.status is Status.FAIL
        assert f"run.device = {device}" in told.cause
        assert ("SLURM_GPUS_ON_NODE = 8" if by == "SLURM" else "nvidia-smi lists 8 GPUs") in told.cause
    assert _device(recipe_file, "cpu") is None
