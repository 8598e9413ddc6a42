"""How many weights a model has, and how many of them one token meets: for cost models and memory estimates."""

from __future__ import annotations

import math

from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.names import hf_tensor_specs
from clipo_megatron.weights.rules import hf_shape


def parameter_count(arch: Architecture) -> int:
    """Parameters of the whole model, without the vocabulary's padding; a tied output layer is counted once."""
    return sum(math.prod(shape) for shape in hf_tensor_specs(arch).values())


def active_parameters(arch: Architecture) -> int:
    """Weights of one layer's matrices that a token is multiplied with: of its experts only those it is sent to."""
    experts_per_token = 0 if arch.experts is None else arch.experts.experts_per_token
    return sum(
        math.prod(shape) * (experts_per_token if rule.is_of_expert else 1)
        for rule in FAMILIES[arch.family].rules
        if rule.is_of_layer
        for tensor in rule.hf
        if len(shape := hf_shape(tensor, arch.sizes)) == 2
    )
