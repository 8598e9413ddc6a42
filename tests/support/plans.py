"""Oracles of sync plans: shards by the name tables, engine ranks by plain slicing, and plans carried out with torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.plan import Transfer
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import local_parameter
from clipo_megatron.weights.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    find_rule,
    hf_tensor_specs,
    layer_numbers,
    megatron_parameter_names,
    padded_vocab_size,
)

Parameters = dict[str, Tensor]
UNWRITTEN = -1.0


def numbered_folder(arch: Architecture, folder: Path) -> Parameters:
    """Hugging Face tensors whose elements are all different, from 1 on; also written to `folder`."""
    tensors, first = {}, 1
    for name, shape in hf_tensor_specs(arch).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count
    assert first < 1 << 24  # float32 counts no further
    save_file(tensors, folder / "model.safetensors")
    return tensors


def stage_layers(arch: Architecture, layout: ParallelLayout, stage: int) -> set[int]:
    """Numbers of a stage's layers."""
    return {
        layer
        for chunk in range(layout.vpp)
        for layer in layer_numbers(arch.num_layers, pp=layout.pp, pp_rank=stage, vpp=layout.vpp, vpp_rank=chunk)
    }


def trainer_shards(reader: HFReader, arch: Architecture, layout: ParallelLayout, rank: int) -> Parameters:
    """All that a trainer rank holds, by its name in the tables; a tied output layer on the last stage too."""
    stage, layers = layout.pp_rank(rank), stage_layers(arch, layout, layout.pp_rank(rank))
    names = []
    for name in megatron_parameter_names(arch):
        rule, where = find_rule(name, arch)
        if rule.is_of_expert:
            assert arch.experts is not None
            if where.expert // (arch.experts.num_experts // layout.ep) != layout.ep_rank(rank):
                continue
        is_here = where.layer in layers if rule.is_of_layer else stage == (0 if name == EMBEDDING else layout.pp - 1)
        if is_here:
            names.append(name)
    if arch.tied and layout.pp > 1 and stage == layout.pp - 1:
        names.append(OUTPUT_LAYER)
    return {
        name: local_parameter(
            reader,
            name,
            arch,
            tp=layout.tp,
            tp_rank=layout.tp_rank(rank),
            padded_vocab=padded_vocab_size(arch.vocab_size, layout.tp),
            etp=layout.etp,
            etp_rank=layout.etp_rank(rank),
        )
        for name in names
    }


