"""Where the answer stands: boxes, thinking, gold answers, routing, multiple choice."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.records import Verdict
from clipo_megatron.rewards.choice import judge_choice
from clipo_megatron.rewards.extract import gold_answer, last_boxed, response_answer
from clipo_megatron.rewards.routing import verifier_of

BALANCED = st.recursive(
    st.text(alphabet="abc12 +^_\n", max_size=6),
    lambda inner: st.builds(lambda a, b, c: a + "{" + b + "}" + c, inner, inner, inner),
    max_leaves=6,
)


@given(before=st.text(max_size=30), content=BALANCED, after=st.text(alphabet="abc {}.", max_size=30))
def test_the_last_balanced_box_is_found_whatever_stands_around_it(before, content, after):
    assert last_boxed(before + "\\boxed{" + content + "}" + after) == content.strip()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("first \\boxed{1}, no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{x\\right.}", "\\left\\{x\\right."),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed 2", None),
        ("the answer is 2", None),
        ("", None),
    ],
)
def test_last_box_wins_and_needs_balanced_braces(text, content):
    assert last_boxed(text) == content


def test_text_before_the_end_of_thinking_is_not_read():
    assert response_answer("<think>\\boxed{1}</think> so \\boxed{2}") == "2"
    assert response_answer("<think>\\boxed{1}</think> no box") is None
    assert response_answer("<think>\\boxed{1}, still thinking") == "1"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "72"),
        (" \\frac{1}{2} ", "\\frac{1}{2}"),
        ("We get $x = 2$.\nSo \\boxed{3}? No, $\\boxed{2}$.", "2"),
        ("Since we want the largest value of $x$, our answer is $\\boxed 2$.", None),
        ("It follows that $x^2 + y^2 = \\boxed 9$.", None),
        ("a long\nsolution without a box", None),
        ("  ", None),
    ],
)
def test_gold_is_the_last_box_of_a_solution_or_a_bare_answer(gold, answer):
    assert gold_answer(gold) == answer


def test_a_megabyte_of_open_brackets_is_scanned_in_a_second():
    started = time.process_time()
    assert response_answer("\\boxed{" + "{[(" * 350_000) is None
    assert response_answer("\\boxed{" * 150_000) is None
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("\\boxed{B}", Verdict.CORRECT),
        ("\\boxed{B. Paris}", Verdict.CORRECT),
        ("\\boxed{A} or rather \\boxed{B}", Verdict.CORRECT),
        ("\\boxed{b}", Verdict.WRONG),
        ("\\boxed{(B)}", Verdict.WRONG),
        ("\\boxed{\\text{B}}", Verdict.WRONG),
        ("\\boxed{A}", Verdict.WRONG),
        ("B", Verdict.WRONG),
    ],
)
def test_choice_is_the_exact_letter_after_cutting_at_the_dot(response, verdict):
    assert judge_choice("B", response) is verdict


@pytest.mark.parametrize(
    ("source", "verifier"),
    [
        ("conrl/mmlu2k", "choice"),
        ("conrl/truthfulqa", "choice"),
        ("conrl/commonsense_qa", "choice"),
        ("gpqa_diamond", "choice"),
        ("conrl/gsm8k", "math"),
        ("conrl/theoremqa", "math"),
        ("my_own_set", "math"),
        ("conrl/my_mmlu", "math"),
    ],
)
def test_the_data_source_chooses_the_verifier(source, verifier):
    assert verifier_of(source) == verifier
