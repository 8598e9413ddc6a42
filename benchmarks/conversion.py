"""Import and export of a synthetic checkpoint against `cp -r` of the same bytes: seconds, peak memory, ratios.

    python benchmarks/conversion.py                          8.7 GB, three turns; needs 27 GB of disk
    python benchmarks/conversion.py --folder /scratch --layers 4 --repeats 1

JSON objects go to standard output, tables to standard error. What was measured: RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import Machine, machine, show_table, write_row
from torch import Tensor

from clipo_megatron.checkpoint.checksum import file_checksum
from clipo_megatron.checkpoint.conversion_plan import DEGREES, plan_import, same_dtype, smallest_layout
from clipo_megatron.checkpoint.model_export import export_model
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.cli.check import parse_layout
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.hf_writer import HFWriter
from clipo_megatron.weights.names import hf_tensor_specs

GB = 1e9
ALLOWED_BYTES = 2 * GB
"""Beside twice the largest tensor."""
_REPORTING_S = 15
"""After so long Linux has told the host of a virtual machine which memory is free."""
_MORE_BYTES = 1 << 30
_NOISE_ELEMENTS = (64 << 20) + 7
_BLOCK_ELEMENTS = 8 << 20
_CONFIG: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_667,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "hidden_act": "silu",
}
_TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
_CHUNK_BYTES = 2600
"""Resident memory for each chunk of the index, measured at 19,401 and at 61,569 chunks."""
LARGE_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "30B-A3B": (
        "tp=4,pp=2,ep=8",
        _CONFIG
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "vocab_size": 151_936,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
    "72B": (
        "tp=8,pp=4",
        _CONFIG
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "vocab_size": 152_064,
        },
    ),
}
"""The published shapes of Qwen3-30B-A3B and Qwen2.5-72B, and a layout of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One way, once."""

    seconds: float
    peak_bytes: int
    """High-water mark of the process's resident memory, interpreter and libraries included; 0 for cp."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One way against `cp -r`, medians."""

    part: str
    way: str
    gb: float
    """Of weights, 1e9 bytes."""
    layout: str
    source: str
    """disk: not in the page cache when a run starts; cached: there."""
    memory: str
    """touched or fresh."""
    seconds: float
    cp_s: float
    cp_and_sync_s: float
    speed_to_cp: float
    """Bytes a second over those of `cp -r`, which returns before they are on disk."""
    speed_to_cp_and_sync: float
    """... of `cp -r` and `sync`; the way itself ends with all bytes on disk."""
    peak_gb: float
    allowed_gb: float
    """2 GB and twice the largest tensor."""
    machine: Machine


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    if argv is None and sys.argv[1:2] == ["--child"]:
        return _child(*sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--layers", type=int, default=16, help="16 make 8.7 GB (default: %(default)s)")
    parser.add_argument("--layout", default="tp=2,pp=2", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument(
        "--memory",
        choices=("touched", "fresh"),
        default="touched",
        help="a virtual machine may give free memory back to its host, and getting it again is slow: touched: each run "
        "starts with memory that was in use just before; fresh: after a pause (default: %(default)s)",
    )
    parser.add_argument(
        "--cached",
        action="store_true",
        help="start each run with its source in the page cache, where no checkpoint of the size that users have fits; "
        "cp is then a copy in memory (default: the source is read from the disk)",
    )
    args = parser.parse_args(argv)
    _, problems = parse_layout(args.layout, DEGREES)
    if problems:
        parser.error("; ".join(problems))
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=args.folder) as folder:
        run(args, Path(folder))
    return 0


def run(args: argparse.Namespace, folder: Path) -> None:
    """Make the checkpoint, measure all ways in turns; rows and a table."""
    source = write_checkpoint(folder / "hf", num_layers=args.layers)
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    largest = 2 * max(torch.Size(shape).numel() for shape in hf_tensor_specs(read_architecture(source)).values())
    imported, exported, copied = folder / "imported", folder / "exported", folder / "copied"
    runs: dict[str, list[Run]] = {}

    def measure(way: str, start: Callable[[], Run], *, read: Path, made: Path | None) -> None:
        os.sync()
        for other in (source, imported):
            # What is cached and not read would have to make room for what is written.
            if not args.cached or other != read:
                _drop_from_cache(other)
        if args.cached:
            _read_into_cache(read)
        if args.memory == "fresh":
            time.sleep(_REPORTING_S)
        else:
            _touch_memory(num_bytes + _MORE_BYTES)
        runs.setdefault(way, []).append(start())
        sys.stderr.write(f"{way}: {runs[way][-1].seconds:.1f} s\n")
        if made is not None:
            shutil.rmtree(made)

    for _ in range(args.repeats):
        measure("cp", lambda: _copy(source, copied, is_synced=False), read=source, made=copied)
        measure("cp and sync", lambda: _copy(source, copied, is_synced=True), read=source, made=copied)
        measure("import", lambda: _in_child("import", source, imported, args.layout), read=source, made=None)
        measure("export", lambda: _in_child("export", imported, exported, ""), read=imported, made=exported)
        shutil.rmtree(imported)
    _report(runs, num_bytes, ALLOWED_BYTES + 2 * largest, args)


def write_checkpoint(folder: Path, *, num_layers: int) -> Path:
    """A dense model of bfloat16 noise, the same in every run; no two tensors hold the same elements."""
    source = folder.with_name(folder.name + "-config")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": num_layers}))
    (source / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    noise = torch.randn(_NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    with HFWriter(folder, source=source) as writer:
        for number, (name, shape) in enumerate(hf_tensor_specs(read_architecture(source)).items()):
            blocks = _noise_blocks(noise, torch.Size(shape).numel(), start=1_000_003 * number)
            writer.add_blocks(name, blocks, dtype=noise.dtype)
        return writer.finish()


def _noise_blocks(noise: Tensor, count: int, *, start: int) -> Iterator[Tensor]:
    while count:
        start %= len(noise)
        block = noise[start : start + min(count, _BLOCK_ELEMENTS)]
        yield block
        start += len(block)
        count -= len(block)


def _copy(source: Path, target: Path, *, is_synced: bool) -> Run:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if is_synced:
        os.sync()
    return Run(seconds=time.perf_counter() - started, peak_bytes=0)


def _in_child(way: str, source: Path, target: Path, layout: str) -> Run:
    """A fresh process, so that its peak is that of this run alone; its start is not in the seconds."""
    command = [sys.executable, __file__, "--child", way, str(source), str(target), layout]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Run(**json.loads(found.stdout))


def _child(way: str, source: str, target: str, layout: str) -> int:
    started = time.perf_counter()
    if way == "import":
        import_model(Path(source), Path(target), layout=smallest_layout(parse_layout(layout, DEGREES)[0]))
    else:
        export_model(Path(source), Path(target))
    seconds = time.perf_counter() - started
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * int(line.split()[1])}))
    return 0


