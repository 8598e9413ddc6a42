"""Which parameters a model has: their names on both sides, their shapes, their pipeline stage. No weight is touched.

A Megatron name carries the layer's number in the whole model, not in its pipeline stage. Names of Transformer Engine's
fused norms are understood as well.
"""

from __future__ import annotations

import re

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES, FUSED_NORM_ALIASES
from clipo_megatron.weights.rules import Rule, hf_shape

OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
_VOCAB_MULTIPLE = 128
_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the trainer's embedding: the vocabulary padded to a multiple of 128 on each tp rank.

    The extra rows are zero and no Hugging Face folder ever holds them; the trainer must mask their logits.
    """
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def layer_range(num_layers: int, pp: int, pp_rank: int) -> range:
    """Numbers of the layers of one pipeline stage: Megatron's even split.

    Raises:
        ConfigError: pp does not divide num_layers.
    """
    if num_layers % pp:
        raise ConfigError(f"layout.pp = {pp}: must divide num_hidden_layers = {num_layers}; choose another pp")
    share = num_layers // pp
    return range(pp_rank * share, (pp_rank + 1) * share)


def hf_tensor_specs(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of the model's Hugging Face folder, in the order of the network."""
    specs: dict[str, tuple[int, ...]] = {}
    for rule, layer in _rules_of_model(arch):
        specs |= {at_layer(tensor.name, layer): hf_shape(tensor, arch.sizes) for tensor in rule.hf}
    return specs


def megatron_parameter_names(arch: Architecture) -> list[str]:
    """Names of all parameters of the whole GPTModel (local layer spec), in the order of the network.

    A tied model has no output layer of its own here. With pp > 1 Megatron gives its last stage a copy of the embedding
    under that name: `local_parameter` fills it, and `hf_tensors_of` makes nothing of it.
    """
    return [at_layer(rule.megatron, layer) for rule, layer in _rules_of_model(arch)]


def split_dim(megatron_name: str, arch: Architecture) -> int | None:
    """The dim along which the tp ranks share a parameter; None when each rank holds all of it.

    Raises:
        CheckError: the family's table has no such parameter.
    """
    return find_rule(megatron_name, arch)[0].split_dim


def find_rule(megatron_name: str, arch: Architecture) -> tuple[Rule, int]:
    """The rule behind a Megatron parameter's name, and its layer (0 where it has none).

    The output layer of a tied model is the embedding under another name.

    Raises:
        CheckError: the family's table has no such parameter.
    """
    found = _LAYER_NUMBER.search(megatron_name)
    layer = int(found[0]) if found else 0
    template = _LAYER_NUMBER.sub("{layer}", megatron_name)
    for fused, plain in FUSED_NORM_ALIASES.items():
        template = template.removesuffix(fused) + plain if template.endswith(fused) else template
    if arch.tied and template == OUTPUT_LAYER:
        template = EMBEDDING
    rules = [rule for rule in FAMILIES[arch.family].rules if rule.megatron == template]
    if not rules or layer >= arch.num_layers or "{" in megatron_name:
        raise CheckError(
            f"{megatron_name}: no parameter of a {arch.family} model with {arch.num_layers} layers; "
            "add a rule to weights/families.py if the model really has it"
        )
    return rules[0], layer


def at_layer(name: str, layer: int) -> str:
    """A name of the tables with its layer's number filled in."""
    return name.replace("{layer}", str(layer))


def _rules_of_model(arch: Architecture) -> list[tuple[Rule, int]]:
    """Every parameter of the model as (rule, layer), in the order of the table; its run of layer rules is repeated."""
    rules = FAMILIES[arch.family].rules
    of_layer = [rule for rule in rules if "{layer}" in rule.megatron]
    first = rules.index(of_layer[0])
    bottom = [(rule, 0) for rule in rules[:first]]
    layers = [(rule, layer) for layer in range(arch.num_layers) for rule in of_layer]
    top = [(rule, 0) for rule in rules[first + len(of_layer) :] if not (arch.tied and rule.megatron == OUTPUT_LAYER)]
    return bottom + layers + top