def sliced_engine_rank(
    arch: Architecture, hf: Mapping[str, Tensor], *, tp: int, rank: int, expert_parallel: bool
) -> Parameters:
    """An engine rank's parameters, by slicing and concatenating; `UNWRITTEN` in the vocabulary's padding."""

    def rows(name: str) -> Tensor:
        return hf[name].chunk(tp)[rank]

    def columns(name: str) -> Tensor:
        return hf[name].chunk(tp, 1)[rank]

    def of_vocabulary(name: str) -> Tensor:
        missing = -len(hf[name]) % 64
        padding = torch.full((missing, hf[name].shape[1]), UNWRITTEN, dtype=hf[name].dtype)
        return torch.cat([hf[name], padding]).chunk(tp)[rank]

    def key_rows(name: str) -> Tensor:
        heads = hf[name].split(arch.head_dim)
        per_rank = max(1, arch.num_kv_heads // tp)
        first = rank * arch.num_kv_heads // tp
        return torch.cat(heads[first : first + per_rank])

    found = {"model.embed_tokens.weight": of_vocabulary("model.embed_tokens.weight")}
    for layer in range(arch.num_layers):
        of_layer = f"model.layers.{layer}."
        attention = of_layer + "self_attn."
        for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
            found[f"{attention}qkv_proj.{kind}"] = torch.cat(
                [
                    rows(f"{attention}q_proj.{kind}"),
                    key_rows(f"{attention}k_proj.{kind}"),
                    key_rows(f"{attention}v_proj.{kind}"),
                ]
            )
        found[f"{attention}o_proj.weight"] = columns(f"{attention}o_proj.weight")
        whole = [f"{of_layer}input_layernorm.weight", f"{of_layer}post_attention_layernorm.weight"]
        if arch.qk_norm:
            whole += [f"{attention}q_norm.weight", f"{attention}k_norm.weight"]
        found |= {name: hf[name] for name in whole}
        if arch.experts is None:
            found[f"{of_layer}mlp.gate_up_proj.weight"] = torch.cat(
                [rows(f"{of_layer}mlp.gate_proj.weight"), rows(f"{of_layer}mlp.up_proj.weight")]
            )
            found[f"{of_layer}mlp.down_proj.weight"] = columns(f"{of_layer}mlp.down_proj.weight")
        else:
            found |= _experts(arch, hf, of_layer, tp=tp, rank=rank, expert_parallel=expert_parallel)
    found["model.norm.weight"] = hf["model.norm.weight"]
    if not arch.tied:
        found["lm_head.weight"] = of_vocabulary("lm_head.weight")
    return found


def _experts(
    arch: Architecture, hf: Mapping[str, Tensor], of_layer: str, *, tp: int, rank: int, expert_parallel: bool
) -> Parameters:
    assert arch.experts is not None
    is_mixtral = arch.family == "mixtral"
    module = of_layer + ("block_sparse_moe" if is_mixtral else "mlp")
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    experts, parts, part = list(range(arch.experts.num_experts)), tp, rank
    if expert_parallel:
        share = len(experts) // tp
        experts, parts, part = experts[rank * share : (rank + 1) * share], 1, 0

    def of(expert: int, projection: str, dim: int) -> Tensor:
        return hf[f"{module}.experts.{expert}.{projection}.weight"].chunk(parts, dim)[part]

    return {
        f"{module}.gate.weight": hf[f"{module}.gate.weight"],
        f"{module}.experts.routed_experts.w13_weight": torch.stack(
            [torch.cat([of(expert, gate, 0), of(expert, up, 0)]) for expert in experts]
        ),
        f"{module}.experts.routed_experts.w2_weight": torch.stack([of(expert, down, 1) for expert in experts]),
    }


def views_of(transfer: Transfer, source: Mapping[str, Tensor], target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(source, target) views of one transfer, one pair for each stacked parameter. All tensors are contiguous."""
    copy = transfer.copy
    wholes = [source[name] for name in transfer.source_parameters]
    assert target.is_contiguous()
    assert all(whole.is_contiguous() for whole in wholes)
    if not copy.is_stacked:
        (whole,) = wholes
        return [
            (
                whole.as_strided(copy.shape, copy.source_strides, whole.storage_offset() + copy.source_offset),
                target.as_strided(copy.shape, copy.strides, copy.offset),
            )
        ]
    return [
        (
            whole.as_strided(copy.shape[1:], copy.source_strides[1:], whole.storage_offset() + copy.source_offset),
            target.as_strided(copy.shape[1:], copy.strides[1:], copy.offset + number * copy.strides[0]),
        )
        for number, whole in enumerate(wholes)
    ]


def carry_out(
    transfers: Iterable[Transfer], shards: Mapping[int, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Parameters, Parameters]:
    """One engine rank's parameters after the transfers, and how often each element was written.

    Args:
        transfers: into that rank.
        shards: of each trainer rank.
        shapes: of the rank's parameters.
    """
    dtype = next(iter(next(iter(shards.values())).values())).dtype
    values = {name: torch.full(shape, UNWRITTEN, dtype=dtype) for name, shape in shapes.items()}
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for transfer in transfers:
        name = transfer.parameter
        for source, target in views_of(transfer, shards[transfer.source], values[name]):
            target.copy_(source)
        for _, target in views_of(transfer, shards[transfer.source], counts[name]):
            target.add_(1)
    return values, counts


def shapes_by_layer(shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> dict[str, tuple[int, ...]]:
    """A plan's shapes with the layers filled in."""
    return {
        name.replace("{layer}", str(layer)): shape
        for name, shape in shapes.items()
        for layer in (range(num_layers) if "{layer}" in name else (0,))
    }
