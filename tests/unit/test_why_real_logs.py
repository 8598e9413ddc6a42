"""Laws of `clipo why` on logs as real jobs left them: lines without times, another node's death, the script's own stopping."""

from __future__ import annotations

import json
import logging
import os
import time
from io import StringIO

import pytest
from rich.console import Console

from clipo_megatron.cli.main import main
from clipo_megatron.cli.train import _progress
from clipo_megatron.slurm import job_logs
from clipo_megatron.slurm.why import explain

NO_ROWS = """2026-11-24 04:10:03,000 INFO clipo_megatron.cluster: rank 1 is process 9 on n2
2026-11-24 04:12:07,100 ERROR clipo_megatron.cluster.actors: failed in train
Traceback (most recent call last):
  File "/opt/clipo/clipo_megatron/policy/train.py", line 88, in train
    loss.backward()
ValueError: micro-batch 3 has no rows; raise prompts_per_step
"""
STEPS = "run /runs/r: 256 training prompts\nstep 1/4  accuracy 0.094  s 0.4\nstep 2/4  accuracy 0.438  s 0.2\n"
CHECKS = (
    "2026-11-24T04:00:00 checks job 4, attempt 0, nodes n[1-2], /r/lost.yaml\n2026-11-24T04:00:01 driver starting\n"
)


def at(hour, minute, second):
    return time.mktime((2026, 11, 24, hour, minute, second, 0, 0, -1))


def stepped(hour, minute, second):
    """What the driver logs of a step that is done then."""
    line = f"2026-11-24 {hour:02d}:{minute:02d}:{second:02d},000 INFO clipo_megatron.cli.train: step 2/4  accuracy 0.438  s 0.2\n"
    return "run/driver.log", line, at(hour, minute, second)


@pytest.fixture
def attempt(tmp_path):
    """Writes (name, text, time of its last writing) into the one attempt of a job; "run/..." goes to the run's folder."""
    job, run = tmp_path / "jobs" / "4", tmp_path / "run"

    def write(*files, phase="driver"):
        (run / "logs").mkdir(parents=True)
        (job / "attempt-0").mkdir(parents=True)
        content = {"recipe": "r", "overrides": [], "run_folder": str(run), "nodes": 2, "folder": str(tmp_path)}
        (job / "job.json").write_text(json.dumps(content))
        (job / "attempt-0" / "phase").write_text(f"{phase}\n")
        for name, text, moment in files:
            path = tmp_path / name if name.startswith("run/") else job / "attempt-0" / name
            path.write_text(text)
            os.utime(path, (moment, moment))
        return job, job / "attempt-0"

    return write


def test_steps_without_a_time_do_not_hide_the_worker_that_failed_after_them(attempt):
    told = "clipo: policy_1 failed in train: ValueError: micro-batch 3 has no rows; see its log\n"
    job, folder = attempt(
        ("batch.log", CHECKS, at(4, 12, 9)),
        ("driver.log", STEPS + told, at(4, 12, 8)),
        ("run/logs/policy_1.log", NO_ROWS, at(4, 12, 7)),
        stepped(4, 12, 1),
    )
    first = explain(job, folder).first
    assert (first.host, first.file.name) == ("n2", "policy_1.log")
    assert first.remedy == "raise prompts_per_step"


def test_a_worker_that_failed_before_the_last_steps_row_and_is_told_of_after_it_is_the_cause(attempt):
    job, folder = attempt(
        ("batch.log", CHECKS, at(4, 12, 9)),
        ("driver.log", STEPS + "clipo: policy_1 failed in train: ValueError; see its log\n", at(4, 12, 20)),
        ("run/logs/policy_1.log", NO_ROWS, at(4, 12, 7)),
        ("run/logs/engine_0.log", NO_ROWS.replace("rank 1 is", "engine 0 is"), at(4, 12, 7)),
        stepped(4, 12, 10),
    )
    found = explain(job, folder)
    assert found.first.file.name == "policy_1.log"
    assert {error.file.name for error in found.others} == {"driver.log"}  # the engine's fault was outlived


