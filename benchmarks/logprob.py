"""Part `logprob`: log-probs and entropy of tokens from final hidden states, against logits -> log_softmax -> gather.

Letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from measure import Machine, machine, median_seconds, show_table, write_row
from torch import Tensor

from clipo_megatron.parallel.linear_logprob import linear_logprob

MIB = 1 << 20
Value = TypeVar("Value")
Step = Literal["score", "train"]
"""Forward without gradient; forward and backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is computed, and where."""

    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One step at one size. Peaks are above inputs; the train step's include the weight's gradient."""

    part: str
    size: Size
    step: Step
    fused_s: float
    naive_s: float
    time_ratio: float
    """fused_s / naive_s, medians of runs that took turns."""
    fused_peak_mib: float
    naive_peak_mib: float
    peak_ratio: float
    """fused / naive"""
    working_ratio: float
    """fused / naive without the weight's gradient, which either way returns: the larger of the forward's peak, when no
    gradient is there yet, and of the whole step's peak less the gradient."""
    largest_difference: float
    """Between the two ways' log-probs, nats."""
    machine: Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Random states whose logits have a standard deviation of 2."""

    h_TH: Tensor
    weight_VH: Tensor
    position_T: Tensor
    """On the host."""
    label_T: Tensor


Way = Callable[[Inputs], tuple[Tensor, Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sizes", nargs="*", type=_tokens_and_width, default=[(512, 1024)], metavar="T,H", help="default: 512,1024"
    )
    parser.add_argument("--vocab-size", type=int, default=151_936, help="rows of the weight (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure each size; rows and a table."""
    reports: list[Report] = []
    for tokens, hidden_size in args.sizes:
        size = Size(
            tokens=tokens,
            hidden_size=hidden_size,
            vocab_size=args.vocab_size,
            dtype=args.dtype,
            device=args.device,
            threads=args.threads,
        )
        for report in measure_logprob(size, repeats=args.repeats):
            write_row(asdict(report))
            reports.append(report)
    show_table(
        "fused / naive; working: peak memory without the weight's gradient",
        ("step", "T x H", "fused s", "naive s", "ratio", "fused MiB", "naive MiB", "ratio", "working", "load"),
        [
            (
                report.step,
                f"{report.size.tokens:,} x {report.size.hidden_size:,}",
                report.fused_s,
                report.naive_s,
                report.time_ratio,
                report.fused_peak_mib,
                report.naive_peak_mib,
                report.peak_ratio,
                report.working_ratio,
                report.machine.load,
            )
            for report in reports
        ],
    )


def _tokens_and_width(text: str) -> tuple[int, int]:
    numbers = [int(number) for number in text.split(",")] if text.replace(",", "").isdigit() else []
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text}: must read T,H, say 512,1024")
    return numbers[0], numbers[1]


def measure_logprob(size: Size, *, repeats: int) -> list[Report]:
    """Peaks of each way from a process of its own, then times of both from one process where they take turns."""
    peaks = {name: _in_fresh_process(_peaks_mib, size, name) for name in WAYS}
    seconds, difference, found = _in_fresh_process(_seconds, size, repeats)
    element_bytes = torch.empty(0, dtype=getattr(torch, size.dtype)).element_size()
    gradient_mib = size.vocab_size * size.hidden_size * element_bytes / MIB
    working = {name: max(peak["score"], peak["train"] - gradient_mib) for name, peak in peaks.items()}
    return [
        Report(
            size=size,
            part="logprob",
            step=step,
            fused_s=seconds["fused", step],
            naive_s=seconds["naive", step],
            time_ratio=seconds["fused", step] / seconds["naive", step],
            fused_peak_mib=peaks["fused"][step],
            naive_peak_mib=peaks["naive"][step],
            peak_ratio=peaks["fused"][step] / peaks["naive"][step],
            working_ratio=working["fused"] / working["naive"]
            if step == "train"
            else peaks["fused"][step] / peaks["naive"][step],
            largest_difference=difference,
            machine=found,
        )
        for step in STEPS
    ]


def fused(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The package's way."""
    return linear_logprob(
        inputs.h_TH,
        inputs.weight_VH,
        inputs.position_T,
        inputs.label_T,
        temperature=1.0,
        vocab_size=len(inputs.weight_VH),
        group=dist.group.WORLD,  # pyright: ignore[reportArgumentType]
        is_split=False,
    )


def naive(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The plain way: all logits, in float32."""
    log_p_TV = (inputs.h_TH @ inputs.weight_VH.T).float().log_softmax(1)
    with torch.no_grad():
        entropy_T = -(log_p_TV.exp() * log_p_TV).sum(1)
    return log_p_TV.gather(1, inputs.label_T[:, None]).squeeze(1), entropy_T


WAYS: dict[str, Way] = {"fused": fused, "naive": naive}
STEPS: tuple[Step, ...] = ("score", "train")


def _peaks_mib(size: Size, name: str) -> dict[Step, float]:
    inputs = _inputs(size)
    peaks: dict[Step, float] = {}
    before = _peak_mib(size.device)
    for step in STEPS:  # a process's peak never falls, and scoring is a part of training
        _run(WAYS[name], step, inputs)
        peaks[step] = _peak_mib(size.device) - before
    return peaks


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _seconds(size: Size, repeats: int) -> tuple[dict[tuple[str, Step], float], float, Machine]:
    inputs = _inputs(size)
    keys = {f"{name} {step}": (name, step) for name in WAYS for step in STEPS}
    ways = {text: functools.partial(_run, WAYS[name], step, inputs) for text, (name, step) in keys.items()}
    device = torch.device(size.device)
    medians = median_seconds(ways, repeats=repeats, device=device)
    difference = float((_run(fused, "score", inputs) - _run(naive, "score", inputs)).abs().max())
    return {keys[text]: seconds for text, seconds in medians.items()}, difference, machine(device)


def _run(way: Way, step: Step, inputs: Inputs) -> Tensor:
    """Log-probs; waits for the device."""
    inputs.h_TH.grad = inputs.weight_VH.grad = None
    with torch.set_grad_enabled(step == "train"):
        logprob_T, _ = way(inputs)
    if step == "train":
        logprob_T.mean().backward()
    if logprob_T.is_cuda:
        torch.cuda.synchronize()
    return logprob_T.detach()


def _inputs(size: Size) -> Inputs:
    """Inputs, after both ways have run on a corner of them: what libraries allocate once is no part of a peak."""
    torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    dtype, device = getattr(torch, size.dtype), torch.device(size.device)
    h_TH = torch.randn(size.tokens, size.hidden_size, dtype=dtype, device=device)
    weight_VH = torch.randn(size.vocab_size, size.hidden_size, dtype=dtype, device=device)
    label_T = torch.randint(size.vocab_size, (size.tokens,), device=device)
    inputs = Inputs(
        h_TH=h_TH.requires_grad_(),
        weight_VH=weight_VH.mul_(2 * size.hidden_size**-0.5).requires_grad_(),
        position_T=torch.arange(size.tokens),
        label_T=label_T,
    )
    corner = Inputs(
        h_TH=h_TH[:64].detach().clone().requires_grad_(),
        weight_VH=weight_VH[:256].detach().clone().requires_grad_(),
        position_T=inputs.position_T[:64],
        label_T=label_T[:64] % 256,
    )
    for way in WAYS.values():
        _run(way, "train", corner)
    return inputs


def _in_fresh_process(function: Callable[..., Value], *args: object) -> Value:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start_group) as executor:
        return executor.submit(function, *args).result()


def _start_group() -> None:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
