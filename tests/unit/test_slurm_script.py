"""Laws of the batch script's own decisions, with SLURM's commands played by small ones: what ends an attempt, and what follows.

The script on a real SLURM: tests/slurm.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from clipo_megatron.slurm.job_folder import attempts
from clipo_megatron.slurm.render import HOME, SCRIPT
from clipo_megatron.slurm.why import explain

_SRUN = """\
#!/bin/bash
printf '%s\\n' "$*" >>"$CALLS/srun"
case "$*" in
  --help) echo "--container-image=PATH" ;;
  *job_folder*)
    [[ -z $TOLD_EARLY ]] || kill -USR1 "$(ps -o ppid= "$PPID")" # above timeout
    cp "$CALLS/job.json" "$CALLS/run_folder" "$CALLS/slurm-jobs/7/" ;;
  *ray_node*)
    [[ $RAY_STAYS ]] || exit 0
    trap 'echo told >>"$CALLS/told"; exit' TERM
    echo started >>"$CALLS/started"
    for ((i = 0; i < 200; i++)); do /bin/sleep 0.1; done ;;
  *driver.log*)
    [[ -z $TOLD ]] || { trap "" USR1 && echo $$ >"$CLIPO_ATTEMPT/driver.pid" && kill -USR1 "$PPID" && /bin/sleep 0.5; }
    until [[ -z $RAY_STAYS || $(wc -l <"$CALLS/started") == 2 ]]; do /bin/sleep 0.1; done
    exit "$DRIVER_CODE" ;;
  *--immediate=30*) [[ -z $DEAD_NODE || "$*" != *"$DEAD_NODE"* && "$*" != *--ntasks=2* ]] ;;
  *writable*) [[ -z $DEAD_AT_START ]] ;;
esac
"""
_SCONTROL = """\
#!/bin/bash
case "$*" in
  *hostnames*) printf 'n1\\nn2\\n' ;;
  requeue*)
    [[ -z $RAY_STAYS ]] || cp "$CALLS/told" "$CALLS/told-before"
    echo asked >>"$CALLS/requeue"
    (($(wc -l <"$CALLS/requeue") > REFUSALS)) ;;
  *"show job"*) echo "JobId=7 Requeue=1 EndTime=Unknown" ;;