def test_the_dead_node_is_named_and_not_the_one_that_tells_of_it(attempt, tmp_path):
    job, folder = attempt(
        ("batch.log", CHECKS + "2026-11-24T04:51:04 requeue a node does not answer; attempt 1 goes on\n", at(4, 51, 4)),
        (
            "driver.log",
            "step 1/4  accuracy 0.094  s 0.4\nslurmstepd-n1: error: *** STEP 4.3 ON n1 CANCELLED AT "
            "2026-11-24T04:51:04 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***\n",
            at(4, 51, 5),
        ),
        phase="requeue",
    )
    output = tmp_path / "slurm-4.out"
    output.write_text(
        CHECKS + "srun: error: Node failure on n2\n"
        "slurmstepd-n1: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-24T04:51:04 DUE TO NODE FAILURE, SEE SLURMCTLD LOG\n"
        "2026-11-24T04:51:04 requeue a node does not answer; attempt 1 goes on from the newest checkpoint\n"
        "srun: error: n1: task 0: Killed\n"
    )
    os.utime(output, (at(4, 51, 9), at(4, 51, 9)))
    found = explain(job, folder, output=output)
    assert (found.first.host, found.first.cause) == ("n2", "the node n2 failed")
    assert not any("Killed" in error.cause for error in found.others)


@pytest.mark.parametrize("phase", ["done", "requeue"])
def test_what_the_batch_script_stopped_itself_is_no_cause(attempt, capsys, phase):
    ends = f"2026-11-24T04:30:00 {phase} the run is at its end\n"
    job, _ = attempt(
        ("batch.log", CHECKS + ends + "srun: error: n1: task 0: Killed\n", at(4, 30, 5)),
        ("ray-n1.log", "Traceback (most recent call last):\nray.exceptions.RpcError: CANCELLED\n", at(4, 30, 4)),
        phase=phase,
    )
    assert main(["why", str(job)]) == 1
    assert f"its last phase: {phase}" in capsys.readouterr().out


def test_a_worker_that_ray_killed_for_memory_is_told_by_that_and_not_by_rays_advice(attempt):
    advice = (
        "clipo: policy_1 failed in start: Refer to the documentation on how to address the out of memory issue: "
        "https://docs.ray.io/x.html. Consider provisioning more memory; set the threshold to 1; it is off then\n"
    )
    job, folder = attempt(("batch.log", CHECKS, at(4, 12, 9)), ("driver.log", advice, at(4, 12, 8)))
    first = explain(job, folder).first
    assert first.cause == "policy_1 failed: Ray killed a worker because its node ran out of host memory"
    assert "--mem=0" in first.remedy


CRASH = """2026-11-24 11:00:00,000 INFO x: engine 0 is process 5 on n2
2026-11-24 11:00:07,100 ERROR clipo_megatron.cluster.actors: failed in generate
Traceback (most recent call last):
  File "/opt/clipo/clipo_megatron/rollout/engine.py", line 8, in generate
    outputs = self._llm.generate(prompts)
RuntimeError: CUDA error: uncorrectable ECC error encountered
"""
"""Of an engine that was started again."""
CANCELLED = "slurmstepd: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-24T20:00:00 ***\n"


@pytest.mark.parametrize("ended", ["", CANCELLED])
def test_a_crash_that_the_run_outlived_is_no_cause_of_a_later_cancellation_or_of_a_job_that_runs(
    attempt, tmp_path, capsys, ended
):
    job, folder = attempt(
        ("batch.log", CHECKS, at(4, 0, 1)),
        ("run/logs/engine_0.log", CRASH, at(11, 0, 7)),
        # Ray shows what the engine wrote, without a time; the file's is later than the last step.
        ("driver.log", STEPS + "RuntimeError: CUDA error: ECC\n" + STEPS, at(20, 0, 1)),
        stepped(20, 0, 1),  # a step that ended while SLURM ended the job
    )
    output = tmp_path / "slurm-4.out"
    output.write_text(CHECKS + ended)
    os.utime(output, (at(20, 0, 0), at(20, 0, 0)))
    found = explain(job, folder, output=output)
    assert {error.file.name for error in found.outlived} == {"engine_0.log", "driver.log"}
    assert main(["why", str(job)]) == (0 if ended else 1)
    told = capsys.readouterr().out
    if ended:
        assert found.others == ()
        assert found.first.cause == "the job was cancelled at 2026-11-24T20:00:00 by scancel or an administrator"
        assert "same command" in found.first.remedy
    else:
        assert "no fatal line" in told
        assert "after its last step" in told
        assert "ECC" in told.partition("what the run went on after")[2]


