"""Laws of `clipo why`: the first cause stands first, whoever told of it later, in whatever file."""

from __future__ import annotations

import json
import os
import time

import pytest

from clipo_megatron.cli.main import main
from clipo_megatron.slurm.job_logs import choose_attempt, first_host
from clipo_megatron.slurm.log_times import line_time, line_times
from clipo_megatron.slurm.why import explain

BATCH = "2026-11-24T04:00:00 checks job 17, attempt 0, nodes n[1-2], recipe.yaml\n2026-11-24T04:00:20 driver starting\n"
TRACE = """Traceback (most recent call last):
  File "/opt/clipo/clipo_megatron/cluster/actors.py", line 34, in wrapped
    return method(self, *args, **kwargs)
  File "/opt/clipo/clipo_megatron/policy/train.py", line 88, in train
    loss.backward()
"""


@pytest.fixture
def job(tmp_path):
    """Writes logs of a job's newest attempt: file name -> text; times of the files are those of the batch script's last."""

    class Written:
        folder = tmp_path / "jobs" / "17"
        run = tmp_path / "runs" / "r"

        def write(self, attempt=0, **logs):
            attempt_folder = self.folder / f"attempt-{attempt}"
            (self.run / "logs").mkdir(parents=True, exist_ok=True)
            attempt_folder.mkdir(parents=True, exist_ok=True)
            content = {
                "recipe": "r.yaml",
                "overrides": [],
                "run_folder": str(self.run),
                "nodes": 2,
                "folder": str(tmp_path),
            }
            (self.folder / "job.json").write_text(json.dumps(content))
            logs.setdefault("batch", BATCH)
            for name, text in logs.items():
                is_worker = name.startswith(("policy_", "engine_"))
                name = name.replace("__", "-")
                path = (self.run / "logs" if is_worker else attempt_folder) / f"{name}.log"
                path.write_text(text)
                stamp = time.mktime((2026, 11, 24, 4, 30, 0, 0, 0, -1))
                os.utime(path, (stamp, stamp))
            return self

        def why(self, **options):
            return explain(self.folder, choose_attempt(self.folder, None), **options)

    return Written()


def test_the_worker_that_failed_first_is_the_cause_and_the_driver_follows(job):
    job.write(
        driver="clipo: error: n1: driver: policy_1 failed in train: RuntimeError: bad; see its log\n",
        policy_0="2026-11-24 04:10:03,000 INFO clipo_megatron.cluster: rank 0 is process 7 on n1\n"
        "2026-11-24 04:12:08,100 ERROR clipo_megatron.cluster.actors: failed in train\n"
        + TRACE
        + "RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.2]:4531\n",
        policy_1="2026-11-24 04:10:03,000 INFO clipo_megatron.cluster: rank 1 is process 9 on n2\n"
        "2026-11-24 04:12:07,100 ERROR clipo_megatron.cluster.actors: failed in train\n"
        + TRACE
        + "ValueError: micro-batch 3 has no rows; raise prompts_per_step\n",
    )
    first = job.why().first
    assert (first.host, first.phase, first.file.name) == ("n2", "train", "policy_1.log")
    assert first.cause == "ValueError: micro-batch 3 has no rows (at train.py:88)"
    assert first.remedy == "raise prompts_per_step"
    assert first.line == 8
    causes = [error.cause for error in job.why().others]
    assert any("Connection closed by peer" in cause for cause in causes)
    assert any("policy_1 failed" in cause for cause in causes)


def test_an_earlier_broken_connection_does_not_hide_the_rank_that_ran_out_of_memory(job):
    job.write(
        policy_0="2026-11-24 04:12:07,000 ERROR x: failed in train\n"
        + TRACE
        + "RuntimeError: Connection reset by peer\n",
        policy_1="2026-11-24 04:12:09,000 ERROR x: failed in train\n"
        + TRACE
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.1 GiB in total\n",
    )
    first = job.why().first
    assert first.file.name == "policy_1.log"
    assert "a GPU ran out of memory" in first.cause
    assert "micro_batch_tokens" in first.remedy


