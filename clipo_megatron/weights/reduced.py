"""Small models of a folder's kind, for checks that need its layers and parameters but neither its size nor its skill.

Fewer layers with the folder's own weights or random ones; or narrower as well, with random ones. No tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.weights.architecture import CONFIG_FILE, Architecture, read_architecture, read_json_object
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.hf_folder import INDEX_FILE, SINGLE_FILE
from clipo_megatron.weights.hf_writer import write_hf_folder
from clipo_megatron.weights.names import hf_tensor_specs

Config = dict[str, object]

# Enough that a rank of any split holds several of a thing, and that a forward takes milliseconds.
_HIDDEN, _HEAD_DIM, _FFN_OF_RANK, _EXPERTS, _EXPERTS_PER_TOKEN, _VOCABULARY = 64, 16, 32, 8, 2, 300


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds safetensors, not just a config.json."""
    return (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()


def first_layers_config(source: Path, num_layers: int) -> Config:
    """`source`/config.json with its number of layers changed."""
    config = read_json_object(source / CONFIG_FILE)
    config["num_hidden_layers"] = num_layers
    if config.get("layer_types") is not None:
        config["layer_types"] = ["full_attention"] * num_layers  # the only type that is supported
    return config


def shrunk_config(source: Path, num_layers: int, *, tp: int, ep: int, etp: int) -> Config:
    """A narrow model's config.json: family, kinds of parameters and query heads per key/value head are `source`'s.

    Args:
        source: folder whose config.json it starts from; the degrees must divide its heads and experts.
        num_layers: of the result.
        tp: every tp rank gets two key/value heads, or one where the source has no more.
        ep: every ep rank gets two experts or more, where the source has them.
        etp: divides the experts' width.
    """
    arch, config = read_architecture(source), first_layers_config(source, num_layers)
    num_kv_heads = min(arch.num_kv_heads, 2 * tp)
    num_heads = arch.num_heads // arch.num_kv_heads * num_kv_heads
    has_head_dim = config.get("head_dim") is not None  # else a head is hidden_size / heads wide
    config |= {
        "hidden_size": _HIDDEN if has_head_dim else num_heads * _HEAD_DIM,
        "intermediate_size": _FFN_OF_RANK * tp,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": min(arch.vocab_size, _VOCABULARY),
    }
    if has_head_dim:
        config["head_dim"] = _HEAD_DIM
    if arch.experts is not None:
        least = max(_EXPERTS, 2 * ep)
        num_experts = min(arch.experts.num_experts, -(-least // ep) * ep)
        keys = FAMILIES[arch.family].expert_keys
        config |= {key: num_experts for key in keys.num_experts if key in config}
        config[keys.experts_per_token] = min(arch.experts.experts_per_token, _EXPERTS_PER_TOKEN)
        config[keys.ffn_size] = _FFN_OF_RANK * etp
    return config


def link_model(folder: Path, config: Config, *, source: Path) -> Path:
    """Make `folder` a model of `config` whose weights are links to the files of `source`; more may be there than it needs."""
    write_config(folder, config)
    for path in source.iterdir():
        if path.suffix == ".safetensors" or path.name == INDEX_FILE:
            (folder / path.name).symlink_to(path.resolve())
    return folder


def write_random_model(folder: Path, config: Config, *, seed: int) -> Path:
    """Write a model of `config` with random float32 weights.

    Args:
        folder: must not exist; FOLDER.config beside it is made as well.
        config: as `first_layers_config` or `shrunk_config` gave it.
        seed: the same seed and config give the same weights.
    """
    source = write_config(folder.with_name(folder.name + ".config"), config)
    return write_hf_folder(folder, _random_tensors(read_architecture(source), seed), source=source)


def write_config(folder: Path, config: Config) -> Path:
    """Make `folder` hold a config.json."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _random_tensors(arch: Architecture, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Biases are not zero and norms not one, so that one that is lost or misplaced changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in hf_tensor_specs(arch).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            yield name, noise / shape[1] ** 0.5  # outputs of the size of the inputs
        else:
            yield name, 0.1 * noise if name.endswith(".bias") else 1.0 + 0.2 * noise