def test_a_cancelled_job_is_told_by_its_batch_script_where_slurms_output_is_not_found(attempt):
    job, folder = attempt(("batch.log", CHECKS + "2026-11-24T20:00:00 driver SLURM ends the job\n", at(20, 0, 0)))
    assert explain(job, folder).first.cause == "SLURM ended the job: scancel, its time limit, or a lost node"


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (" DUE TO TIME LIMIT", "the time limit of the job was reached"),
        (" DUE TO PREEMPTION", "the job was preempted"),
        (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", "another node of the job failed"),
    ],
)
def test_what_slurm_gives_a_reason_for_is_not_taken_for_scancel(attempt, reason, cause):
    ended = f"slurmstepd: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-24T20:00:00{reason} ***\n"
    job, folder = attempt(
        ("batch.log", CHECKS, at(4, 0, 1)),
        ("driver.log", ended, at(20, 0, 0)),
        stepped(20, 0, 1),
    )
    assert cause in explain(job, folder).first.cause


def test_an_attempt_that_was_saved_and_put_back_has_no_cause_and_one_that_lost_a_node_has(attempt, capsys):
    ends = "2026-11-24T20:00:00 requeue {}; attempt 1 goes on from the newest checkpoint\n"
    saved = "the run was saved before its end"
    job, folder = attempt(
        ("batch.log", CHECKS + ends.format(saved), at(20, 0, 0)),
        ("run/logs/engine_0.log", CRASH, at(11, 0, 7)),
        phase="requeue",
    )
    assert main(["why", str(job)]) == 1
    assert f"requeue: {saved}; attempt 1 goes on" in capsys.readouterr().out
    (folder / "batch.log").write_text(CHECKS + ends.format("a node does not answer"))
    assert "ECC" in explain(job, folder).first.cause


def test_a_cause_that_was_outlived_once_and_came_back_is_a_cause(attempt):
    again = CRASH.replace(" 11:00", " 19:00")
    job, folder = attempt(
        ("batch.log", CHECKS, at(4, 0, 1)),
        ("run/logs/engine_0.log", CRASH + again, at(19, 0, 7)),
        stepped(12, 0, 1),
    )
    found = explain(job, folder)
    assert (int(found.first.moment), len(found.outlived)) == (at(19, 0, 7), 1)


OOM = NO_ROWS.replace(" 04:1", " 15:0").replace(
    "ValueError: micro-batch 3 has no rows; raise", "OutOfMemoryError: CUDA"
)
AGAIN = NO_ROWS.replace(" 04:1", " 16:2").replace("on n2", "on n3")
"""Of the same worker, in the next attempt."""


@pytest.mark.parametrize("next_one", ["4/attempt-1", "5/attempt-0"])
def test_an_older_attempt_is_told_by_what_it_wrote_before_the_run_was_started_again(attempt, tmp_path, next_one):
    """By the same job, or by the same command submitted again."""
    job, folder = attempt(
        ("batch.log", CHECKS, at(15, 2, 9)),
        ("run/logs/policy_1.log", OOM + AGAIN, at(16, 22, 8)),
        stepped(16, 21, 0),
    )
    following = tmp_path / "jobs" / next_one
    following.mkdir(parents=True)
    begins = CHECKS.replace("T04:00", "T16:20").replace("attempt 0", f"attempt {next_one[-1]}")
    (following / "batch.log").write_text(begins)
    (following / "phase").write_text("driver\n")
    (following.parent / "job.json").write_text((job / "job.json").read_text())
    found = explain(job, folder)
    assert "a GPU ran out of memory" in found.first.cause
    assert (found.first.host, int(found.first.moment), found.others) == ("n2", at(15, 2, 7), ())
    newest = explain(following.parent, following)
    assert (newest.first.host, newest.first.line, newest.others) == ("n3", 12, ())
    assert newest.first.cause.startswith("ValueError: micro-batch 3")


