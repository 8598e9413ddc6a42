"""Layouts that a model can't be split by, from its config.json alone. Loads without torch."""

from __future__ import annotations

from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.names import uneven_stages


def layout_problems(arch: Architecture, *, tp: int, pp: int, vpp: int, ep: int, etp: int, rollout_tp: int) -> list[str]:
    """Layouts that the model can't be split by; arguments and result as in `model_folder_problems`."""
    problems = [
        *_uneven("layout.tp", tp, "num_attention_heads", arch.num_heads),
        *_uneven("layout.tp", tp, "num_key_value_heads", arch.num_kv_heads),
    ]
    if arch.experts is not None:
        problems += _uneven("layout.ep", ep, "number of experts", arch.experts.num_experts)
        problems += _uneven("layout.etp", etp, _expert_width_key(arch), arch.experts.ffn_size)
    else:
        problems += _uneven("layout.tp", tp, "intermediate_size", arch.ffn_size)
        problems += [
            f"{key} = {degree}: a {arch.family} model has no experts to share out; set it to 1"
            for key, degree in (("layout.ep", ep), ("layout.etp", etp))
            if degree > 1
        ]
    if arch.num_layers % (pp * vpp):
        problems.append(uneven_stages(arch.num_layers, pp=pp, vpp=vpp))
    return problems + _rollout_problems(arch, rollout_tp)


def _rollout_problems(arch: Architecture, tp: int) -> list[str]:
    problems = _uneven("rollout.tp", tp, "num_attention_heads", arch.num_heads)
    if arch.num_kv_heads % tp and tp % arch.num_kv_heads:
        problems.append(
            f"rollout.tp = {tp}: must divide the model's num_key_value_heads = {arch.num_kv_heads} or be a multiple of "
            "it; choose another rollout.tp"
        )
    if arch.experts is not None:
        problems += _uneven("rollout.tp", tp, _expert_width_key(arch), arch.experts.ffn_size)
        if tp > arch.experts.num_experts:
            problems.append(
                f"rollout.tp = {tp}: vLLM needs at least as many experts, and the model has "
                f"{arch.experts.num_experts}; choose a smaller rollout.tp"
            )
    return problems


def _expert_width_key(arch: Architecture) -> str:
    return FAMILIES[arch.family].expert_keys.ffn_size


def _uneven(key: str, degree: int, name: str, size: int) -> list[str]:
    """The fault of a degree that does not divide one of the model's sizes, if it is one."""
    if size % degree == 0:
        return []
    return [f"{key} = {degree}: must divide the model's {name} = {size}; choose another {key}"]
