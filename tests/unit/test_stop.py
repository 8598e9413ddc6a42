"""Laws of a run's end: a step that can be given up is, one that can't be is finished, and nothing begins that can't end in time."""

from __future__ import annotations

import os
import signal

import pytest

from clipo_megatron.cli.train import stop_signals
from clipo_megatron.controller.stop import StepAbandoned, StopRequest


@pytest.fixture(autouse=True)
def handlers_of_the_tests_process():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_being_told_twice_by_usr1_is_being_told_once_also_after_the_run():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals(None) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_asked
    os.kill(os.getpid(), signal.SIGUSR1)  # would end the process
    with stop_signals(None):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_gives_up_what_can_be_given_up_and_nothing_else():
    with stop_signals(None) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_asked
        assert not stop.allows_step()
        with pytest.raises(StepAbandoned), stop.abandonable():
            pytest.fail("a block was entered though a stop was asked for before it")
    with stop_signals(None) as stop, pytest.raises(StepAbandoned), stop.abandonable():
        os.kill(os.getpid(), signal.SIGTERM)
    with stop_signals(None) as stop:
        with stop.abandonable():
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # after the block: no exception here
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_neither_a_step_nor_a_save_begins_that_would_outlast_the_time_given():
    moment = 1000.0
    stop = StopRequest(end_time=1100.0, now=lambda: moment)
    assert stop.allows_step()
    stop.note({"seconds/step": 40.0, "checkpoint/snapshot_seconds": 1.0, "checkpoint/write_seconds": 9.0})
    stop.note({"seconds/step": 20.0})
    for moment, step, save in (
        (1000.0, True, True),
        (1035.0, True, True),
        (1036.0, False, True),
        (1086.0, False, False),
    ):
        assert (stop.allows_step(), stop.allows_save()) == (step, save), moment


def test_without_an_end_everything_fits():
    stop = StopRequest()
    stop.note({"seconds/step": 1e9, "checkpoint/write_seconds": 1e9})
    assert stop.allows_step()
    assert stop.allows_save()
