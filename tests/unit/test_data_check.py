"""`clipo data check`: the JSON it prints and the inputs it refuses."""

from __future__ import annotations

import json

import pytest
from support.tiny_models import tiny_tokenizer

from clipo_megatron.cli.main import main

SOLUTIONS = [
    "Adding, we get $x = 2$, so the answer is $\\boxed{\\frac{2}{3}}$.",
    "Since we want the largest value of $x$, our answer is $\\boxed 2$.",
    "The weekday is $\\boxed{\\text{Monday}}$.",
    "It follows that $x^2 + y^2 = \\boxed 9$.",
    "First \\boxed{1}. Then\nmore lines and $\\boxed{10,\\!000}$.",
    "5",
]


@pytest.fixture
def file(tmp_path):
    rows = [
        {
            "data_source": "conrl/commonsense_qa" if answer == "B" else "conrl/math75",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"ground_truth": answer, "style": "rule"},
        }
        for question, answer in [
            *[(f"Question {n}", solution) for n, solution in enumerate(SOLUTIONS)],
            ("Question 0", "1"),
            ("long " * 200, "B"),
        ]
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_report_counts_rows_and_names_those_that_can_never_be_right(file, tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["data", "check", str(file), "--tokenizer", str(tmp_path / "model"), "--max-prompt-tokens", "100"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "file": str(file),
            "rows": 8,
            "sources": {"conrl/commonsense_qa": 1, "conrl/math75": 7},
            "duplicates": 1,
            "overlong": 1,
            "unverifiable": [1, 3],
            "text_only": [2],
        }
    ]


def test_overlong_is_null_without_a_tokenizer(file, capsys):
    assert main(["data", "check", str(file), str(file)]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["overlong"] for report in reports] == [None, None]


def test_faults_of_all_files_and_options_end_with_code_2(file, tmp_path, capsys):
    assert main(["data", "check", str(file), str(tmp_path / "none.parquet"), "--max-prompt-tokens", "9"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 2
    assert main(["data", "check", str(file), "--workers", "0"]) == 2
    assert "rewards.workers = 0" in capsys.readouterr().err