KNOWN = {
    "slurm time limit": (
        "slurmstepd: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-24T04:12:00 DUE TO TIME LIMIT ***",
        "time limit",
        "n1",
    ),
    "node failure": ("srun: error: Node failure on n2", "the node n2 failed", "n2"),
    "oom kill": (
        "slurmstepd: error: Detected 1 oom_kill event in StepId=17.3. Some of the step tasks have been OOM Killed.",
        "lack of host memory",
        "n1",
    ),
    "no space": ("OSError: [Errno 28] No space left on device: '/tmp/ray/session'", "no space left", "n1"),
    "read only": ("OSError: [Errno 30] Read-only file system: '/runs/x'", "read-only", "n1"),
    "bus error": ("srun: error: n2: task 1: Bus error (core dumped)", "/dev/shm", "n2"),
    "command": ("/var/spool/slurmd/job00017/slurm_script: line 70: nonsuch: command not found", "nonsuch", "n1"),
    "permission": ("bash: ./run.sh: Permission denied", "permission denied", "n1"),
    "port": ("RuntimeError: ... EADDRINUSE, message: address already in use", "a port is taken", "n1"),
    "module": ("ModuleNotFoundError: No module named 'ray'", "'ray' is missing", "n1"),
    "pyxis": ("srun: unrecognized option '--container-image=x.sqsh'", "no pyxis", "n1"),
    "vllm": ("RuntimeError: Engine core initialization failed. See root cause above.", "did not start", "n1"),
    "xid": ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "a GPU failed", "n1"),
    "quota": ("OSError: [Errno 122] Disk quota exceeded", "quota", "n1"),
    "socket path": ("OSError: AF_UNIX path length cannot exceed 107 bytes: /very/long", "too long", "n1"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_fatal_line_gets_its_meaning_and_a_remedy(job, tmp_path, name):
    line, cause, host = KNOWN[name]
    first = job.write(driver=f"2026-11-24 04:12:00 starting\n{line}\n").why().first
    assert cause in first.cause
    assert first.host == host
    assert first.remedy not in ("", "read the log from there")


FOLLOWERS = (
    "[rank3]:[E1124 04:11:00.123456789 ProcessGroupNCCL.cpp:683] [Rank 3] Watchdog caught collective operation timeout",
    "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
    "srun: error: n1: task 0: Exited with exit code 1",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:5",
)


@pytest.mark.parametrize("line", FOLLOWERS)
def test_what_only_follows_stands_first_when_nothing_else_is_known_and_after_a_cause_else(job, line):
    alone = job.write(driver=f"{line}\n").why()
    assert alone.first.is_follower
    both = job.write(
        driver=f"{line}\n", ray__n2="2026-11-24 04:12:00 x\nOSError: [Errno 28] No space left on device\n"
    ).why()
    assert both.first.host == "n2"
    assert "no space left" in both.first.cause
    assert len(both.others) == 1


def test_the_failed_check_of_a_node_comes_before_the_batch_script_that_tells_of_it(job, tmp_path):
    output = tmp_path / "slurm-17.out"
    output.write_text(
        BATCH + "srun: error: n2: task 1: Exited with exit code 2\n"
        "clipo: error: n1: checks: a node is not fit, see /jobs/17/attempt-0/doctor-*.log\n"
    )
    job.write(doctor__n2="clipo: error: n2: checks: /models/q: no config.json in it; give the folder of a model\n")
    found = job.why(output=output)
    assert (found.first.host, found.first.phase) == ("n2", "checks")
    assert (found.first.cause, found.first.remedy) == ("/models/q: no config.json in it", "give the folder of a model")


def test_what_the_run_went_on_after_is_not_the_cause(job):
    job.write(
        driver="2026-11-24 04:10:00 x\n"
        "2026-11-24 04:20:00 step 9/30  accuracy 0.300  s 12.0\n"
        "clipo: error: n1: driver: run.folder: no more room; free space\n",
        engine_0="2026-11-24 04:12:00,000 ERROR x: failed in generate\n"
        + TRACE
        + "RuntimeError: lost, and restarted\n",
    )
    assert job.why().first.cause == "run.folder: no more room"


def test_only_the_lines_of_the_attempt_that_is_asked_for_count(job, tmp_path):
    output = tmp_path / "slurm-17.out"
    second = BATCH.replace("attempt 0", "attempt 1").replace("T04:0", "T05:0")
    output.write_text(BATCH + "srun: error: Node failure on n2\n" + second + "/x.sh: line 3: raay: command not found\n")
    job.write(attempt=0, policy_0="2026-11-24 04:12:00,000 ERROR x: failed in train\n" + TRACE + "ValueError: old\n")
    job.write(attempt=1, batch=second)
    newest = explain(job.folder, choose_attempt(job.folder, None), output=output)
    assert "raay" in newest.first.cause
    assert newest.others == ()
    oldest = explain(job.folder, choose_attempt(job.folder, 0), output=output)
    assert {error.cause for error in (oldest.first, *oldest.others)} >= {
        "the node n2 failed",
        "ValueError: old (at train.py:88)",
    }


def test_a_chain_of_exceptions_is_told_by_its_last(job):
    chained = (
        TRACE
        + "KeyError: 'tp'\n\nThe above exception was the direct cause of the following exception:\n\n"
        + TRACE
        + "clipo_megatron.errors.ConfigError: layout.tp = x: must be a number; correct it\nclosing\n"
    )
    first = job.write(driver=chained).why().first
    assert first.cause == "clipo_megatron.errors.ConfigError: layout.tp = x: must be a number (at train.py:88)"
    assert first.remedy == "correct it"


def test_an_interrupted_process_is_no_cause(job):
    assert job.write(driver=TRACE + "KeyboardInterrupt\n").why().first is None


LATE = "clipo: error: n1: driver: score: not done after 20 s: policy_0, policy_1; look at the logs\n"
STACK = """Current thread 0x00007f1 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 5 in all_reduce
  File "/x/clipo_megatron/policy/score.py", line 9 in score
"""
OTHER_STACK = STACK.replace("site-packages/torch/distributed/distributed_c10d.py", "clipo_megatron/data/packing.py")


def _worker(rank, host, rest=""):
    return f"2026-11-24 04:10:03,000 INFO x: rank {rank} is process 7 on {host}\n{rest}"


@pytest.mark.parametrize(
    ("first", "second", "hosts"),
    [
        (STACK, "", "n2"),  # stopped: it can't dump
        ("", STACK, "n1"),
        (STACK, OTHER_STACK, "n2"),  # stuck in its own work
        (OTHER_STACK, STACK, "n1"),
        (STACK, STACK, "n1, n2"),  # not to be told apart
        ("", "", "n1, n2"),
    ],
)
def test_of_late_workers_the_one_that_the_others_waited_for_is_told_with_its_host(job, first, second, hosts):
    job.write(driver=LATE, policy_0=_worker(0, "n1", first), policy_1=_worker(1, "n2", second))
    found = job.why().first
    assert (found.host, found.phase) == (hosts, "score")
    for number, host in enumerate(("n1", "n2")):
        assert (f"policy_{number} on {host}" in found.cause) == (host in hosts)
    assert "score was not done after 20 s" in found.cause


def test_lines_without_a_time_have_the_next_ones_or_the_files():
    lines = ["a", "2026-11-24 04:00:01,500 b", "c", "2026-11-24 04:00:09 d", "e"]
    at = line_time(lines[1], year=2026)
    assert line_times(lines, written=at + 100) == [at, at, at + 7.5, at + 7.5, at + 100]


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-24 04:00:01,250 ERROR x",
        "2026-11-24T04:00:01.250000 x",
        "[2026-11-24 04:00:01,250 E 1234 1234] (raylet) x",
        "[rank0]:[E1124 04:00:01.250000000 ProcessGroupNCCL.cpp:1] x",
    ],
)
def test_the_time_of_a_line_is_read_in_each_programs_way(line):
    assert line_time(line, year=2026) == time.mktime((2026, 11, 24, 4, 0, 1, 0, 0, -1)) + 0.25


