"""Rows of parquet and JSONL files, in either of two schemas. No tokenizer here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipo_megatron.data.tokenizer import Message
from clipo_megatron.errors import ConfigError

CHAT_COLUMNS = ("data_source", "prompt", "reward_model")
PLAIN_COLUMNS = ("question", "answer")
_RULE = (
    "a file needs either the columns data_source (text), prompt (a list of messages with role and content) and "
    "reward_model (with ground_truth), or question and answer (text), with data_source if you like"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question with its gold answer."""

    source: str
    """`data_source`; the file's name without its ending where the file has none."""
    messages: tuple[Message, ...]
    answer: str


def read_rows(file: str | Path) -> list[Row]:
    """All rows of a file.

    Raises:
        ConfigError: the file is missing, unreadable, empty, lacks columns, or has a row without a question or answer.
    """
    path = Path(file)
    records = list(_records(path))
    if problem := _columns_problem(path, _columns(records)):
        raise ConfigError(problem)
    rows, problems = [], []
    for number, record in enumerate(records):
        row = _row(record, default_source=path.stem)
        if isinstance(row, Row):
            rows.append(row)
        elif len(problems) < 5:
            problems.append(f"{path}: row {number}: {row}; correct or remove it")
    if problems:
        raise ConfigError(problems)
    return rows


def read_rows_problems(files: Sequence[str | Path]) -> list[str]:
    """What is wrong with data files, as far as their headers tell: all faults, cheap, without a tokenizer."""
    return [problem for file in files for problem in _file_problems(Path(file))]


def _file_problems(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            parquet = _open_parquet(path)
            columns = parquet.schema_arrow.names if parquet.metadata.num_rows else None
        else:
            first = next(_json_records(path), None)
            columns = None if first is None else list(first)
    except ConfigError as error:
        yield from error.problems
        return
    if problem := _columns_problem(path, columns):
        yield problem


def _columns_problem(path: Path, columns: Sequence[str] | None) -> str | None:
    if columns is None:
        return f"{path}: no rows; give a file with at least one"
    if all(name in columns for name in CHAT_COLUMNS) or all(name in columns for name in PLAIN_COLUMNS):
        return None
    return f"{path}: columns {', '.join(sorted(columns)) or 'none'}: {_RULE}; rename or add columns"


def _columns(records: Sequence[Mapping[str, object]]) -> list[str] | None:
    return list(records[0]) if records else None


def _records(path: Path) -> Iterator[Mapping[str, object]]:
    if path.suffix == ".parquet":
        try:
            yield from _open_parquet(path).read().to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(_unreadable(path, error)) from error
    else:
        yield from _json_records(path)


def _open_parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a parquet or JSONL file on this machine")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(_unreadable(path, error)) from error


def _json_records(path: Path) -> Iterator[Mapping[str, object]]:
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path}: unknown ending {path.suffix!r}; give a .parquet or a .jsonl file")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a parquet or JSONL file on this machine")
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _json_object(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_unreadable(path, error)) from error


def _json_object(path: Path, number: int, line: str) -> Mapping[str, object]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {number + 1} is not JSON ({error}); write one object a line") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: line {number + 1} is no JSON object; write one object a line")
    return record


def _unreadable(path: Path, error: Exception) -> str:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path}: can't be read ({first_line}); is it complete, and of the kind its name says?"


def _row(record: Mapping[str, object], *, default_source: str) -> Row | str:
    """The row, or what is wrong with it."""
    source = record.get("data_source", default_source)
    if not isinstance(source, str) or not source:
        return f"data_source = {source!r}: must be text"
    if "question" in record and "answer" in record and "reward_model" not in record:
        question, answer = record["question"], record["answer"]
        messages = (("user", question),) if isinstance(question, str) and question.strip() else None
    else:
        messages = _messages(record.get("prompt"))
        reward = record.get("reward_model")
        answer = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if messages is None:
        return "no question: the prompt must be messages with role and content, or the question text, and not blank"
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        return f"no gold answer: found {answer!r}, must be text"
    return Row(source=source, messages=messages, answer=answer)


def _messages(prompt: object) -> tuple[Message, ...] | None:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
        return None
    messages = []
    for message in prompt:
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            return None
        messages.append((role, content))
    return tuple(messages)
