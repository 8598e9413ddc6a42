"""A strict reader of LaTeX answers, independent of math-verify: it reads a whole answer or refuses it.

It computes nothing symbolic: a scalar is a function of its variables that is evaluated at points (`values.py`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from clipo_megatron.rewards.canonical import Canonical
from clipo_megatron.rewards.scalars import ScalarParser, Unreadable
from clipo_megatron.rewards.values import Based, Group, Matrix, Relation, Scalar, Union, Value

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\[{}|\\%]|[<>!]=|\S| ")
_OPENING = frozenset(["(", "[", "{", "\\{"])
_CLOSING = frozenset([")", "]", "}", "\\}"])
_RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "\\lt": "<",
    "\\gt": ">",
    "\\le": "<=",
    "\\leq": "<=",
    "<=": "<=",
    "\\leqslant": "<=",
    "\\ge": ">=",
    "\\geq": ">=",
    ">=": ">=",
    "\\geqslant": ">=",
    "\\ne": "!=",
    "\\neq": "!=",
}
_BASED = re.compile(r"(-?[0-9A-F]+)_(?:\{(\d+)\}|(\d+))")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}|[A-Za-z] [A-Za-z]")
_ENVIRONMENT_OR_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]+\}(?:\{[lcr|]*\})?|\\[A-Za-z]+")
_MATRICES = ("pmatrix", "bmatrix")
_BARE_MATRICES = ("matrix", "array")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A whole answer: its value, and the unit that was cut off."""

    value: Value
    unit: str


def read(answer: Canonical) -> Reading | None:
    """Read an answer, or None when any part of it is not understood."""
    try:
        return Reading(value=_value(answer.body), unit=answer.unit)
    except (Unreadable, RecursionError, ValueError):
        return None


def _value(body: str) -> Value:
    if match := _BASED.fullmatch(body):
        return Based(digits=match[1], base=match[2] or match[3])
    if _WORD.search(_ENVIRONMENT_OR_COMMAND.sub("", body)):
        raise Unreadable(body)  # a word, not a product of letters
    tokens = [
        token
        for token, next_token in itertools.pairwise([*_TOKEN.findall(body), ""])
        # A space that ends a command's name says nothing; between two numbers it makes them unreadable.
        if token != " " or not next_token.isalpha()
    ]
    if not tokens:
        raise Unreadable(body)
    return _set_or_relation(tokens)


def _set_or_relation(tokens: Sequence[str]) -> Value:
    parts, cups = _split(tokens, frozenset(["\\cup"]))
    if cups:
        return Union(parts=tuple(_group(part) for part in parts))
    sides, relations = _split(tokens, frozenset(_RELATIONS))
    commas = _split(tokens, frozenset([",", ";"]))[0]
    if relations and len(commas) == 1:
        return Relation(
            operators=tuple(_RELATIONS[relation] for relation in relations),
            sides=tuple(_scalar(side) for side in sides),
        )
    if len(commas) > 1:
        return Group(opening="", closing="", items=tuple(_item(part) for part in commas))
    return _item(tokens)


def _item(tokens: Sequence[str]) -> Value:
    """A relation, a group, a matrix, a pair written with +-, or a scalar."""
    if len(_split(tokens, frozenset(_RELATIONS))[0]) > 1:
        return _set_or_relation(tokens)
    if _is_enclosed(tokens) and (tokens[0] == "\\{" or len(_split(tokens[1:-1], frozenset([",", ";"]))[0]) > 1):
        return _group(tokens)
    if list(tokens[:2]) == ["\\begin", "{"] or (_is_enclosed(tokens) and list(tokens[1:3]) == ["\\begin", "{"]):
        return _matrix(tokens)
    if tokens.count("\\pm") == 1:
        both = [[sign if token == "\\pm" else token for token in tokens] for sign in "+-"]
        return Group(opening="", closing="", items=tuple(_scalar(each) for each in both))
    return _scalar(tokens)


def _group(tokens: Sequence[str]) -> Group:
    if not _is_enclosed(tokens):
        raise Unreadable(tokens)
    if list(tokens) == ["\\{", "\\}"]:
        return Group(opening="\\{", closing="\\}", items=())
    parts = _split(tokens[1:-1], frozenset([",", ";"]))[0]
    return Group(opening=tokens[0], closing=tokens[-1], items=tuple(_item(part) for part in parts))


def _is_enclosed(tokens: Sequence[str]) -> bool:
    """The first token opens what only the last one closes; half-open intervals close with the other kind."""
    if len(tokens) < 2 or tokens[0] not in ("(", "[", "\\{") or tokens[-1] not in (")", "]", "\\}"):
        return False
    if (tokens[0] == "\\{") != (tokens[-1] == "\\}"):
        return False
    depth = 0
    for number, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and number < len(tokens) - 1:
            return False
    return depth == 0


def _matrix(tokens: Sequence[str]) -> Matrix:
    r"""`\begin{pmatrix}...`, or a bare `matrix` or `array` inside brackets."""
    is_bracketed = tokens[0] in ("(", "[")
    if is_bracketed:
        tokens = tokens[1:-1]
    name_end = tokens.index("}")
    name = "".join(tokens[2:name_end])
    tail = ["\\end", *tokens[1 : name_end + 1]]
    if name not in (_BARE_MATRICES if is_bracketed else _MATRICES) or list(tokens[-len(tail) :]) != tail:
        raise Unreadable(tokens)
    inner = tokens[name_end + 1 : -len(tail)]
    if name == "array":
        inner = inner[inner.index("}") + 1 :]  # after the alignment of the columns
    rows = [row for row in _split(inner, frozenset(["\\\\"]))[0] if row]
    cells = tuple(tuple(_scalar(cell) for cell in _split(row, frozenset(["&"]))[0]) for row in rows)
    if len({len(row) for row in cells}) != 1:
        raise Unreadable(tokens)
    return Matrix(rows=cells)


def _scalar(tokens: Sequence[str]) -> Scalar:
    return ScalarParser(tokens).parse()


def _split(tokens: Sequence[str], separators: frozenset[str]) -> tuple[list[Sequence[str]], list[str]]:
    """The parts between `separators` outside of all brackets, and the separators met."""
    parts: list[Sequence[str]] = []
    met: list[str] = []
    depth = start = 0
    for number, token in enumerate(tokens):
        # Environments hold commas and ampersands of their own.
        depth += (token in _OPENING or token == "\\begin") - (token in _CLOSING or token == "\\end")
        if depth == 0 and token in separators:
            parts.append(tokens[start:number])
            met.append(token)
            start = number + 1
    parts.append(tokens[start:])
    return parts, met
