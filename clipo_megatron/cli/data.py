"""`clipo data check FILE...`: what the data files hold and which rows no response can get right, as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json

from clipo_megatron.errors import ConfigError

_MAX_ANSWER_CHARS = 2000


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("data", help="look into data files", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="count rows, duplicates, over-long prompts and unverifiable gold answers")
    check.add_argument("files", nargs="+", metavar="FILE", help="parquet or JSONL")
    check.add_argument("--tokenizer", metavar="DIR", help="Hugging Face folder whose tokenizer counts prompt tokens")
    check.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longer prompts are over-long (default 512)")
    check.add_argument("--workers", type=int, default=2, help="verifier processes")
    check.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds an answer may take")
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the files and print a list with one JSON object a file.

    Raises:
        ConfigError: all faults of the files, an option out of range, or an option without effect.
    """
    from clipo_megatron.data.check import check_files
    from clipo_megatron.data.rows import read_rows_problems
    from clipo_megatron.data.tokenizer import load_tokenizer
    from clipo_megatron.rewards.pool import Verifiers

    problems = read_rows_problems(args.files)
    if args.max_prompt_tokens is not None and args.tokenizer is None:
        problems.append(f"--max-prompt-tokens = {args.max_prompt_tokens}: has no effect without --tokenizer; give both")
    if args.max_prompt_tokens is not None and args.max_prompt_tokens < 1:
        problems.append(f"--max-prompt-tokens = {args.max_prompt_tokens}: must be >= 1")
    if problems:
        raise ConfigError(problems)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    max_prompt_tokens = 512 if args.max_prompt_tokens is None else args.max_prompt_tokens
    with Verifiers(args.workers, args.timeout, _MAX_ANSWER_CHARS) as verifiers:
        reports = check_files(args.files, verifiers, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens)
    print(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    return 0
