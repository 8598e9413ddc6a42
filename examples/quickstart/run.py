"""`make quickstart`: prepare the policy and the problems, train with CLIPO, tell what came of it.

What is there already is not made again: a finished preparation is reused, an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SOURCE = "quickstart/arithmetic"
LEVELS = "".join(chr(0x2581 + level) for level in range(8))  # eight block characters, low to high
CURVES = (
    ("sampled accuracy", "reward/accuracy"),
    ("response tokens", "rollout/response_length_mean"),
    ("contrastive loss", "contrastive/loss"),
    ("cosine of right rollouts", "contrastive/cosine_right_right_mean"),
    ("entropy", "policy/entropy"),
)


def sparkline(values: Sequence[float]) -> str:
    """One block character a value, the lowest value lowest."""
    low, high = min(values), max(values)
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((value - low) * scale)] for value in values)


def call(*command: str | Path) -> None:
    """Run a command in the foreground; ends this script with its exit code when it fails."""
    code = subprocess.run([sys.executable, *map(str, command)], check=False).returncode
    if code:
        raise SystemExit(code)


def summary(folder: Path, console: Console) -> None:
    """Print accuracy before and after, the curves, and where everything is."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row[f"evaluation/{SOURCE}/pass@1"] for row in rows if f"evaluation/{SOURCE}/pass@1" in row]
    steps = [row for row in rows if row["step"] > 0]
    table = Table(title="curves, one character a step", show_header=False, box=None, title_justify="left")
    for title, key in CURVES:
        values = [row[key] for row in steps if key in row]
        if values:
            table.add_row(title, sparkline(values), f"{values[0]:.3g} -> {values[-1]:.3g}")
    console.print()
    console.print(table)
    console.print()
    console.print(
        f"held-out accuracy (greedy): {accuracy[0]:.3f} before, {accuracy[-1]:.3f} after, "
        f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points",
        highlight=False,
        style="bold",
    )
    for what, where in (
        ("metrics", "metrics.jsonl"),
        ("rollouts", "rollouts/"),
        ("checkpoints to resume from", "checkpoints/"),
        ("Hugging Face checkpoint", "hf/final/"),
    ):
        console.print(f"  {what:<27} {folder / where}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, e.g. run.steps=10")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    started = time.perf_counter()

    folder = args.folder / f"quickstart-seed{args.seed}"
    prepared = args.folder / "prepared" / f"quickstart-seed{args.seed}"
    console.print(f"1/2 problems, tokenizer and a warm-started policy in {prepared}", highlight=False)
    call(HERE / "prepare.py", "--out", prepared, "--seed", str(args.seed))
    console.print(f"2/2 CLIPO, run folder {folder}", highlight=False)
    call(
        "-m",
        "clipo_megatron.cli",
        "train",
        HERE / "recipe.yaml",
        f"run.name={folder.name}",
        f"run.folder={args.folder}",
        f"run.seed={args.seed}",
        f"model.path={prepared / 'policy'}",
        f"data.train=[{prepared / 'train.parquet'}]",
        f"data.evaluation=[{prepared / 'heldout.parquet'}]",
        *args.overrides,
    )
    summary(folder, console)
    console.print(f"  {'time':<27} {(time.perf_counter() - started) / 60:.1f} minutes", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
