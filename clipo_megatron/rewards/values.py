"""What the strict reader understands of an answer, and when two answers are the same. Numbers by mpmath, 50 digits."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpmath import mp, mpf

DIGITS = 50
_NUM_POINTS = 3

Number = complex
"""mpmath's mpf and mpc: they behave like complex numbers and have no types of their own."""
Point = Mapping[str, Number]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scalar:
    """A number, or a function of the variables `names`."""

    at: Callable[[Point], Number]
    names: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Values in brackets: point, interval or set; a list without brackets has empty ones."""

    opening: str
    closing: str
    items: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Union:
    """Groups joined by a union sign."""

    parts: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Rows of equal length."""

    rows: tuple[tuple[Scalar, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """sides[0] operators[0] sides[1] ..."""

    operators: tuple[str, ...]
    sides: tuple[Scalar, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Based:
    """A numeral with its base as subscript: the digits count, not the value."""

    digits: str
    base: str


Value = Scalar | Group | Union | Matrix | Relation | Based
Scale = Sequence[Number]
_FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def same(gold: Value, answer: Value, *, factors: Callable[[], Scale] = lambda: (mpf(1),)) -> bool | None:
    """Whether two values are equal.

    Variables take a few fixed positive values, so a difference is proven and equality is overwhelmingly likely.

    Args:
        gold: the right value.
        answer: the value to judge.
        factors: a scalar answer counts as equal when it is the gold times any of these (percent, degrees).

    Returns:
        None when the two are of kinds that can't be compared, or have no value at the points tried.
    """
    with mp.workdps(DIGITS):
        try:
            return _same(_unwrap(gold, answer), _unwrap(answer, gold), factors())
        except (ZeroDivisionError, ValueError, OverflowError, TypeError):
            return None


def _unwrap(value: Value, other: Value) -> Value:
    """`x = 5` against `5` is 5; so is a list of such, if they all speak of the same variable."""
    if isinstance(value, Relation) and not isinstance(other, Relation):
        right = _assigned(value)
        return right[1] if right else value
    if isinstance(value, Group) and isinstance(other, Group) and not any(isinstance(i, Relation) for i in other.items):
        pairs = [_assigned(item) if isinstance(item, Relation) else None for item in value.items]
        if None not in pairs and len({name for name, _ in filter(None, pairs)}) == 1:
            items = tuple(right for _, right in filter(None, pairs))
            return Group(opening=value.opening, closing=value.closing, items=items)
    return value


def _assigned(relation: Relation) -> tuple[str, Scalar] | None:
    """The name and value of `name = value`."""
    left, right = relation.sides[0], relation.sides[-1]
    if relation.operators != ("=",) or len(left.names) != 1 or right.names & left.names:
        return None
    return next(iter(left.names)), right


def _same(gold: Value, answer: Value, factors: Scale) -> bool | None:
    match gold, answer:
        case Scalar(), Scalar():
            return any(_same_scalars(gold, answer, factor) for factor in factors)
        case Group(), Group():
            return _same_groups(gold, answer)
        case Union(), Union():
            return _same_unordered(gold.parts, answer.parts)
        case Matrix(), Matrix():
            return [len(row) for row in gold.rows] == [len(row) for row in answer.rows] and _same_ordered(
                [cell for row in gold.rows for cell in row], [cell for row in answer.rows for cell in row]
            )
        case Relation(), Relation():
            return _same_relations(gold, answer)
        case Based(), Based():
            return gold == answer
        case (Based(), Scalar()) | (Scalar(), Based()):
            return _same_digits(gold, answer)
        case (Scalar(), Group()) | (Group(), Scalar()):
            return _same_single(gold, answer)
    return None


def _same_digits(gold: Value, answer: Value) -> bool | None:
    """`66_8` against `66`: perhaps the base was only left out. Against any other number: different."""
    based, scalar = (gold, answer) if isinstance(gold, Based) else (answer, gold)
    if not isinstance(based, Based) or not isinstance(scalar, Scalar) or not based.digits.lstrip("-").isdigit():
        return None
    return None if not scalar.names and _is_close(scalar.at({}), mpf(based.digits)) else False


def _same_single(gold: Value, answer: Value) -> bool | None:
    """A set or list against a scalar: equal when it has this one element, different when it has several."""
    group, scalar = (gold, answer) if isinstance(gold, Group) else (answer, gold)
    if not isinstance(group, Group) or not isinstance(scalar, Scalar):
        return None
    if len(group.items) != 1:
        return False
    return _same(group.items[0], scalar, (mpf(1),))


def _same_groups(gold: Group, answer: Group) -> bool | None:
    kinds = (gold.opening + gold.closing, answer.opening + answer.closing)
    if len(gold.items) != len(answer.items):
        return False
    is_set = tuple(kind in ("", "\\{\\}") for kind in kinds)
    if all(is_set):
        return _same_unordered(gold.items, answer.items)
    ordered = _same_ordered(gold.items, answer.items)
    if kinds[0] == kinds[1]:
        return ordered
    if any(is_set):
        # "3, 4" for (3, 4) is a matter of taste; other orders and numbers are not.
        return ordered if kinds[1] == "" and kinds[0] == "()" else None
    return False


def _same_ordered(gold: Sequence[Value], answer: Sequence[Value]) -> bool | None:
    verdicts = [_same(g, a, (mpf(1),)) for g, a in zip(gold, answer, strict=True)]
    if any(verdict is False for verdict in verdicts):
        return False
    return None if any(verdict is None for verdict in verdicts) else True


def _same_unordered(gold: Sequence[Value], answer: Sequence[Value]) -> bool | None:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        verdicts = [_same(item, other, (mpf(1),)) for other in left]
        if True not in verdicts:
            return None if None in verdicts else False
        left.pop(verdicts.index(True))
    return True


def _same_relations(gold: Relation, answer: Relation) -> bool | None:
    if len(gold.operators) > 1 or len(answer.operators) > 1:
        flipped = Relation(
            operators=tuple(_FLIPPED[operator] for operator in reversed(answer.operators)),
            sides=tuple(reversed(answer.sides)),
        )
        tries = [_same_ordered(gold.sides, a.sides) for a in (answer, flipped) if a.operators == gold.operators]
        return True if True in tries else None
    return _same_single_relations(gold, answer)


def _same_single_relations(gold: Relation, answer: Relation) -> bool | None:
    """Equal when left minus right is proportional, with the sign that the operators ask for."""
    operator = answer.operators[0]
    if not any(side.names for side in (*gold.sides, *answer.sides)):
        return gold.operators == answer.operators and _same_ordered(gold.sides, answer.sides)
    signs = {operator: 1, _FLIPPED[operator]: -1}
    names = gold.sides[0].names | gold.sides[1].names | answer.sides[0].names | answer.sides[1].names
    ratios = []
    for point in _points(names):
        differences = [side[0].at(point) - side[1].at(point) for side in (gold.sides, answer.sides)]
        if _is_close(differences[0], mpf(0)) or _is_close(differences[1], mpf(0)):
            return None
        ratios.append(differences[1] / differences[0])
    if not all(_is_close(ratio, ratios[0]) for ratio in ratios):
        # 2^x = 8 and x = 3 have the same solution: other forms are not this reader's business.
        return None
    if gold.operators[0] in ("=", "!="):
        return gold.operators[0] == operator
    sign = signs.get(gold.operators[0])
    return sign is not None and abs(ratios[0].imag) < 1e-20 and ratios[0].real * sign > 0


def _same_scalars(gold: Scalar, answer: Scalar, factor: Number) -> bool:
    return all(_is_close(gold.at(point) * factor, answer.at(point)) for point in _points(gold.names | answer.names))


def _points(names: frozenset[str]) -> list[Point]:
    """A few fixed positive values for each name, the same in both answers."""
    count = _NUM_POINTS if names else 1
    return [
        {name: mpf(zlib.crc32(f"{name}/{number}".encode())) / mpf(2**31) + mpf("0.3") for name in names}
        for number in range(count)
    ]


def _is_close(left: Number, right: Number) -> bool:
    """Equal to 25 of 50 digits; rounding noise around 0 counts as 0."""
    if mp.isinf(left) or mp.isinf(right):
        return left == right
    if mp.isnan(left) or mp.isnan(right):
        raise ValueError("no value here")
    size = max(abs(left), abs(right))
    return size < mpf("1e-40") or abs(left - right) <= size * mpf("1e-25")
