"""One rank of the policy: scores batches, trains on them, gives out its weights, saves and restores its state."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import WrittenFile
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.collectives import reduce_sum
from clipo_megatron.parallel.linear_logprob import linear_logprob
from clipo_megatron.policy.attention_path import AttentionWatch
from clipo_megatron.policy.build import build_stage
from clipo_megatron.policy.contrast import ContrastiveHead
from clipo_megatron.policy.cpu import check_version, cuda_means_cpu
from clipo_megatron.policy.dist_weights import Sharding
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.policy.offload import Offload
from clipo_megatron.policy.packer import Packer, is_sequence_split
from clipo_megatron.policy.score import PooledStates, Pooling, TokenScores, score_batch
from clipo_megatron.policy.settings import ContrastiveSettings, PolicySettings
from clipo_megatron.policy.snapshot import SnapshotWriter
from clipo_megatron.policy.state import TrainingState, read_plain
from clipo_megatron.policy.train import AuxiliaryLoss, PolicyLoss, summarize, update, update_shares
from clipo_megatron.policy.weight_io import stage_hf_tensors
from clipo_megatron.policy.weight_sharing import WeightSharing
from clipo_megatron.records import RolloutBatch, Scores, TrainReport
from clipo_megatron.weights.architecture import read_architecture

P = ParamSpec("P")
Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)


def _on_device(
    method: Callable[Concatenate[PolicyWorker, P], Result],
) -> Callable[Concatenate[PolicyWorker, P], Result]:
    """Runs a method that calls into Megatron in the scope that its device needs."""

    @functools.wraps(method)
    def scoped(self: PolicyWorker, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self._scope():
            return method(self, *args, **kwargs)

    return scoped


class PolicyWorker:
    """This process's share of the policy. The default process group must be initialised; one policy at a time.

    Collectives: all methods but those of a save are collective over all ranks; `hf_tensors` over the tp ranks of a stage.
    """

    def __init__(self, settings: PolicySettings, *, rank: int) -> None:
        """Build the model and load this rank's slices of the weights.

        Raises:
            ConfigError: the folder or the layout can't be used.
            CheckError: the ranks that run are not those of the layout.
        """
        layout, device = settings.layout, settings.device
        self._settings, self._layout, self._rank = settings, layout, rank
        self._device = torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        self._scope: Callable[[], AbstractContextManager[None]] = (
            cuda_means_cpu if device == "cpu" else contextlib.nullcontext
        )
        self._architecture = read_architecture(settings.model_path)
        self._is_split = is_sequence_split(settings)
        self._watch_attention = AttentionWatch(self._device)
        self._packer = Packer(settings, self._architecture, rank=rank, device=self._device)
        with self._scope():
            if device == "cpu":
                check_version()
            self._groups = make_groups(layout, seed=settings.seed)
            self._stage, self._optimizer = build_stage(
                settings, self._architecture, self._groups, rank=rank, device=self._device
            )
        self._reference: list[Tensor] | None = None
        if settings.algorithm.kl_coefficient > 0:
            # The parameters still hold the model folder's weights, on every start: a resumed run loads its state later.
            self._reference = self._host_copy()
        self._head: ContrastiveHead | None = None
        self._pooling: Pooling | None = None
        if settings.contrastive is not None:
            self._build_head(settings.contrastive)
        self._state = TrainingState(
            settings,
            self._stage,
            self._optimizer,
            self._head,
            Sharding(self._architecture, layout, rank=rank),
            self._groups,
            reports=self.reports,
        )
        self._snapshot = SnapshotWriter(device=self._device)
        self.sharing = WeightSharing(
            self._stage, self._architecture, layout, self._groups, rank=rank, fp8=settings.engine_fp8
        )
        """The weights, for engines of this node that copy them where they lie."""
        self.memory = Offload(self._stage, self._optimizer, device=self._device)
        """What only training needs; without it the policy still scores, gives out its weights and is saved."""

    def _build_head(self, settings: ContrastiveSettings) -> None:
        groups = self._groups
        self._pooling = Pooling(
            pool=settings.pool,
            group=groups.tp_cp if self._is_split else groups.cp,
            sp_group=groups.tp if self._is_split else None,
        )
        if self._stage.is_last:
            self._head = ContrastiveHead(
                settings,
                hidden_size=self._architecture.hidden_size,
                seed=self._settings.seed,
                dp_group=groups.dp,
                device=self._device,
            )

    @property
    def reports(self) -> bool:
        """Whether this rank is the one that returns results: last stage, first of its tp, cp and dp ranks."""
        layout = self._layout
        return self._rank == layout.rank(tp=0, dp=0, pp=layout.pp - 1)

    @_on_device
    def score(self, batch: RolloutBatch, *, step: int, with_reference: bool) -> Scores | None:
        """Log-probs and entropy before the update, contrastive losses; then the head takes its step.

        The losses are those of the head before its step. A batch without an anchor leaves the head as it is.

        Args:
            batch: all rows of the step, the same on all ranks.
            step: number of the training step; keys the drawn positives.
            with_reference: score the batch under the reference policy as well.

        Returns:
            The whole batch's scores on the rank that reports, None on the others.

        Raises:
            CheckError: `with_reference` on a policy without a KL loss.
            ConfigError: a sequence does not fit into a micro-batch.
        """
        micro_batches, _ = self._packer(batch, with_routes=True)
        scores, pooled = self._forward(batch, micro_batches, pooling=self._pooling)
        self._watch_attention("score")
        policy_metrics = self._route_agreement()
        reference = self._reference_logprobs(batch) if with_reference else None
        loss_B, is_anchor_B = torch.zeros(batch.num_sequences), torch.zeros(batch.num_sequences, dtype=torch.bool)
        metrics: dict[str, float] = {}
        if self._head is not None:
            assert pooled is not None
            result, metrics = self._head.score(batch, pooled.h_bH, pooled.row_b, step=step)
            loss_B, is_anchor_B = result.loss_B, result.is_anchor_B
        if not self.reports:
            return None
        return Scores(
            old_logprobs=scores.logprob_T.cpu().numpy(),
            entropy=scores.entropy_T.cpu().numpy(),
            reference_logprobs=None if reference is None else reference.cpu().numpy(),
            contrastive_loss=loss_B.cpu().numpy(),
            is_anchor=is_anchor_B.cpu().numpy(),
            contrastive_metrics=metrics,
            policy_metrics=policy_metrics,
        )

    @_on_device
    def train(self, batch: RolloutBatch, *, step: int) -> TrainReport | None:
        """The optimizer steps of one training step, over whole groups each.

        Args:
            batch: scored, with advantages; the same on all ranks.
            step: number of the training step, for messages.

        Returns:
            On the rank that reports, means over the updates taken; None on the others.

        Raises:
            CheckError: the batch lacks a column that the loss needs, or the optimizer's state is offloaded.
        """
        self.memory.require_onload("train")
        shares = update_shares(
            batch.group_id,
            updates=self._settings.algorithm.updates_per_step,
            least_rows=self._packer.least_rows,
        )
        updates: list[tuple[bool, dict[str, float]]] = []
        self.sharing.withdraw()
        for rows in shares:
            share = batch.select(rows) if len(shares) > 1 else batch
            micro_batches, plan = self._packer(share, with_routes=True)
            loss = PolicyLoss(share, self._settings.algorithm, self._logprob, self._auxiliary_loss())
            updated, metrics = update(self._stage, self._optimizer, micro_batches, loss, group=self._groups.dp_cp)
            metrics |= {"padding_share": plan.padding_share, "imbalance": plan.imbalance}
            updates.append((updated, metrics))
        self._route_agreement()
        self._watch_attention("train")
        if not self.reports:
            return None
        report = summarize(updates)
        if report.skipped:
            _LOG.warning(
                "step %d: %d of %d updates skipped: loss or gradient not finite", step, report.skipped, len(updates)
            )
        return report

    def hf_tensors(self, *, timeout_s: float | None = None) -> Iterator[tuple[str, Tensor]]:
        """This stage's weights as full Hugging Face tensors, one after the other; tied embeddings from one stage only.

        Collectives: those of `stage_hf_tensors`; all of `ParallelLayout.ranks_of_weights` must draw it to its end.

        Yields:
            (name, tensor) on the policy's device and in its dtype, the same on all ranks of the stage.
        """
        return stage_hf_tensors(
            self._stage, self._architecture, self._layout, self._groups, rank=self._rank, timeout_s=timeout_s
        )

    @_on_device
    def begin_save(self, folder: Path) -> None:
        """Take a snapshot of this rank's part of the training state and start to write it into `folder`, which exists.

        Parameters, float32 masters, moments, the head and its optimizer, random states. When it returns, training may go
        on: a thread writes the copy.

        Raises:
            CheckError: the save before this one was not finished.
        """
        self._snapshot.begin(folder / f"__{self._rank}_0.distcp", self._state.parts(self.memory.readable))

    def is_saving(self) -> bool:
        """Whether the snapshot is still being written."""
        return self._snapshot.is_writing

    def finish_save(self) -> tuple[WrittenFile, ...]:
        """Wait until this rank's files are on disk.

        Raises:
            CheckpointError: a file could not be written.
        """
        return (self._snapshot.finish(),)

    def training_plain(self) -> dict[str, Any]:
        """What of the training state is no tensor, as JSON types; whole on the rank that reports."""
        return self._state.plain()

    @_on_device
    def load(self, folder: Path, *, with_optimizer: bool = True) -> list[str]:
        """Restore what all ranks wrote, under this layout or another; under the same one bit for bit.

        Args:
            folder: of a checkpoint; its `POLICY_FILE` holds `training_plain` of the rank that reported.
            with_optimizer: False starts AdamW afresh.

        Returns:
            What could not be restored, in words.

        Raises:
            CheckpointError: the state is missing, damaged, or of another dtype, architecture or head.
            CheckError: the optimizer's state is offloaded.
        """
        self.memory.require_onload("load")
        self.sharing.withdraw()
        with DistReader(folder) as reader:
            return self._state.load(reader, read_plain(folder), with_optimizer=with_optimizer)

    def _token_scores(self, micro_batch: MicroBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(
            states,
            self._stage.output_weight,
            torch.from_numpy(micro_batch.predictor),
            micro_batch.labels,
            temperature=self._settings.temperature,
            vocab_size=self._architecture.vocab_size,
            group=self._groups.tp,
            is_split=self._is_split,
        )

    def _logprob(self, micro_batch: MicroBatch, states: Tensor) -> Tensor:
        return self._token_scores(micro_batch, states)[0]

    def _auxiliary_loss(self) -> AuxiliaryLoss | None:
        """The contrastive loss as a loss of the policy: linear in the pooled states, with the gradient found in `score`."""
        contrastive, head, pooling = self._settings.contrastive, self._head, self._pooling
        if contrastive is None or contrastive.policy_gradient_weight == 0 or head is None or pooling is None:
            return None

        def loss(micro_batch: MicroBatch, states: Tensor, row_key: NDArray[np.int64]) -> Tensor:
            gradient = contrastive.policy_gradient_weight * head.take_state_gradient(row_key)
            return pooling.weighted_sum(micro_batch, states, gradient)

        return loss

    def _forward(
        self, batch: RolloutBatch, micro_batches: Sequence[MicroBatch], *, pooling: Pooling | None
    ) -> tuple[TokenScores, PooledStates | None]:
        return score_batch(
            self._stage,
            micro_batches,
            num_tokens=len(batch.input_ids),
            score=self._token_scores,
            pooling=pooling,
            group=self._groups.dp_cp,
        )

    def _route_agreement(self) -> dict[str, float]:
        """How often the routers would have chosen the experts that they were given, since the last call."""
        if self._stage.replay is None:
            return {}
        counts = reduce_sum(self._stage.replay.take_counts().to(self._device), self._groups.world).tolist()
        return {"route_agreement": counts[0] / counts[1]} if counts[1] else {}

    def _reference_logprobs(self, batch: RolloutBatch) -> Tensor:
        if self._reference is None:
            raise CheckError(
                "score(with_reference=True) on a policy with kl_coefficient = 0: it keeps no reference weights; score "
                "without the reference or set a KL coefficient"
            )
        # Another policy than the engine's, so its routers decide by themselves.
        micro_batches, _ = self._packer(batch, with_routes=False)
        own = self._host_copy()
        self.sharing.withdraw()
        self._set_parameters(self._reference)
        try:
            return self._forward(batch, micro_batches, pooling=None)[0].logprob_T
        finally:
            self._set_parameters(own)

    def _host_copy(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._stage.parameters()]

    @torch.no_grad()
    def _set_parameters(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._stage.parameters(), values, strict=True):
            parameter.copy_(value)
