"""The layers and the size limits, read from the sources: the first arrow upwards fails here, before anyone runs it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clipo_megatron

PACKAGE = Path(clipo_megatron.__file__).parent
ROOT = PACKAGE.parent
ORDER = (
    "errors",
    "imports",
    "records",
    "recipe",
    "algorithms",
    "rewards",
    "data",
    "parallel",
    "weights",
    "sync",
    "checkpoint",
    "policy",
    "rollout",
    "checks",
    "doctor",
    "slurm",
    "controller",
    "cluster",
    "cli",
)
ONLY_IN = {"megatron": "policy", "transformer_engine": "policy", "vllm": "rollout", "ray": "cluster"}
APART = {("rollout", "policy"), ("controller", "policy"), ("controller", "rollout")}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "examples").rglob("*.py"))]


def imported_modules(tree: ast.AST, module: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and under TYPE_CHECKING included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return found


def forbidden_imports(source: str, module: str) -> list[str]:
    """Imports of `module` ("clipo_megatron.data.batch") that break a layer rule."""
    layer = module.split(".")[1] if "." in module else ""
    problems = []
    for line, target in imported_modules(ast.parse(source), module):
        parts = target.split(".")
        if parts[0] == "clipo_megatron" and layer in ORDER and len(parts) > 1 and parts[1] in ORDER:
            if ORDER.index(parts[1]) > ORDER.index(layer):
                problems.append(f"{module}:{line} imports {target}: {parts[1]} stands above {layer}")
            if (layer, parts[1]) in APART:
                problems.append(f"{module}:{line} imports {target}: {layer} knows {parts[1]} by its protocol only")
        if parts[0] in ONLY_IN and layer != ONLY_IN[parts[0]]:
            problems.append(f"{module}:{line} imports {target}: only {ONLY_IN[parts[0]]}/ may")
        if parts[0] == "torch" and layer in ("errors", "imports", "records", "recipe"):
            problems.append(f"{module}:{line} imports {target}: {layer} must load without torch")
    return problems


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_what_stands_above_it():
    problems = [problem for path in MODULES for problem in forbidden_imports(path.read_text(), _importer(path))]
    assert not problems, "\n".join(problems)


def _importer(path: Path) -> str:
    """A package's __init__ counts as a module of its own, so that its relative imports resolve."""
    name = module_name(path)
    return f"{name}.__init__" if path.name == "__init__.py" else name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clipo_megatron.data.batch", "from clipo_megatron.policy.worker import PolicyWorker"),
        ("clipo_megatron.data.batch", "def f():\n    import clipo_megatron.controller.loop"),
        ("clipo_megatron.data.batch", "from clipo_megatron import cluster"),
        ("clipo_megatron.data.batch", "from ..rollout import engine"),
        ("clipo_megatron.sync.bucket", "import megatron.core"),
        ("clipo_megatron.policy.worker", "from vllm import LLM"),
        ("clipo_megatron.controller.loop", "import ray"),
        ("clipo_megatron.controller.loop", "from clipo_megatron.rollout.engine import RolloutEngine"),
        ("clipo_megatron.recipe.rules", "from torch import Tensor"),
    ],
)
def test_the_layer_check_sees_each_kind_of_forbidden_import(module, source):
    assert len(forbidden_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clipo_megatron.policy.worker", "import megatron.core\nfrom clipo_megatron.data.batch import build_batch"),
        ("clipo_megatron.data.batch", "from .rows import read_rows\nimport numpy as np"),
        ("clipo_megatron.errors", "from collections.abc import Sequence"),
    ],
)
def test_the_layer_check_lets_imports_downwards_pass(module, source):
    assert forbidden_imports(source, module) == []


def test_every_package_has_its_place_in_the_order():
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    found |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert found == set(ORDER)


def test_no_file_is_longer_than_350_lines():
    lengths = {module_name(path): path.read_text().count("\n") for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines():
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{module_name(path)}.{node.name}"] = length
    assert long == {}


def test_every_module_says_what_it_holds_in_five_lines_at_most():
    missing, wordy = [], []
    for path in SOURCES:
        source = path.read_text()
        if not source.strip():
            continue  # an empty __init__.py
        docstring = ast.get_docstring(ast.parse(source))
        if not docstring:
            missing.append(module_name(path))
        elif len([line for line in docstring.splitlines() if line.strip()]) > 5:
            wordy.append(module_name(path))
    assert missing == []
    assert wordy == []


def test_the_public_names_are_these():
    assert sorted(clipo_megatron.__all__) == [
        "CheckError",
        "CheckpointError",
        "ClipoError",
        "ConfigError",
        "EngineError",
        "Recipe",
        "WorkerError",
        "load_recipe",
    ]
    assert all(hasattr(clipo_megatron, name) for name in clipo_megatron.__all__)


def test_the_command_line_loads_without_torch():
    """Each verifier process loads it again, and a login node may have no torch."""
    source = "import sys, clipo_megatron.cli.main; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
