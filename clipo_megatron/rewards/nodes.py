"""Functions of variables, built from smaller ones. Evaluated lazily, at the caller's mpmath precision."""

from __future__ import annotations

from collections.abc import Callable

from mpmath import mp, mpf

from clipo_megatron.rewards.values import Number, Point

Node = Callable[[Point], Number]


def constant(value: Number) -> Node:
    """The same value everywhere."""
    return lambda point: value


def decimal(digits: str) -> Node:
    """A numeral, read at the precision of the evaluation."""
    return lambda point: mpf(digits)


def negated(node: Node) -> Node:
    """The negative of a node."""
    return lambda point: -node(point)


def added(left: Node, right: Node) -> Node:
    """Sum of two nodes."""
    return lambda point: left(point) + right(point)


def subtracted(left: Node, right: Node) -> Node:
    """Difference of two nodes."""
    return lambda point: left(point) - right(point)


def multiplied(left: Node, right: Node) -> Node:
    """Product of two nodes."""
    return lambda point: left(point) * right(point)


def divided(top: Node, bottom: Node) -> Node:
    """Quotient of two nodes."""
    return lambda point: top(point) / bottom(point)


def applied(function: Callable[[Number], Number], node: Node) -> Node:
    """A function of a node."""
    return lambda point: function(node(point))


def in_degrees(node: Node) -> Node:
    """Degrees as radians."""
    return lambda point: node(point) * mp.pi / 180


def power(base: Node, exponent: Node) -> Node:
    """A power, principal value."""
    return lambda point: _power(base(point), exponent(point))


def root(node: Node, degree: int) -> Node:
    """The real root where there is one, else the principal one."""
    return lambda point: _root(node(point), degree)


def _power(base: Number, exponent: Number) -> Number:
    # A power of millions of digits is out of reach of any honest answer.
    if abs(exponent) > 1e6 or (base != 0 and abs(exponent * mp.log(abs(base))) > 1e7):
        raise OverflowError("power too large")
    return mp.power(base, exponent)


def _root(value: Number, degree: int) -> Number:
    if degree % 2 and mp.im(value) == 0 and mp.re(value) < 0:
        return -mp.root(-mp.re(value), degree)
    return mp.root(value, degree)
