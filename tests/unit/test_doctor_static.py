"""Laws of the static doctor: a sound recipe passes; with one thing broken, exactly that check fails, with a remedy."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.manifest import Manifest, Progress, manifest_text
from clipo_megatron.cli.main import main
from clipo_megatron.doctor.finding import Status, read_report
from clipo_megatron.doctor.static import StaticCase, run_static
from clipo_megatron.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def write_rows(path, count=16, answer="{}"):
    rows = [{"question": f"What is {n} + 1?", "answer": answer.format(n + 1)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def recipe(tmp_path, source):
    """A sound recipe; its model folder is a copy by links, so that a test may break it."""
    model = tmp_path / "model"
    model.mkdir()
    for file in source.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    content = {
        "run": {"name": "r", "folder": str(tmp_path / "runs"), "steps": 5, "device": "cpu"},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": [write_rows(tmp_path / "train.jsonl")],
            "evaluation": [write_rows(tmp_path / "held.jsonl", count=1).replace("\n", "")],
        },
        "layout": {"micro_batch_tokens": 4096},
        "rollout": {"max_response_tokens": 256},
        "algorithm": {"prompts_per_step": 4},
    }
    (tmp_path / "held.jsonl").write_text('{"question": "What is 900 + 1?", "answer": "901"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def found(path, *overrides, **options):
    """(check -> statuses) of all static checks."""
    statuses = {}
    for finding in run_static(StaticCase(recipe=load_recipe(path, overrides), **options)):
        statuses.setdefault(finding.check, []).append(finding.status)
        assert finding.status not in (Status.WARN, Status.FAIL) or finding.remedy, finding
        assert "\n" not in finding.cause + finding.remedy
    return statuses


def past(statuses, *wanted):
    return {check for check, of_check in statuses.items() if set(of_check) & set(wanted)}


def test_a_sound_recipe_passes_all(recipe):
    assert past(found(recipe), Status.FAIL, Status.WARN) == set()


def _drop_config(folder):
    (folder / "model" / "config.json").unlink()


def _cut_weights(folder):
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_template(folder):
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    path = folder / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def _drop_data(folder):
    (folder / "train.jsonl").unlink()


def _too_few_rows(folder):
    write_rows(folder / "train.jsonl", count=3)


def _gold_that_none_matches(folder):
    write_rows(folder / "train.jsonl", answer="a solution\nof two lines without a box: {}")


def _file_as_run_folder(folder):
    (folder / "runs").write_text("")


def _damaged_manifest(folder):
    checkpoint = folder / "runs" / "r" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")


BROKEN = {
    "no config.json": (_drop_config, "model folder"),
    "cut weights": (_cut_weights, "model folder"),
    "no chat template": (_drop_template, "chat template"),
    "no data file": (_drop_data, "data"),
    "too few rows": (_too_few_rows, "data rows"),
    "gold answers that nothing matches": (_gold_that_none_matches, "gold answers"),
    "a file in place of the run folder": (_file_as_run_folder, "run folder"),
    "a damaged checkpoint": (_damaged_manifest, "resume"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_with_one_thing_broken_exactly_its_check_fails(recipe, tmp_path, what):
    break_it, check = BROKEN[what]
    break_it(tmp_path)
    assert past(found(recipe), Status.FAIL) == {check}


OVERRIDDEN = {
    "layout.tp=8 layout.world_size=8": "model folder",  # 4 heads
    "data.max_prompt_tokens=2000": "model folder",  # more than its positions
    "model.weights=/nowhere": "start weights",
    "precision.recipe=blockwise layout.tp=4 layout.world_size=4": "model folder",
    "experts.routing_replay=false": "model folder",  # a dense model
}


@pytest.mark.parametrize("overrides", OVERRIDDEN)
def test_an_override_that_does_not_fit_fails_exactly_its_check(recipe, overrides):
    assert past(found(recipe, *overrides.split()), Status.FAIL) == {OVERRIDDEN[overrides]}


def test_rows_of_the_evaluation_that_are_trained_on_are_told(recipe, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"question": "What is 3 + 1?", "answer": "4"}\n')
    assert past(found(recipe), Status.WARN, Status.FAIL) == {"data overlap"}


def test_questions_that_stand_twice_are_told(recipe, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() * 2)
    assert past(found(recipe), Status.WARN, Status.FAIL) == {"data duplicates"}


def _checkpoint(folder, recipe, *, step, fingerprint=None):
    checkpoint = folder / "runs" / "r" / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    manifest = Manifest(
        progress=Progress(step=step),
        fingerprint=fingerprint or load_recipe(recipe).fingerprint,
        data_hash="",
        sound=True,
        accuracy=None,
        versions={},
        files={},
        checksums={},
    )
    (checkpoint / "manifest.json").write_text(manifest_text(manifest))


def test_a_checkpoint_of_this_recipe_is_gone_on_from(recipe, tmp_path):
    _checkpoint(tmp_path, recipe, step=3)
    assert past(found(recipe), Status.FAIL, Status.WARN) == set()


def test_a_checkpoint_of_another_recipe_is_refused_unless_that_is_accepted(recipe, tmp_path):
    _checkpoint(tmp_path, recipe, step=3, fingerprint="0" * 16)
    assert past(found(recipe), Status.FAIL) == {"resume"}
    assert past(found(recipe, "run.accept=[recipe]"), Status.FAIL) == set()


def test_a_checkpoint_past_the_end_is_refused(recipe, tmp_path):
    _checkpoint(tmp_path, recipe, step=6)
    assert past(found(recipe), Status.FAIL) == {"resume"}


def test_a_run_folder_that_is_not_empty_is_refused_where_nothing_may_be_resumed(recipe, tmp_path):
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "metrics.jsonl").write_text("")
    assert past(found(recipe, "run.resume=never"), Status.FAIL) == {"run folder"}


def test_a_model_larger_than_the_gpu_is_told_before_a_gpu_is_asked_for(recipe):
    overrides = ("run.device=cuda", "model.dtype=bfloat16")
    assert past(found(recipe, *overrides, gpu_gib=80.0), Status.FAIL, Status.WARN) == set()
    assert past(found(recipe, *overrides, gpu_gib=3.4), Status.WARN) == {"GPU memory"}
    assert past(found(recipe, *overrides, gpu_gib=1.0), Status.FAIL) == {"GPU memory"}
    shared = (*overrides, "rollout.colocate=true", "rollout.gpu_memory_utilization=0.9")
    assert past(found(recipe, *shared, gpu_gib=100.0), Status.FAIL) == set()
    assert past(found(recipe, *shared, gpu_gib=20.0), Status.FAIL) == {"GPU memory"}


def test_checkpoints_that_do_not_fit_on_the_disk_are_told(recipe, tmp_path):
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"intermediate_size": 10**12}))
    assert past(found(recipe), Status.FAIL) >= {"disk"}


def test_tensorboard_without_its_package_is_told(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert past(found(recipe, "run.tensorboard=true"), Status.FAIL) == {"tensorboard"}


def test_a_typo_in_the_recipe_is_told_with_the_nearest_key_and_a_line_for_the_logs(recipe, capsys):
    assert main(["doctor", str(recipe), "layout.wold_size=2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("clipo: error: ")
    assert ": checks: layout.wold_size: unknown key; did you mean 'layout.world_size'?" in err


def test_the_report_is_read_back_as_it_was_written(recipe, tmp_path, capsys):
    assert main(["doctor", str(recipe), "--json", str(tmp_path / "report.json")]) == 0
    report = read_report(tmp_path / "report.json")
    assert report.worst is Status.SKIP
    assert report.recipe == str(recipe)
    table = capsys.readouterr().out
    assert all(finding.check in table for finding in report.findings)


def test_a_check_that_is_left_out_is_recorded_as_left_out(recipe, tmp_path):
    _too_few_rows(tmp_path)
    assert main(["doctor", str(recipe)]) == 2
    arguments = ["doctor", str(recipe), "--skip", "data rows", "--json", str(tmp_path / "report.json")]
    assert main(arguments) == 0
    left_out = [f for f in read_report(tmp_path / "report.json").findings if f.check == "data rows"]
    assert [finding.status for finding in left_out] == [Status.SKIP]
    assert "--skip; it said FAIL" in left_out[0].cause


@pytest.mark.parametrize("example", ["math_qwen3_30b_a3b", "math_qwen3_32b"])
def test_large_recipes_are_examined_in_seconds_without_torch(example):
    path = ROOT / "examples" / example / "recipe.yaml"
    config = ROOT / "examples" / "configs" / example.removeprefix("math_")
    source = (
        "import sys; from clipo_megatron.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'ray', 'vllm', 'megatron'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # others keep the machine busy
    ended = subprocess.run(
        [sys.executable, "-c", source, "doctor", str(path), f"model.path={config}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5
    assert ended.stdout.splitlines()[-1] == "2 []", ended.stderr
    assert "GPU memory" in ended.stdout
    assert "no model.safetensors" in ended.stderr  # only the config is here
