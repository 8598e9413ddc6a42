"""Names, shards and imported models equal those of mbridge, an independent converter between the same two formats."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.families import FAMILIES, FUSED_NORM_ALIASES
from clipo_megatron.weights.global_tensors import boxes_of
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.mapping import local_parameter
from clipo_megatron.weights.names import is_expert, megatron_parameter_names, padded_vocab_size

pytest.importorskip("mbridge", reason="mbridge is not installed: no second converter to compare with")


def _bridge(folder: Path, family: str, vocab_size: int, padded_vocab: int):
    """An mbridge converter without its Megatron model: only its maps and splits are wanted."""
    from mbridge.core.bridge import _MODEL_REGISTRY
    from transformers import AutoConfig

    bridge = object.__new__(_MODEL_REGISTRY[family])
    bridge.hf_config = AutoConfig.from_pretrained(folder)
    bridge.config = types.SimpleNamespace(gated_linear_unit=True)
    bridge.dtype = None
    bridge.make_vocab_size_divisible_by = 128
    bridge.vocab_size, bridge.padded_vocab_size = vocab_size, padded_vocab
    return bridge


def _grouped_and_fused(name: str, family: str) -> str:
    """A parameter's name in Transformer Engine's layers, the only ones that mbridge knows."""
    if is_expert(name):
        return re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.weight)", r"\2\1", name)
    for fused, plain in FUSED_NORM_ALIASES.items():
        if name.endswith("." + plain) and FAMILIES[family].has(fused.replace("layer_norm_weight", "weight")):
            return name.removesuffix(plain) + fused
    return name


def _imported_shard(imported: DistReader, name: str, arch: Architecture, *, tp: int, rank: int, padded: int) -> Tensor:
    """A rank's parameter put together from the chunks of an imported model, whatever layout these were cut for."""
    boxes = boxes_of(name, arch, tp=tp, tp_rank=rank, padded_vocab=padded, etp=tp, etp_rank=rank)
    parts: list[Tensor] = []
    for box in boxes:
        stored = imported.shape(box.key)
        # The vocabulary is padded for the layout of the import; other rows of padding are 0.
        rows = box.shape[0]
        if stored != box.global_shape:
            rows = max(0, min(rows, stored[0] - box.global_start[0]))
        part = torch.zeros(box.shape)
        shape = (*box.global_extent[: -len(box.shape)], rows, *box.shape[1:])
        if rows:
            part[:rows] = imported.read_box(box.key, start=box.global_start, shape=shape).view(rows, *box.shape[1:])
        parts.append(part)
    return torch.cat(parts)  # gate and up are stacked by rows; others are one box


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_shard_and_what_is_imported_is_what_mbridge_makes(tmp_path: Path, family: str) -> None:
    folder = make_tiny_hf(tmp_path / "model", family, num_heads=8, num_kv_heads=4, vocab_size=515)
    arch = read_architecture(folder)
    degrees = {"ep": 2} if FAMILIES[family].has_experts else {}
    import_model(folder, tmp_path / "imported", layout=ParallelLayout(world_size=4, tp=2, pp=2, **degrees))
    with HFReader(folder) as reader, DistReader(tmp_path / "imported") as imported:
        for tp in (1, 2, 4):
            padded = padded_vocab_size(arch.vocab_size, tp)
            bridge = _bridge(folder, family, arch.vocab_size, padded)
            for name in (_grouped_and_fused(name, family) for name in megatron_parameter_names(arch)):
                shards = [
                    local_parameter(reader, name, arch, tp=tp, tp_rank=r, padded_vocab=padded, etp=tp, etp_rank=r)
                    for r in range(tp)
                ]
                hf_tensors = [reader.read(hf_name) for hf_name in bridge._weight_name_mapping_mcore_to_hf(name)]
                whole = bridge._weight_to_mcore_format(name, hf_tensors)
                for rank, want in enumerate(bridge._weight_split_across_tp(name, whole, shards[0], tp)):
                    assert torch.equal(shards[rank], want), f"{name} at tp = {tp}"
                    got = _imported_shard(imported, name, arch, tp=tp, rank=rank, padded=padded)
                    assert torch.equal(got, want), f"{name} at tp = {tp}, imported"
