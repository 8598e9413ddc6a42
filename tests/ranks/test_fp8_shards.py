"""Laws of FP8 shards that several ranks make together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support.architectures import small_architecture
from support.fp8_oracle import awkward_matrix
from support.plans import trainer_shards
from support.ranks import run_ranks

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.fp8 import Fp8Shards
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.holdings import table_name
from clipo_megatron.weights.names import hf_tensor_specs

TP = 2


def _shards(arch: Architecture, folder: str, scaling: str) -> Fp8Shards:
    layout, rank = ParallelLayout(world_size=dist.get_world_size(), tp=dist.get_world_size()), dist.get_rank()
    with HFReader(folder) as reader:
        held = trainer_shards(reader, arch, layout, rank)
    weights = {table_name(name, arch): tensor for name, tensor in held.items()}
    shards = Fp8Shards(weights, arch, layout, rank=rank, scaling=scaling)
    shards.refresh(dist.group.WORLD, dist.group.WORLD)
    places = {name: tensor.data_ptr() for name, tensor in shards.tensors().items()}
    first = {name: tensor.clone() for name, tensor in shards.tensors().items()}
    for weight in weights.values():
        weight.mul_(2)
    shards.refresh(dist.group.WORLD, dist.group.WORLD)
    assert {name: tensor.data_ptr() for name, tensor in shards.tensors().items()} == places
    scales = [name for name in first if "scale" in name]
    assert all(torch.equal(shards.tensors()[name], 2 * first[name]) for name in scales)
    return {name: tensor.view(torch.uint8) for name, tensor in first.items() if name in weights or "scale" in name}


def test_two_ranks_make_the_scales_and_values_of_one(tmp_path) -> None:
    from safetensors.torch import save_file

    # 96 rows of gate a rank: every second block straddles both ranks.
    arch = small_architecture(
        "qwen3", num_kv_heads=2, heads_per_group=1, head_dim=64, hidden_size=200, ffn_size=192, num_layers=1
    )
    tensors = {
        name: awkward_matrix(torch.Size(shape[:-1]).numel(), shape[-1], seed=number, dtype=torch.bfloat16)
        .view(shape)
        .clamp(min=2e-4)  # above vLLM's bound, so that twice the weights have twice the scales
        for number, (name, shape) in enumerate(hf_tensor_specs(arch).items())
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for scaling in ("block", "tensor"):
        (alone,) = run_ranks(_shards, arch, tmp_path, scaling, world_size=1)
        split = run_ranks(_shards, arch, tmp_path, scaling, world_size=TP)
        layer = "decoder.layers.0."
        for name, whole in alone.items():
            if "scale" in name:
                assert all(torch.equal(rank[name], whole) for rank in split), name
        down = f"{layer}mlp.linear_fc2.weight"
        assert torch.equal(torch.cat([rank[down] for rank in split], dim=1), alone[down])
        gate_up = f"{layer}mlp.linear_fc1.weight"
        halves = [rank[gate_up].unflatten(0, (2, -1)) for rank in split]
        assert torch.equal(torch.cat(halves, dim=1).flatten(0, 1), alone[gate_up])
        qkv = f"{layer}self_attention.linear_qkv.weight"
        assert torch.equal(torch.cat([rank[qkv] for rank in split]), alone[qkv])
