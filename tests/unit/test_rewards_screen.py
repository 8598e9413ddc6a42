"""Poison is recognised before it is parsed, and honest answers pass."""

from __future__ import annotations

import time

import pytest

from clipo_megatron.records import Verdict
from clipo_megatron.rewards.equality import quick_verdict
from clipo_megatron.rewards.screen import hazard

POISON = [
    "1000000000!",
    "(10^9)!",
    "5!!!",
    "9^{9^{9^9}}",
    "9^9^9^9",
    "9**9**9",
    "10^{10^{10}}",
    "2^{1000000}",
    "((9^{99})^{99})^{99}",
    "\\sum_{k=1}^{1000000000000} \\frac{1}{k}",
    "\\prod_{k=1}^{10^{12}} k",
    "\\int_0^1 x^x dx",
    "\\binom{1000000000}{500000000}",
    "[" * 1_000_000,
    "(" * 40 + ")" * 40,
    "1" * 500,
]
HONEST = [
    "2^{2008}",
    "x^{12}+x^{11}+x^{10}",
    "e^{x^2}",
    "2^{n-1}",
    "5!",
    "n!",
    "100!",
    "\\binom{20}{10}",
    "10,\\!000",
    "x \\neq 3",
    "(-\\infty,-2) \\cup (-1,1) \\cup (2,3) \\cup (4,6) \\cup (7,\\infty)",
    "\\begin{pmatrix} -64 & 0 \\\\ 0 & -64 \\end{pmatrix}",
    "\\infty",
]


@pytest.mark.parametrize("answer", POISON, ids=lambda answer: answer[:24])
def test_poison_is_undecided_without_being_parsed(answer):
    started = time.process_time()
    assert quick_verdict("\\sqrt{2}", answer, max_chars=2000) is Verdict.UNDECIDED
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("answer", HONEST)
def test_honest_answers_pass_the_screen(answer):
    assert hazard(answer, max_chars=2000) is None


@pytest.mark.parametrize("answer", POISON[:5])
def test_poison_that_is_the_gold_answer_itself_is_correct(answer):
    assert quick_verdict(answer, answer, max_chars=2000) is Verdict.CORRECT


@pytest.mark.parametrize(
    "unit", [" ", "1 ", "1a", "ab ", "\\text{a}", "\\frac", ",1", "^1", "^{", "\\!", "~", "%", "a_"]
)
def test_time_to_look_at_an_answer_is_bounded(unit):
    answer = "5 " + unit * (2000 // len(unit) - 2) + "!"
    started = time.process_time()
    quick_verdict("12", answer, max_chars=2000)
    assert time.process_time() - started < 0.5
