"""The exceptions of the project. Each message names the key or tensor, the value found, the rule and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class ClipoError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(ClipoError, ValueError):
    """The user's input can't be run: recipe, command line, data files, model folder. Holds all faults found at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class CheckError(ClipoError, RuntimeError):
    """An invariant of the run is broken (say, sampled and scored log-probs differ): going on would give wrong numbers."""


class CheckpointError(ClipoError, RuntimeError):
    """A checkpoint or model folder is incomplete, damaged, or does not belong to this run."""


class EngineError(ClipoError, RuntimeError):
    """A rollout engine was asked for what it can't do now, say, to generate for weights that it does not hold."""


class EngineLostError(EngineError):
    """Processes of an engine died or hang: it can't be asked for anything any more, but another can take its place."""


class WorkerError(ClipoError, RuntimeError):
    """A worker process failed. The message is its first cause on one line; the traceback is in the worker's log."""