esac
"""


class Job:
    """A job of two nodes. `attempt` runs the script once, as SLURM does each time that it starts the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / 'läufe "a\\b"' / "run"
        (folder / "bin").mkdir()
        for name, text in {
            "srun": _SRUN,
            "scontrol": _SCONTROL,
            "squeue": "#!/bin/bash\n",
            "hostname": "#!/bin/bash\necho n1\n",
            "sleep": "#!/bin/bash\n",
        }.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        job = {"recipe": "r.yaml", "overrides": [], "run_folder": str(self.run), "nodes": 2, "folder": str(folder)}
        (folder / "job.json").write_text(json.dumps(job, indent=1) + "\n")
        (folder / "run_folder").write_text(f"{self.run}\n")

    def attempt(self, driver_code: int, *, left_s: float = 60, **environment: str) -> int:
        done = subprocess.run(
            ["bash", str(SCRIPT), "r.yaml"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env={
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "CALLS": str(self.folder),
                "CLIPO_HOME": str(HOME),
                "CLIPO_DOCTOR": "off",
                "DRIVER_CODE": str(driver_code),
                "DEAD_NODE": "",
                "RAY_STAYS": "",
                "DEAD_AT_START": "",
                "REFUSALS": "0",
                "TOLD": "",
                "TOLD_EARLY": "",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_END_TIME": str(int(time.time() + left_s)),
                "SLURM_SUBMIT_DIR": str(self.folder),
                "SLURMD_NODENAME": "n1",
                **environment,
            },
        )
        self.told = done.stderr
        return done.returncode

    def phases(self) -> list[str]:
        return [(attempt / "phase").read_text().strip() for attempt in attempts(self.folder / "slurm-jobs" / "7")]

    def cause(self, attempt: int) -> tuple[str, str, str]:
        """Host, cause and remedy, as `clipo why` tells them."""
        job = self.folder / "slurm-jobs" / "7"
        first = explain(job, job / f"attempt-{attempt}").first
        assert first is not None
        return first.host, first.cause, first.remedy

    def requeues(self) -> int:
        asked = self.folder / "requeue"
        return len(asked.read_text().splitlines()) if asked.exists() else 0


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_job_that_uses_up_its_time_twice_without_a_new_checkpoint_ends(job):
    assert (job.attempt(85), job.attempt(85)) == (0, 1)
    assert (job.phases(), job.requeues()) == (["requeue", "failed"], 1)
    host, cause, remedy = job.cause(1)
    assert host == "n1"
    assert "two attempts in a row used up their time without a new checkpoint (newest: none)" in cause
    assert "--time" in remedy


def test_a_job_that_saves_in_every_attempt_or_is_told_to_stop_early_goes_on(job):
    for step in range(1, 4):
        (job.run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        assert job.attempt(85) == 0
    for code in (85, 138, 85):  # an hour is left: not its time is too short
        assert job.attempt(code, left_s=3600, TOLD="1") == 0
    assert job.requeues() == 6


def test_ray_s_steps_hear_of_the_end_before_the_job_is_put_back(job):
    """One that lives on could cancel the next attempt's steps, which have the same numbers."""
    assert job.attempt(85, left_s=3600, RAY_STAYS="1") == 0
    assert (job.folder / "told-before").read_text() == "told\ntold\n"


def test_a_requeue_that_is_refused_is_asked_for_again_and_told_when_it_stays_so(job):
    assert job.attempt(85, left_s=3600, TOLD="1", REFUSALS="3") == 0
    assert (job.phases(), job.requeues()) == (["requeue"], 4)
    assert job.attempt(85, left_s=3600, TOLD="1", REFUSALS="1000") == 1
    assert job.phases() == ["requeue", "failed"]
    assert "scontrol requeue is refused for four minutes" in job.cause(1)[1]
    assert "submit the job again" in job.cause(1)[2]


@pytest.mark.parametrize(("code", "cause"), [(2, "the driver refused the run"), (1, "the run failed with exit code 1")])
def test_an_attempt_that_failed_keeps_its_cause_when_the_job_is_put_back_by_hand(job, code, cause):
    assert job.attempt(code) == code
    before = (job.folder / "slurm-jobs" / "7" / "attempt-0" / "batch.log").read_text()
    assert job.attempt(0) == 0
    assert (job.folder / "slurm-jobs" / "7" / "attempt-0" / "batch.log").read_text() == before
    assert (job.phases(), job.requeues()) == (["failed", "done"], 0)
    assert cause in job.cause(0)[1]


def test_a_run_that_failed_on_nodes_that_answer_one_by_one_is_not_put_back(job):
    slow = job.folder / "bin" / "srun"  # a step over both nodes fails, one on each is there
    slow.write_text(_SRUN.replace("*--immediate=30*) [[ -z", '*--immediate=30*) [[ "$*" != *--ntasks=2* && -z'))
    assert (job.attempt(1), job.phases(), job.requeues()) == (1, ["failed"], 0)


@pytest.mark.parametrize("at_start", ["", "yes"])
def test_a_node_that_does_not_answer_is_named_and_the_job_is_put_back(job, at_start):
    assert job.attempt(1, DEAD_NODE="n2", DEAD_AT_START=at_start) == 0
    assert (job.phases(), job.requeues()) == (["requeue"], 1)
    host, cause, remedy = job.cause(0)
    assert (host, cause) == ("n2", "the node was lost: it does not answer")
    assert remedy == "attempt 1 goes on from the newest checkpoint on other nodes"


def test_a_node_that_is_not_fit_and_answers_ends_the_job(job):
    assert (job.attempt(0, DEAD_AT_START="yes"), job.phases(), job.requeues()) == (2, ["failed"], 0)


def test_with_a_container_every_step_of_the_run_has_its_image_and_mounts(job):
    assert job.attempt(0, CONTAINER_IMAGE="/images/a b.sqsh", CONTAINER_MOUNTS="/data:/data") == 0
    calls = (job.folder / "srun").read_text().splitlines()
    steps = [call for call in calls if "clipo_megatron" in call]
    assert len(steps) == 4  # job's folder, Ray's head and worker, driver
    jobs = job.folder / "slurm-jobs"
    mounts = f"--container-mounts=/data:/data,{jobs}:{jobs},/tmp:/tmp"
    assert all(f"--overlap --container-image=/images/a b.sqsh {mounts} " in call for call in steps)


def test_a_job_whose_signal_comes_before_its_run_can_begin_is_not_put_back_for_ever(job):
    assert (job.attempt(0, TOLD_EARLY="1"), job.attempt(0, TOLD_EARLY="1")) == (
        0,
        0,
    )  # its folder is there the second time
    assert job.phases() == ["requeue", "done"]
    (job.folder / "slurm-jobs" / "7" / "job.json").unlink()
    assert job.attempt(0, TOLD_EARLY="1") == 0
    (job.folder / "slurm-jobs" / "7" / "job.json").unlink()
    assert job.attempt(0, TOLD_EARLY="1") == 1
    assert "two attempts in a row used up their time" in job.cause(3)[1]


def test_a_run_that_ends_itself_again_and_again_without_saving_ends_the_job_whatever_time_is_left(job):
    """Its step or its save takes longer than the job has; nobody told it to stop."""
    assert (job.attempt(85, left_s=7200), job.attempt(85, left_s=7200)) == (0, 1)
    assert "two attempts in a row" in job.cause(1)[1]


SITE_FILES = {
    "a test that fails": "[[ -f /none ]] && export A=1\n",
    "a variable that is not set": 'module() { [ "$_ModuleTable_" ] && :; }\nmodule load cuda\n',
}


@pytest.mark.parametrize("what", SITE_FILES)
def test_what_fails_in_the_sites_file_does_not_end_the_job(job, what):
    (job.folder / "site.env").write_text(SITE_FILES[what] + "CLIPO_MAX_RESTARTS=7\n")
    assert (job.attempt(0, CLIPO_SITE=str(job.folder / "site.env")), job.phases()) == (0, ["done"])


def test_a_sites_file_that_is_no_bash_ends_the_job_with_its_name(job):
    (job.folder / "site.env").write_text("if then\n")
    assert job.attempt(0, CLIPO_SITE=str(job.folder / "site.env")) == 2
    assert "site.env: bash can't read it" in job.told


@pytest.mark.parametrize("name", ["CLIPO_MAX_RESTARTS", "CLIPO_CHECKS_SECONDS", "CLIPO_RAY_CPUS", "CLIPO_RAY_TIMEOUT"])
def test_a_number_of_the_site_that_is_none_is_told_before_anything_starts(job, name):
    assert job.attempt(0, **{name: "ten"}) == 2
    assert f"{name} = ten: must be a whole number" in job.told
    assert not (job.folder / "srun").exists()


def test_a_job_that_is_submitted_elsewhere_is_told_where_the_project_is_looked_for(job):
    assert job.attempt(0, CLIPO_HOME="") == 2
    assert f"{job.folder} is not the project's folder; submit from there, or set CLIPO_HOME" in job.told


def test_the_projects_own_code_comes_before_that_of_a_folder_with_a_longer_name(job):
    (job.folder / "bin" / "srun").write_text(
        _SRUN.replace("#!/bin/bash\n", '#!/bin/bash\necho "$PYTHONPATH" >>"$CALLS/paths"\n')
    )
    assert job.attempt(0, PYTHONPATH=f"{HOME}-old") == 0
    assert set((job.folder / "paths").read_text().splitlines()) == {f"{HOME}:{HOME}-old"}
