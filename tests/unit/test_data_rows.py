"""Reading data files: two schemas, two formats, and messages that say what to do."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipo_megatron.data.rows import Row, read_rows, read_rows_problems
from clipo_megatron.errors import ConfigError

CHAT = [
    {
        "data_source": "conrl/gsm8k",
        "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
        "extra_info": {"index": n, "split": "train"},
    }
    for n in range(3)
]
PLAIN = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(("records", "source"), [(CHAT, "conrl/gsm8k"), (PLAIN, "sums")])
def test_both_schemas_read_the_same_from_both_formats(tmp_path, ending, records, source):
    file = write(tmp_path / f"sums.{ending}", records)
    assert read_rows(file) == [
        Row(source=source, messages=(("user", f"What is {n} + 1?"),), answer=str(n + 1)) for n in range(3)
    ]
    assert read_rows_problems([file]) == []


def test_plain_rows_may_name_their_source_and_give_numbers_as_answers(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "1 + 1?", "answer": 2, "data_source": "mine"}])
    assert read_rows(file) == [Row(source="mine", messages=(("user", "1 + 1?"),), answer="2")]


def test_system_messages_are_kept_in_order(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    file = write(tmp_path / "a.parquet", [{**CHAT[0], "prompt": messages}])
    assert read_rows(file)[0].messages == (("system", "Be brief."), ("user", "1 + 1?"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.parquet", None, "no such file"),
        ("missing.jsonl", None, "no such file"),
        ("rows.csv", "question,answer\n", "unknown ending '.csv'"),
        ("torn.parquet", "PAR1 this is no parquet file", "can't be read"),
        ("empty.jsonl", "", "no rows"),
        ("text.jsonl", "hello\n", "line 1 is not JSON"),
        ("list.jsonl", "[1, 2]\n", "line 1 is no JSON object"),
        ("columns.jsonl", '{"input": "x", "output": "y"}\n', "columns input, output"),
        ("half.jsonl", '{"question": "x"}\n', "columns question"),
    ],
)
def test_a_bad_file_is_named_with_what_was_found_before_anything_is_tokenised(tmp_path, name, content, words):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    [problem] = read_rows_problems([file])
    assert str(file) in problem
    assert words in problem
    with pytest.raises(ConfigError) as caught:
        read_rows(file)
    assert caught.value.problems == (problem,)


def test_an_empty_parquet_and_one_without_columns_are_refused(tmp_path):
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    write(tmp_path / "columns.parquet", [{"question": "x", "label": "y"}])
    empty, columns = read_rows_problems([tmp_path / "empty.parquet", tmp_path / "columns.parquet"])
    assert "no rows" in empty
    assert "columns label, question" in columns
    assert "reward_model" in columns


def test_a_truncated_parquet_is_refused(tmp_path):
    file = write(tmp_path / "a.parquet", CHAT * 100)
    file.write_bytes(file.read_bytes()[:-100])
    [problem] = read_rows_problems([file])
    assert "can't be read" in problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "no question"),
        ({"prompt": "What is 1 + 1?"}, "no question"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "no question"),
        ({"prompt": [{"content": "1 + 1?"}]}, "no question"),
        ({"reward_model": {"ground_truth": None}}, "no gold answer"),
        ({"reward_model": {"ground_truth": ""}}, "no gold answer"),
        ({"reward_model": "2"}, "no gold answer"),
        ({"data_source": None}, "data_source = None"),
    ],
)
def test_a_bad_row_is_named_by_its_number(tmp_path, change, words):
    file = write(tmp_path / "a.jsonl", [CHAT[0], CHAT[1], {**CHAT[2], **change}])
    with pytest.raises(ConfigError) as caught:
        read_rows(file)
    [problem] = caught.value.problems
    assert f"{file}: row 2: " in problem
    assert words in problem
