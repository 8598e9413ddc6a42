"""Weight sync on one machine: planned copies beside the floor and the path with whole tensors; cost of the plan's walk.

    PYTHONPATH=. python benchmarks/sync.py                      1 GB of a dense model, trainer tp 2, engine tp 1, real vLLM
    PYTHONPATH=. python benchmarks/sync.py --no-engine --layers 8
    PYTHONPATH=. python benchmarks/sync.py walk                 Qwen3-30B-A3B and Qwen3-235B-A22B, no data

The model is made up and written to a temporary folder. JSON objects go to standard output, tables to standard error. What
was measured: RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import Machine, machine, median_seconds, show_table, write_row
from plan import CASES, CONFIGS
from torch import Tensor

from clipo_megatron.checks.sync_speed import SyncSpeedSettings, measure_sync_speed
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.executor import BoundCopies, PlannedCopies
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.reduced import write_random_model

CPU = torch.device("cpu")
MS = 1e3
DENSE: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32_768,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
"""Layers of Qwen3-1.7B: 50 million weights each; the embedding has 67 million."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """What a sync of one rank costs beside its bytes."""

    model: str
    engines: str
    copies: int
    batches: int
    listed_ms: float
    """Once: the plan's transfers and all views of both ends."""
    walk_ms: float
    """Each sync: the executor's run over views without elements."""
    machine: Machine


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("copy", "walk"), default="copy", help="default copy")
    parser.add_argument("--layers", type=int, default=9, metavar="N", help="of the dense model (default 9: 1.04 GB)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trainer-tp", type=int, default=2, metavar="N")
    parser.add_argument("--engine-tp", type=int, default=1, metavar="N")
    parser.add_argument("--bucket-mib", type=int, default=256, metavar="N", help="of whole tensors (default 256)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed turns (default 7)")
    parser.add_argument("--no-engine", action="store_true", help="starts no vLLM")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.part == "walk":
        _show_walks(args.repeats)
    else:
        _show_copy(args)
    return 0


def _show_copy(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="clipo-benchmark-") as name:
        folder = write_random_model(Path(name) / "model", DENSE | {"num_hidden_layers": args.layers}, seed=0)
        _write_tokenizer(folder)
        speed = measure_sync_speed(
            SyncSpeedSettings(
                model_path=folder,
                dtype=args.dtype,
                device=args.device,
                trainer=ParallelLayout(world_size=args.trainer_tp, tp=args.trainer_tp),
                engine_tp=args.engine_tp,
                repeats=args.repeats,
                bucket_mib=args.bucket_mib,
                with_engine=not args.no_engine,
            )
        )
    found = speed.as_dict()
    write_row(
        {"benchmark": "sync", "dtype": args.dtype, **found, "machine": asdict(machine(torch.device(args.device)))}
    )
    names = [name for name in asdict(speed) if name.endswith("_s") and found[name] is not None]
    show_table(
        f"{speed.num_bytes / 1e9:.2f} GB, medians",
        ("way", "ms", "GB/s"),
        [
            (name.removesuffix("_s"), MS * (found[name] or 0), speed.num_bytes / 1e9 / (found[name] or 1))
            for name in names
        ],
    )


def _write_tokenizer(folder: Path) -> None:
    """An engine asks for one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"end": 0, "unknown": 1}, unk_token="unknown"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end").save_pretrained(folder)


def _show_walks(repeats: int) -> None:
    walks = [_walk(*case, repeats=repeats) for case in CASES]
    for walk in walks:
        write_row({"benchmark": "sync walk", **asdict(walk)})
    show_table(
        "Walk of one engine rank's copies, no data, medians",
        ("model", "engines", "copies", "batches", "lay out ms", "walk ms"),
        [(walk.model, walk.engines, walk.copies, walk.batches, walk.listed_ms, walk.walk_ms) for walk in walks],
    )


def _walk(model: str, trainer: ParallelLayout, engines: EngineLayout, *, repeats: int) -> Walk:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
        apart = place_apart(trainer_ranks=trainer.world_size, engine_ranks=engines.num_ranks, gpus_per_node=8)
        plan = plan_sync(read_architecture(folder), trainer, engines, apart, dtype="bfloat16")
    sources = {}
    for transfer in plan.into(0, 0):
        of_rank = sources.setdefault(transfer.source, {})
        for template, name in zip(transfer.copy.source_parameters, transfer.source_parameters, strict=True):
            if name not in of_rank:
                of_rank[name] = _unbacked(plan.trainer_shapes[template])
    targets = {
        name: _unbacked(shape)
        for name, shape in PlannedCopies(plan, sources, engine=0, engine_rank=0).parameters.items()
    }
    bound = _laid_out(plan, sources, targets)
    copies, batches = bound.num_copies, len(bound._batches)
    # The same lists of views, each without elements: what is left is Python's and torch's work a copy.
    bound._batches = [
        batch._replace(
            targets=[view[..., :0] for view in batch.targets], sources=[view[..., :0] for view in batch.sources]
        )
        for batch in bound._batches
    ]
    seconds = median_seconds(
        {"walk": bound.run, "listed": lambda: _laid_out(plan, sources, targets)}, repeats=repeats, device=CPU
    )
    return Walk(
        model=model,
        engines=f"{engines.engines} x tp={engines.tp}",
        copies=copies,
        batches=batches,
        listed_ms=MS * seconds["listed"],
        walk_ms=MS * seconds["walk"],
        machine=machine(CPU),
    )


def _laid_out(plan: SyncPlan, sources: dict[int, dict[str, Tensor]], targets: dict[str, Tensor]) -> BoundCopies:
    return PlannedCopies(plan, sources, engine=0, engine_rank=0).bind(targets)


def _unbacked(shape: tuple[int, ...]) -> Tensor:
    """Memory that is promised only: nothing reads or writes it, but for the vocabulary's padding."""
    return torch.empty(shape, dtype=torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
