"""Multiple choice: the exact letter in the last box, by the reference scorer's rules."""

from __future__ import annotations

from clipo_megatron.records import Verdict
from clipo_megatron.rewards.extract import gold_answer, response_answer


def judge_choice(gold: str, response: str) -> Verdict:
    r"""Compare the boxed text, cut at its first '.', with the gold letter.

    `\boxed{B}` and `\boxed{B. Paris}` answer B; `\boxed{b}`, `\boxed{(B)}` and `\boxed{\text{B}}` do not: the
    published evaluation counts them wrong, so figures stay comparable.
    """
    letter = gold_answer(gold)
    answer = response_answer(response)
    if answer is None:
        return Verdict.WRONG
    if letter is None:
        return Verdict.UNDECIDED
    return Verdict.CORRECT if _letter(answer) == _letter(letter) else Verdict.WRONG


def _letter(text: str) -> str:
    return text.partition(".")[0].strip()
