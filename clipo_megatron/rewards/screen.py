"""Cheap tests for answers that could keep a computer algebra system busy for ever. Run before anything is parsed."""

from __future__ import annotations

import re

MAX_DIGITS = 400
MAX_EXPONENT_DIGITS = 4
MAX_DEPTH = 30

_HEAVY_COMMANDS = re.compile(r"\\(?:sum|prod|i*int|oint|bigcup|bigcap|uparrow|Uparrow)(?![A-Za-z])")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1},}}")
# A factorial of a number with up to three digits, or of one letter, is harmless.
_FACTORIAL = re.compile(r"(?<!\\)!(?!=)")
_SMALL_FACTORIAL = re.compile(r"(?:(?<![\d.])\d{1,3}|(?<![A-Za-z\\])[A-Za-z])\s*$")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{[^{}]*\d{4,}|\\[dt]?binom\s*\{[^{}]*\}\s*\{[^{}]*\d{4,}")
_POWER = re.compile(r"\^|\*\*")
_NUMBER = re.compile(r"\d+")
_BARE_TOWER = re.compile(r"(?:\^|\*\*)\s*[\d.]+\s*(?:\^|\*\*)")
_POWER_OF_POWER = re.compile(r"(?:\^|\*\*)[^()]*\)\s*(?:\^|\*\*)|(?:\^|\*\*)[^{}]*\}\s*\}\s*(?:\^|\*\*)")
_EXPONENT_ATOM = re.compile(r"\d+|.", re.DOTALL)


def hazard(answer: str, *, max_chars: int) -> str | None:
    """Why `answer` is not worth parsing, or None when it looks harmless.

    Args:
        answer: content of a box.
        max_chars: longest answer that is parsed, in characters.
    """
    if len(answer) > max_chars:
        return f"longer than {max_chars} characters"
    if _depth(answer) > MAX_DEPTH:
        return f"brackets nested deeper than {MAX_DEPTH}"
    if _LONG_NUMBER.search(answer):
        return f"a number of more than {MAX_DIGITS} digits"
    if _HEAVY_COMMANDS.search(answer):
        return "a sum, product or integral"
    if _BINOMIAL.search(answer) or any(
        not _SMALL_FACTORIAL.search(answer[max(0, m.start() - 8) : m.start()]) for m in _FACTORIAL.finditer(answer)
    ):
        return "a large factorial or binomial"
    if _has_large_powers(answer):
        return "a tower of powers or a huge exponent"
    return None


def _depth(answer: str) -> int:
    depth = deepest = 0
    for character in answer:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _has_large_powers(answer: str) -> bool:
    """A numeric power inside an exponent, a huge exponent, or powers of powers that multiply up to one."""
    if _BARE_TOWER.search(answer):
        return True
    digits = 0
    for match in _POWER.finditer(answer):
        exponent = _exponent(answer, match.end())
        numbers = _NUMBER.findall(exponent)
        if _POWER.search(exponent) and len(numbers) > 1:
            return True
        longest = max(map(len, numbers), default=0)
        if longest > MAX_EXPONENT_DIGITS:
            return True
        digits += longest
    return digits > MAX_EXPONENT_DIGITS and bool(_POWER_OF_POWER.search(answer))


def _exponent(answer: str, start: int) -> str:
    """The exponent that starts at `start`: a bracketed group, or the run of characters a parser might take for it."""
    while start < len(answer) and answer[start] in " -+":
        start += 1
    if start < len(answer) and answer[start] in "{(":
        depth = 0
        for end in range(start, len(answer)):
            depth += (answer[end] in "{(") - (answer[end] in "})")
            if depth == 0:
                return answer[start : end + 1]
        return answer[start:]
    match = _EXPONENT_ATOM.match(answer, start)
    return match.group() if match else ""
