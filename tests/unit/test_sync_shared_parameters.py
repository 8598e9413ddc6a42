"""Laws of shared parameters, between real processes: what readers see, what they are refused, what is left behind."""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipo_megatron.errors import EngineError
from clipo_megatron.sync import cpu_segments
from clipo_megatron.sync.cpu_segments import bytes_to_share
from clipo_megatron.sync.shared_parameters import (
    OpenedParameters,
    SharedHandles,
    open_shared,
    reading,
    share,
)

OWNER = "trainer rank 3"


def parameters() -> dict[str, torch.Tensor]:
    """Two views of one buffer, one transposed, and a storage of its own."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(50_000, generator=generator)
    return {
        "first": buffer[10:4010].view(40, 100),
        "second": buffer[5000:5600].view(20, 30).t(),
        "alone": torch.randn(7, 3, generator=generator).bfloat16(),
        "codes": torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.float8_e4m3fn),
    }


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


STARTED: list[Child] = []


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill()


def _serve_alone(pipe: Connection, serve: Callable[..., None], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    serve(pipe, *args)


class Child:
    """A process that runs `serve` and is asked through a pipe."""

    def __init__(self, serve: Callable[..., None], *args: object, method: str = "fork") -> None:
        context = multiprocessing.get_context(method)
        self._pipe, other = context.Pipe()
        self.process = context.Process(target=_serve_alone, args=(other, serve, args), daemon=True)
        self.process.start()
        other.close()
        STARTED.append(self)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ask(self, *question: object) -> Any:
        self._pipe.send(question)
        return self.answer()

    def answer(self) -> Any:
        assert self._pipe.poll(60)
        return self._pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def serve_reader(pipe: Connection, text: str) -> None:
    """Opens the parameters and answers "bits" of a version, or what it is refused with; ends at "end"."""
    opened = open_shared(SharedHandles.from_json(text))
    while True:
        question, *arguments = pipe.recv()
        if question == "end":
            pipe.send(None)
            os._exit(0)
        try:
            with reading([opened], arguments[0]):
                found = bits(opened.tensors)
            pipe.send(found)
        except EngineError as error:
            pipe.send(str(error))


def serve_owner(pipe: Connection) -> None:
    """Shares parameters, sends the handles, then changes them when asked."""
    tensors = parameters()
    shared = share(tensors, owner=OWNER)
    shared.end_change(0)
    pipe.send((shared.handles.to_json(), bits(tensors)))
    while True:
        question, *arguments = pipe.recv()
        if question == "begin":
            shared.begin_change()
        elif question == "change":
            tensors["first"].add_(1.0)
        elif question == "end":
            shared.end_change(arguments[0])
        pipe.send(bits(tensors))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_bits_of_each_version_while_all_views_stay_views(method: str) -> None:
    tensors = parameters()
    views = {name: tensor[1:3] for name, tensor in tensors.items()}
    before, places = bits(tensors), bits(views)
    shared = share(tensors, owner=OWNER)
    assert bits(tensors) == before
    assert bits(views) == places
    shared.end_change(0)
    reader = Child(serve_reader, shared.handles.to_json(), method=method)
    assert reader.ask("bits", 0) == before
    for version in (1, 2):
        shared.begin_change()
        views["first"].add_(version)  # through a view taken before the tensors were shared
        tensors["alone"].mul_(2)
        shared.end_change(version)
        found = reader.ask("bits", version)
        assert found == bits(tensors)
        assert found["first"] != before["first"]
        assert found["alone"] != before["alone"]
    assert reader.ask("end") is None
    shared.close()


def test_a_reader_is_refused_all_but_the_version_that_is_there() -> None:
    shared = share(parameters(), owner=OWNER)
    opened = open_shared(shared.handles)
    with pytest.raises(EngineError, match=f"asked for version 0, but the weights of {OWNER} are in change"):
        opened.require(0)
    shared.end_change(0)
    opened.require(0)
    with pytest.raises(EngineError, match=r"asked for version 1, but .* are those of version 0"):
        opened.require(1)
    shared.begin_change()
    for version in (0, 1):
        with pytest.raises(EngineError, match="in change"):
            opened.require(version)
    shared.end_change(1)
    opened.require(1)
    with pytest.raises(EngineError, match="are those of version 1"):
        opened.require(0)
    with pytest.raises(EngineError, match="counted from 0"):
        shared.end_change(-1)
    shared.close()
    shared.close()
    with pytest.raises(EngineError, match="are not shared any more"):
        opened.require(1)
    with pytest.raises(EngineError, match="share them again"):
        open_shared(shared.handles)


def test_weights_that_change_while_they_are_read_are_refused_also_if_the_version_is_the_same_again() -> None:
    shared = share(parameters(), owner=OWNER)
    other = share(parameters(), owner="trainer rank 4")
    shared.end_change(5)
    other.end_change(5)
    opened = [open_shared(shared.handles), open_shared(other.handles)]
    with reading(opened, 5):
        pass
    with pytest.raises(EngineError, match="trainer rank 4 are in change"), reading(opened, 5):
        other.begin_change()
    other.end_change(5)

    def change() -> None:
        other.begin_change()
        other.end_change(5)

    with pytest.raises(EngineError, match="trainer rank 4 were changed while version 5 was copied"), reading(opened, 5):
        change()


def test_a_tensor_that_was_moved_away_is_refused_at_the_next_version() -> None:
    tensors = parameters()
    shared = share(tensors, owner=OWNER)
    shared.end_change(0)
    tensors["alone"].data = tensors["alone"].clone()
    shared.begin_change()
    with pytest.raises(EngineError, match="alone was moved after it was shared"):
        shared.end_change(1)


def test_a_killed_owner_leaves_nothing_behind_and_its_last_whole_version_can_still_be_read() -> None:
    names = set(os.listdir("/dev/shm"))
    owner = Child(serve_owner)
    text, values = owner.answer()
    handles = SharedHandles.from_json(text)
    opened = open_shared(handles)
    assert not [name for name in set(os.listdir("/dev/shm")) - names if str(owner.pid) in name]
    owner.kill()
    assert not [name for name in set(os.listdir("/dev/shm")) - names if str(owner.pid) in name]
    with reading([opened], 0):
        assert bits(opened.tensors) == values
    with pytest.raises(EngineError, match="not shared any more"):
        open_shared(handles)
    opened.close()


def test_an_owner_killed_in_the_middle_of_a_change_leaves_weights_that_are_refused() -> None:
    owner = Child(serve_owner)
    opened = open_shared(SharedHandles.from_json(owner.answer()[0]))
    owner.ask("begin")
    owner.ask("change")
    owner.kill()
    with pytest.raises(EngineError, match="are in change"), reading([opened], 0):
        raise AssertionError("nothing must be read")


def test_a_killed_reader_leaves_nothing_behind_and_does_not_disturb_the_owner() -> None:
    tensors = parameters()
    shared = share(tensors, owner=OWNER)
    shared.end_change(0)
    descriptors = len(os.listdir("/proc/self/fd"))
    reader = Child(serve_reader, shared.handles.to_json())
    reader.ask("bits", 0)
    reader.kill()
    STARTED.clear()
    del reader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    shared.begin_change()
    tensors["first"].zero_()
    shared.end_change(1)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_hundred_pulls_keep_memory_and_descriptors_flat(record_property: Callable[[str, object], None]) -> None:
    tensors = {f"{number}": torch.randn(64, 1024) for number in range(16)}  # 4 MiB
    shared = share(tensors, owner=OWNER)
    opened = open_shared(shared.handles)
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    resident, descriptors = [], []
    for version in range(220):
        shared.begin_change()
        tensors["3"].add_(1)
        shared.end_change(version)
        with reading([opened], version):
            for name, tensor in opened.tensors.items():
                targets[name].copy_(tensor)
        resident.append(_resident_bytes())
        descriptors.append(len(os.listdir("/proc/self/fd")))
    slope = float(np.polyfit(np.arange(200), resident[20:], 1)[0])
    record_property("bytes_per_pull", slope)
    assert slope < 1024
    assert len(set(descriptors[20:])) == 1


def test_closing_gives_back_the_memory_and_every_descriptor() -> None:
    gc.collect()
    descriptors, maps = len(os.listdir("/proc/self/fd")), _shared_maps()
    tensors = parameters()
    shared = share(tensors, owner=OWNER)
    opened = open_shared(shared.handles)
    assert _shared_maps() > maps
    opened.close()
    opened.close()
    shared.close()
    del tensors, shared, opened
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert _shared_maps() == maps


def _shared_maps() -> int:
    return sum("/dev/shm/torch_" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_one_storage_is_shared_once_and_sharing_again_takes_no_room() -> None:
    tensors = parameters()
    assert bytes_to_share(tensors) == 4 * 50_000 + 2 * 21 + 256
    shared = share(tensors, owner=OWNER)
    assert len(shared.handles.memories) == 3
    assert bytes_to_share(tensors) == 0
    again = share(tensors, owner=OWNER)
    assert again.handles.memories == shared.handles.memories


def test_handles_survive_their_json() -> None:
    shared = share(parameters(), owner=OWNER)
    assert SharedHandles.from_json(shared.handles.to_json()) == shared.handles


def test_a_writer_on_the_readers_side_can_not_change_the_trainers_weights() -> None:
    tensors = parameters()
    shared = share(tensors, owner=OWNER)

    def write(_: Connection) -> None:  # forked: closures need no pickle
        faulthandler.disable()
        open_shared(shared.handles).tensors["first"].zero_()

    before = bits(tensors)
    child = Child(write)
    child.process.join(30)
    assert child.process.exitcode == -signal.SIGSEGV
    assert bits(tensors) == before


def test_weights_for_which_there_is_no_room_are_refused_before_anything_moves(tmp_path: Path) -> None:
    num_bytes = 1 << 42
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(num_bytes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        large = torch.from_numpy(np.memmap(tmp_path / "sparse", np.uint8, mode="r"))
    with pytest.raises(EngineError, match=r"/dev/shm has .* MiB free, sharing the weights takes 4,194,304\.2 MiB"):
        share({"large": large, **parameters()}, owner=OWNER)
    assert not large.untyped_storage().is_shared()


def test_handles_of_another_node_or_of_a_descriptor_used_again_are_refused() -> None:
    shared = share(parameters(), owner=OWNER)
    fields = {name: getattr(shared.handles, name) for name in SharedHandles.__slots__}
    with pytest.raises(EngineError, match="on another node"):
        OpenedParameters(SharedHandles(**fields | {"node": "elsewhere 1-2-3"}))
    memory = shared.handles.memories[0]
    other = memory._replace(identity="1:1")
    with pytest.raises(EngineError, match="another file by now"):
        OpenedParameters(SharedHandles(**fields | {"memories": (other, *shared.handles.memories[1:])}))


def test_tensors_on_no_known_device_are_refused() -> None:
    with pytest.raises(EngineError, match=r"can't share tensors on \['cpu', 'meta'\]"):
        share({"first": torch.zeros(1), "second": torch.zeros(1, device="meta")}, owner=OWNER)


def test_a_lock_that_another_process_holds_is_waited_for_and_then_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_segments, "_LOCK_TIMEOUT_S", 0.3)

    def hold(pipe: Connection) -> None:
        descriptor = os.open("/dev/shm", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        pipe.send("held")
        pipe.recv()

    tensors = parameters()
    holder = Child(hold)
    assert holder.answer() == "held"
    with pytest.raises(EngineError, match=r"/dev/shm is locked by another process for 0\.3 s"):
        share(tensors, owner=OWNER)
    assert not any(tensor.untyped_storage().is_shared() for tensor in tensors.values())
    holder.kill()
    share(tensors, owner=OWNER)
