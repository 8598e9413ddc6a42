"""Which verifier judges a row, by the prefix of its data source."""

from __future__ import annotations

from typing import Literal

VerifierName = Literal["math", "choice"]

_BENCHMARK_PREFIX = "conrl/"
_CHOICE_PREFIXES = ("mmlu", "gpqa", "arc_c", "truthfulqa", "winogrande", "bbh", "commonsense_qa")


def verifier_of(source: str) -> VerifierName:
    """Multiple choice for the known choice benchmarks, with or without `conrl/` in front; math for all else."""
    return "choice" if source.removeprefix(_BENCHMARK_PREFIX).startswith(_CHOICE_PREFIXES) else "math"
