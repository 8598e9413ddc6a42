"""One spelling for answers that LaTeX can spell in many ways. No parsing, no arithmetic but plain numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|normal|sf|up)?|mbox|math(?:rm|bf|it|sf)|operatorname|rm)"
_TEXT = re.compile(_TEXT_COMMAND + r"\s*\{([^{}]*)\}")
_TEXT_UNIT = re.compile(r"(?<=\S)\s*" + _TEXT_COMMAND + r"\s*\{([^{}]*)\}\s*(\^\s*\{?\s*[23]\s*\}?)?$")
_WORD_UNIT = re.compile(r"(?<=[\d}])\s*([A-Za-z]{2,}\.?(?:\s+[A-Za-z]{2,}\.?)*)\s*(\^\s*\{?\s*[23]\s*\}?)?$")
_JOINING_TEXT = re.compile(_TEXT_COMMAND + r"\s*\{\s*,?\s*(?:and|or)\s*\}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])|\u00b0)")
_ANGLE_FUNCTION = re.compile(r"\\(?:a?(?:rc)?(?:sin|cos|tan|cot|sec|csc))")
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])")
_PHANTOM = re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|\S)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,\s*\\!|\{,\})\s*(?=\d{3}(?!\d))")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\hspace\{[^{}]*\}|\s)+")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_FRACTION_ARGUMENTS = re.compile(
    r"\\frac\s*(\{[^{}]*\}|\d|[A-Za-z]|\\(?:pi|theta)(?![A-Za-z]))\s*(\{|\d|[A-Za-z]|\\(?:pi|theta)(?![A-Za-z]))"
)
_ROOT_ARGUMENT = re.compile(r"\\sqrt\s*(\d|[A-Za-z])")
_LOG_BASE = re.compile(r"\\log\s*_\s*(\d)(?!\d)\s*")
_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ASSIGNMENT = re.compile(r"[A-Za-z](?:_(?:\w|\{\w+\}))?(?:\([A-Za-z]\))?(?:=|\\in(?![A-Za-z])\s?)(?=.)")
_LETTER_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_MAX_NUMBER_CHARS = 400
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})(?:/(\d+))?")
_PLAIN_FRACTION = re.compile(r"([+-]?)(\d+)?\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}")
_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)")
# Words after a number that are no unit: they change its value or are operators.
_NO_UNIT = frozenset(
    re.findall(
        r"\w+",
        "hundred thousand million billion trillion dozen half halves third thirds quarter quarters fourth fourths "
        "fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths squared "
        "cubed mod modulo base factorial times plus minus over divided power root not and or if pi sqrt sin cos tan "
        "cot sec csc log ln exp sinh cosh tanh arcsin arccos arctan inf infty infinity theta alpha beta gamma delta",
    )
)
_SHORT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "m g s h l n j w v f c k cm mm km kg mg lb lbs oz in ft yd sq mi hr hrs min sec ml kl ha mph kph",
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Canonical:
    """An answer in one spelling."""

    body: str
    """Without spaces, sizes and units; a space is left where its loss would join two tokens."""
    unit: str
    """"%", "deg", a word such as "cm", or "" without one."""

    @property
    def without_assignment(self) -> str:
        r"""The body without a leading `x=` or `x\in`."""
        match = _ASSIGNMENT.match(self.body)
        rest = self.body[match.end() :] if match else self.body
        return self.body if any(sign in rest for sign in "=<>") else rest

    def clashes(self, other: Canonical) -> bool:
        """Both have a unit and not the same one: their bodies being equal says nothing."""
        return bool(self.unit and other.unit) and self.unit != other.unit


@lru_cache(maxsize=4096)
def canonical(answer: str) -> Canonical:
    """Bring the content of a box into one spelling.

    Args:
        answer: at most a few thousand characters.
    """
    body = _bare(answer)
    body, unit = _cut_unit(body)
    body = _TEXT.sub(lambda match: match[1].strip(), body).rstrip(".,; ").removeprefix("\\approx").strip()
    body = _LETTER_IN_BRACKETS.sub(r"\1", body) if _LETTER_IN_BRACKETS.fullmatch(body) else body
    if _COMMAS.fullmatch(body):
        body = body.replace(",", "")
    body = _brace_arguments(_FRACTION.sub(r"\\frac", body))
    return Canonical(body=_drop_spaces(body), unit=unit)


def same_text(gold: Canonical, answer: Canonical) -> bool:
    """The same spelling; an assignment on one side only is no difference, nor are a word's capitals."""
    pairs = {(gold.body, answer.body)}
    if ("=" in gold.body) != ("=" in answer.body) or ("\\in" in gold.body) != ("\\in" in answer.body):
        pairs.add((gold.without_assignment, answer.without_assignment))
    return any(g == a or (_is_word(g) and _is_word(a) and g.lower() == a.lower()) for g, a in pairs)


