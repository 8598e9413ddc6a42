"""Prompts: the chat template applied once, over-long ones counted, and a hash that tells data sets apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.tiny_models import tiny_tokenizer

from clipo_megatron.data.prompts import load_prompts
from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count, **columns):
    return [{"question": f"What is {n} + {n}?", "answer": str(2 * n), **columns} for n in range(count)]


def test_ids_are_those_of_the_chat_template(tmp_path, tokenizer):
    loaded = load_prompts([write(tmp_path / "a.jsonl", sums(3))], tokenizer, max_prompt_tokens=512)
    for n, prompt in enumerate(loaded.prompts):
        messages = [{"role": "user", "content": f"What is {n} + {n}?"}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert prompt.token_ids.tolist() == wanted
        assert prompt.token_ids.dtype == np.int32
        assert (prompt.index, prompt.answer, prompt.verifier, prompt.source) == (n, str(2 * n), "math", "a")


def test_indexes_count_rows_of_all_files_and_overlong_rows_are_left_out(tmp_path, tokenizer):
    long = {"question": "long " * 100, "answer": "1"}
    first = write(tmp_path / "a.jsonl", [*sums(2), long])
    second = write(tmp_path / "b.jsonl", sums(2, data_source="conrl/mmlu2k"))
    loaded = load_prompts([first, second], tokenizer, max_prompt_tokens=60)
    assert [prompt.index for prompt in loaded.prompts] == [0, 1, 3, 4]
    assert [prompt.verifier for prompt in loaded.prompts] == ["math", "math", "choice", "choice"]
    assert (len(loaded), loaded.num_overlong) == (4, 1)


def test_hash_changes_with_anything_that_training_sees(tmp_path, tokenizer):
    rows = sums(3)
    variants = {
        "same": rows,
        "same again": rows,
        "order": rows[::-1],
        "fewer": rows[:2],
        "answer": [*rows[:2], {**rows[2], "answer": "5"}],
        "question": [*rows[:2], {**rows[2], "question": "What is 2 + 3?"}],
        "source": [*rows[:2], {**rows[2], "data_source": "other"}],
    }
    hashes = {}
    for name, content in variants.items():
        file = write(tmp_path / "a.jsonl", content)
        hashes[name] = load_prompts([file], tokenizer, max_prompt_tokens=512).hash
    assert hashes.pop("same again") == hashes["same"]
    assert len(set(hashes.values())) == len(hashes)


def test_all_faults_of_all_files_are_reported_together(tmp_path, tokenizer):
    bad = write(tmp_path / "bad.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError) as caught:
        load_prompts([bad, tmp_path / "missing.parquet"], tokenizer, max_prompt_tokens=512)
    assert len(caught.value.problems) == 2


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not load"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_prompts([write(tmp_path / "a.jsonl", sums(1))], load_tokenizer(tmp_path), max_prompt_tokens=512)
