"""Prompts of a run: rows of all files, tokenised once; over-long ones are left out and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.data.rows import read_rows, read_rows_problems
from clipo_megatron.data.tokenizer import render_prompts
from clipo_megatron.errors import ConfigError
from clipo_megatron.records import Prompt
from clipo_megatron.rewards.routing import verifier_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptSet", "load_prompts", "read_rows_problems"]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in file order."""

    prompts: tuple[Prompt, ...]
    num_overlong: int
    """Rows left out because they have too many tokens."""

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all prompts in order; a resumed run must find the same."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            # Lengths first, so that no two lists of fields give the same bytes.
            fields = [prompt.token_ids.astype("<i4").tobytes()]
            fields += [text.encode() for text in (prompt.answer, prompt.verifier, prompt.source)]
            digest.update(f"{prompt.index} {[len(field) for field in fields]}".encode())
            digest.update(b"".join(fields))
        return digest.hexdigest()


def load_prompts(
    files: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int
) -> PromptSet:
    """Read and tokenise files.

    Args:
        files: parquet or JSONL; `Prompt.index` counts their rows one after the other, left-out rows included.
        tokenizer: one with a chat template.
        max_prompt_tokens: longest prompt kept, template included.

    Raises:
        ConfigError: all faults of the files, or the tokenizer has no chat template.
    """
    rows, problems = [], []
    for file in files:
        try:
            rows += read_rows(file)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    token_ids = render_prompts(tokenizer, [row.messages for row in rows])
    prompts = tuple(
        Prompt(index=index, token_ids=ids, answer=row.answer, verifier=verifier_of(row.source), source=row.source)
        for index, (row, ids) in enumerate(zip(rows, token_ids, strict=True))
        if len(ids) <= max_prompt_tokens
    )
    return PromptSet(prompts=prompts, num_overlong=len(rows) - len(prompts))
