"""Laws of the meeting of trainer and engine ranks: all come and can speak to each other, or those that are missing are named."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from clipo_megatron.errors import EngineError
from clipo_megatron.sync.meeting import Meeting

SIZE = 3


def _meeting(store: TCPStore, number: int, patience_s: float) -> Meeting:
    return Meeting(
        host="127.0.0.1",
        port=store.port,
        number=number,
        size=SIZE,
        device="cpu",
        bucket_bytes=1,
        timeout_s=600.0,
        patience_s=patience_s,
    )


def test_those_that_do_not_come_are_named_in_time_and_a_later_meeting_is_not_disturbed() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(SIZE) as threads:
        started = time.monotonic()
        alone = [threads.submit(_meeting(store, 1, 2.0).join, rank) for rank in (0, 2)]
        for waiting in alone:
            with pytest.raises(EngineError, match=r"ranks \[1\] of 3 .* did not come to meeting 1 within 2 s"):
                waiting.result()
        assert time.monotonic() - started < 10
        groups = [threads.submit(_meeting(store, 2, 20.0).join, rank) for rank in range(SIZE)]
        first, _, last = (group.result() for group in groups)
        found = torch.zeros(4)
        received = last.recv([found], 0, 0)
        first.send([torch.arange(4.0)], 2, 0).wait()
        received.wait()
    assert found.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_one_that_came_and_died_before_all_were_connected_is_not_waited_for_as_long_as_for_a_message() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    PrefixStore("sync 1", store).set("seat 1", "taken")
    with ThreadPoolExecutor(SIZE) as threads:
        started = time.monotonic()
        for waiting in [threads.submit(_meeting(store, 1, 2.0).join, rank) for rank in (0, 2)]:
            with pytest.raises(EngineError, match="came to meeting 1 and was gone before all were connected"):
                waiting.result()
        assert time.monotonic() - started < 30
