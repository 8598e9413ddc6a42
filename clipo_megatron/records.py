"""The types that flow between packages. Read this file first.

Letters: P prompts, G group size, S sequences (P * G minus drops), T packed tokens, L tokens of one sequence.
Host records hold numpy arrays: they travel through Ray's object store without a copy and need no device.
Per-token columns are aligned to the token itself: entry t speaks of `input_ids[t]` given the tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Routes = NDArray[np.int16]
Offsets = NDArray[np.int64]


class Verdict(StrEnum):
    """What a verifier says of one answer. Undecided is never counted as wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNDECIDED = "undecided"


class Finish(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, tokenised once with the chat template."""

    index: int
    """Row number in the concatenated data set: the identity of the prompt."""
    token_ids: Ids
    """[L] ids of the rendered chat template, generation prompt included."""
    answer: str
    """Gold answer as the data file gives it; a whole solution is allowed, its last box counts."""
    verifier: str
    """Name of the verifier that judges it: "math" or "choice"."""
    source: str
    """The file's `data_source`: the key of per-source metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are drawn. A response is a function of these, the weights, the prompt and its sample number."""

    samples: int
    """Responses of one prompt."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """1 for training: log-probs are then those of the whole distribution."""
    max_tokens: int
    """A longer response is cut."""
    seed: int
    """Of the run."""
    step: int
    """Training step, from 1; 0 for evaluations, whose seeds then never meet those of training."""
    routed_experts: bool = False
    """Return the experts of each token, from engines that were started to know them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were sampled from the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response."""

    response_ids: Ids
    """[L] sampled ids, the stop token included."""
    sampled_logprobs: Floats
    """[L] nats, of the distribution that was really sampled (temperature applied)."""
    finish: Finish
    policy_versions: tuple[VersionSpan, ...]
    text: str
    """The response decoded, special tokens left out: what the verifier reads."""
    verdict: Verdict | None = None
    """None until judged."""
    routed_experts: Routes | None = None
    """[prompt and response, layers, experts per token] that the engine sent each token to, -1 where it is not known;
    None when they were not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt in one step."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """One step's rollouts on the host: columnar and ragged. Sequence s owns tokens cu_seqlens[s]:cu_seqlens[s + 1]."""

    input_ids: Ids
    """[T] prompt and response of each sequence, one after the other."""
    cu_seqlens: Offsets
    """[S + 1]"""
    prompt_lengths: Offsets
    """[S] tokens of the prompt; the rest of the sequence is the response."""
    sampled_logprobs: Floats
    """[T] 0 on prompt tokens."""
    group_id: Offsets
    """[S] number of the prompt in this step, 0 <= group_id < P."""
    row_key: Offsets
    """[S] prompt.index * G + sample number: identity of the row, whatever order rows come in."""
    is_correct: Bools
    """[S]"""
    outcome: Floats
    """[S] the verifier's reward, 0 or 1."""
    truncated: Bools
    """[S] ended at the length limit."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rollouts left out of the batch, counted by reason: "undecided", "empty", "aborted"."""
    old_logprobs: Floats | None = None
    """[T] of the trainer's policy before the update."""
    reference_logprobs: Floats | None = None
    """[T] of the frozen reference policy; None when the KL coefficient is 0."""
    advantages: Floats | None = None
    """[S] one per sequence; it holds for every response token."""
    routed_experts: Routes | None = None
    """[T, layers, experts per token] of the engine's forward, -1 where unknown; None for dense policies."""

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch."""
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Offsets:
        """[S] tokens of each sequence, prompt and response."""
        return np.diff(self.cu_seqlens)

    @property
    def response_lengths(self) -> Offsets:
        """[S] tokens of each response."""
        return self.lengths - self.prompt_lengths

    @property
    def response_mask(self) -> Bools:
        """[T] True on response tokens."""
        position = np.arange(self.cu_seqlens[-1]) - np.repeat(self.cu_seqlens[:-1], self.lengths)
        return position >= np.repeat(self.prompt_lengths, self.lengths)

    def with_(self, **columns: Floats | None) -> RolloutBatch:
        """A copy with some columns replaced."""
        return replace(self, **columns)  # pyright: ignore[reportArgumentType]

    def select(self, rows: NDArray[np.int64]) -> RolloutBatch:
        """The sequences `rows` (int64 [s]), in that order, with all their columns. `dropped` is not carried over."""
        lengths = self.lengths[rows]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(self.cu_seqlens[rows] - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])

        def take(column: Floats | None, where: NDArray[np.int64]) -> Floats | None:
            return None if column is None else column[where]

        return RolloutBatch(
            input_ids=self.input_ids[tokens],
            cu_seqlens=cu_seqlens,
            prompt_lengths=self.prompt_lengths[rows],
            sampled_logprobs=self.sampled_logprobs[tokens],
            group_id=self.group_id[rows],
            row_key=self.row_key[rows],
            is_correct=self.is_correct[rows],
            outcome=self.outcome[rows],
            truncated=self.truncated[rows],
            old_logprobs=take(self.old_logprobs, tokens),
            reference_logprobs=take(self.reference_logprobs, tokens),
            advantages=take(self.advantages, rows),
            routed_experts=None if self.routed_experts is None else self.routed_experts[tokens],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the policy says of a batch before it is updated. Columns follow the batch's rows and tokens."""

    old_logprobs: Floats
    """[T] nats; 0 on prompt tokens."""
    entropy: Floats
    """[T] nats, of the distribution each response token was drawn from; 0 on prompt tokens."""
    reference_logprobs: Floats | None
    """[T]; None when no reference policy was asked for."""
    contrastive_loss: Floats
    """[S] nats per anchor, 0 where the row is no anchor; zeros when the contrastive term is off."""
    is_anchor: Bools
    """[S] row has a loss of its own (right, with another right one and a wrong one in its set, by default)."""
    contrastive_metrics: Mapping[str, float]
    """Head loss, anchor counts, similarities, head gradient norm; empty when the contrastive term is off."""
    policy_metrics: Mapping[str, float] = field(default_factory=dict)
    """Agreement of the routers with replayed routes; empty without replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """What one or more optimizer steps did."""

    metrics: Mapping[str, float]
    """Means over the step's updates: policy loss, KL, clip share, gradient norm, learning rate."""
    updates: int
    """Optimizer steps taken."""
    skipped: int
    """Optimizer steps refused because a loss or a gradient was not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Where one Hugging Face tensor lies in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Torch's name without the prefix: "float32", "bfloat16"."""
    offset: int
    """Bytes from the bucket's start."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBucket:
    """A run of whole Hugging Face tensors on their way to the engines."""

    version: int
    index: int
    specs: tuple[TensorSpec, ...]
    payload: NDArray[np.uint8]
    """[num_bytes]"""
    checksum: int
    """CRC-32 of the payload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one sync moved, into all engines or into those that lacked the version."""

    transport: str
    """"stream" or "shm"."""
    num_bytes: int
    """Written into these engines' parameters, or sent to each of them in buckets."""
    floor_seconds: float | None
    """That the copies of the busiest engine rank take at least, at the copy rate measured there; None for streams."""