def test_an_older_attempt_went_on_after_what_came_before_the_steps_that_its_driver_logged(attempt, tmp_path, capsys):
    job, folder = attempt(
        ("batch.log", CHECKS, at(15, 2, 9)),
        ("run/logs/engine_0.log", CRASH, at(11, 0, 7)),
        (
            "run/driver.log",
            "2026-11-24 15:00:00,000 INFO clipo_megatron.cli.train: step 1/4  accuracy 0.094  s 0.4\n"
            "2026-11-24 16:21:00,000 INFO clipo_megatron.cli.train: step 2/4  accuracy 0.094  s 0.4\n",
            at(16, 21, 0),
        ),
    )
    (job / "attempt-1").mkdir()
    (job / "attempt-1" / "batch.log").write_text(CHECKS.replace("T04:00", "T16:20").replace("attempt 0", "attempt 1"))
    found = explain(job, folder)
    assert (found.first, len(found.outlived)) == (None, 1)
    assert main(["why", str(job), "--attempt", "0"]) == 1
    assert "attempt-1 followed it" in capsys.readouterr().out
    (tmp_path / "run" / "driver.log").unlink()
    assert "ECC" in explain(job, folder).first.cause


def test_a_step_that_is_a_files_last_line_has_the_files_time(attempt):
    job, folder = attempt(
        ("batch.log", CHECKS, at(15, 2, 9)),
        ("run/logs/engine_0.log", CRASH, at(11, 0, 7)),
        ("driver.log", STEPS, at(15, 2, 9)),
    )
    assert explain(job, folder).first is None


def test_the_steps_that_a_run_logs_are_the_ones_that_prove_its_progress(attempt, tmp_path):
    """The driver's own log has the line of each step, as its screen has, and the time of it."""
    job, folder = attempt(("batch.log", CHECKS, at(15, 2, 9)), ("run/logs/engine_0.log", CRASH, at(11, 0, 7)))
    log = logging.FileHandler(tmp_path / "run" / "driver.log")
    log.setFormatter(logging.Formatter("2026-11-24 15:00:00,000 %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("clipo_megatron")
    level = logger.level
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    try:
        with _progress(Console(file=StringIO()), 4) as on_row:
            on_row({"step": 1.0, "reward/accuracy": 0.25, "seconds/step": 2.0})
    finally:
        logger.removeHandler(log)
        logger.setLevel(level)
    assert explain(job, folder).first is None


def test_a_run_folder_that_was_touched_or_a_clock_that_is_ahead_hides_no_cause(attempt):
    files = [
        (
            "batch.log",
            CHECKS + "2026-11-24T04:12:19 clipo: error: n1: driver: the run failed with exit code 1\n",
            at(4, 12, 19),
        ),
        ("run/logs/policy_1.log", NO_ROWS, at(4, 12, 7)),
        ("run/metrics.jsonl", '{"step": 2}\n', at(11, 0, 0)),
    ]
    job, folder = attempt(*files, phase="failed")
    assert explain(job, folder).first.cause.startswith("ValueError: micro-batch 3")
    name, line, moment = stepped(11, 0, 0)
    (job.parents[1] / name).write_text(line)
    os.utime(job.parents[1] / name, (moment, moment))
    assert explain(job, folder).first.cause.startswith("ValueError: micro-batch 3")


def test_a_line_is_counted_as_grep_counts_it_in_logs_with_bars_and_in_large_ones(attempt, monkeypatch):
    bars = "".join(f"\r loading {share} %" for share in range(0, 100, 7)) + "\n\x85 \u2028 one line\r\n"
    job, folder = attempt(("batch.log", CHECKS, at(4, 12, 9)), ("run/logs/policy_1.log", bars + NO_ROWS, at(4, 12, 7)))
    assert explain(job, folder).first.line == 2 + len(NO_ROWS.splitlines())
    monkeypatch.setattr(job_logs, "LARGEST_BYTES", 400)
    monkeypatch.setattr(job_logs, "_CHUNK_BYTES", 7)
    many = "2026-11-24 04:11:00,000 INFO x: nothing\n" * 100
    (job.parents[1] / "run" / "logs" / "policy_1.log").write_text(many + NO_ROWS)
    os.utime(job.parents[1] / "run" / "logs" / "policy_1.log", (at(4, 12, 7), at(4, 12, 7)))
    assert explain(job, folder).first.line == 100 + len(NO_ROWS.splitlines())
