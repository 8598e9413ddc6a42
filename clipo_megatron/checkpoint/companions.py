"""Two models' tokenizers, chat templates and generation configs against each other: what stands beside the weights.

Compared by meaning: transformers writes the same tokenizer in several ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from clipo_megatron.weights.architecture import GENERATION_CONFIG_FILE, read_json_object

Json = Mapping[str, object]

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE, _TEMPLATE_JSON, _TEMPLATE_KEY = "chat_template.jinja", "chat_template.json", "chat_template"
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt")
"""Not read where there is a tokenizer.json."""
_TEXT_TOKENS, _OTHER_TOKENS = ("bos_token", "eos_token"), ("pad_token", "unk_token")
# Set by a call of the tokenizer and saved along; every call sets them again.
_OF_A_CALL = ("truncation", "padding")
# The ids that end a response are compared as part of the architecture.
_NOT_OF_SAMPLING = ("transformers_version", "eos_token_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompanionDifferences:
    """Where the files beside two models' weights differ, one line each."""

    faults: tuple[str, ...] = ()
    """The same text becomes other tokens, or a chat another text."""
    warnings: tuple[str, ...] = ()
    """Defaults of sampling or padding differ, or a folder has no tokenizer."""


def compare_companions(first: Path, second: Path) -> CompanionDifferences:
    """Compare tokenizer, special tokens, chat template and generation config of two folders.

    Args:
        first: folder with a model's config.json and tokenizer.
        second: another one.

    Raises:
        ConfigError: a file is not JSON.
    """
    faults, warnings = [], []
    sampling = [_json(folder / GENERATION_CONFIG_FILE) for folder in (first, second)]
    keys = sorted({*sampling[0], *sampling[1]}.difference(_NOT_OF_SAMPLING))
    warnings += _unequal(GENERATION_CONFIG_FILE, keys, sampling, (first, second))
    bare = [folder for folder in (first, second) if not _has_tokenizer(folder)]
    if bare:
        warnings += [f"{folder}: no tokenizer in it; not compared" for folder in bare]
    else:
        configs = [_json(folder / _TOKENIZER_CONFIG) for folder in (first, second)]
        tokens = [{key: _token(config.get(key)) for key in (*_TEXT_TOKENS, *_OTHER_TOKENS)} for config in configs]
        faults += _tokenizer_faults(first, second)
        faults += _unequal(_TOKENIZER_CONFIG, _TEXT_TOKENS, tokens, (first, second))
        faults += _template_faults(first, second)
        warnings += _unequal(_TOKENIZER_CONFIG, _OTHER_TOKENS, tokens, (first, second))
    return CompanionDifferences(faults=tuple(faults), warnings=tuple(f"warning: {line}" for line in warnings))


def _unequal(file: str, keys: Sequence[str], values: Sequence[Json], folders: tuple[Path, Path]) -> list[str]:
    return [
        f"{file}: {key} is {values[0].get(key)!r} in {folders[0]} and {values[1].get(key)!r} in {folders[1]}"
        for key in keys
        if values[0].get(key) != values[1].get(key)
    ]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_TOKENIZER, *_OTHER_TOKENIZERS))


def _tokenizer_faults(first: Path, second: Path) -> list[str]:
    there = [folder for folder in (first, second) if (folder / _TOKENIZER).is_file()]
    if len(there) == 1:
        return [f"{_TOKENIZER}: is in {there[0]} alone; copy it to the other folder"]
    if not there:
        return [
            f"{name}: differs between {first} and {second}"
            for name in _OTHER_TOKENIZERS
            if _bytes(first / name) != _bytes(second / name)
        ]
    if _bytes(first / _TOKENIZER) == _bytes(second / _TOKENIZER):
        return []
    one, other = (_canonical(read_json_object(folder / _TOKENIZER)) for folder in (first, second))
    parts = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return [f"{_TOKENIZER}: {', '.join(parts)}: differs between {first} and {second}"] if parts else []


def _canonical(tokenizer: Json) -> dict[str, object]:
    """Parts of a tokenizer by name, those of its model one by one; absent and null are the same."""
    parts = {key: value for key, value in tokenizer.items() if key not in _OF_A_CALL and value is not None}
    model = parts.pop("model", None)
    if isinstance(model, dict):
        parts |= {f"model.{key}": value for key, value in cast("Json", model).items() if value is not None}
    merges = parts.get("model.merges")
    if isinstance(merges, list):
        # "a b" in old files, ["a", "b"] in new ones.
        pairs = cast("list[object]", merges)
        parts["model.merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    return parts


def _template_faults(first: Path, second: Path) -> list[str]:
    one, other = _template(first), _template(second)
    if one == other:
        return []
    if one is None or other is None:
        return [f"chat template: {first if one is None else second} has none, the other folder has"]
    return [f"chat template: differs between {first} and {second}"]


def _template(folder: Path) -> object:
    """The chat template, from the first place where transformers looks for it; None where there is none."""
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    found = _json(folder / _TEMPLATE_JSON).get(_TEMPLATE_KEY)
    return _json(folder / _TOKENIZER_CONFIG).get(_TEMPLATE_KEY) if found is None else found


def _token(value: object) -> object:
    """The text of a special token, which may be told with its properties."""
    return cast("Json", value).get("content") if isinstance(value, dict) else value


def _json(path: Path) -> Json:
    """Empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
