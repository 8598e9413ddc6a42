r"""Whether a boxed answer equals the gold one: cheap text rules first, then two independent judges that must agree.

math-verify 0.9.0 calls some unequal answers equal (`4` and `4\sqrt(2)`, `1-1/e` and `1+1/e`, `east` and `seat`): a
wrong rollout in the set of right ones is worse than a dropped one, so its yes counts only with the strict reader's.
"""

from __future__ import annotations

from mpmath import mp, mpf

from clipo_megatron.records import Verdict
from clipo_megatron.rewards.canonical import Canonical, canonical, plain_number, same_text
from clipo_megatron.rewards.reader import Reading, read
from clipo_megatron.rewards.screen import hazard
from clipo_megatron.rewards.values import Scale, same


def quick_verdict(gold: str, answer: str, *, max_chars: int) -> Verdict | None:
    """What can be said in microseconds and without parsing: the same text, two plain numbers, or a hopeless answer.

    Args:
        gold: content of the gold box.
        answer: content of the response's box.
        max_chars: longest answer that is looked into.

    Returns:
        None when the answer needs `full_verdict`.
    """
    if answer == gold:
        return Verdict.CORRECT
    if not answer or not gold:
        return Verdict.WRONG
    if len(answer) > max_chars or len(gold) > max_chars:
        return Verdict.UNDECIDED
    right, said = canonical(gold), canonical(answer)
    equal = _equal_on_sight(right, said)
    if equal is not None:
        return _with_units(Verdict.CORRECT if equal else Verdict.WRONG, right, said)
    return Verdict.UNDECIDED if is_hazardous(gold, answer, max_chars=max_chars) else None


def is_hazardous(gold: str, answer: str, *, max_chars: int) -> bool:
    """Whether parsing either of them could take for ever."""
    return any(hazard(text, max_chars=max_chars) for text in (gold, answer))


def full_verdict(gold: str, answer: str) -> Verdict:
    """Ask the strict reader, then math-verify. May hang or exhaust memory: only for worker processes.

    | reader    | math-verify equal | math-verify not equal |
    |-----------|-------------------|-----------------------|
    | equal     | correct           | undecided             |
    | different | wrong             | wrong (not asked)     |
    | refuses   | undecided         | wrong                 |

    The reader refuses whatever it does not wholly understand, so where it has read both sides and their values differ,
    the answer is wrong whatever math-verify makes of it.
    """
    right, said = canonical(gold), canonical(answer)
    equal = readers_opinion(right, said)
    if equal is False:
        return Verdict.WRONG
    # math-verify trips over spellings (`10,\\!000`, `\\frac\\pi 2`) that the canonical one has not.
    if math_verify_says_equal(gold, answer) or (equal and math_verify_says_equal(right.body, said.body)):
        return _with_units(Verdict.CORRECT if equal else Verdict.UNDECIDED, right, said)
    return Verdict.UNDECIDED if equal else Verdict.WRONG


def readers_opinion(gold: Canonical, answer: Canonical) -> bool | None:
    """The strict reader's: equal, different, or None when it can't read or compare one of them."""
    right, said = read(gold), read(answer)
    if right is None or said is None:
        return None
    return same(right.value, said.value, factors=lambda: _factors(right, said))


def math_verify_says_equal(gold: str, answer: str) -> bool:
    """math-verify's opinion of two box contents; also False when it can parse none or one of them."""
    # Imported by the worker only: it takes a second and most callers never need it.
    from math_verify import LatexExtractionConfig, parse, verify

    boxed = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [
        # Wrapped by us, so that a bare formula is read whole and not for its first number. Its own time-outs use
        # SIGALRM, which fails in threads and takes a slow answer for a wrong one; the pool kills from outside instead.
        parse("$\\boxed{" + text + "}$", boxed, fallback_mode="no_fallback", parsing_timeout=0)
        for text in (gold, answer)
    ]
    return all(parsed) and verify(parsed[0], parsed[1], strict=True, timeout_seconds=None)


def _equal_on_sight(gold: Canonical, answer: Canonical) -> bool | None:
    if same_text(gold, answer):
        return True
    right, said = plain_number(gold.without_assignment), plain_number(answer.without_assignment)
    if right is None or said is None or ("=" in gold.body and "=" in answer.body):
        return None
    if right == said:
        return True
    # 0.5 for 50% and pi/2 for 90 degrees are left to the judges.
    return None if {gold.unit, answer.unit} & {"%", "deg"} and gold.unit != answer.unit else False


def _with_units(verdict: Verdict, gold: Canonical, answer: Canonical) -> Verdict:
    """Equal numbers of different units ("5 cm", "5 m"; but also "cubic inches", "in^3") can't be decided by text."""
    return Verdict.UNDECIDED if verdict is Verdict.CORRECT and gold.clashes(answer) else verdict


def _factors(gold: Reading, answer: Reading) -> Scale:
    """What the answer may be as a multiple of the gold's number: 50% is 50 or 0.5, 90 degrees is 90 or pi/2."""
    factors = [mpf(1)]
    for unit, value in (("%", mpf(1) / 100), ("deg", mp.pi / 180)):
        if gold.unit == unit and answer.unit != unit:
            factors.append(value)
        elif answer.unit == unit and gold.unit != unit:
            factors.append(1 / value)
    return factors
