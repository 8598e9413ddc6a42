"""Two model folders compared by their forward passes: `clipo ckpt verify A B --logits`.

Hugging Face folders run in transformers, distributed checkpoints in Megatron, both in float32 on the CPU: this checks
weights and their places, not kernels. Log-probs of all tokens of the vocabulary are compared at every position.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import METADATA
from clipo_megatron.checkpoint.dist_model import config_folder, is_model_key, model_faults
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checks.host_memory import allowed_bytes
from clipo_megatron.checks.local_ranks import run_local_ranks
from clipo_megatron.data.tokenizer import load_tokenizer, render_prompts
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.records import Ids, Routes
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.folder_check import model_folder_problems
from clipo_megatron.weights.hf_folder import HFReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Nats, of the largest difference. Equal weights in float32 leave the order of summation: 28 layers of random weights, with
logits of some tens, were measured at 6e-5. A misplaced weight moves log-probs by whole nats."""
ROUTE_AGREEMENT = 0.99
"""Share of (token, layer) pairs sent to the same experts, at least: rounding decides between experts that are almost tied."""
_QUESTIONS = ("What is 17 + 25?", "Name three prime numbers that are larger than 100, and say why each one is prime.")
_LONGEST_QUESTION = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TIMEOUT_S = 3600.0
_SPARE_BYTES = 2 << 30
"""Of the process and the activations of a few hundred tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitReport:
    """How far two models are apart."""

    num_prompts: int
    num_positions: int
    """Tokens of all prompts; after each, the log-probs of the whole vocabulary are compared."""
    largest: float
    """|difference| of log-probs, nats; infinite where one is not a number."""
    mean: float
    """|difference| over all positions and tokens, nats."""
    place: tuple[int, int, int]
    """(prompt, position, token) of the largest."""
    same_choice: float
    """Share of positions at which both find the same token most probable."""
    route_agreement: float
    """Share of (token, layer) pairs that both routers send to the same experts; 1 where this was not compared."""
    rounded_to: str | None
    """Number format that the weights of both were rounded to, where the folders store them in different ones."""

    @property
    def is_clean(self) -> bool:
        """Whether the models are the same but for the order of summation."""
        return self.largest <= TOLERANCE and self.route_agreement >= ROUTE_AGREEMENT

    @property
    def line(self) -> str:
        """All of it in one line."""
        prompt, position, token = self.place
        rounded = f", weights rounded to {self.rounded_to}" if self.rounded_to is not None else ""
        routes = f", routers agree on {self.route_agreement:.2%}" if self.route_agreement < 1 else ""
        return (
            f"log-probs of {self.num_positions} positions in {self.num_prompts} prompts{rounded}: largest difference "
            f"{self.largest:.2e} (prompt {prompt}, position {position}, token {token}; tolerance {TOLERANCE:g}), mean "
            f"{self.mean:.2e}, the same most probable token at {self.same_choice:.2%}{routes}"
        )


def compare_logits(
    first: Path,
    second: Path,
    *,
    config: Path | None = None,
    seed: int = 0,
    num_prompts: int = 4,
    num_tokens: int = 32,
) -> LogitReport:
    """Run both models on the same prompts: drawn tokens, and two questions in the chat template where there is one.

    A mixture of experts in Megatron is sent to the experts that transformers chose: which of two almost tied experts
    comes first is a matter of rounding, and moves log-probs more than rounding does. Where the folders have different
    number formats, both models' weights are rounded to the coarser one first: that is what an export to it does.

    Args:
        first: Hugging Face folder or distributed checkpoint.
        second: the same.
        config: Hugging Face folder whose config.json describes a checkpoint that has none of its own.
        seed: of the drawn tokens.
        num_prompts: prompts of drawn tokens.
        num_tokens: of each.

    Raises:
        ConfigError: a folder can't be run, or their vocabularies differ; nothing but what transformers itself has is run.
        CheckpointError: a file is damaged.
    """
    models = [_Model.of(folder, config) for folder in (first, second)]
    sizes = [model.architecture.vocab_size for model in models]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{second}: vocab_size = {sizes[1]}, and {sizes[0]} in {first}: must be equal to compare log-probs; compare "
            "folders of the same model"
        )
    _check_memory(models)
    sequences = _sequences(models, seed=seed, num_prompts=num_prompts, num_tokens=num_tokens)
    round_to = _coarser_format(models)
    routes: list[Routes] | None = None
    results: dict[int, list[Tensor]] = {}
    agreement = 1.0
    # Transformers first: Megatron takes over its routes.
    for number in sorted(range(2), key=lambda number: models[number].is_distributed):
        if models[number].is_distributed:
            results[number], agreement = _in_megatron(models[number], sequences, routes, round_to)
        else:
            results[number], routes = _in_transformers(models[number], sequences, round_to)
    return _report(results[0], results[1], agreement=agreement, rounded_to=round_to)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    folder: Path
    is_distributed: bool
    config: Path
    """Folder of config.json and perhaps of a tokenizer."""
    architecture: Architecture
    number_formats: frozenset[str]
    """Of the stored weights."""

    @classmethod
    def of(cls, folder: Path, config: Path | None) -> _Model:
        is_distributed = (folder / METADATA).exists()
        formats: frozenset[str] = frozenset()
        if is_distributed:
            config = config_folder(folder, config)
            with DistReader(folder) as reader:
                problems = model_faults(reader, read_architecture(config), folder=folder)
                formats = frozenset(map(reader.dtype, filter(is_model_key, reader.keys())))
        else:
            config, problems = folder, model_folder_problems(folder)
            if not problems:
                with HFReader(folder) as reader:
                    formats = frozenset(map(reader.dtype, reader.names()))
        if problems:
            raise ConfigError(problems)
        return cls(
            folder=folder,
            is_distributed=is_distributed,
            config=config,
            architecture=read_architecture(config),
            number_formats=formats,
        )


def _coarser_format(models: Sequence[_Model]) -> str | None:
    if models[0].number_formats == models[1].number_formats:
        return None
    return "bfloat16" if any("bfloat16" in model.number_formats for model in models) else "float16"


def _check_memory(models: Sequence[_Model]) -> None:
    """Refuse what the kernel would end halfway. One model is in memory at a time."""
    available = allowed_bytes()
    needed = max(4 * parameter_count(model.architecture) for model in models) + _SPARE_BYTES
    if available is not None and needed > available:
        raise ConfigError(
            f"--logits: the model in float32 needs about {needed / 2**30:.0f} GiB, and this machine has "
            f"{available / 2**30:.0f} GiB free; use a larger machine, or verify without --logits"
        )


def _sequences(models: Sequence[_Model], *, seed: int, num_prompts: int, num_tokens: int) -> list[Ids]:
    vocab_size = models[0].architecture.vocab_size
    longest = min(model.architecture.max_positions for model in models)
    random = np.random.default_rng(seed)
    drawn = [random.integers(0, vocab_size, min(num_tokens, longest)).astype(np.int32) for _ in range(num_prompts)]
    for model in models:
        if any((model.config / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer = load_tokenizer(model.config)
            if tokenizer.chat_template:
                rendered = render_prompts(tokenizer, [[("user", question)] for question in _QUESTIONS])
                shown = [ids[: min(longest, _LONGEST_QUESTION)] for ids in rendered]
                return drawn + [ids for ids in shown if ids.max(initial=-1) < vocab_size]
    return drawn


def _in_transformers(
    model: _Model, sequences: Sequence[Ids], round_to: str | None
) -> tuple[list[Tensor], list[Routes] | None]:
    """(float32 [L, vocabulary] of each sequence, int16 [L, layers, experts per token] of each for experts)."""
    loaded = _load(model.folder)
    experts = model.architecture.experts
    logprobs: list[Tensor] = []
    routes: list[Routes] = []
    with torch.no_grad():
        if round_to is not None:
            for parameter in loaded.parameters():
                parameter.copy_(parameter.to(getattr(torch, round_to)))
        for ids in sequences:
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            if experts is None:
                output = loaded(tokens, use_cache=False)
            else:
                output = loaded(tokens, use_cache=False, output_router_logits=True)
                chosen = [layer.topk(experts.experts_per_token).indices for layer in output.router_logits]
                routes.append(torch.stack(chosen, 1).numpy().astype(np.int16))
            logprobs.append(output.logits[0].float().log_softmax(-1))
    return logprobs, routes or None


def _load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM  # takes seconds to import

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )  # pyright: ignore[reportGeneralTypeIssues]  a pair, as loading info is asked for
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{folder}: transformers does not load it ({error}); export the folder again") from error
    # Transformers fills what is missing with random numbers and goes on.
    absent = sorted(found["missing_keys"]) + sorted(str(entry) for entry in found["mismatched_keys"])
    if absent:
        raise ConfigError(
            f"{folder}: {absent[0]} ({len(absent)} tensors in all) is missing or of another shape for transformers; export "
            "the folder again"
        )
    return model.eval()


def _in_megatron(
    model: _Model, sequences: Sequence[Ids], routes: Sequence[Routes] | None, round_to: str | None
) -> tuple[list[Tensor], float]:
    """As `policy.logits.checkpoint_logprobs`, in a process of its own."""
    [(arrays, agreement)] = run_local_ranks(
        _run_rank, model.folder, model.config, sequences, routes, round_to,
        world_size=1, device="cpu", timeout_s=_TIMEOUT_S,
    )  # fmt: skip
    return [torch.from_numpy(array) for array in arrays], agreement


def _run_rank(
    folder: Path, config: Path, sequences: Sequence[Ids], routes: Sequence[Routes] | None, round_to: str | None
) -> tuple[list[np.ndarray], float]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Megatron's modules for the CPU are for machines without a GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU Megatron tells at length what it does without
        from clipo_megatron.policy.logits import checkpoint_logprobs
    try:
        logprobs, agreement = checkpoint_logprobs(folder, config, sequences, routes=routes, round_to=round_to)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error  # the kind that reaches the caller as it is
    return [tensor.numpy() for tensor in logprobs], agreement


def _report(
    first: Sequence[Tensor], second: Sequence[Tensor], *, agreement: float, rounded_to: str | None
) -> LogitReport:
    largest, place, total, num_values, num_same = -1.0, (0, 0, 0), 0.0, 0, 0
    for prompt, (one, other) in enumerate(zip(first, second, strict=True)):
        distance = (one - other).abs().nan_to_num(nan=math.inf)
        worst = int(distance.argmax())
        if float(distance.flatten()[worst]) > largest:
            largest = float(distance.flatten()[worst])
            place = (prompt, *divmod(worst, distance.shape[1]))
        total += float(distance.sum(dtype=torch.float64))
        num_values += distance.numel()
        num_same += int((one.argmax(-1) == other.argmax(-1)).sum())
    num_positions = sum(len(one) for one in first)
    return LogitReport(
        num_prompts=len(first),
        num_positions=num_positions,
        largest=largest,
        mean=total / num_values,
        place=place,
        same_choice=num_same / num_positions,
        route_agreement=agreement,
        rounded_to=rounded_to,
    )
