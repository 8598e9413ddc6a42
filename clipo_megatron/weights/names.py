"""Which parameters a model has: their names on both sides, their shapes, their pipeline stage. No weight is touched.

A Megatron name carries the numbers of layer and expert in the whole model, not on its rank. Names of Transformer
Engine's modules, where they differ from the local ones, are understood as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES, FUSED_NORM_ALIASES
from clipo_megatron.weights.rules import Rule, hf_shape

OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
_VOCAB_MULTIPLE = 128
_LAYER_NUMBER = re.compile(r"(?<=\bdecoder\.layers\.)\d+(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=\.mlp\.experts\.local_experts\.)\d+(?=\.)")
# Transformer Engine's grouped linear holds the experts of a rank side by side, each with a parameter of its own.
_GROUPED_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)(linear_fc[12]\.weight)(\d+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The layer and the expert of a parameter in the whole model; 0 where it has none."""

    layer: int = 0
    expert: int = 0

    def fill(self, name: str) -> str:
        """A name of the tables with its numbers filled in."""
        return name.replace("{layer}", str(self.layer)).replace("{expert}", str(self.expert))


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the trainer's embedding: the vocabulary padded to a multiple of 128 on each tp rank.

    The extra rows are zero and no Hugging Face folder ever holds them; the trainer must mask their logits.
    """
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def layer_numbers(num_layers: int, *, pp: int, pp_rank: int, vpp: int = 1, vpp_rank: int = 0) -> range:
    """Numbers of the layers of one model chunk: Megatron's even split, chunks dealt to the stages in turn.

    Args:
        num_layers: of the whole model.
        pp: pipeline stages.
        pp_rank: 0 <= pp_rank < pp.
        vpp: chunks of each stage.
        vpp_rank: the chunk's number in its stage, 0 <= vpp_rank < vpp.

    Raises:
        ConfigError: pp * vpp does not divide num_layers.
    """
    if num_layers % (pp * vpp):
        raise ConfigError(uneven_stages(num_layers, pp=pp, vpp=vpp))
    share = num_layers // (pp * vpp)
    first = (vpp_rank * pp + pp_rank) * share
    return range(first, first + share)


def uneven_stages(num_layers: int, *, pp: int, vpp: int) -> str:
    """The fault of a pipeline that can't share out the layers evenly."""
    if vpp == 1:
        return f"layout.pp = {pp}: must divide the model's num_hidden_layers = {num_layers}; choose another layout.pp"
    return (
        f"layout.pp * layout.vpp = {pp} * {vpp}: must divide the model's num_hidden_layers = {num_layers}; choose "
        "another layout.pp or layout.vpp"
    )


def global_name(local_name: str, *, first_layer: int, first_expert: int) -> str:
    """A parameter's name in the whole model, from its name on a rank, where layers and experts are numbered from 0.

    Args:
        local_name: as in the GPTModel of one model chunk, with local layer specs or Transformer Engine's.
        first_layer: number of the chunk's first layer in the whole model.
        first_expert: number of the rank's first expert in its layer.
    """
    name = _LAYER_NUMBER.sub(lambda found: str(int(found[0]) + first_layer), local_name, count=1)
    name = _EXPERT_NUMBER.sub(lambda found: str(int(found[0]) + first_expert), name)
    return _GROUPED_EXPERT.sub(lambda found: found[1] + str(int(found[2]) + first_expert), name)


def is_expert(megatron_name: str) -> bool:
    """Whether a parameter belongs to one expert, so that ep and etp share it out, not tp; a router's does not."""
    return ".mlp.experts." in megatron_name


def hf_tensor_specs(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of the model's Hugging Face folder, in the order of the network."""
    specs: dict[str, tuple[int, ...]] = {}
    for rule, where in _rules_of_model(arch):
        specs.update((where.fill(tensor.name), hf_shape(tensor, arch.sizes)) for tensor in rule.hf)
    return specs


def megatron_parameter_names(arch: Architecture) -> list[str]:
    """Names of all parameters of the whole GPTModel (local layer spec), in the order of the network.

    A tied model has no output layer of its own here. With pp > 1 Megatron gives its last stage a copy of the embedding
    under that name: `local_parameter` fills it, and `hf_tensors_of` makes nothing of it.
    """
    return [where.fill(rule.megatron) for rule, where in _rules_of_model(arch)]


def split_dim(megatron_name: str, arch: Architecture) -> int | None:
    """The dim along which the tp ranks (for an expert's the etp ranks) share a parameter; None when each holds it all.

    Raises:
        CheckError: the family's table has no such parameter.
    """
    return find_rule(megatron_name, arch)[0].split_dim


def find_rule(megatron_name: str, arch: Architecture) -> tuple[Rule, Where]:
    """The rule behind a Megatron parameter's name, and the layer and expert that the name tells.

    The output layer of a tied model is the embedding under another name.

    Raises:
        CheckError: the family's table has no such parameter.
    """
    family = FAMILIES[arch.family]
    template, where = _template(megatron_name)
    for fused, plain in FUSED_NORM_ALIASES.items():
        linear = fused.replace("layer_norm_weight", "weight")
        if template.endswith("." + fused) and family.has(linear):
            template = template.removesuffix(fused) + plain
    if arch.tied and template == OUTPUT_LAYER:
        template = EMBEDDING
    rules = [rule for rule in family.rules if rule.megatron == template]
    num_experts = 1 if arch.experts is None else arch.experts.num_experts
    if not rules or where.layer >= arch.num_layers or where.expert >= num_experts or "{" in megatron_name:
        of_experts = "" if arch.experts is None else f" of {num_experts} experts"
        raise CheckError(
            f"{megatron_name}: no parameter of a {arch.family} model with {arch.num_layers} layers{of_experts}; "
            "add a rule to weights/families.py if the model really has it"
        )
    return rules[0], where


def _template(megatron_name: str) -> tuple[str, Where]:
    """A parameter's name as the tables write it, and its numbers."""
    name = _GROUPED_EXPERT.sub(r"local_experts.\2.\1", megatron_name)
    layer, expert = _LAYER_NUMBER.search(name), _EXPERT_NUMBER.search(name)
    where = Where(layer=int(layer[0]) if layer else 0, expert=int(expert[0]) if expert else 0)
    return _EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name)), where


def _rules_of_model(arch: Architecture) -> list[tuple[Rule, Where]]:
    """Every parameter of the model: the table's run of layer rules for each layer, in it the experts' for each expert."""
    rules = FAMILIES[arch.family].rules
    of_layer = [rule for rule in rules if rule.is_of_layer]
    common, of_expert = [r for r in of_layer if not r.is_of_expert], [r for r in of_layer if r.is_of_expert]
    num_experts = 0 if arch.experts is None else arch.experts.num_experts
    first = rules.index(of_layer[0])
    listed = [(rule, Where()) for rule in rules[:first]]
    for layer in range(arch.num_layers):
        listed += [(rule, Where(layer=layer)) for rule in common]
        listed += [(rule, Where(layer=layer, expert=expert)) for expert in range(num_experts) for rule in of_expert]
    top = rules[first + len(of_layer) :]
    return listed + [(rule, Where()) for rule in top if not (arch.tied and rule.megatron == OUTPUT_LAYER)]
