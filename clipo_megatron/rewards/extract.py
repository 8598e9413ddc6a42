"""Where the answer stands in a text: after the thinking, in the last box. Linear scans, safe on megabytes."""

from __future__ import annotations

_BOX = "\\boxed{"
_END_OF_THINKING = "</think>"
_MAX_BARE_GOLD_CHARS = 2000


def response_answer(response: str) -> str | None:
    """Content of the response's last box, or None when it has none. What stands before `</think>` is not read."""
    return last_boxed(response.rpartition(_END_OF_THINKING)[2])


def gold_answer(gold: str) -> str | None:
    r"""The gold answer: the last box of a worked solution, or a bare answer as it is.

    Returns:
        None when no response can ever match it: the text is empty, holds a box without braces (`\boxed 2`) or an open
        one, or is a solution of several lines without a box. An empty box is an answer that only an empty box matches.
    """
    if "\\boxed" in gold:
        return last_boxed(gold)
    bare = gold.strip()
    return bare if bare and "\n" not in bare and len(bare) <= _MAX_BARE_GOLD_CHARS else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces balanced and outer spaces cut; None without one or when it stays open.

    An open last box does not fall back to an earlier one: the writer had not finished changing its mind.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    end = _closing_brace(text, start)
    return None if end is None else text[start:end].strip()


def _closing_brace(text: str, start: int) -> int | None:
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # an escaped brace is a character of the answer
            continue
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