def _touch_memory(num_bytes: int) -> None:
    """Free memory that this machine holds, so that every run starts with as much of it."""
    subprocess.run([sys.executable, "-c", f"bytearray(b'x') * {num_bytes}"], check=True)


def _read_into_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            file_checksum(path)


def _drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _report(runs: dict[str, list[Run]], num_bytes: int, allowed: float, args: argparse.Namespace) -> None:
    seconds = {way: statistics.median(run.seconds for run in of_way) for way, of_way in runs.items()}
    for way in ("import", "export"):
        peak = max(run.peak_bytes for run in runs[way])
        report = Report(
            part="conversion",
            way=way,
            gb=num_bytes / GB,
            layout=args.layout,
            source="cached" if args.cached else "disk",
            memory=args.memory,
            seconds=seconds[way],
            cp_s=seconds["cp"],
            cp_and_sync_s=seconds["cp and sync"],
            speed_to_cp=seconds["cp"] / seconds[way],
            speed_to_cp_and_sync=seconds["cp and sync"] / seconds[way],
            peak_gb=peak / GB,
            allowed_gb=allowed / GB,
            machine=machine(torch.device("cpu")),
        )
        write_row(asdict(report))
    columns = ("way", "s", "MB/s", "/ cp", "/ cp and sync", "peak GB", "allowed GB")
    rows = [
        (
            way,
            seconds[way],
            num_bytes / 1e6 / seconds[way],
            seconds["cp"] / seconds[way],
            seconds["cp and sync"] / seconds[way],
            max(run.peak_bytes for run in runs[way]) / GB if way in ("import", "export") else None,
            allowed / GB if way in ("import", "export") else None,
        )
        for way in runs
    ]
    show_table(f"{num_bytes / GB:.2f} GB, {args.layout}, median of {args.repeats}", columns, rows)
    _extrapolate(seconds, num_bytes, max(run.peak_bytes for run in runs["import"]))


def _extrapolate(seconds: dict[str, float], num_bytes: int, peak: int) -> None:
    """Larger models at the measured bytes a second; of memory only the index grows, with the number of chunks."""
    rows = []
    for model, (layout, config) in LARGE_MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            arch = read_architecture(Path(folder))
        degrees, _ = parse_layout(layout, DEGREES)
        plan = plan_import(arch, smallest_layout(degrees), dtypes=same_dtype(arch, arch.dtype))
        num_chunks = sum(share.num_chunks for share in plan.shares())
        size = 2 * parameter_count(arch)
        row = {
            "part": "conversion",
            "kind": "extrapolated",
            "model": model,
            "layout": layout,
            "gb": size / GB,
            "chunks": num_chunks,
            "import_s": size / num_bytes * seconds["import"],
            "export_s": size / num_bytes * seconds["export"],
            "peak_gb": (peak + _CHUNK_BYTES * num_chunks) / GB,
        }
        write_row(row)
        rows.append(tuple(row.values())[2:])
    show_table(
        "extrapolated, not measured: same bytes a second; memory grows by the index",
        ("model", "layout", "GB", "chunks", "import s", "export s", "import peak GB"),
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
