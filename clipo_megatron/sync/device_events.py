"""Until what was started on a GPU is there, with a deadline. On a CPU messages are there when their `wait` returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

_POLL_S = 0.0005


class Event(Protocol):
    """What is used of a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether all before it in its stream is done."""
        ...


class DeviceEvents:
    """Events in the order of the current stream, each with the peer whose message comes before it.

    NCCL's `wait` orders streams and returns at once, so a host that goes on knows nothing of what has come; one that asks
    the device for a value waits without a deadline.
    """

    def __init__(self, record: Callable[[], Event] | None) -> None:
        """Nothing is noted.

        Args:
            record: puts an event into the current stream; None: there is no stream, as on a CPU.
        """
        self._record = record
        self._noted: list[tuple[int, Event]] = []

    def note(self, peer: int) -> None:
        """What was put into the stream since the last call needs a message of `peer`."""
        if self._record is not None:
            self._noted.append((peer, self._record()))

    def late(self, deadline: float) -> int | None:
        """Wait until all that was noted is done; None if it is, else the first peer whose message is not there.

        Args:
            deadline: as `time.monotonic`.
        """
        noted, self._noted = self._noted, []
        for peer, event in noted:
            while not event.query():
                if time.monotonic() >= deadline:
                    return peer
                time.sleep(_POLL_S)
        return None


def recorder(device: torch.device) -> Callable[[], Event] | None:
    """For `DeviceEvents`, of a device's current stream."""
    if device.type != "cuda":
        return None

    def record() -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    return record
