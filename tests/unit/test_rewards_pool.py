"""The real pool: real processes, real math-verify, real kills."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import clipo_megatron
from clipo_megatron.errors import ConfigError
from clipo_megatron.records import Verdict
from clipo_megatron.rewards.pool import Verifiers
from clipo_megatron.rewards.processes import WorkerPool

TOWER = "9^{9^{9^{9}}}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(clipo_megatron.__file__).parents[1])}


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers(2, 3.0, 2000) as pool:
        yield pool


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


def boxed(*answers: str, gold: str = "\\sqrt{12}") -> list[tuple[str, str, str]]:
    return [("math", gold, f"Therefore $\\boxed{{{answer}}}$.") for answer in answers]


def test_self_test_passes_here(verifiers):
    verifiers.self_test()


def test_verdicts_come_in_the_order_of_the_items(verifiers):
    right, wrong, undecided = ["2\\sqrt{3}", "\\sqrt{13}", "1000000000!"]
    order = [right, wrong, wrong, undecided, right, wrong, right] * 20
    expected = {right: Verdict.CORRECT, wrong: Verdict.WRONG, undecided: Verdict.UNDECIDED}
    assert verifiers.judge(boxed(*order)) == [expected[answer] for answer in order]


def test_each_item_is_judged_by_its_own_verifier_and_gold(verifiers):
    items = [
        ("choice", "B", "\\boxed{B}"),
        ("choice", "B", "\\boxed{\\text{B}}"),
        ("math", "B", "\\boxed{\\text{B}}"),
        ("math", "Long.\nSo \\boxed{\\frac{3}{6}}.", "<think>\\boxed{7}</think>\\boxed{0.5}"),
        ("math", "our answer is $\\boxed 2$.", "\\boxed{2}"),
        ("math", "our answer is $\\boxed 2$.", "no box"),
        ("math", "2", "2"),
    ]
    assert verifiers.judge(items) == [
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.CORRECT,
        Verdict.CORRECT,
        Verdict.UNDECIDED,
        Verdict.WRONG,
        Verdict.WRONG,
    ]


def test_no_items_give_no_verdicts(verifiers):
    assert verifiers.judge([]) == []


def test_unknown_verifier_and_bad_numbers_are_config_errors(verifiers):
    with pytest.raises(ConfigError, match="'maths'"):
        verifiers.judge([("maths", "1", "\\boxed{1}")])
    with pytest.raises(ConfigError) as caught:
        Verifiers(0, -1.0, 2000)
    assert len(caught.value.problems) == 2


def test_an_item_that_hangs_is_undecided_alone_and_the_pool_goes_on(pool):
    # The tower is put past the screen: only the kill from outside can end it.
    started = time.perf_counter()
    [chunk, single] = pool.run([[("1", "\\frac{x}{x}"), ("1", TOWER)], [("1", "\\frac{3}{3}")]], timeout_s=2.0)
    assert chunk is None
    assert single == [Verdict.CORRECT]
    assert pool.run([[("2", "\\frac{6}{3}")]] * 4, timeout_s=10.0) == [[Verdict.CORRECT]] * 4
    assert time.perf_counter() - started < 60


def test_the_neighbours_of_a_hanging_answer_keep_their_verdicts(verifiers):
    # Reader and screen let this one pass; math-verify needs minutes for it.
    slow = "\\sin(\\cos(\\tan(x^x)))^{123}-\\frac{1}{x^{17}+1}+(x+y+z)^{500}"
    verdicts = verifiers.judge(boxed("2\\sqrt{3}", slow, "\\sqrt{13}", "12^{1/2}"))
    assert verdicts == [Verdict.CORRECT, Verdict.UNDECIDED, Verdict.WRONG, Verdict.CORRECT]


def test_killed_workers_are_replaced(pool):
    assert pool.run([[("1", "\\frac{2}{2}")]] * 2, timeout_s=10.0) == [[Verdict.CORRECT]] * 2
    for child in multiprocessing.active_children():
        if child.name == "pebble_pool_worker" and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
    assert pool.run([[("2", "\\frac{6}{3}")]] * 4, timeout_s=10.0) == [[Verdict.CORRECT]] * 4


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from clipo_megatron.rewards.processes import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(1)\n"
        "    pool.run([[('1', '1')]], timeout_s=30.0)\n"
        "    print([child.pid for child in multiprocessing.active_children()], flush=True)\n"
        f"    pool.run([[('1', '{TOWER}')]], timeout_s=600.0)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert parent.stdout is not None
    [worker] = [int(pid) for pid in parent.stdout.readline().strip("[]\n").split(",")]
    time.sleep(1.0)  # the worker is now inside a C call that no Python code can interrupt
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def test_a_worker_can_not_take_more_memory_than_it_is_given():
    script = (
        "import os\n"
        "from clipo_megatron.rewards.worker import judge_pairs, start_worker\n"
        "start_worker(os.getppid(), 256 << 20)\n"
        "print(judge_pairs([('1', '\\\\frac{2}{2}')])[0])\n"
        "try:\n"
        "    bytearray(512 << 20)\n"
        "except MemoryError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.split() == ["correct", "refused"]


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
