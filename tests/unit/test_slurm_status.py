"""Laws of `clipo launch`, `status` and `why` around a job that has no folder yet, and of where they look for folders."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from clipo_megatron.cli import launch
from clipo_megatron.cli.main import main
from clipo_megatron.slurm import progress, render
from clipo_megatron.slurm.job_folder import jobs_folder
from clipo_megatron.slurm.render import HOME

RECIPE = str(HOME / "examples" / "quickstart" / "recipe.yaml")
PENDING = (
    "JobId=17 JobName=clipo-q UserId=me(7) JobState=PENDING Reason=Resources Dependency=(null) StdOut=/none/17.out"
)
SCONTROL = f'#!/bin/sh\n[ "$4" = 17 ] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}\necho "{PENDING}"\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to call commands in, a project without a site's file, and no SLURM of this machine's."""
    for name in ("CLIPO_JOBS_DIR", "CLIPO_SITE", "SLURM_SUBMIT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLIPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "home" / "slurm").mkdir(parents=True)
    (tmp_path / "home" / "clipo_megatron").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    program(tmp_path, "scontrol", SCONTROL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(place, name, text):
    path = place / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def submitted(jobs, number, content=None):
    """The folder of a job."""
    (jobs / number / "attempt-0").mkdir(parents=True)
    known = {"recipe": "r", "overrides": [], "run_folder": str(jobs / f"run-{number}"), "nodes": 1, "folder": str(jobs)}
    (jobs / number / "job.json").write_text(json.dumps(known) if content is None else content)


def test_a_job_that_waits_is_shown_with_slurms_state_and_reason(place, capsys):
    assert main(["status", "17"]) == 0
    told = capsys.readouterr().out
    assert "PENDING (Resources)" in told
    assert "clipo-q" in told
    assert main(["status", "17", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "PENDING (Resources)"
    assert main(["why", "17"]) == 1
    assert "PENDING (Resources)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "why"])
def test_a_job_that_nobody_knows_has_not_begun_or_is_elsewhere(place, capsys, command):
    assert main([command, "18"]) == 2
    told = capsys.readouterr().err
    assert "it has not begun, or its folder is elsewhere" in told
    assert "CLIPO_JOBS_DIR" in told


@pytest.mark.parametrize("content", ["{", "[]", '{"recipe": 1}'])
def test_a_damaged_jobs_file_does_not_hide_the_other_jobs(place, capsys, content):
    jobs = place / "slurm-jobs"
    submitted(jobs, "3")
    submitted(jobs, "4", content)
    submitted(jobs, "5")
    assert main(["status"]) == 2
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()[1:]] == ["3", "5"]
    assert f"{Path('slurm-jobs') / '4' / 'job.json'}: can't be read" in told.err
    assert "5/job.json" not in told.err


def test_a_recipe_that_is_being_written_does_not_hide_a_job(place, capsys):
    submitted(place / "slurm-jobs", "3")
    (place / "slurm-jobs" / "run-3").mkdir()
    (place / "slurm-jobs" / "run-3" / "recipe.yaml").write_text("run: {steps: [")
    (place / "slurm-jobs" / "run-3" / "metrics.jsonl").write_text("3\n")
    assert main(["status", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 0


SITES = (
    "CLIPO_JOBS_DIR=/shared/jobs\n",
    "export CLIPO_JOBS_DIR='/shared/my jobs'   # quoted\n",
    "BASE=/shared\nCLIPO_JOBS_DIR=$BASE/jobs\necho said\n",
    "CLIPO_JOBS_DIR=${CLIPO_JOBS_DIR:-/else}\n",
    "CLIPO_JOBS_DIR=$SLURM_SUBMIT_DIR/here\n",
    "# CLIPO_JOBS_DIR=/no\nfalse\n",
    "CLIPO_JOBS_DIR=\n",
)


@pytest.mark.parametrize("environment", ["", "/from/environment"])
@pytest.mark.parametrize("site", SITES)
def test_the_folder_of_jobs_is_the_one_that_the_batch_script_takes(place, monkeypatch, site, environment):
    (place / "home" / "slurm" / "site.env").write_text(site)
    if environment:
        monkeypatch.setenv("CLIPO_JOBS_DIR", environment)
    if "false" in site:  # it ends the batch script
        assert jobs_folder() == Path(environment or "slurm-jobs")
        return
    # The batch script's own lines, up to where it makes the folder.
    lines = (HOME / "slurm" / "train.sbatch").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("home="))
    last = next(number for number, line in enumerate(lines) if line.startswith("job="))
    script = "\n".join(["set -euo pipefail", *lines[first : last + 1], 'printf "\\n%s" "$job"'])
    variables = {**os.environ, "SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert (jobs_folder() / "17").absolute() == Path(done.stdout.splitlines()[-1])


def test_launch_status_and_why_look_where_the_sites_file_says(place, capsys):
    jobs = place / "shared" / "jobs"
    (place / "home" / "slurm" / "site.env").write_text(f"CLIPO_JOBS_DIR={jobs}\n")
    program(place, "sbatch", "#!/bin/sh\ncat >/dev/null\necho 19\n")
    assert main(["launch", RECIPE]) == 0
    assert f"its folder will be {jobs}/19" in capsys.readouterr().out
    submitted(jobs, "19")
    (jobs / "19" / "attempt-0" / "driver.log").write_text("clipo: run.folder: full; free space\n")
    assert main(["status", "19"]) == 0
    assert "run-19" in capsys.readouterr().out
    assert main(["why", "19"]) == 0
    assert "cause:  run.folder: full" in capsys.readouterr().out


def test_a_sites_file_that_is_none_ends_launch_before_it_submits(place, monkeypatch, capsys):
    program(place, "sbatch", f"#!/bin/sh\ntouch {place}/called\necho 19\n")
    (place / "home" / "slurm" / "site.env").write_text("if then\n")
    assert main(["launch", RECIPE]) == 2
    assert "site.env: bash ends in it" in capsys.readouterr().err
    monkeypatch.setenv("CLIPO_SITE", "/none.env")
    assert main(["launch", RECIPE]) == 2
    assert "CLIPO_SITE = /none.env: no such file" in capsys.readouterr().err
    assert not (place / "called").exists()


def test_an_sbatch_that_does_not_answer_may_have_submitted_the_job(place, monkeypatch, capsys):
    program(place, "sbatch", "#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(launch, "_SBATCH_S", 1)
    started = time.monotonic()
    assert main(["launch", RECIPE]) == 1
    assert time.monotonic() - started < 20
    told = capsys.readouterr().err
    assert "sbatch did not end within 1 s: the job may have been submitted" in told
    assert "squeue --me" in told


@pytest.mark.parametrize("row", ['{"step": 1, "seconds/step": null}', '{"step": "x"}', '{"step": NaN}', "[]", "{"])
def test_a_damaged_row_does_not_hide_a_job(place, capsys, row):
    jobs = place / "slurm-jobs"
    submitted(jobs, "1")
    (jobs / "1" / "attempt-²").mkdir()
    (jobs / "run-1").mkdir()
    (jobs / "run-1" / "metrics.jsonl").write_text(row + "\n")
    assert main(["status", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["attempt"], told["step_s"]) == (0, None)


def test_the_table_is_whole_in_a_pipe_and_names_are_taken_literally(place, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    name = "math_qwen3_30b_a3b_with_a_long_name_[red]"
    submitted(
        place / "slurm-jobs",
        "1",
        json.dumps({"recipe": "r", "overrides": [], "run_folder": f"/runs/{name}", "nodes": 1, "folder": "/"}),
    )
    assert main(["status", "1"]) == 0
    assert name in capsys.readouterr().out


def test_a_slurm_that_does_not_answer_is_asked_once(place, monkeypatch, capsys):
    program(place, "scontrol", "#!/bin/sh\necho asked >>asked\nexec sleep 30\n")
    monkeypatch.setattr(progress, "_SCONTROL_S", 1)
    for number in ("1", "2", "3"):
        submitted(place / "slurm-jobs", number)
    assert main(["status", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert (place / "asked").read_text() == "asked\n"


def test_a_job_that_is_launched_from_another_one_takes_nothing_of_it(place, monkeypatch):
    program(place, "sbatch", "#!/bin/sh\nenv >environment\necho 18\n")
    for name in ("SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURM_JOB_ID", "SLURMD_NODENAME", "CLIPO_LOST_NODES"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert main(["launch", RECIPE]) == 0
    lines = (place / "environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert {name for name in names if name.startswith(("SLURM", "SBATCH"))} == {"SLURM_CONF", "SBATCH_PARTITION"}
    assert "CLIPO_LOST_NODES" not in names


def test_a_project_that_is_installed_without_its_script_says_so(place, monkeypatch, capsys):
    monkeypatch.setattr(render, "SCRIPT", place / "train.sbatch")
    assert main(["launch", RECIPE, "--render"]) == 2
    assert (
        "train.sbatch: can't be read (No such file or directory); clipo launch needs the project's folder"
        in capsys.readouterr().err
    )
