"""Level model of `clipo doctor`: the recipe's own model, verifiers and engines, tried before the run relies on them.

Each check is the command that does it alone, in a process of its own: none leaves memory or devices taken for the next.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.data.rows import read_rows
from clipo_megatron.data.tokenizer import load_tokenizer, render_prompts
from clipo_megatron.doctor.finding import Finding, fail, of_problems, ok, skip, warn
from clipo_megatron.doctor.imports import UNCONFINED_REMEDY, check_imports
from clipo_megatron.errors import CheckError, ConfigError, WorkerError
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import Ids
from clipo_megatron.rewards.pool import Verifiers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPTS, _SHOWN_TOKENS = 3, 16
_TIMEOUT_S = 1800.0
_BAD_INPUT = 2


def run_model(recipe: Recipe) -> list[Finding]:
    """All model checks, one after the other."""
    findings = [check_imports(), check_verifiers(recipe), *check_prompts(recipe)]
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
            _check_command(
                "step",
                ["check", "step", str(path)],
                good="longest rollouts",
                remedy="out of memory: lower layout.micro_batch_tokens or recompute more; else see that the run folder's file "
                "system keeps what it is given",
            )
        )
    return findings


def check_verifiers(recipe: Recipe) -> Finding:
    """Known pairs and a poison pill in the verifier processes, set up as the run's."""
    name, rewards = "verifiers", recipe.rewards
    try:
        with Verifiers(rewards.workers, rewards.timeout_s, rewards.max_answer_chars) as verifiers:
            verifiers.self_test()
            unconfined = verifiers.why_unconfined()
    except (CheckError, WorkerError) as error:
        cause, _, remedy = str(error).rpartition("; ")
        return fail(name, cause or remedy, remedy if cause else "reinstall math-verify and sympy as pinned")
    good = f"{rewards.workers} processes judge known pairs rightly and outlive a poison pill"
    if unconfined:
        return warn(name, f"{good}, and are not confined: {unconfined}", UNCONFINED_REMEDY)
    return ok(name, good)


def check_prompts(recipe: Recipe) -> list[Finding]:
    """The first prompts in the model's chat template, as the engines will get them."""
    name = "prompts"
    try:
        tokenizer = load_tokenizer(recipe.model.path)
        rows = [row for file in recipe.data.train for row in read_rows(file)[:_PROMPTS]][:_PROMPTS]
        prompts = render_prompts(tokenizer, [row.messages for row in rows])
        longer = render_prompts(tokenizer, [(*row.messages, ("assistant", "x")) for row in rows])
    except ConfigError as error:
        return of_problems(name, error.problems, otherwise="")
    return [*_prompt_findings(recipe, name, tokenizer, prompts, longer)]


def _prompt_findings(
    recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids], answered: Sequence[Ids]
) -> Iterator[Finding]:
    shown = " | ".join(str(tokenizer.decode(ids[-_SHOWN_TOKENS:])) for ids in prompts[:1])
    lengths = ", ".join(str(len(ids)) for ids in prompts)
    limit, bos = recipe.data.max_prompt_tokens, tokenizer.bos_token_id
    if all(len(ids) > limit for ids in prompts):
        cause = f"data.max_prompt_tokens = {limit}: the first prompts have {lengths} tokens, and all would be left out"
        yield fail(name, cause, "raise it, or take a shorter template")
    elif bos is not None and any(list(ids[:2]) == [bos, bos] for ids in prompts):
        yield fail(name, "prompts begin with two BOS tokens", "take the BOS out of the chat template")
    elif any(
        len(then) <= len(ids) or list(then[: len(ids)]) != list(ids)
        for ids, then in zip(prompts, answered, strict=True)
    ):
        cause = f"an answered conversation does not begin as its prompt does, which ends in {shown!r}"
        yield warn(name, cause, "see that the chat template's generation prompt is how it begins an answer")
    else:
        yield ok(name, f"the first have {lengths} tokens; the first one ends in {shown!r}")


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
    if done.returncode:
        return _of_failure(name, done, remedy)
    return ok(name, f"{good}: {done.stdout.strip()}" if name == "step" else good)


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
