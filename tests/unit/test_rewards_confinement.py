"""Laws of a verifier process: it judges and reads, and has no way to the network, to files, or to other programs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from pebble import ProcessPool

from clipo_megatron.records import Verdict
from clipo_megatron.rewards.worker import judge_pairs, start_worker, why_unconfined

MEMORY = 2 << 30


@pytest.fixture(scope="module")
def confined():
    """A process started as the verifiers' pool starts its own."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(max_workers=1, initializer=start_worker, initargs=(os.getpid(), MEMORY), context=context)
    yield pool
    pool.stop()
    pool.join()


def _connect(folder: Path, port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def _connect_unix(folder: Path, port: int) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(folder / "socket"))


def _send_datagram(folder: Path, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.sendto(b"x", ("127.0.0.1", port))


def _listen(folder: Path, port: int) -> None:
    socket.create_server(("127.0.0.1", 0)).close()


def _make_file(folder: Path, port: int) -> None:
    (folder / "new").write_text("x")


def _append(folder: Path, port: int) -> None:
    with (folder / "there").open("a") as file:
        file.write("x")


def _update_in_place(folder: Path, port: int) -> None:
    os.close(os.open(folder / "there", os.O_RDWR))


def _by_c_library(folder: Path, port: int) -> None:
    """`creat` and `openat2`, which Python has no function for."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number, arguments in ((85, (bytes(folder / "created"), 0o600)), (437, (-100, bytes(folder / "created"), 0, 0))):
        if libc.syscall(number, *arguments) < 0 and ctypes.get_errno() not in (14, 22):  # openat2 without a structure
            raise PermissionError(ctypes.get_errno(), f"call {number}")


def _remove(folder: Path, port: int) -> None:
    (folder / "to_remove").unlink()


def _rename(folder: Path, port: int) -> None:
    (folder / "to_rename").rename(folder / "renamed")


def _make_folder(folder: Path, port: int) -> None:
    (folder / "folder").mkdir()


def _make_link(folder: Path, port: int) -> None:
    (folder / "link").symlink_to(folder / "there")


def _open_rights(folder: Path, port: int) -> None:
    (folder / "there").chmod(0o777)


def _run_program(folder: Path, port: int) -> None:
    if os.spawnv(os.P_WAIT, "/bin/true", ["true"]) != 0:
        raise PermissionError("the program did not run")


def _signal_parent(folder: Path, port: int) -> None:
    os.kill(os.getppid(), 0)


DEEDS: tuple[Callable[[Path, int], None], ...] = (
    *(_connect, _connect_unix, _send_datagram, _listen, _make_file, _append, _update_in_place, _by_c_library, _remove),
    *(_rename, _make_folder, _make_link, _open_rights, _run_program, _signal_parent),
)


@pytest.fixture
def scene(tmp_path: Path):
    """A folder with files, and a listener on this host: (folder, port)."""
    for name in ("there", "to_remove", "to_rename"):
        (tmp_path / name).write_text(name)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        yield tmp_path, listener.getsockname()[1]


def _content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.iterdir()}


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__.strip("_"))
def test_what_any_process_can_do_a_verifier_process_can_not(confined, scene, deed):
    folder, port = scene
    before = _content(folder)
    with pytest.raises(PermissionError):
        confined.schedule(deed, args=(folder, port)).result(timeout=60)
    assert _content(folder) == before
    deed(folder, port)  # here it works: it is the confinement that refused it


def test_a_confined_process_still_judges_and_reads(confined, tmp_path):
    (tmp_path / "file").write_text("content")
    assert confined.schedule(why_unconfined).result(timeout=60) == ""
    assert confined.schedule(Path.read_text, args=(tmp_path / "file",)).result(timeout=60) == "content"
    found = confined.schedule(judge_pairs, args=([("\\frac{1}{2}", "0.5"), ("\\int_0^1 x dx", "0.25")],)).result(60)
    assert found == [Verdict.CORRECT, Verdict.WRONG]
