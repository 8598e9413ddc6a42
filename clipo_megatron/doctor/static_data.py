"""Level static: the data files' rows. What needs a tokenizer or a verifier is left to `clipo data check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.data.rows import Row, read_rows, read_rows_problems
from clipo_megatron.doctor.finding import Finding, fail, of_problems, ok, skip, warn
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.rewards.extract import gold_answer
from clipo_megatron.rewards.routing import verifier_of

_LARGEST_BYTES = 64 << 20
"""Of all files together: reading more takes longer than a check of seconds may."""


def check_data(recipe: Recipe) -> list[Finding]:
    """Files and columns; then the rows: enough of them, gold answers that can be read, none in the evaluation as well."""
    name, data = "data", recipe.data
    files = [*data.train, *data.evaluation]
    if problems := read_rows_problems(files):
        return of_problems(name, problems, otherwise="")
    size = sum(Path(file).stat().st_size for file in files)
    if size > _LARGEST_BYTES:
        return [
            ok(name, f"{len(files)} files with the columns needed"),
            skip("data rows", f"{size / 1e6:.0f} MB of data; `clipo data check` reads them all"),
        ]
    try:
        train = [row for file in data.train for row in read_rows(file)]
        evaluation = [row for file in data.evaluation for row in read_rows(file)]
    except ConfigError as error:
        return of_problems(name, error.problems, otherwise="")
    said = f"{len(train)} rows to train on, {len(evaluation)} to evaluate"
    return [ok(name, said), *_row_findings(recipe, train, evaluation)]


def _row_findings(recipe: Recipe, train: Sequence[Row], evaluation: Sequence[Row]) -> list[Finding]:
    findings = []
    needed = recipe.algorithm.prompts_per_step
    if len(train) < needed:
        cause = f"algorithm.prompts_per_step = {needed}: data.train has {len(train)} rows, and a step holds none twice"
        findings.append(fail("data rows", cause, "lower it or add data"))
    unreadable = [row for row in train if verifier_of(row.source) == "math" and gold_answer(row.answer) is None]
    if unreadable:
        cause = f"data.train: {len(unreadable)} of {len(train)} gold answers can't be read, e.g. {unreadable[0].answer[:60]!r}"
        remedy = "correct or remove them: no response can be right; `clipo data check` names the rows"
        is_most = 2 * len(unreadable) > len(train)
        findings.append(fail("gold answers", cause, remedy) if is_most else warn("gold answers", cause, remedy))
    asked = {row.messages for row in train}
    if shared := sum(row.messages in asked for row in evaluation):
        cause = f"data.evaluation: {shared} of {len(evaluation)} questions stand in data.train as well"
        findings.append(warn("data overlap", cause, "remove them from one of the two: the evaluation measures memory"))
    if repeated := len(train) - len(asked):
        cause = f"data.train: {repeated} of {len(train)} questions stand there twice"
        findings.append(warn("data duplicates", cause, "remove the copies, or know that they weigh double"))
    return findings
