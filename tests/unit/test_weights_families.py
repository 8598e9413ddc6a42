"""Laws of the families: all that is special about one stands in its table, and the guide shows it as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.rules import Split

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipo_megatron"
TABLES = PACKAGE / "weights" / "families.py"
GUIDE = ROOT / "docs" / "families.md"
# `llama3` is a kind of rope scaling, which other families have as well.
NAMES = re.compile("|".join(rf"\b{name}\b|\b{family.hf_class}\b" for name, family in FAMILIES.items()))
DIMS = {"vocab", "hidden", "ffn", "query", "kv", "head_dim", "experts", "expert_ffn"}


def test_no_code_outside_the_tables_asks_for_a_family_by_its_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for path in PACKAGE.rglob("*.py")
        if path != TABLES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES.fullmatch(node.value)
    ]
    assert found == []


def test_the_guide_shows_the_worked_example_as_it_stands_in_the_tables_in_under_40_lines() -> None:
    tables, shown = TABLES.read_text(), re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(shown) == 2
    assert all(excerpt in tables for excerpt in shown)
    assert sum(len(excerpt.splitlines()) for excerpt in shown) < 40


def test_the_guide_names_files_that_exist() -> None:
    named = re.findall(r"`((?:tests/|docs/|clipo_megatron/)?[\w/]+\.py)`", GUIDE.read_text())
    assert len(named) > 10
    missing = [
        name
        for name in named
        if not any((ROOT / folder / name).exists() for folder in ("", "clipo_megatron", "tests/unit"))
    ]
    assert missing == []


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_rules_are_whole_and_in_the_order_of_the_network(family) -> None:
    of_layer = [rule.is_of_layer for rule in family.rules]
    first, beyond = of_layer.index(True), len(of_layer) - of_layer[::-1].index(True)
    assert all(of_layer[first:beyond])
    assert [rule.megatron for rule in family.rules[:first]] == ["embedding.word_embeddings.weight"]
    assert [rule.megatron for rule in family.rules[beyond:]] == [
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    assert len({rule.megatron for rule in family.rules}) == len(family.rules)
    counts = {Split.QKV_PARALLEL: {3}, Split.COLUMN_PARALLEL: {1, 2}}
    for rule in family.rules:
        assert len(rule.hf) in counts.get(rule.split, {1})
        for tensor in rule.hf:
            assert set(tensor.dims) <= DIMS
            assert ("{layer}" in tensor.name, "{expert}" in tensor.name) == (rule.is_of_layer, rule.is_of_expert)
