"""An engine's worker processes, called all at once: one deadline, and who failed or is late told by rank."""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clipo_megatron.errors import CheckError, ClipoError, EngineError, EngineLostError

if TYPE_CHECKING:
    from vllm import LLM

Reply = tuple[str, str, Any]
"""Name and message of the error, both empty when all went well; then what was asked for.

An error is returned, not raised: vLLM stops reading the workers' replies at the first that raised, and would take the
others for replies to its next call.
"""
_CELL = struct.Struct("<q")


class ProgressBoard:
    """The number of the last call that each worker has finished, in an anonymous memory file.

    vLLM reads replies in the order of ranks and stops at the first that does not come, so replies don't tell who is late.
    """

    def __init__(self, workers: int) -> None:
        """All are at call 0.

        Args:
            workers: of the engine.
        """
        self._workers = workers
        self._descriptor = os.memfd_create("clipo-progress")
        os.ftruncate(self._descriptor, workers * _CELL.size)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        """For `mark_done`, until `close`."""

    def behind(self, call: int) -> list[int]:
        """Ranks that have not finished `call`."""
        cells = _CELL.iter_unpack(os.pread(self._descriptor, self._workers * _CELL.size, 0))
        return [rank for rank, (done,) in enumerate(cells) if done < call]

    def close(self) -> None:
        """Give the file back. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def mark_done(path: str, rank: int, call: int) -> None:
    """Say that worker `rank` has finished `call`; to be called in the worker."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, _CELL.pack(call), rank * _CELL.size)
    finally:
        os.close(descriptor)


class Workers:
    """Calls methods of `rollout.receiver.WeightReceiver` on all workers of an engine."""

    def __init__(self, llm: LLM, count: int) -> None:
        """Nothing is called yet.

        Args:
            llm: the running engine.
            count: its workers.
        """
        self._llm: LLM | None = llm
        self._count = count
        self._calls = 0
        self._board = ProgressBoard(count)
        self._lost = ""

    def require(self) -> LLM:
        """The running engine, if all its workers can be called.

        Raises:
            EngineError: it is closed.
            EngineLostError: a worker died or was late in an earlier call.
        """
        if self._llm is None:
            raise EngineError("the engine is closed; start a new one")
        if self._lost:
            raise EngineLostError(f"the engine has lost its workers ({self._lost}); restart it")
        return self._llm

    def call(self, method: str, *arguments: object, timeout_s: float | None = None) -> list[Any]:
        """What `method` returns on each worker.

        Args:
            method: of the receiver.
            arguments: plain values; they cross processes.
            timeout_s: deadline of all together; with one worker, which runs in this process, there is none.

        Raises:
            EngineError: a worker failed.
            EngineLostError: a worker died or is late: no worker can be called any more.
            CheckError: what came is damaged.
        """
        llm = self.require()
        self._calls += 1
        try:
            replies: list[Reply] = llm.collective_rpc(
                "clipo_call", timeout=timeout_s, args=(self._board.path, self._calls, method, arguments)
            )
        except (TimeoutError, RuntimeError) as error:  # vLLM has no class of its own for a worker that died
            self._lost = self._cause(method, error, timeout_s)
            raise EngineLostError(self._lost) from error
        for rank, (kind, message, _) in enumerate(replies):
            if kind:
                text = f"engine worker {rank} of {self._count}: {method}: {kind}: {message}"
                raise CheckError(text) if kind == "CheckError" else EngineError(text)
        return [found for _, _, found in replies]

    @contextmanager
    def generating(self) -> Generator[LLM]:
        """Within the block the engine generates: an error of vLLM's there is the loss of its workers, where they are processes.

        vLLM has no way back from one: its scheduler goes on as if nothing had been sampled.

        Raises:
            EngineLostError: a worker died, failed, or did not answer vLLM in the time that vLLM gives it.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self.require()
        try:
            yield llm
        except ClipoError:
            raise
        except (TimeoutError, RuntimeError, EngineDeadError) as error:
            if self._count == 1:
                raise
            self._lost = f"an engine worker of {self._count} died, failed or is late in generate: {error or type(error).__name__}"
            raise EngineLostError(self._lost) from error

    def close(self) -> None:
        """End the workers; none can be called any more. Closing twice is fine."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._board.close()

    def _cause(self, method: str, error: Exception, timeout_s: float | None) -> str:
        behind = ", ".join(map(str, self._board.behind(self._calls)))
        who = f"engine worker {behind} of {self._count}: {method}"
        if isinstance(error, TimeoutError):
            return f"{who}: not done after {timeout_s:g} s"
        return f"{who}: died, or the connection to it broke: {error}"
