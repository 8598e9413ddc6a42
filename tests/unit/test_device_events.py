"""Laws of waiting for a device: nothing is there before its event is done, and who is late is told at the deadline."""

from __future__ import annotations

import time

import torch

from clipo_megatron.sync.device_events import DeviceEvents, recorder


class _Stream:
    """Work in the order it was put in; each piece is done after being asked for so many times."""

    def __init__(self, *asks: float) -> None:
        self._asks = iter(asks)
        self.open = 0

    def record(self) -> _Recorded:
        self.open += 1
        return _Recorded(self, next(self._asks))


class _Recorded:
    def __init__(self, stream: _Stream, asks: float) -> None:
        self._stream, self._asks = stream, asks

    def query(self) -> bool:
        self._asks -= 1
        if self._asks == 0:
            self._stream.open -= 1
        return self._asks <= 0


def test_all_that_was_noted_is_done_on_return() -> None:
    stream = _Stream(3, 1, 5)
    events = DeviceEvents(stream.record)
    for peer in (4, 7, 4):
        events.note(peer)
    assert events.late(time.monotonic() + 60) is None
    assert stream.open == 0
    assert events.late(0.0) is None, "what was told once is not asked for again"


def test_the_first_peer_whose_message_is_not_there_is_told_at_the_deadline() -> None:
    events = DeviceEvents(_Stream(2, float("inf"), float("inf")).record)
    for peer in (4, 7, 9):
        events.note(peer)
    assert events.late(time.monotonic() + 0.1) == 7


def test_what_is_done_is_no_lateness_though_the_deadline_has_passed() -> None:
    events = DeviceEvents(_Stream(1).record)
    events.note(4)
    assert events.late(time.monotonic() - 1) is None


def test_a_cpu_has_no_events() -> None:
    assert recorder(torch.device("cpu")) is None
    events = DeviceEvents(None)
    events.note(3)
    assert events.late(time.monotonic() - 1) is None
