"""The comparison of forward passes: equal weights pass in any folder format, and a wrong one fails where it shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.model_export import export_model
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.checks.local_ranks import start_server
from clipo_megatron.checks.logits import TOLERANCE, compare_logits
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the scope is for machines without a GPU")

MODELS = {
    "llama": {"family": "llama", "tied": True, "llama3_rope": True},
    "qwen2": {"family": "qwen2", "dtype": "bfloat16"},
    "mixtral": {"family": "mixtral", "num_experts": 16, "experts_per_token": 3},
}


@pytest.fixture(scope="module", autouse=True)
def _ranks() -> None:
    start_server(["clipo_megatron.policy.logits"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> (Hugging Face folder, the same imported)."""
    made: dict[str, tuple[Path, Path]] = {}
    for name, keys in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        source = make_tiny_hf(root / "model", vocab_size=307, tokenizer_size=280, **keys)
        import_model(source, root / "imported", layout=ParallelLayout(world_size=4, tp=2, pp=2))
        made[name] = source, root / "imported"
    return made


def _changed(source: Path, folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model folder in which one tensor is another."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_gives_the_log_probs_of_transformers(
    folders: dict[str, tuple[Path, Path]], name: str
) -> None:
    report = compare_logits(*folders[name])
    assert report.is_clean
    assert report.rounded_to is None
    # Two layers of float32; four prompts of 32 drawn tokens and two rendered ones.
    assert 0 < report.largest < 1e-4
    assert (report.num_prompts, report.same_choice) == (6, 1.0)
    assert report.num_positions > 4 * 32
    assert "largest difference" in report.line


def test_a_folder_equals_itself_exactly(folders: dict[str, tuple[Path, Path]]) -> None:
    source, imported = folders["qwen2"]
    for first, second in [(source, source), (imported, imported)]:
        report = compare_logits(first, second, num_prompts=2, num_tokens=8)
        assert (report.largest, report.mean, report.is_clean) == (0.0, 0.0, True)


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight", lambda tensor: tensor.roll(32, 0)),
        ("qwen2", "model.layers.0.self_attn.v_proj.bias", torch.zeros_like),
        ("qwen2", "lm_head.weight", lambda tensor: tensor.flip(0)),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", lambda tensor: tensor.roll(1, 0)),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", lambda tensor: tensor.roll(1, 0)),
    ],
)
def test_a_tensor_that_is_not_in_its_place_is_found(
    folders: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    name: str,
    tensor: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    source, imported = folders[name]
    report = compare_logits(imported, _changed(source, tmp_path / "changed", tensor, change))
    assert not report.is_clean
    assert report.largest > 100 * TOLERANCE


def test_a_value_that_is_no_number_is_found(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, _ = folders["qwen2"]
    broken = _changed(source, tmp_path / "changed", "model.norm.weight", lambda tensor: tensor * torch.nan)
    report = compare_logits(source, broken)
    assert report.largest == float("inf")
    assert not report.is_clean


def test_rounding_to_another_number_format_is_no_fault(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, imported = folders["llama"]
    rounded = export_model(imported, tmp_path / "rounded", dtype="bfloat16")
    for folder in (imported, source):
        report = compare_logits(folder, rounded)
        assert report.rounded_to == "bfloat16"
        assert report.is_clean
    name = "model.layers.0.mlp.up_proj.weight"
    changed = _changed(rounded, tmp_path / "changed", name, lambda tensor: tensor * (1 + 2**-7))
    assert not compare_logits(imported, changed).is_clean


def test_models_that_have_no_common_vocabulary_are_refused(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    other = make_tiny_hf(tmp_path / "other", "llama", vocab_size=300, tokenizer_size=280)
    with pytest.raises(ConfigError, match="vocab_size = 300, and 307 in"):
        compare_logits(folders["llama"][0], other)


def test_a_folder_that_asks_for_code_of_its_own_runs_none(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = folders["llama"]
    folder = tmp_path / "foreign"
    shutil.copytree(source, folder)
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = (folder / "config.json").read_text()
    own = '"auto_map": {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"},'
    foreign = config.replace("{", "{" + own, 1).replace('"model_type": "llama",', "")
    (folder / "config.json").write_text(foreign)
    with pytest.raises(ConfigError, match="transformers does not load it"):
        compare_logits(source, folder)
    assert not ran.exists()


def test_a_checkpoint_without_a_config_runs_with_the_one_that_is_given(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, imported = folders["qwen2"]
    bare = tmp_path / "bare"
    shutil.copytree(imported, bare)
    shutil.rmtree(bare / "config")
    with pytest.raises(ConfigError, match="--config"):
        compare_logits(source, bare)
    assert compare_logits(bare, source, config=source, num_prompts=1).is_clean
    with pytest.raises(ConfigError, match=r"linear_qkv\.bias .* is not known in a llama model"):
        compare_logits(source, bare, config=folders["llama"][0])
