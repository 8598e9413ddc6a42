"""Laws of the doctor's model level: what is wrong with prompts or verifiers is found where it is, and only there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.tiny_models import CHAT_TEMPLATE, make_tiny_hf

from clipo_megatron.cli.doctor_model import check_prompts, check_verifiers
from clipo_megatron.doctor.finding import Status
from clipo_megatron.doctor.imports import check_imports
from clipo_megatron.recipe import Recipe
from clipo_megatron.rewards import worker


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3")


def _recipe(model: Path, folder: Path, **data: object) -> Recipe:
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return Recipe.model_validate(
        {
            "run": {"name": "try", "folder": str(folder)},
            "model": {"path": str(model)},
            "data": {"train": [str(folder / "train.jsonl")], **data},
        }
    )


def _changed(model: Path, folder: Path, *, template: str, bos: bool = False) -> Path:
    """A copy of the model with another template."""
    copy = folder / "changed"
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").write_text(template)
    if bos:
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
    return copy


def test_the_first_prompts_are_shown_as_the_engines_get_them(model, tmp_path):
    (finding,) = check_prompts(_recipe(model, tmp_path))
    assert finding.status is Status.OK
    assert finding.cause.endswith("<|im_start|>assistant\\n'")


@pytest.mark.parametrize(
    ("broken", "status", "cause"),
    [
        ("too long", Status.FAIL, "data.max_prompt_tokens = 8: the first prompts have"),
        ("two BOS", Status.FAIL, "prompts begin with two BOS tokens"),
        ("another start of answers", Status.WARN, "an answered conversation does not begin as its prompt does"),
        ("no rendering", Status.FAIL, "does not render: no such role"),
    ],
)
def test_what_is_wrong_with_prompts_is_found(broken, status, cause, model, tmp_path):
    data = {"max_prompt_tokens": 8} if broken == "too long" else {}
    if broken == "two BOS":
        model = _changed(model, tmp_path, template="<|endoftext|><|endoftext|>" + CHAT_TEMPLATE, bos=True)
    elif broken == "another start of answers":
        model = _changed(model, tmp_path, template=CHAT_TEMPLATE.replace("assistant\n{% endif", "model\n{% endif"))
    elif broken == "no rendering":
        model = _changed(model, tmp_path, template="{{ raise_exception('no such role') }}")
    (finding,) = check_prompts(_recipe(model, tmp_path, **data))
    assert finding.status is status
    assert cause in finding.cause
    assert finding.remedy


def test_the_packages_of_this_machine_load():
    assert check_imports().status is Status.OK


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import os; os.abort()", "torch: exit code -6: no message"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open shared"),
        ("import time; time.sleep(60)", "torch: not done after 1 s"),
    ],
)
def test_a_package_that_crashes_or_hangs_is_named(code, cause, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(code + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    finding = check_imports(timeout_s=1.0)
    assert finding.status is Status.FAIL
    assert cause in finding.cause
    assert finding.remedy


def test_a_host_that_can_not_confine_verifiers_is_warned_of(model, tmp_path, monkeypatch):
    assert check_verifiers(_recipe(model, tmp_path)).status is Status.OK
    # The processes import this module anew, so the machine's kind is what is changed: by a name that they inherit.
    monkeypatch.setenv("PYTHONPATH", str(_other_machine(tmp_path)), prepend=":")
    finding = check_verifiers(_recipe(model, tmp_path))
    assert finding.status is Status.WARN
    assert "are not confined: a filter of system calls is written for Linux on x86_64 alone" in finding.cause
    assert worker.why_unconfined()  # this process was never one of them


def _other_machine(folder: Path) -> Path:
    """A folder whose sitecustomize makes Python think that it runs on another kind of machine."""
    (folder / "sitecustomize.py").write_text("import platform\nplatform.machine = lambda: 'riscv64'\n")
    return folder