def test_a_time_with_a_zone_is_read_in_that_zone():
    assert line_time("2026-11-24T05:00:00+01:00 x", year=2026) == line_time("2026-11-24T04:00:00Z x", year=2026)


def test_vllms_times_have_no_year():
    assert line_time("(EngineCore pid=3) ERROR 11-24 04:00:01 [core.py:9] x", year=2026) == line_time(
        "2026-11-24 04:00:01 x", year=1999
    )


def test_the_first_three_lines_are_node_cause_and_remedy(job, capsys):
    job.write(doctor__n2="clipo: error: n2: checks: port 6379 of Ray: can't be had; choose another\n")
    assert main(["why", str(job.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("node:   n2, in phase checks, ")
    assert lines[1:3] == ["cause:  port 6379 of Ray: can't be had", "remedy: choose another"]
    assert lines[3].endswith("doctor-n2.log:1")


def test_a_job_without_a_fatal_line_says_so(job, capsys):
    job.write()
    assert main(["why", str(job.folder)]) == 1
    assert "no fatal line" in capsys.readouterr().out


def test_a_job_that_could_make_no_folder_is_explained_by_slurms_own_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm-18.out").write_text("clipo: error: n1: start: /ro/18 can't be made; set CLIPO_JOBS_DIR\n")
    assert main(["why", "18"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "cause:  /ro/18 can't be made"


def test_an_unknown_job_is_refused_with_where_it_was_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["why", "99"]) == 2
    assert "CLIPO_JOBS_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n[1-4,7]", "n1"),
        ("n1,n2", "n1"),
        ("gpu-[003-017]", "gpu-003"),
        ("big", "big"),
        ("n[01-02]-ib,m3", "n01-ib"),
        ("r[1-2]n[3,5]", "r1n3"),
    ],
)
def test_the_first_host_of_a_list_is_found(nodes, host):
    assert first_host(nodes) == host


def test_why_loads_without_torch():
    import subprocess
    import sys

    source = (
        "import sys, clipo_megatron.cli.why, clipo_megatron.cli.doctor, clipo_megatron.doctor.static, "
        "clipo_megatron.doctor.node, clipo_megatron.doctor.hosts; "
        "print(sorted({'torch', 'transformers', 'ray', 'vllm', 'megatron'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
