"""`clipo ckpt`: models imported and exported, checkpoints compared bit by bit, and what a folder holds."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.cli.ckpt_export import add_export_parser
from clipo_megatron.cli.ckpt_import import add_import_parser
from clipo_megatron.cli.transfer_bar import transfer_bar
from clipo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from clipo_megatron.checkpoint.verify import VerifyReport
    from clipo_megatron.checks.logits import LogitReport

_SHOWN = 20


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("ckpt", help="convert, verify and inspect checkpoints", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_import_parser(actions)
    add_export_parser(actions)
    verify = actions.add_parser(
        "verify",
        help="compare two model folders or checkpoints bit by bit, or check one",
        description="Files are compared with their manifest's checksums first, then the tensors. Exit code 0: equal, or "
        "without faults; 1: not; 2: a folder can't be read.",
    )
    verify.add_argument("first", type=Path, metavar="A", help="Hugging Face model folder or distributed checkpoint")
    verify.add_argument("second", type=Path, nargs="?", metavar="B", help="another one; without it, A is checked alone")
    verify.add_argument(
        "--config", type=Path, metavar="HF_FOLDER", help="config.json of a checkpoint that holds none, as Megatron's"
    )
    verify.add_argument(
        "--logits",
        action="store_true",
        help="also compare forward passes on a few prompts; another number format alone is no difference then",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object with all differences")
    verify.set_defaults(run=run_verify)
    inspect = actions.add_parser("inspect", help="what a folder holds, from its headers and manifests")
    inspect.add_argument("path", type=Path, metavar="PATH", help="model folder, training checkpoint or run folder")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=run_inspect)


def run_verify(args: argparse.Namespace) -> int:
    """Verify, with progress on stderr.

    Raises:
        ConfigError: all reasons why the folders can't be read, or run.
    """
    # Imported late: other commands need no torch.
    from clipo_megatron.checkpoint.verify import verify_folder, verify_folders

    if args.logits and args.second is None:
        raise ConfigError("--logits: compares two folders; give B as well")
    with transfer_bar("verify") as on_progress:
        if args.second is None:
            report = verify_folder(args.first, config=args.config, on_progress=on_progress)
        else:
            report = verify_folders(args.first, args.second, config=args.config, on_progress=on_progress)
    logits = None if args.second is None or not args.logits else _compare_logits(report, args)
    is_clean = report.is_clean
    if args.logits:
        only_formats = not report.faults and all(difference.kind == "dtype" for difference in report.differences)
        is_clean = only_formats and logits is not None and logits.is_clean
    if args.json:
        found = {"clean": is_clean} | asdict(report)
        print(json.dumps(found | ({"logits": logits and asdict(logits)} if args.logits else {}), indent=1))
    else:
        _print_report(report, is_pair=args.second is not None)
        if args.logits:
            print("forward passes were not compared: the tensors do not fit" if logits is None else logits.line)
    return 0 if is_clean else 1


def _compare_logits(report: VerifyReport, args: argparse.Namespace) -> LogitReport | None:
    """None where files are damaged, or tensors missing or of another shape: such a folder can't be run."""
    if report.faults or any(difference.kind not in ("dtype", "bits") for difference in report.differences):
        return None
    from clipo_megatron.checks.logits import compare_logits

    return compare_logits(args.first, args.second, config=args.config)


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
    counted = f"{report.num_tensors} tensors, {size_text(report.bytes_read)} read"
    for note in report.notes:
        print(note)
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
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) if value else "none"
    return str(value)
