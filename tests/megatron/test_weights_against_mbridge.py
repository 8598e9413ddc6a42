"""Names and shards equal those of mbridge, an independent converter between the same two formats."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch
from support.tiny_models import make_tiny_hf

from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.families import FAMILIES, FUSED_NORM_ALIASES
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


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_every_shard_is_the_one_that_mbridge_makes(tmp_path: Path, family: str, tp: int) -> None:
    folder = make_tiny_hf(tmp_path, family, num_heads=8, num_kv_heads=4, vocab_size=515)
    arch = read_architecture(folder)
    padded = padded_vocab_size(arch.vocab_size, tp)
    bridge = _bridge(folder, family, arch.vocab_size, padded)
    with HFReader(folder) as reader:
        for name in (_grouped_and_fused(name, family) for name in megatron_parameter_names(arch)):
            shards = [
                local_parameter(reader, name, arch, tp=tp, tp_rank=r, padded_vocab=padded, etp=tp, etp_rank=r)
                for r in range(tp)
            ]
            hf_tensors = [reader.read(hf_name) for hf_name in bridge._weight_name_mapping_mcore_to_hf(name)]
            whole = bridge._weight_to_mcore_format(name, hf_tensors)
            want = bridge._weight_split_across_tp(name, whole, shards[0], tp)
            assert all(torch.equal(got, shard) for got, shard in zip(shards, want, strict=True)), name
