"""What `clipo data check` says of data files: counts, and the rows that no response can ever get right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.data.rows import Row, read_rows
from clipo_megatron.data.tokenizer import render_prompts
from clipo_megatron.errors import ConfigError
from clipo_megatron.records import Verdict
from clipo_megatron.rewards.pool import Verifiers
from clipo_megatron.rewards.routing import verifier_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """One file."""

    file: str
    rows: int
    sources: Mapping[str, int]
    """Rows of each `data_source`."""
    duplicates: int
    """Rows whose prompt stands in an earlier row of the file."""
    overlong: int | None
    """Rows with too many tokens; None without a tokenizer."""
    unverifiable: tuple[int, ...]
    """Row numbers, from 0, whose gold answer does not verify against itself: no response can be right there."""
    text_only: tuple[int, ...]
    """Row numbers, from 0, where an answer must be spelled like the gold one: it is no formula that can be compared."""


def check_files(
    files: Sequence[str | Path],
    verifiers: Verifiers,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_tokens: int | None = None,
) -> list[FileReport]:
    """Check files.

    Args:
        files: parquet or JSONL.
        verifiers: judge the gold answers, as they would judge responses.
        tokenizer: counts over-long prompts; None: they are not counted.
        max_prompt_tokens: longest prompt that is not over-long; goes with `tokenizer`.

    Raises:
        ConfigError: all faults of the files.
    """
    contents: list[list[Row]] = []
    problems: list[str] = []
    for file in files:
        try:
            contents.append(read_rows(file))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return [
        _report(str(file), rows, verifiers, tokenizer, max_prompt_tokens)
        for file, rows in zip(files, contents, strict=True)
    ]


def _report(
    file: str,
    rows: Sequence[Row],
    verifiers: Verifiers,
    tokenizer: PreTrainedTokenizerBase | None,
    max_prompt_tokens: int | None,
) -> FileReport:
    overlong = None
    if tokenizer is not None and max_prompt_tokens is not None:
        ids = render_prompts(tokenizer, [row.messages for row in rows])
        overlong = sum(len(prompt) > max_prompt_tokens for prompt in ids)
    items = [(verifier_of(row.source), row.answer, _perfect_response(row.answer)) for row in rows]
    verdicts = verifiers.judge(items)
    by_value = verifiers.judge(items, use_shortcuts=False)
    return FileReport(
        file=file,
        rows=len(rows),
        sources=dict(sorted(Counter(row.source for row in rows).items())),
        duplicates=len(rows) - len({row.messages for row in rows}),
        overlong=overlong,
        unverifiable=tuple(n for n, verdict in enumerate(verdicts) if verdict is not Verdict.CORRECT),
        text_only=tuple(
            n
            for n, (as_text, as_value) in enumerate(zip(verdicts, by_value, strict=True))
            if as_text is Verdict.CORRECT and as_value is not Verdict.CORRECT
        ),
    )


def _perfect_response(answer: str) -> str:
    """The best that a model could write: the gold solution, or the bare gold answer in a box."""
    return answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
