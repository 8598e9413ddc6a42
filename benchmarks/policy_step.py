"""Part `step`: the policy's score and train against the raw layers, its own parts, FP8 against bfloat16.

The raw layers are the same Megatron modules (Transformer Engine's on a GPU), forward and backward over the same
micro-batches, without log-probs, loss, gradient buffers and optimizer. On a CPU FP8 is emulated: its ratio says nothing
of a GPU's. The GPU side has not been run yet.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from measure import Machine, machine, median_seconds, show_table, write_row
from step_model import (
    CPU_SHAPE,
    GPU_SHAPE,
    ONE_RANK,
    StepShape,
    count_flops,
    draw_batch,
    policy_settings,
    random_model,
    start_one_rank,
)

from clipo_megatron.parallel.linear_logprob import linear_logprob
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.model import build_chunks, transformer_config
from clipo_megatron.policy.precision import PrecisionRecipe, hardware_problems
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.records import RolloutBatch

RECIPES: tuple[PrecisionRecipe, ...] = ("none", "tensorwise", "delayed", "blockwise")
# Forward and backward of layers like GPU_SHAPE's on 8 k tokens; measured elsewhere on one H100, with their own count.
H100_TFLOPS: dict[PrecisionRecipe, float] = {"none": 526.0, "tensorwise": 678.0, "delayed": 703.0}
NAMES = ("raw_forward", "raw_train", "score", "train", "logprob", "optimizer", "contrastive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One precision's medians; seconds of a whole optimizer step over all its micro-batches."""

    part: str
    shape: StepShape
    precision: str
    """Dtype, or FP8 recipe; " (emulated)" on a CPU."""
    tokens: int
    raw_forward_s: float
    raw_train_s: float
    score_s: float
    train_s: float
    logprob_s: float
    """Forward and backward; a part of train."""
    optimizer_s: float
    """A part of train."""
    contrastive_s: float
    """Pooling of all micro-batches, and the head's step; a part of score."""
    score_tokens_per_s: float
    train_tokens_per_s: float
    raw_tflops: float
    """Of the layers, forward and backward."""
    train_tflops: float
    """Of the whole step: layers and output layer."""
    kept: float
    """Seconds that the step's work takes at the raw layers' speed / train_s. The output layer, which is never FP8, counts
    with the speed of the first precision."""
    contrastive_share: float
    """contrastive_s / (score_s + train_s)"""
    speedup: float
    """train_s of the first precision / train_s"""
    peak_gib: float | None
    """GPU memory allocated at most, raw layers included; None on a CPU."""
    h100_tflops: float | None
    """Raw figure measured elsewhere on one H100."""
    machine: Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--precisions", nargs="*", choices=RECIPES, default=RECIPES, help="default: all")
    parser.add_argument(
        "--recompute", choices=["none", "selective", "full"], default="none", help="default: %(default)s"
    )
    parser.add_argument("--layers", type=int, help="transformer layers (default: 6 on a GPU, else 4)")
    parser.add_argument("--micro-batches", type=int, help="of an optimizer step (default: 8 on a GPU, else 2)")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure each precision; rows and tables."""
    torch.set_num_threads(args.threads)
    shape = GPU_SHAPE if args.device == "cuda" else CPU_SHAPE
    shape = replace(
        shape,
        num_layers=args.layers or shape.num_layers,
        micro_batches=args.micro_batches or shape.micro_batches,
    )
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    reports: list[Report] = []
    start_one_rank(args.device)
    try:
        with random_model(shape) as model_path:
            for recipe in args.precisions:
                problems = hardware_problems(recipe) if args.device == "cuda" else []
                if problems:
                    write_row({"part": "step", "precision": recipe, "left_out": problems})
                    continue
                reports.append(measure(policy_settings(model_path, shape, args, recipe), shape, args, reports[:1]))
                write_row(asdict(reports[-1]))
    finally:
        dist.destroy_process_group()
    _show(reports, shape)


def measure(settings: PolicySettings, shape: StepShape, args: argparse.Namespace, first: list[Report]) -> Report:
    """All ways of one precision, taking turns."""
    device = torch.device(args.device)
    recipe = settings.precision.recipe
    bench = StepBench(settings, draw_batch(shape))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(bench.ways(), repeats=args.repeats, device=device)
    flops = count_flops(bench.worker._architecture, bench.batch)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    del bench
    gc.collect()  # the next precision's policy needs the memory
    tokens, train_s = shape.num_rows * shape.sequence_tokens, seconds["train"]
    raw_tflops = 3 * flops.layers / seconds["raw_train"] / 1e12
    train_tflops = 3 * (flops.layers + flops.output) / train_s / 1e12
    output_tflops = first[0].raw_tflops if first else raw_tflops
    name = settings.dtype if recipe == "none" else recipe
    return Report(
        part="step",
        shape=shape,
        precision=f"{name} (emulated)" if recipe != "none" and device.type == "cpu" else name,
        tokens=tokens,
        **{f"{way}_s": seconds[way] for way in NAMES},
        score_tokens_per_s=tokens / seconds["score"],
        train_tokens_per_s=tokens / train_s,
        raw_tflops=raw_tflops,
        train_tflops=train_tflops,
        kept=(seconds["raw_train"] + 3 * flops.output / (output_tflops * 1e12)) / train_s,
        contrastive_share=seconds["contrastive"] / (seconds["score"] + train_s),
        speedup=(first[0].train_s if first else train_s) / train_s,
        peak_gib=peak_gib,
        h100_tflops=H100_TFLOPS.get(recipe) if device.type == "cuda" else None,
        machine=machine(device),
    )


class StepBench:
    """A policy of one rank on a batch, the same layers without it, and what to time of both."""

    def __init__(self, settings: PolicySettings, batch: RolloutBatch) -> None:
        self.batch = batch
        self.worker = worker = PolicyWorker(settings, rank=0)
        self._device, self._scope = worker._device, _scope_of(settings.device)
        self._micro_batches, _ = worker._packer(batch, with_routes=False)
        with self._scope():
            self._raw = _raw_layers(settings, worker)
        scores = worker.score(batch, step=0, with_reference=False)
        assert scores is not None
        self._ready = batch.with_(old_logprobs=scores.old_logprobs)
        dtype, width = getattr(torch, settings.dtype), worker._architecture.hidden_size
        self._states = [
            torch.randn(len(micro_batch.source), width, dtype=dtype, device=self._device)
            for micro_batch in self._micro_batches
        ]

    def ways(self) -> dict[str, Callable[[], object]]:
        """By the names of `NAMES`."""
        return {
            "raw_forward": self._raw_forward,
            "raw_train": self._raw_train,
            "score": lambda: self.worker.score(self.batch, step=0, with_reference=False),
            "train": lambda: self.worker.train(self._ready, step=0),
            "logprob": self._logprob,
            "optimizer": self._optimizer,
            "contrastive": self._contrastive,
        }

    def _raw_forward(self) -> None:
        self._raw.eval()
        with self._scope(), torch.no_grad():
            for micro_batch in self._micro_batches:
                self._raw(
                    micro_batch.input_ids,
                    micro_batch.position_ids,
                    attention_mask=None,
                    packed_seq_params=micro_batch.packed,
                )

    def _raw_train(self) -> None:
        self._raw.train()
        self._raw.zero_grad(set_to_none=True)
        with self._scope():
            for micro_batch, gradient in zip(self._micro_batches, self._states, strict=True):
                states = self._raw(
                    micro_batch.input_ids,
                    micro_batch.position_ids,
                    attention_mask=None,
                    packed_seq_params=micro_batch.packed,
                )
                states.backward(gradient[:, None])

    def _logprob(self) -> None:
        weight = self.worker._stage.output_weight.detach().requires_grad_()
        for micro_batch, states in zip(self._micro_batches, self._states, strict=True):
            logprob, _ = linear_logprob(
                states.detach().requires_grad_(),
                weight,
                torch.from_numpy(micro_batch.predictor),
                micro_batch.labels,
                temperature=1.0,
                vocab_size=self.worker._architecture.vocab_size,
                group=self.worker._groups.tp,
                is_split=False,
            )
            logprob.sum().backward()

    def _optimizer(self) -> None:
        with self._scope():
            self.worker._optimizer.zero_grad()
            self.worker._optimizer.step(loss_is_finite=True)

    def _contrastive(self) -> None:
        pooling, head = self.worker._pooling, self.worker._head
        assert pooling is not None
        assert head is not None
        with self._scope():
            pooled = [
                pooling(micro_batch, states)
                for micro_batch, states in zip(self._micro_batches, self._states, strict=True)
            ]
            rows = [torch.from_numpy(micro_batch.row) for micro_batch in self._micro_batches]
            head.score(self.batch, torch.cat(pooled), torch.cat(rows).to(self._device), step=0)


def _scope_of(device: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    return cuda_means_cpu if device == "cpu" else contextlib.nullcontext


def _raw_layers(settings: PolicySettings, worker: PolicyWorker) -> torch.nn.Module:
    """The policy's modules alone, with random weights."""
    config = transformer_config(
        worker._architecture,
        ONE_RANK,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
        sequence_parallel=False,
        recompute=settings.recompute,
        precision=settings.precision,
    )
    config.gradient_accumulation_fusion = False  # it adds to gradient buffers, which these layers do not have
    [chunk] = build_chunks(
        config, worker._architecture, ONE_RANK, rank=0, device=settings.device, precision=settings.precision
    )
    with torch.no_grad():
        for parameter in chunk.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)
    return chunk.to(worker._device)


