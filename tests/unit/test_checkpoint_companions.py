"""Laws of comparing what stands beside the weights: what changes tokens or chats is a fault, another spelling is nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.dist_folders import import_tiny
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.verify import verify_folders
from clipo_megatron.cli.main import main

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", num_layers=1)


@pytest.fixture
def other(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "other"))


def _edit(name: str, change: Callable[[dict], object]) -> Change:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def _swap_two_tokens(tokenizer: dict) -> None:
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _to_json(folder: Path) -> None:
    """The template where older versions of transformers keep it."""
    template = folder / "chat_template.jinja"
    _edit("tokenizer_config.json", lambda values: values.update(chat_template=template.read_text()))(folder)
    template.unlink()


FAULTS: list[tuple[Change, str]] = [
    (_edit("tokenizer.json", _swap_two_tokens), "tokenizer.json: model.vocab: differs"),
    (_edit("tokenizer.json", lambda values: values["model"]["merges"].pop()), "tokenizer.json: model.merges: differs"),
    (_edit("tokenizer.json", lambda values: values.update(normalizer={"type": "NFC"})), "tokenizer.json: normalizer"),
    (
        lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
        "tokenizer.json: is in",
    ),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "chat template: differs"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "other has none"),
    (
        _edit("tokenizer_config.json", lambda values: values.update(eos_token="<|endoftext|>")),
        "tokenizer_config.json: eos_token is '<|im_end|>' in",
    ),
    (_edit("generation_config.json", lambda values: values.update(eos_token_id=[2, 0])), "eos_ids is (2,)"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_what_changes_tokens_or_chats_is_a_fault(model, other, change, words):
    change(other)
    report = verify_folders(model, other)
    assert not report.is_clean
    assert report.differences == ()
    [fault] = report.faults
    assert words in fault


ALIKE: list[Change] = [
    lambda folder: None,
    _to_json,
    _edit("tokenizer.json", lambda values: values.update(padding={"strategy": "BatchLongest"}, truncation=None)),
    _edit(
        "tokenizer.json",
        lambda values: values["model"].update(
            merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]]
        ),
    ),
    _edit(
        "tokenizer_config.json",
        lambda values: values.update(eos_token={"content": "<|im_end|>", "lstrip": False}, model_max_length=7),
    ),
    _edit("generation_config.json", lambda values: values.update(transformers_version="4.1")),
]


@pytest.mark.parametrize("change", ALIKE)
def test_another_way_of_writing_the_same_is_no_difference(model, other, change):
    change(other)
    report = verify_folders(model, other)
    assert report.is_clean
    assert report.notes == ()


def _without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


WARNINGS: list[tuple[Change, str]] = [
    (
        _edit("generation_config.json", lambda values: values.update(top_k=7)),
        "generation_config.json: top_k is None in",
    ),
    (
        _edit("tokenizer_config.json", lambda values: values.update(pad_token="<|im_end|>")),
        "pad_token is '<|endoftext|>'",
    ),
    (_without_tokenizer, "other: no tokenizer in it"),
]


@pytest.mark.parametrize(("change", "words"), WARNINGS)
def test_defaults_and_an_absent_tokenizer_are_warnings(model, other, change, words, capsys):
    change(other)
    assert main(["ckpt", "verify", str(model), str(other)]) == 0
    out = capsys.readouterr().out
    assert "warning: " in out
    assert words in out


def test_a_checkpoint_s_companions_are_those_of_its_config_folder(model, other, tmp_path):
    imported = import_tiny(model, tmp_path / "imported")
    assert verify_folders(imported, other).is_clean
    FAULTS[0][0](other)
    [fault] = verify_folders(imported, other).faults
    assert f"{imported / 'config'} and {other}" in fault
