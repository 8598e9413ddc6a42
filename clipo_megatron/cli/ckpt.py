"""`clipo ckpt verify A [B]`, `clipo ckpt inspect PATH`: checkpoints compared bit by bit, and what a folder holds."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from clipo_megatron.checkpoint.verify import VerifyReport

_SHOWN = 20


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("ckpt", help="verify and inspect checkpoints", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="compare two Hugging Face model folders bit by bit, or check one",
        description="Exit code 0: equal, or without faults; 1: not; 2: a folder can't be read.",
    )
    verify.add_argument("first", type=Path, metavar="A", help="Hugging Face model folder")
    verify.add_argument("second", type=Path, nargs="?", metavar="B", help="another one; without it, A is checked alone")
    verify.add_argument("--json", action="store_true", help="print one JSON object with all differences")
    verify.set_defaults(run=run_verify)
    inspect = actions.add_parser("inspect", help="what a folder holds, from its headers and manifests")
    inspect.add_argument("path", type=Path, metavar="PATH", help="model folder, training checkpoint or run folder")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=run_inspect)


def run_verify(args: argparse.Namespace) -> int:
    """Verify, with progress on stderr.

    Raises:
        ConfigError: all reasons why the folders can't be read.
    """
    # Imported late: other commands need no torch.
    from clipo_megatron.checkpoint.verify import verify_folder, verify_folders

    columns = (
        TextColumn("verify"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def on_progress(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        if args.second is None:
            report = verify_folder(args.first, on_progress=on_progress)
        else:
            report = verify_folders(args.first, args.second, on_progress=on_progress)
    if args.json:
        print(json.dumps({"clean": report.is_clean} | asdict(report), indent=1))
    else:
        _print_report(report, is_pair=args.second is not None)
    return 0 if report.is_clean else 1


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a folder holds.

    Raises:
        ConfigError: it is none of the known folders, or damaged.
    """
    from clipo_megatron.checkpoint.inspection import inspect_folder

    found = inspect_folder(args.path)
    print(json.dumps(found, indent=1) if args.json else "\n".join(_lines(found)))
    return 0


def _print_report(report: VerifyReport, *, is_pair: bool) -> None:
    for difference in report.differences[:_SHOWN]:
        files = " and ".join(dict.fromkeys(file for file in (difference.first_file, difference.second_file) if file))
        print(f"{difference.tensor}: {difference.kind}: {difference.detail} ({files})")
    if len(report.differences) > _SHOWN:
        print(f"... and {len(report.differences) - _SHOWN} more tensors; --json lists all")
    for fault in report.faults[:_SHOWN]:
        print(fault)
    if len(report.faults) > _SHOWN:
        print(f"... and {len(report.faults) - _SHOWN} more faults; --json lists all")
    counted = f"{report.num_tensors} tensors, {report.bytes_read} bytes read"
    if report.is_clean:
        print(f"{'equal' if is_pair else 'no faults'}: {counted}")
    else:
        differing = f"{len(report.differences)} tensors differ, " if is_pair else ""
        print(f"not {'equal' if is_pair else 'sound'}: {differing}{len(report.faults)} faults; {counted}")


def _lines(values: dict[str, object], indent: str = "") -> list[str]:
    """Nested values, one a line."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_words(value)}")
    return lines


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) if value else "none"
    return str(value)