def _show(reports: list[Report], shape: StepShape) -> None:
    title = (
        f"{shape.num_layers} layers of {shape.hidden_size:,} (FFN {shape.ffn_size:,}), vocabulary {shape.vocab_size:,}, "
        f"{shape.micro_batches} micro-batches of {shape.micro_batch_tokens:,} tokens, {shape.num_rows} rows"
    )
    show_table(
        title,
        ("precision", "raw TFLOP/s", "(H100)", "train TFLOP/s", "kept", "train s", "tokens/s", "speed-up", "GiB"),
        [
            (
                report.precision,
                report.raw_tflops,
                report.h100_tflops,
                report.train_tflops,
                report.kept,
                report.train_s,
                report.train_tokens_per_s,
                report.speedup,
                report.peak_gib,
            )
            for report in reports
        ],
    )
    show_table(
        "parts of a step, share of score + train",
        ("precision", "score tokens/s", "raw fwd / score", "log-prob", "optimizer", "contrastive", "load"),
        [
            (
                report.precision,
                report.score_tokens_per_s,
                report.raw_forward_s / report.score_s,
                report.logprob_s / (report.score_s + report.train_s),
                report.optimizer_s / (report.score_s + report.train_s),
                report.contrastive_share,
                report.machine.load,
            )
            for report in reports
        ],
    )
