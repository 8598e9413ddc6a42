"""One rank of the policy: scores batches, trains on them, gives out its weights, saves and restores its state."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from clipo_megatron.data.packing import plan_micro_batches
from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.logprob import vocab_parallel_logprob
from clipo_megatron.policy import state as training_state
from clipo_megatron.policy.contrast import ContrastiveHead
from clipo_megatron.policy.cpu import check_version, cuda_means_cpu
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.micro_batch import MicroBatch, pack
from clipo_megatron.policy.model import build_model, transformer_config
from clipo_megatron.policy.optimizer import PolicyOptimizer, wrap_model
from clipo_megatron.policy.schedule import FinalStates
from clipo_megatron.policy.score import PooledStates, Pooling, TokenScores, score_batch
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.policy.train import PolicyLoss, summarize, update, update_shares
from clipo_megatron.policy.weight_io import load_hf_weights, mark_split_parameters, stage_hf_tensors
from clipo_megatron.records import RolloutBatch, Scores, TrainReport
from clipo_megatron.weights.architecture import read_architecture

P = ParamSpec("P")
Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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

    Collectives: all methods but `save` are collective over all ranks; `hf_tensors` over the tp ranks of a stage.
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
        self._is_split = settings.sequence_parallel and layout.tp > 1
        self._pad_multiple = layout.tp if self._is_split else 1
        with self._scope():
            if device == "cpu":
                check_version()
            self._groups = make_groups(layout, seed=settings.seed)
            self._build_model()
        self._reference: list[Tensor] | None = None
        if settings.algorithm.kl_coefficient > 0:
            # The parameters still hold the model folder's weights, on every start: a resumed run loads its state later.
            self._reference = self._host_copy()
        self._head: ContrastiveHead | None = None
        self._pooling: Pooling | None = None
        if settings.contrastive is not None:
            sp_group = self._groups.tp if self._is_split else None
            self._pooling = Pooling(self._states, pool=settings.contrastive.pool, sp_group=sp_group)
            if layout.is_last_stage(rank):
                self._head = ContrastiveHead(
                    settings.contrastive,
                    hidden_size=self._architecture.hidden_size,
                    seed=settings.seed,
                    dp_group=self._groups.dp,
                    device=self._device,
                )

    def _build_model(self) -> None:
        settings, layout, rank = self._settings, self._layout, self._rank
        dtype = _DTYPES[settings.dtype]
        config = transformer_config(
            self._architecture,
            layout,
            dtype=dtype,
            device=settings.device,
            sequence_parallel=self._is_split,
            recompute=settings.recompute,
        )
        self._gpt = build_model(config, self._architecture, layout, rank=rank, device=settings.device).to(self._device)
        mark_split_parameters(self._gpt, self._architecture, layout, rank=rank)
        load_hf_weights(self._gpt, settings.model_path, self._architecture, layout, rank=rank)
        self._states = FinalStates(self._gpt)
        self._model = wrap_model(self._gpt, config)
        self._optimizer = PolicyOptimizer(self._model, settings.optimizer, dtype=dtype, world=self._groups.world)

    @property
    def reports(self) -> bool:
        """Whether this rank is the one that returns results: last stage, tp 0, dp 0."""
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
        micro_batches = self._plan(batch)
        scores, pooled = self._forward(batch, micro_batches, pooling=self._pooling)
        reference = self._reference_logprobs(batch, micro_batches) if with_reference else None
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
            CheckError: the batch lacks a column that the loss needs.
        """
        self._states.drop()
        shares = update_shares(
            batch.group_id, updates=self._settings.algorithm.updates_per_step, least_rows=self._layout.dp
        )
        updates: list[tuple[bool, dict[str, float]]] = []
        for rows in shares:
            share = batch.select(rows)
            loss = PolicyLoss(share, self._settings.algorithm, self._logprob)
            updates.append(update(self._model, self._optimizer, self._plan(share), loss, dp_group=self._groups.dp))
            self._states.drop()
        if not self.reports:
            return None
        report = summarize(updates)
        if report.skipped:
            _LOG.warning(
                "step %d: %d of %d updates skipped: loss or gradient not finite", step, report.skipped, len(updates)
            )
        return report

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This stage's weights as full Hugging Face tensors, one after the other; tied embeddings from one stage only.

        Collectives: one all_gather per split parameter over the stage's tp ranks, which must all draw it to its end.

        Yields:
            (name, tensor) on the policy's device and in its dtype, the same on all tp and dp ranks.
        """
        return stage_hf_tensors(self._gpt, self._architecture, self._layout, rank=self._rank, group=self._groups.tp)

    def save(self, folder: Path) -> None:
        """Write this rank's share of the training state into `folder`, which exists.

        Parameters, float32 masters, moments, step counts, the generator's state, the head and its optimizer.
        """
        optimizers = self._optimizers()
        plain: dict[str, training_state.Plain] = {
            "identity": self._identity(),
            "updates": self._optimizer.updates,
            "steps": {name: training_state.optimizer_steps(optimizer) for name, optimizer in optimizers.items()},
            "head_skipped": self._head.skipped if self._head else 0,
        }
        tensors = self._state_tensors() | {"random.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        training_state.write_state(folder, self._rank, tensors, plain)

    @_on_device
    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; training goes on bit for bit as it would have.

        Raises:
            CheckpointError: the state is missing, damaged, or of another layout, dtype, architecture or head.
        """
        tensors, plain = training_state.read_state(folder, self._rank, identity=self._identity())
        training_state.check_tensors(folder, tensors, self._state_tensors())
        for name, parameter in self._gpt.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        for name, optimizer in self._optimizers().items():
            training_state.restore_optimizer(optimizer, name, tensors, plain["steps"][name])
        self._optimizer.updates = plain["updates"]
        if self._head is not None:
            self._head.skipped = plain["head_skipped"]
        torch.set_rng_state(tensors["random.cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"])

    def _plan(self, batch: RolloutBatch) -> list[MicroBatch]:
        plan = plan_micro_batches(
            batch.lengths,
            dp=self._layout.dp,
            token_budget=self._settings.micro_batch_tokens,
            pad_multiple=self._pad_multiple,
        )
        rows = plan.rows[self._layout.dp_rank(self._rank)]
        return [pack(batch, part, pad_multiple=self._pad_multiple, device=self._device) for part in rows]

    def _token_scores(self, micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        logprob, entropy = vocab_parallel_logprob(
            logits,
            micro_batch.labels,
            temperature=self._settings.temperature,
            vocab_size=self._architecture.vocab_size,
            group=self._groups.tp,
        )
        return logprob[micro_batch.predictor], entropy[micro_batch.predictor]

    def _logprob(self, micro_batch: MicroBatch, logits: Tensor) -> Tensor:
        return self._token_scores(micro_batch, logits)[0]

    def _forward(
        self, batch: RolloutBatch, micro_batches: Sequence[MicroBatch], *, pooling: Pooling | None
    ) -> tuple[TokenScores, PooledStates | None]:
        return score_batch(
            self._model,
            micro_batches,
            num_tokens=len(batch.input_ids),
            score=self._token_scores,
            pooling=pooling,
            dp_group=self._groups.dp,
        )

    def _reference_logprobs(self, batch: RolloutBatch, micro_batches: Sequence[MicroBatch]) -> Tensor:
        if self._reference is None:
            raise CheckError(
                "score(with_reference=True) on a policy with kl_coefficient = 0: it keeps no reference weights; score "
                "without the reference or set a KL coefficient"
            )
        own = self._host_copy()
        self._set_parameters(self._reference)
        try:
            return self._forward(batch, micro_batches, pooling=None)[0].logprob_T
        finally:
            self._set_parameters(own)

    def _host_copy(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._gpt.parameters()]

    @torch.no_grad()
    def _set_parameters(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._gpt.parameters(), values, strict=True):
            parameter.copy_(value)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        optimizers = {"policy": self._optimizer.inner}
        return optimizers | ({"head": self._head.optimizer} if self._head else {})

    def _state_tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self._gpt.named_parameters()}
        for name, optimizer in self._optimizers().items():
            tensors |= training_state.optimizer_tensors(optimizer, name)
        return tensors

    def _identity(self) -> dict[str, training_state.Plain]:
        head = self._settings.contrastive
        return {
            "layout": asdict(self._layout),
            "rank": self._rank,
            "dtype": self._settings.dtype,
            "architecture": asdict(self._architecture),
            "head": None if head is None else {"kind": head.head, "size": head.head_size},
        }
