"""Laws of `clipo ckpt export`: the imported bits come back, faults are known before the first byte, no half folder."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.dist_folders import flip_one_bit, import_tiny, read_keys, write_keys
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.checkpoint.manifest import Progress
from clipo_megatron.checkpoint.model_export import export_model
from clipo_megatron.checkpoint.training import RunIdentity, close_checkpoint, open_checkpoint
from clipo_megatron.cli.main import main
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.folder_check import model_folder_problems

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING, OUTPUT, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
MODELS = {
    "qwen3_moe": {"vocab_size": 509, "num_kv_heads": 4},
    "llama": {"tied": True, "dtype": "bfloat16", "vocab_size": 391, "llama3_rope": True},
}
LAYOUTS = {"qwen3_moe": {"tp": 2, "pp": 2, "ep": 2}, "llama": {"tp": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_hf(root / name, name, max_shard_size="200KB", **keys) for name, keys in MODELS.items()}


@pytest.fixture(scope="module")
def imported(models, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    return {name: import_tiny(models[name], root / name, **LAYOUTS[name]) for name in MODELS}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _assert_same(folder: Path, source: Path) -> None:
    want, got = _tensors(source), _tensors(folder)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert model_folder_problems(folder) == []


@pytest.mark.parametrize("action", ["export", "import"])
def test_a_target_below_a_file_is_refused_with_what_is_there(models, imported, tmp_path, capsys, action):
    (tmp_path / "file").write_text("")
    source, options = (imported["llama"], []) if action == "export" else (models["llama"], ["--layout", "tp=1"])
    assert main(["ckpt", action, str(source), str(tmp_path / "file" / "out"), *options]) == 2
    assert f"{tmp_path / 'file'} is no folder that can be written to" in capsys.readouterr().err


def test_a_flipped_bit_is_refused_before_anything_is_written(imported, tmp_path):
    source = Path(shutil.copytree(imported["qwen3_moe"], tmp_path / "source"))
    damaged = sorted(source.glob("*.distcp"))[0]
    flip_one_bit(damaged, byte=-5000)  # among the elements
    with pytest.raises(ConfigError, match=rf"{damaged.name}: has checksum"):
        export_model(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", MODELS)
def test_an_export_has_the_bits_and_the_small_files_of_what_was_imported(models, imported, tmp_path, family):
    out = tmp_path / "out"
    assert main(["ckpt", "export", str(imported[family]), str(out)]) == 0
    _assert_same(out, models[family])
    small = {path.name for path in models[family].iterdir() if not path.name.startswith("model")}
    assert {path.name for path in out.iterdir()} == small | {"model.safetensors"}
    for name in small - {"config.json"}:
        assert (out / name).read_bytes() == (models[family] / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((models[family] / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_transformers_reads_an_export_with_its_tokenizer_and_chat_template(models, imported, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_model(imported["llama"], tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want, got = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (models["llama"], out))
    assert torch.equal(got, want)
    chat = [{"role": "user", "content": "What is 3 + 4 ?"}]
    old, new = (AutoTokenizer.from_pretrained(folder).apply_chat_template(chat) for folder in (models["llama"], out))
    assert new["input_ids"] == old["input_ids"]


def test_a_number_format_can_be_chosen_and_config_json_tells_it(models, imported, tmp_path):
    told: list[tuple[str, int, int]] = []
    out = export_model(
        imported["qwen3_moe"], tmp_path / "out", dtype="bfloat16", on_progress=lambda *now: told.append(now)
    )
    want = {name: tensor.bfloat16() for name, tensor in _tensors(models["qwen3_moe"]).items()}
    got = _tensors(out)
    assert all(torch.equal(got[name], tensor) and got[name].dtype == torch.bfloat16 for name, tensor in want.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert told[-1][1:] == (sum(tensor.nbytes for tensor in want.values()),) * 2


def test_a_checkpoint_without_config_takes_that_of_a_named_folder_and_drops_padding(models, imported, tmp_path):
    tensors = read_keys(imported["qwen3_moe"])
    tensors[EMBEDDING][509:] = 7.0  # what Megatron has trained there is nobody's
    bare = write_keys(tmp_path / "bare", tensors)
    with pytest.raises(ConfigError, match="name the model's Hugging Face folder with --config"):
        export_model(bare, tmp_path / "out")
    assert main(["ckpt", "export", str(bare), str(tmp_path / "out"), "--config", str(models["qwen3_moe"])]) == 0
    _assert_same(tmp_path / "out", models["qwen3_moe"])


def test_a_training_checkpoint_exports_its_parameters_alone(models, imported, tmp_path):
    beside = open_checkpoint(tmp_path / "checkpoints", 3)
    writer = DistWriter(beside / "__0_0.distcp")
    for key, tensor in read_keys(imported["llama"]).items():
        for prefix, values in {"": tensor, "optimizer.state.exp_avg.": torch.randn(tensor.shape)}.items():
            writer.write(prefix + key, values, global_shape=tensor.shape, start=(0,) * tensor.dim(), shape=tensor.shape)
    writer.write("rank_state.00000.random.cpu", torch.get_rng_state(), global_shape=(5056,), start=(0,), shape=(5056,))
    step, _ = close_checkpoint(
        beside,
        progress=Progress(step=3),
        run=RunIdentity(fingerprint="f", data_hash="d", recipe="", model_path=models["llama"]),
        sound=True,
        accuracy=None,
        files=[writer.finish()],
        policy={},
    )
    with pytest.raises(ConfigError, match="give one of the folders in it: checkpoints/latest, checkpoints/step_0"):
        export_model(tmp_path, tmp_path.parent / "out")
    _assert_same(export_model(step, tmp_path / "out"), models["llama"])
    flip_one_bit(step / "__0_0.distcp", byte=-8000)
    with pytest.raises(ConfigError, match=r"__0_0\.distcp has checksum"):
        export_model(step, tmp_path / "again")
    with (step / "__0_0.distcp").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"__0_0\.distcp has .* bytes, its manifest says"):
        export_model(step, tmp_path / "again")


def test_all_that_does_not_fit_is_told_at_once_before_anything_is_written(models, imported, tmp_path, capsys):
    tensors = read_keys(imported["llama"])
    del tensors[FINAL_NORM]
    tensors["decoder.layers.self_attention.linear_qkv.bias"] = torch.zeros(2, 256)
    tensors["decoder.layers.mlp.linear_fc2.weight"] = tensors["decoder.layers.mlp.linear_fc2.weight"][:, :, :-1].clone()
    tensors[EMBEDDING] = tensors[EMBEDDING][:390].clone()
    tensors[OUTPUT] = tensors[EMBEDDING].clone()
    bare = write_keys(tmp_path / "bare", tensors, config=models["llama"])
    before = _bytes(bare)
    (tmp_path / "out").mkdir()
    assert main(["ckpt", "export", str(bare), str(tmp_path / "out"), "--dtype", "int8"]) == 2
    errors = capsys.readouterr().err
    for words in (
        "out: exists; remove it",
        "--dtype int8: must be one of float32, bfloat16, float16",
        f"no {FINAL_NORM}, which a llama model has with shape (128,)",
        "linear_qkv.bias (2, 256) is not known in a llama model",
        "linear_fc2.weight has shape (2, 128, 95): config.json asks for (2, 128, 96)",
        f"{EMBEDDING} has shape (390, 128): config.json asks for (391, 128), with more rows where they are padded",
        f"{OUTPUT} (390, 128) is not known in a llama model whose tie_word_embeddings is true",
    ):
        assert words in errors
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "out"]
    assert _bytes(bare) == before


def test_folders_that_are_no_checkpoint_are_refused_with_what_to_do(models, imported, tmp_path):
    source = imported["llama"]
    with pytest.raises(ConfigError, match="it is a Hugging Face folder already"):
        export_model(models["llama"], tmp_path / "out")
    with pytest.raises(ConfigError, match="give one of the folders in it: llama, qwen3_moe"):
        export_model(source.parent, tmp_path / "out")
    with pytest.raises(ConfigError, match="no such folder"):
        export_model(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="which stays as it is; write to another folder"):
        export_model(source, source / "out")
    # The export would be made under the source's own name, after that has been cleared.
    partial = Path(shutil.copytree(source, tmp_path / "model.partial"))
    with pytest.raises(ConfigError, match=r"lies where .*model would be made"):
        export_model(partial, tmp_path / "model")
    assert _bytes(partial) == _bytes(source)
    config = json.loads((partial / "config" / "config.json").read_text())
    (partial / "config" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    (partial / "conversion.json").unlink()
    with pytest.raises(ConfigError, match=r'architectures = \["GPT2LMHeadModel"\]: must be one of'):
        export_model(partial, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_missing_or_truncated_file_is_named_and_nothing_is_left(imported, tmp_path, damage):
    broken = Path(shutil.copytree(imported["qwen3_moe"], tmp_path / "broken"))
    file = sorted(broken.glob("__*.distcp"))[1]
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{file.name}: {'is missing' if damage == 'missing' else 'has .* bytes'}"):
        export_model(broken, tmp_path / "out")
    (broken / "conversion.json").unlink()
    with pytest.raises(ConfigError, match=file.name):
        export_model(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_left(models, imported, tmp_path):
    tensors = read_keys(imported["qwen3_moe"])
    tensors["decoder.layers.mlp.experts.experts.linear_fc2.weight"][1, 3, 2, 1] = torch.inf
    bare = write_keys(tmp_path / "bare", tensors, config=models["qwen3_moe"])
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.experts.3.down_proj.weight: holds values that are not finite"
    ):
        export_model(bare, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_a_full_disk_leaves_nothing_and_the_repeated_export_is_right(models, imported, tmp_path, file_size_limit):
    before = _bytes(imported["qwen3_moe"])
    with file_size_limit(300_000), pytest.raises(CheckpointError, match=r"out: can't be written .* free some space"):
        export_model(imported["qwen3_moe"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert _bytes(imported["qwen3_moe"]) == before
    _assert_same(export_model(imported["qwen3_moe"], tmp_path / "out"), models["qwen3_moe"])


class _Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("command", ["export", "verify", "inspect"])
def test_a_pickle_that_would_run_code_is_refused_by_its_name(imported, tmp_path, capsys, command):
    evil = Path(shutil.copytree(imported["llama"], tmp_path / "evil"))
    (evil / "conversion.json").unlink()
    (evil / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "was-run")))
    targets = [str(tmp_path / "out")] if command == "export" else []
    assert main(["ckpt", command, str(evil), *targets]) == 2
    errors = capsys.readouterr().err
    assert "Path.touch" in errors
    assert "could run code: refused" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil"]


def test_code_that_config_json_names_is_neither_run_nor_copied(models, tmp_path, caplog):
    evil = Path(shutil.copytree(models["llama"], tmp_path / "evil"))
    (evil / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'was-run')!r}).touch()\n")
    config = json.loads((evil / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (evil / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((evil / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": ["someone/repository--tokenizer_evil.Evil", None]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(tokenizer | named))
    out = export_model(import_tiny(evil, tmp_path / "imported"), tmp_path / "out")
    assert main(["ckpt", "verify", str(evil), str(out)]) == 0
    assert not list(out.glob("*.py"))
    assert json.loads((out / "tokenizer_config.json").read_text()) == tokenizer
    assert "config.json: auto_map, which names code, is not copied" in caplog.text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A user who trusts the folder gets the family's own classes all the same.
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(model.model.norm.weight, _tensors(models["llama"])["model.norm.weight"])
    assert not (tmp_path / "was-run").exists()


def test_the_script_is_the_command(imported, models, tmp_path):
    script = [sys.executable, str(ROOT / "checkpoint_tools" / "megatron_to_hf.py")]
    subprocess.run([*script, str(imported["llama"]), str(tmp_path / "out")], check=True, timeout=120)
    _assert_same(tmp_path / "out", models["llama"])
