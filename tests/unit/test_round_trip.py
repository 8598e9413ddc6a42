"""Hugging Face -> distributed checkpoint -> Hugging Face changes no bit: every family under every kind of layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.model_export import export_model
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.families import FAMILIES

# Odd in every place that a layout allows: the vocabulary, what a rank holds of heads and of the MLP, the experts.
EVEN = {"num_heads": 8, "num_kv_heads": 4, "num_layers": 4, "ffn_size": 20, "num_experts": 6, "expert_ffn_size": 10}
ODD = {"num_heads": 6, "num_kv_heads": 3, "num_layers": 7, "ffn_size": 21, "num_experts": 3, "expert_ffn_size": 9}
COMMON = {"vocab_size": 307, "tokenizer_size": 280, "head_dim": 6}


def _layout(**degrees: int) -> ParallelLayout:
    """On the fewest ranks."""
    of_stage = max(degrees.get("tp", 1), degrees.get("ep", 1) * degrees.get("etp", 1))
    return ParallelLayout(world_size=of_stage * degrees.get("pp", 1), **degrees)


EVEN_LAYOUTS = [_layout(tp=tp, pp=pp) for tp in (1, 2, 4) for pp in (1, 2, 4)]
EVEN_LAYOUTS += [_layout(tp=tp, pp=2, vpp=2) for tp in (1, 2, 4)]
ODD_LAYOUTS = [_layout(tp=tp, pp=pp) for tp in (1, 3) for pp in (1, 7)]
EXPERT_LAYOUTS = [
    _layout(ep=2),
    _layout(tp=2, ep=2),
    _layout(tp=4, pp=4, ep=2),
    _layout(pp=2, vpp=2, ep=2),
    _layout(etp=2),
    _layout(tp=4, pp=2, ep=2, etp=2),
]
ODD_EXPERT_LAYOUTS = [_layout(ep=3), _layout(tp=3, pp=7, ep=3, etp=3)]


def _bits(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}


def _check(source: Path, layout: ParallelLayout, work: Path) -> None:
    import_model(source, work / "imported", layout=layout)
    export_model(work / "imported", work / "exported")
    want, got = _bits(source), _bits(work / "exported")
    assert got.keys() == want.keys(), layout
    for name, bits in want.items():
        assert torch.equal(got[name], bits), f"{name} under {layout}"
    assert read_architecture(work / "exported") == read_architecture(source)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_import_and_export_under_any_layout_give_the_same_bits(tmp_path: Path, family: str, tied: bool) -> None:
    dtype = "float32" if tied else "bfloat16"
    even = make_tiny_hf(tmp_path / "even", family, tied=tied, dtype=dtype, **COMMON, **EVEN)
    odd = make_tiny_hf(tmp_path / "odd", family, tied=tied, dtype=dtype, **COMMON, **ODD)
    cases = [(even, layout) for layout in EVEN_LAYOUTS] + [(odd, layout) for layout in ODD_LAYOUTS]
    if FAMILIES[family].has_experts:
        cases += [(even, layout) for layout in EXPERT_LAYOUTS] + [(odd, layout) for layout in ODD_EXPERT_LAYOUTS]
    for number, (source, layout) in enumerate(cases):
        _check(source, layout, tmp_path / str(number))


def test_a_layout_that_would_cut_a_layer_or_a_head_is_refused(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "model", "qwen2", **COMMON, **ODD)
    with pytest.raises(ConfigError, match=r"layout\.pp = 2: must divide the model's num_hidden_layers = 7"):
        import_model(source, tmp_path / "imported", layout=_layout(pp=2))
    with pytest.raises(ConfigError, match=r"layout\.tp = 2: must divide the model's num_key_value_heads = 3"):
        import_model(source, tmp_path / "imported", layout=_layout(tp=2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
