"""`clipo eval HF_DIR --data FILE --samples N`: accuracy of a Hugging Face folder, per source, as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from clipo_megatron.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("eval", help="evaluate a Hugging Face checkpoint", description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help="parquet or JSONL; repeatable")
    parser.add_argument("--samples", type=int, default=1, help="n of mean@n; 1: greedy pass@1 only")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the n samples")
    parser.add_argument("--top-p", type=float, default=0.95, help="of the n samples")
    parser.add_argument("--max-response-tokens", type=int, help="default: 2048, or what the model's positions leave")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-prompts", type=int, default=0, help="first prompts of each source; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel degree of the engine")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="requests that run at the same time")
    parser.add_argument("--workers", type=int, default=2, help="verifier processes")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds an answer's verification may take")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the JSON; everything else that libraries print goes to standard error.

    Raises:
        ConfigError: all faults of the model folder, the data files and the numbers.
    """
    # Imported late here and below: each verifier process imports this module again, and has no use for torch.
    from clipo_megatron.data.rows import read_rows_problems
    from clipo_megatron.weights.architecture import read_architecture
    from clipo_megatron.weights.folder_check import model_folder_problems

    problems = [*_number_problems(args), *model_folder_problems(args.model, rollout_tp=args.tp)]
    problems += read_rows_problems(args.data)
    if problems:
        raise ConfigError(problems)
    positions = read_architecture(args.model).max_positions
    if args.max_response_tokens is None:
        args.max_response_tokens = min(2048, positions - args.max_prompt_tokens)
    if args.max_response_tokens < 1 or args.max_prompt_tokens + args.max_response_tokens > positions:
        raise ConfigError(
            f"--max-prompt-tokens = {args.max_prompt_tokens}, --max-response-tokens = {args.max_response_tokens}: together "
            f"they must not exceed the model's {positions} positions (max_position_embeddings); lower one of them"
        )
    with _stdout_to_stderr():
        result = _evaluate(args)
    print(json.dumps(result, indent=1))
    return 0


def _evaluate(args: argparse.Namespace) -> dict[str, object]:
    import torch

    from clipo_megatron.controller.evaluate import evaluate
    from clipo_megatron.controller.loop import limit_per_source
    from clipo_megatron.data.prompts import load_prompts
    from clipo_megatron.data.tokenizer import load_tokenizer
    from clipo_megatron.records import Sampling
    from clipo_megatron.rewards.pool import Verifiers
    from clipo_megatron.rollout.engine import RolloutEngine
    from clipo_megatron.rollout.environment import engine_environment
    from clipo_megatron.rollout.settings import EngineSettings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.update(engine_environment(device, args.tp))
    prompts = load_prompts(args.data, load_tokenizer(args.model), max_prompt_tokens=args.max_prompt_tokens)
    if not len(prompts):
        raise ConfigError(f"--data: all {prompts.num_overlong} prompts are longer than --max-prompt-tokens")
    prompts = limit_per_source(prompts, args.max_prompts)
    sampling = Sampling(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_response_tokens,
        seed=args.seed,
        step=0,
    )
    with Verifiers(args.workers, args.timeout, 2000) as verifiers:
        engine = RolloutEngine(
            EngineSettings(
                model_path=str(args.model),
                dtype=args.dtype,
                device=device,
                tp=args.tp,
                max_model_len=args.max_prompt_tokens + args.max_response_tokens,
                max_num_seqs=args.max_num_seqs,
                kv_cache_mib=1024,
                gpu_memory_utilization=0.9,
                enforce_eager=device == "cpu",
                prefix_caching=True,
                seed=args.seed,
            )
        )
        try:
            evaluation = evaluate(prompts.prompts, engine, verifiers, sampling, version=None)
        finally:
            engine.close()
    return {
        "model": str(args.model),
        "prompts": len(prompts),
        "overlong_dropped": prompts.num_overlong,
        "samples": args.samples,
        "sources": evaluation.measures,
    }


def _number_problems(args: argparse.Namespace) -> list[str]:
    rules = (
        ("samples", args.samples >= 1, ">= 1"),
        ("max_response_tokens", args.max_response_tokens is None or args.max_response_tokens >= 1, ">= 1"),
        ("max_prompt_tokens", args.max_prompt_tokens >= 1, ">= 1"),
        ("max_prompts", args.max_prompts >= 0, ">= 0"),
        ("max_num_seqs", args.max_num_seqs >= 1, ">= 1"),
        ("tp", args.tp >= 1, ">= 1"),
        ("workers", args.workers >= 1, ">= 1"),
        ("seed", 0 <= args.seed < 2**32, ">= 0 and < 2**32"),
        ("temperature", 0 <= args.temperature < math.inf, ">= 0"),
        ("top_p", 0 < args.top_p <= 1, "> 0 and <= 1"),
        ("timeout", 0 < args.timeout < math.inf, "> 0"),
    )
    return [
        f"--{name.replace('_', '-')} = {getattr(args, name)}: must be {rule}"
        for name, holds, rule in rules
        if not holds
    ]


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Standard output, of C extensions too, goes to standard error within the block."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
