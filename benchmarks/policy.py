"""Cost of the policy's parts, each against a plain way of computing the same, as ratios of medians from one run.

    python benchmarks/policy.py                      all parts with their defaults, on one CPU thread
    python benchmarks/policy.py step --device cuda   one part; PART --help tells its options

JSON objects go to standard output, tables to standard error. What was measured: RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from types import ModuleType

PARTS = {
    "logprob": ("logprob", "log-probs and entropy from final hidden states"),
    "contrastive": ("contrastive_step", "pooling and the contrastive head's step"),
    "step": ("policy_step", "score and train step against the raw layers; FP8"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="policy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="part", metavar="PART")
    # Here, not above: the processes that measure memory load this file too, and are to stay small.
    parts = {name: (_load(module), text) for name, (module, text) in PARTS.items()}
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, (module, text) in parts.items():
        parsers[name] = subparsers.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(parsers[name])
    args = parser.parse_args(argv)
    if args.part is not None:
        parts[args.part][0].run(args)
        return 0
    for name, (module, _) in parts.items():
        module.run(parsers[name].parse_args([]))
    return 0


def _load(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU Megatron tells at length what it does without
        return importlib.import_module(module)


if __name__ == "__main__":
    sys.exit(main())
