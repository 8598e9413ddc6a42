"""The process group that trainer and engine ranks send slices over, which no other library of either process sees."""

from __future__ import annotations

import datetime
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """A message on its way."""

    def wait(self) -> object:
        """Until its buffer can be used; on a GPU, by what comes next in the current stream."""
        ...


class Group(Protocol):
    """What is used of a c10d process group; see `join`."""

    @property
    def options(self) -> Any:  # noqa: ANN401 (torch has a class for each backend)
        """With the deadline of a message, on a GPU."""
        ...

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work:
        """Start sending."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work:
        """Start receiving."""
        ...

    def abort(self) -> None:
        """End what is under way, on a GPU; on a CPU it ends with the last reference to the group."""
        ...


def join(
    store: dist.Store,  # pyright: ignore[reportPrivateImportUsage]
    *,
    rank: int,
    size: int,
    device: Literal["cpu", "cuda"],
    timeout_s: float,
    patience_s: float,
) -> Group:
    """This process's end of a group of all trainer and engine ranks; other groups of the process are left alone.

    Args:
        store: the same one for all, used by nothing else.
        rank: of the trainer; or trainer ranks + rank over all engines.
        size: ranks of trainer and engines.
        device: "cpu" (gloo) or "cuda" (nccl, on the current GPU).
        timeout_s: after which a message that did not come is an error.
        patience_s: after which a rank that does not connect is one; nccl's connect at their first message.

    Raises:
        RuntimeError: a rank did not connect.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if device == "cpu":
        return _Gloo(dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=patience_s)), timeout)  # pyright: ignore
    options = dist.ProcessGroupNCCL.Options()  # pyright: ignore
    options._timeout = timeout  # pyright: ignore
    return dist.ProcessGroupNCCL(store, rank, size, options)  # pyright: ignore


class _Gloo:
    """Gloo keeps the deadline that its ranks had for connecting, so each message gets its own."""

    def __init__(self, group: Any, timeout: datetime.timedelta) -> None:  # noqa: ANN401 (torch's stubs lack it)
        self._group, self._timeout = group, timeout

    @property
    def options(self) -> Any:  # noqa: ANN401 (as above)
        return self._group.options

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work:
        return _Timed(self._group.send(tensors, rank, tag), self._timeout)

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work:
        return _Timed(self._group.recv(tensors, rank, tag), self._timeout)

    def abort(self) -> None:
        self._group.abort()


class _Timed:
    def __init__(self, work: Any, timeout: datetime.timedelta) -> None:  # noqa: ANN401 (as above)
        self._work, self._timeout = work, timeout

    def wait(self) -> object:
        return self._work.wait(self._timeout)
