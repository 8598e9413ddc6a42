"""Parses one scalar in LaTeX into a function of its variables. Whatever has two readings is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mpmath import mp, mpc, mpf

from clipo_megatron.rewards.nodes import (
    Node,
    added,
    applied,
    constant,
    decimal,
    divided,
    in_degrees,
    multiplied,
    negated,
    power,
    root,
    subtracted,
)
from clipo_megatron.rewards.values import Number, Scalar

_GREEK = frozenset(
    re.findall(
        r"\\[A-Za-z]+",
        r"\alpha\beta\gamma\delta\epsilon\varepsilon\zeta\eta\theta\vartheta\kappa\lambda\mu\nu\xi\rho\sigma\tau\phi\varphi"
        r"\chi\psi\omega\Gamma\Delta\Theta\Lambda\Xi\Sigma\Phi\Psi\Omega\ell",
    )
)
_FUNCTIONS: dict[str, Callable[[Number], Number]] = {
    "\\sin": mp.sin,
    "\\cos": mp.cos,
    "\\tan": mp.tan,
    "\\cot": mp.cot,
    "\\sec": mp.sec,
    "\\csc": mp.csc,
    "\\arcsin": mp.asin,
    "\\arccos": mp.acos,
    "\\arctan": mp.atan,
    "\\sinh": mp.sinh,
    "\\cosh": mp.cosh,
    "\\tanh": mp.tanh,
    "\\ln": mp.log,
    "\\exp": mp.exp,
}
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", "\\div")
_LOG_BASE = "\\log"


class Unreadable(Exception):
    """The reader does not understand all of an answer."""


class ScalarParser:
    """Recursive descent over tokens; use once."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._position = 0
        self._names: set[str] = set()

    def parse(self) -> Scalar:
        """Read all tokens.

        Raises:
            Unreadable: a token is unknown, misplaced, or leaves more than one reading.
        """
        node = self._sum()
        if self._peek() is not None:
            raise Unreadable(self._tokens)
        return Scalar(at=node, names=frozenset(self._names))

    def _peek(self) -> str | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _take(self) -> str:
        token = self._peek()
        if token is None:
            raise Unreadable(self._tokens)
        self._position += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise Unreadable(self._tokens)

    def _sum(self) -> Node:
        sign = self._take() if self._peek() in ("+", "-") else "+"
        total = self._product()
        if sign == "-":
            total = negated(total)
        while self._peek() in ("+", "-"):
            total = added(total, self._product()) if self._take() == "+" else subtracted(total, self._product())
        return total

    def _product(self) -> Node:
        product = self._factor(allow_mixed=True)
        while True:
            token = self._peek()
            if token in _TIMES:
                self._take()
                product = multiplied(product, self._signed_factor())
            elif token in _OVER:
                self._take()
                product = divided(product, self._signed_factor())
                if self._starts_factor():
                    raise Unreadable(self._tokens)  # 1/2x: (1/2)x or 1/(2x)
            elif self._starts_factor():
                product = multiplied(product, self._factor())
            else:
                return product

    def _signed_factor(self) -> Node:
        if self._peek() == "-":
            self._take()
            return negated(self._factor())
        return self._factor()

    def _starts_factor(self) -> bool:
        """Whether a factor follows without a sign. A number never does: `2 3` has no one reading."""
        token = self._peek()
        if token is None:
            return False
        return token in ("(", "{", "\\frac", "\\sqrt", "\\pi", "\\binom", "\\log", "\\infty") or (
            token in _FUNCTIONS or token in _GREEK or (token.isascii() and len(token) == 1 and token.isalpha())
        )

    def _factor(self, *, allow_mixed: bool = False) -> Node:
        start = self._position
        node = self._atom()
        if self._peek() == "\\frac" and self._tokens[start].isdigit() and self._position == start + 1:
            return self._mixed_number(int(self._tokens[start]), allowed=allow_mixed)
        while self._peek() in ("^", "!", "\\%", "%"):
            mark = self._take()
            if mark == "^":
                node = self._power(node)
            elif mark == "!":
                node = applied(mp.factorial, node)
            else:
                node = divided(node, constant(mpf(100)))
        return node

    def _mixed_number(self, whole: int, *, allowed: bool) -> Node:
        r"""`3\frac{1}{2}` is 3.5 when both parts are digits, and a product else."""
        fraction_at = self._position
        fraction = self._factor()
        parts = [token for token in self._tokens[fraction_at + 1 : self._position] if token not in ("{", "}")]
        if not all(part.isdigit() for part in parts):
            return multiplied(constant(mpf(whole)), fraction)
        if not allowed:
            raise Unreadable(self._tokens)
        return added(constant(mpf(whole)), fraction)

    def _power(self, base: Node) -> Node:
        token = self._peek()
        if token == "{":
            self._take()
            if self._peek() == "\\circ":
                self._take()
                self._expect("}")
                return in_degrees(base)
            exponent = self._sum()
            self._expect("}")
        elif token == "\\circ":
            self._take()
            return in_degrees(base)
        elif token is not None and token.isdigit() and len(token) > 1:
            raise Unreadable(self._tokens)  # x^12 is x^1 * 2 in LaTeX
        else:
            exponent = self._atom()
        return power(base, exponent)

    def _atom(self) -> Node:
        token = self._take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return decimal(token)
        if token in ("(", "{"):
            inner = self._sum()
            self._expect(")" if token == "(" else "}")
            return inner
        if token == "|":
            inner = self._sum()
            self._expect("|")
            return applied(abs, inner)
        if token == "\\frac":
            top, bottom = self._argument(), self._argument()
            return divided(top, bottom)
        if token == "\\binom":
            top, bottom = self._argument(), self._argument()
            return lambda point: mp.binomial(top(point), bottom(point))
        if token == "\\sqrt":
            return self._root()
        return self._named(token)

    def _named(self, token: str) -> Node:
        if token in _FUNCTIONS or token == "\\log":
            return self._function(token)
        if token == "\\pi":
            return lambda point: +mp.pi
        if token == "\\infty":
            return constant(mp.inf)
        if token in _GREEK or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self._variable(token)
        raise Unreadable(self._tokens)

    def _variable(self, name: str) -> Node:
        if self._peek() == "_":
            self._take()
            name += "_" + self._subscript()
        elif name == "e":
            return lambda point: +mp.e
        elif name == "i":
            return constant(mpc(0, 1))
        self._names.add(name)
        return lambda point: point[name]

    def _subscript(self) -> str:
        token = self._take()
        if token != "{":
            return token
        parts = []
        while (token := self._take()) != "}":
            if token == "{":
                raise Unreadable(self._tokens)
            parts.append(token)
        return "".join(parts)

    def _root(self) -> Node:
        degree = 2
        if self._peek() == "[":
            self._take()
            token = self._take()
            if not token.isdigit() or int(token) < 2:
                raise Unreadable(self._tokens)
            degree = int(token)
            self._expect("]")
        # The argument of `\sqrt(2)` is in round brackets where LaTeX wants braces; there is no other sensible reading.
        argument = self._atom() if self._peek() == "(" else self._argument()
        return root(argument, degree)

    def _argument(self) -> Node:
        """`{...}`, or the one symbol that LaTeX takes without braces."""
        token = self._peek()
        if token == "{" or token in _GREEK or token in ("\\pi", "\\sqrt") or (token is not None and len(token) == 1):
            if token in ("(", "|", "-", "+"):
                raise Unreadable(self._tokens)
            return self._atom()
        raise Unreadable(self._tokens)

    def _function(self, name: str) -> Node:
        base: Node | None = None
        if name == "\\log":
            base = self._log_base()
        exponent: Node | None = None
        if self._peek() == "^":
            self._take()
            token = self._peek()
            # sin^{-1} is an inverse function for some and a reciprocal for others.
            exponent = self._braced_integer() if token == "{" else self._digit()
        argument = self._function_argument()
        if base is not None:
            value: Node = divided(applied(mp.log, argument), applied(mp.log, base))
        elif name == "\\log":
            # Without a base: 10, e or 2 by the author's habit. An unknown constant keeps all of them apart.
            self._names.add(_LOG_BASE)
            value = divided(applied(mp.log, argument), lambda point: point[_LOG_BASE])
        else:
            value = applied(_FUNCTIONS[name], argument)
        if exponent is None:
            return value
        return power(value, exponent)

    def _log_base(self) -> Node | None:
        if self._peek() != "_":
            return None
        self._take()
        token = self._peek()
        if token is not None and token.isdigit() and len(token) > 1:
            raise Unreadable(self._tokens)  # \log_23 x
        return self._atom()

    def _digit(self) -> Node:
        token = self._take()
        if not token.isdigit() or len(token) > 1:
            raise Unreadable(self._tokens)
        return constant(mpf(int(token)))

    def _braced_integer(self) -> Node:
        self._expect("{")
        token = self._take()
        if not token.isdigit():
            raise Unreadable(self._tokens)
        self._expect("}")
        return constant(mpf(int(token)))

    def _function_argument(self) -> Node:
        r"""Brackets, or a run of plain factors as in `\sin 2x`; another function or bracket ends it."""
        token = self._peek()
        if token in ("(", "{"):
            argument = self._atom()
            if self._peek() == "^":
                raise Unreadable(self._tokens)  # \sin(x)^2: the square of which?
            return argument
        argument = self._factor()
        while (token := self._peek()) is not None and (
            token == "\\pi" or token in _GREEK or (len(token) == 1 and token.isascii() and token.isalpha())
        ):
            argument = multiplied(argument, self._factor())
        if self._peek() in ("/", "("):
            raise Unreadable(self._tokens)
        return argument
