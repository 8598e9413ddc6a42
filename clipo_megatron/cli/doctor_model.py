"""Level model of `clipo doctor`: the recipe's own model, verifiers and engines, tried before the run relies on them.

Each check is the command that does it alone, in a process of its own: none leaves memory or devices taken for the next.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.doctor.finding import Finding, fail, ok, skip
from clipo_megatron.errors import CheckError, WorkerError
from clipo_megatron.recipe import Recipe
from clipo_megatron.rewards.pool import Verifiers

_TIMEOUT_S = 1800.0
_BAD_INPUT = 2


def run_model(recipe: Recipe) -> list[Finding]:
    """All model checks, one after the other."""
    findings = [check_verifiers(recipe)]
    with tempfile.TemporaryDirectory(prefix="clipo-doctor-") as name:
        folder = Path(name)
        path = folder / "recipe.yaml"
        path.write_text(recipe.to_yaml())
        findings.append(_check_logits(recipe, path, folder))
        findings.append(
            _check_command(
                "layout",
                ["check", "parity", str(path)],
                good="the layout gives the numbers of one rank",
                remedy="see docs/parity.md; narrow it down with `clipo check parity --layout`",
            )
        )
        findings.append(
            _check_command(
                "sync",
                ["check", "sync", str(path)],
                good="engines have the policy's weights after each sync",
                remedy="see docs/weight_sync.md; try sync.transport=stream",
            )
        )
    findings.append(
        skip("worst micro-batch", "none of full length is run here; its memory is estimated, see GPU memory above")
    )
    return findings


def check_verifiers(recipe: Recipe) -> Finding:
    """Known pairs and a poison pill in the verifier processes, set up as the run's."""
    name, rewards = "verifiers", recipe.rewards
    try:
        with Verifiers(rewards.workers, rewards.timeout_s, rewards.max_answer_chars) as verifiers:
            verifiers.self_test()
    except (CheckError, WorkerError) as error:
        cause, _, remedy = str(error).rpartition("; ")
        return fail(name, cause or remedy, remedy if cause else "reinstall math-verify and sympy as pinned")
    return ok(name, f"{rewards.workers} processes judge known pairs rightly and outlive a poison pill")


def _check_logits(recipe: Recipe, path: Path, folder: Path) -> Finding:
    """Hugging Face's log-probs of the model against Megatron's, of an import of the model."""
    model, imported = recipe.model.path, folder / "imported"
    name, remedy = (
        "HF against Megatron",
        "the model folder is not what its config.json says, or its family has a fault here",
    )
    done = _run(["ckpt", "import", model, str(imported), "--recipe", str(path)])
    if done.returncode:
        return _of_failure(name, done, remedy)
    good = "log-probs of transformers and Megatron agree"
    return _check_command(name, ["ckpt", "verify", model, str(imported), "--logits"], good=good, remedy=remedy)


def _check_command(name: str, arguments: Sequence[str], *, good: str, remedy: str) -> Finding:
    done = _run(arguments)
    return _of_failure(name, done, remedy) if done.returncode else ok(name, good)


def _of_failure(name: str, done: subprocess.CompletedProcess[str], remedy: str) -> Finding:
    """What can't be run here is a skip: too little memory, too few GPUs."""
    told = [line.removeprefix("clipo: ") for line in done.stderr.splitlines() if line.startswith("clipo: ")]
    cause = " ".join(" ".join(told or done.stderr.splitlines()[-1:] or ["no message"]).split())[:500]
    if done.returncode == _BAD_INPUT:
        return skip(name, f"can't be run here: {cause}")
    return fail(name, cause, remedy)


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipo_megatron.cli", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"clipo: not done after {_TIMEOUT_S:g} s")
