"""Everything that can be known to be wrong with a model folder from its small files and its safetensors headers."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import CONFIG_FILE, DTYPES, Architecture, read_architecture, read_json_object
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.layout_check import layout_problems
from clipo_megatron.weights.names import hf_tensor_specs

_TOKENIZER_FILE = "tokenizer.json"
_OUTPUT_TENSOR = "lm_head.weight"
# Old Llama checkpoints store the rotary frequencies, which follow from config.json.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_NAMES_SHOWN = 3


def model_folder_problems(
    folder: Path, *, tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int = 1, rollout_tp: int = 1
) -> list[str]:
    """All faults of a model folder, and of the layouts against its model. No weight is read.

    Args:
        folder: Hugging Face folder of the policy.
        tp: tensor parallel degree of the trainer.
        pp: pipeline parallel degree of the trainer.
        vpp: model chunks of one of its stages.
        ep: expert parallel degree of the trainer.
        etp: tensor parallel degree of an expert in the trainer.
        rollout_tp: tensor parallel degree of a rollout engine.

    Returns:
        One line per fault: place, value found, rule, what to do. Empty when all is well.
    """
    if not (folder / CONFIG_FILE).exists():
        return [f"{folder}: no {CONFIG_FILE} in it; give the folder of a Hugging Face model"]
    problems: list[str] = []
    try:
        arch = read_architecture(folder)
    except ConfigError as error:
        problems += error.problems
        arch = None
    try:
        with HFReader(folder) as reader:
            if arch is not None:
                problems += _tensor_problems(reader, arch)
    except ConfigError as error:
        problems += error.problems
    if arch is not None:
        problems += layout_problems(arch, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, rollout_tp=rollout_tp)
        problems += _tokenizer_problems(folder, arch)
    return problems


def _tensor_problems(reader: HFReader, arch: Architecture) -> list[str]:
    specs = hf_tensor_specs(arch)
    found = {name for name in reader.names() if not name.endswith(_DERIVED_SUFFIX)}
    missing, unknown = [name for name in specs if name not in found], sorted(found - set(specs))
    problems: list[str] = []
    if arch.tied and _OUTPUT_TENSOR in unknown:
        unknown.remove(_OUTPUT_TENSOR)
        problems.append(
            f"{reader.folder}: tie_word_embeddings = true, yet there is a {_OUTPUT_TENSOR}; set it to false, or save "
            "the model again without that tensor"
        )
    if not arch.tied and _OUTPUT_TENSOR in missing:
        missing.remove(_OUTPUT_TENSOR)
        problems.append(
            f"{reader.folder}: tie_word_embeddings = false, yet there is no {_OUTPUT_TENSOR}; set it to true if the "
            "output layer is the embedding"
        )
    if missing:
        problems.append(f"{reader.folder}: {_some(missing)} missing; copy the folder again")
    if unknown:
        problems.append(f"{reader.folder}: {_some(unknown)} not known in a {arch.family} model; take another model")
    for name in found & set(specs):
        if reader.shape(name) != specs[name]:
            problems.append(
                f"{reader.folder}: {name} has shape {reader.shape(name)}: config.json asks for {specs[name]}; "
                "take config.json and weights of the same model"
            )
        if reader.dtype(name) not in DTYPES:
            problems.append(
                f"{reader.folder}: {name} is stored as {reader.dtype(name)}: must be one of {', '.join(DTYPES)}"
            )
    return problems


def _tokenizer_problems(folder: Path, arch: Architecture) -> list[str]:
    path = folder / _TOKENIZER_FILE
    if not path.exists():
        return [f"{folder}: no {_TOKENIZER_FILE} in it; save the tokenizer with transformers' fast tokenizer"]
    try:
        tokenizer = read_json_object(path)
        ids = _token_ids(tokenizer)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        return [f"{path}: is no tokenizer file ({error}); copy the file again"]
    if ids and max(ids) >= arch.vocab_size:
        return [
            f"{folder}: vocab_size = {arch.vocab_size}: the tokenizer's largest token id is {max(ids)}, so it must be "
            f">= {max(ids) + 1}; take the model's own tokenizer or enlarge the embedding"
        ]
    return []


def _token_ids(tokenizer: dict[str, object]) -> list[int]:
    """Ids of tokenizer.json: its model's vocabulary (a map, or for Unigram a list of pairs) and the added tokens."""
    vocab = cast("dict[str, dict[str, int] | list[object]]", tokenizer["model"])["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    added = cast("list[dict[str, int]]", tokenizer.get("added_tokens", []))
    return ids + [token["id"] for token in added]


def _some(names: list[str]) -> str:
    """The first few names of many."""
    more = f" and {len(names) - _NAMES_SHOWN} others" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more + (" is" if len(names) == 1 else " are")