def plain_number(body: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a fraction of integers or a mixed number; None for all else."""
    if len(body) > _MAX_NUMBER_CHARS:
        return None
    if match := _PLAIN.fullmatch(body):
        sign, whole, top, bottom = match[1], "0", match[2], match[3] or "1"
    elif match := _PLAIN_FRACTION.fullmatch(body):
        sign, whole, top, bottom = match[1], match[2] or "0", match[3], match[4]
    elif match := _MIXED.fullmatch(body):
        sign, whole, top, bottom = match[1], match[2], match[3], match[4]
    else:
        return None
    if int(bottom) == 0 or (whole != "0" and (top.startswith(("+", "-")) or bottom.startswith(("+", "-")))):
        return None
    value = int(whole) + Fraction(top) / int(bottom)
    return -value if sign == "-" else value


def _bare(answer: str) -> str:
    """Without math delimiters, currency signs, size and space commands; a joining "and" is a comma."""
    body = answer.strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if body.startswith(opening) and body.endswith(closing):
            body = body[2:-2]
    body = body.replace("\\$", "").replace("$", "").replace("\u2212", "-").replace("\\%", "%")
    body = body.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("\\colon", ":")
    body = _JOINING_TEXT.sub(",", _SIZE.sub("", _PHANTOM.sub("", body)))
    body = _SPACE.sub(" ", _THOUSANDS.sub("", body))
    return re.sub(r",(?: *,)+", ",", body).strip()


def _cut_unit(body: str) -> tuple[str, str]:
    body = body.rstrip(".,; ")
    if _DEGREES.search(body):
        # sin 30 degrees is not sin 30: there the sign belongs to the expression.
        return (body, "") if _ANGLE_FUNCTION.search(body) else (_DEGREES.sub("", body), "deg")
    if body.endswith("%"):
        return body[:-1].rstrip(), "%"
    match = _TEXT_UNIT.search(body)
    if match is None and not _ANGLE_FUNCTION.search(body):
        match = _WORD_UNIT.search(body)
    if match is None or not _is_unit(match[1]):
        return body, ""
    power = re.sub(r"[^23]", "", match[2] or "")
    rest, percent_or_degrees = _cut_unit(body[: match.start()].rstrip())
    return rest, (_unit_name(match[1]) + power) or percent_or_degrees


def _is_unit(words: str) -> bool:
    """Known short units, and longer words that are neither a scale ("million") nor a function."""
    parts = re.findall(r"[a-z]+", words.lower())
    return not parts or all(part in _SHORT_UNITS or (len(part) >= 3 and part not in _NO_UNIT) for part in parts)


def _unit_name(words: str) -> str:
    name = re.sub(r"[^a-z0-9/]", "", words.lower())
    if name in ("percent", "unit", "units"):
        return "%" if name == "percent" else ""
    name = name.removesuffix("s") if len(name) > 2 else name
    return "deg" if name == "degree" else name


def _brace_arguments(body: str) -> str:
    r"""`\frac12`, `\frac{1}2`, `\sqrt2` and `\log_2 8` with all their braces."""
    body = _LOG_BASE.sub(r"\\log_{\1}", _ROOT_ARGUMENT.sub(r"\\sqrt{\1}", body))

    def brace(match: re.Match[str]) -> str:
        top = match[1] if match[1].startswith("{") else "{" + match[1] + "}"
        return f"\\frac{top}" + (match[2] if match[2] == "{" else "{" + match[2] + "}")

    return _FRACTION_ARGUMENTS.sub(brace, body)


def _drop_spaces(body: str) -> str:
    """Spaces go, but for those that keep two numbers, or a command and a letter, apart."""
    kept = re.sub(r"(\d) (?=[\d.])", "\\1\x00", body)
    kept = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])", "\\1\x00", kept)
    kept = re.sub(r"([A-Za-z]{3,}) (?=[A-Za-z])", "\\1\x00", kept)
    return kept.replace(" ", "").replace("\x00", " ")


def _is_word(body: str) -> bool:
    """A word in lower case or capitalised; `AB` and `ab` are different products."""
    return body.isalpha() and (len(body) >= 4 or body.lower() in ("yes", "no")) and body[1:].islower()
