"""What of a policy's training state this rank writes, and how it is put back, on this layout or another.

Parameters, AdamW's masters and moments and the contrastive head are parts of global tensors, so a checkpoint does not
depend on the layout. Random states and FP8 histories belong to a rank: they come back on the layout that wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.training import POLICY_FILE, policy_identity
from clipo_megatron.errors import CheckpointError
from clipo_megatron.policy.contrast import ContrastiveHead
from clipo_megatron.policy.dist_weights import Sharding, load_dist_weights, read_part
from clipo_megatron.policy.groups import Groups
from clipo_megatron.policy.optimizer import PolicyOptimizer
from clipo_megatron.policy.optimizer_shards import MASTER, MOMENTS, OptimizerShard, finish_restore, optimizer_shards
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.policy.stage import Stage
from clipo_megatron.weights.flat_ranges import flat_parts
from clipo_megatron.weights.names import is_expert

Plain = Mapping[str, Any]
"""JSON types."""
_OPTIMIZER, _HEAD, _RANK = "optimizer.state", "contrastive_head", "rank_state"
_PLAIN_KEYS = ("identity", "layout", "precision", "updates", "head_steps", "head_skipped")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StatePart:
    """A rectangle of a global tensor that this rank writes."""

    key: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    """With the leading axes of the global tensor."""
    tensor: Tensor
    """A reference to its elements, on the policy's device or, offloaded, on the host."""


class TrainingState:
    """This rank's part of the training state."""

    def __init__(
        self,
        settings: PolicySettings,
        stage: Stage,
        optimizer: PolicyOptimizer,
        head: ContrastiveHead | None,
        sharding: Sharding,
        groups: Groups,
        *,
        reports: bool,
    ) -> None:
        self._settings = settings
        self._stage = stage
        self._optimizer = optimizer
        self._head = head
        self._sharding = sharding
        self._groups = groups
        self._reports = reports
        self._shards = optimizer_shards(optimizer.chained, stage.named_parameters())

    def plain(self) -> dict[str, Any]:
        """What is no tensor. The same on all ranks but for the head's counters, which ranks without it give as 0."""
        head = self._head
        return {
            "identity": json.loads(json.dumps(self._identity())),
            "layout": asdict(self._settings.layout),
            "precision": asdict(self._settings.precision),
            "updates": self._optimizer.updates,
            "head_steps": 0 if head is None else head.steps,
            "head_skipped": 0 if head is None else head.skipped,
        }

    def parts(self, readable: Callable[[Tensor], Tensor]) -> Iterator[StatePart]:
        """All that this rank writes: one of the ranks that hold the same elements writes them.

        Args:
            readable: gives a tensor of the optimizer, or its copy where it is offloaded.
        """
        own = self._own_names()
        for name, parameter in self._stage.named_parameters():
            if name in own:
                yield from self._cut(name, parameter.detach().reshape(-1), prefix="")
        for shard in self._shards:
            if self._writes(shard, own):
                for kind, value in self._values(shard).items():
                    yield from self._cut(
                        shard.name, readable(value).reshape(-1), prefix=f"{_OPTIMIZER}.{kind}.", start=shard.start
                    )
        if self._head is not None and self._reports:
            for name, tensor in self._head.tensors(with_moments=self._head.steps > 0).items():
                yield _whole(f"{_HEAD}.{name}", tensor)
        for name, tensor in self._of_rank().items():
            yield _whole(self._rank_key(name), tensor)

    @torch.no_grad()
    def load(self, reader: DistReader, plain: Plain, *, with_optimizer: bool) -> list[str]:
        """Restore what all ranks wrote with `parts` and `plain`; each reads what it holds.

        Args:
            reader: open on the checkpoint.
            plain: of the rank with the head.
            with_optimizer: False starts AdamW afresh, for the policy and for the head.

        Returns:
            What could not be restored, in words.

        Raises:
            CheckpointError: a tensor is missing, damaged or of another shape or dtype, or the state is of another model,
                dtype or head.
        """
        self._check_identity(plain)
        load_dist_weights(self._stage, reader, self._sharding)
        if with_optimizer:
            self._check_optimizer(reader, plain["updates"])
            self._load_optimizer(reader, plain["updates"])
        else:
            self._restart_optimizer()
        if self._head is not None:
            self._load_head(self._head, reader, plain, with_optimizer=with_optimizer)
        return self._load_of_rank(reader, plain)

    def _own_names(self) -> set[str]:
        """Parameters that this rank writes; those that ranks hold alike are dealt among them by their size."""
        sharding, groups = self._sharding, self._groups
        dealt = {False: [0] * groups.dp_cp.size(), True: [0] * groups.expert_dp.size()}
        own_rank = {False: dist.get_rank(groups.dp_cp), True: dist.get_rank(groups.expert_dp)}
        own: set[str] = set()
        for name, parameter in self._stage.named_parameters():
            loads = dealt[is_expert(name)]
            writer = loads.index(min(loads))
            loads[writer] += parameter.numel()
            if writer == own_rank[is_expert(name)] and sharding.is_first_holder(name):
                own.add(name)
        return own

    def _writes(self, shard: OptimizerShard, own: set[str]) -> bool:
        if self._settings.distributed_optimizer:
            return self._sharding.is_first_holder(shard.name)
        return shard.name in own

    def _values(self, shard: OptimizerShard) -> dict[str, Tensor]:
        values = shard.values()
        if self._settings.dtype == "float32":
            del values[MASTER]  # the parameter itself
        return values

    def _cut(self, name: str, flat: Tensor, *, prefix: str, start: int = 0) -> Iterator[StatePart]:
        for part in flat_parts(self._sharding.boxes(name), start, start + flat.numel()):
            yield StatePart(
                key=prefix + part.key,
                global_shape=part.global_shape,
                start=part.start,
                shape=part.shape,
                tensor=flat[part.offset : part.offset + part.numel],
            )

    def _kinds(self, updates: int) -> list[str]:
        """What of AdamW a checkpoint holds after so many updates; the masters of a float32 policy are its parameters."""
        return [*([] if self._settings.dtype == "float32" else [MASTER]), *(MOMENTS if updates else ())]

    def _check_optimizer(self, reader: DistReader, updates: int) -> None:
        keys = {box.key for shard in self._shards for box in self._sharding.boxes(shard.name)}
        wanted = {f"{_OPTIMIZER}.{kind}.{key}" for kind in self._kinds(updates) for key in keys}
        if missing := sorted(wanted - set(reader.keys())):
            raise CheckpointError(
                f"{reader.folder}: no optimizer state {missing[0]} ({len(missing)} of {len(wanted)} keys are missing); "
                "restore the checkpoint, or start the optimizer afresh with run.accept=[no_optimizer]"
            )

    def _load_optimizer(self, reader: DistReader, updates: int) -> None:
        self._optimizer.updates = updates
        kinds = self._kinds(updates)
        for shard in self._shards:
            values = {kind: self._read_shard(reader, shard, kind) for kind in kinds}
            shard.restore(values, steps=updates)
        for optimizer in self._optimizer.inner:
            finish_restore(optimizer, steps=updates)

    def _read_shard(self, reader: DistReader, shard: OptimizerShard, kind: str) -> Tensor:
        flat = torch.empty(shard.stop - shard.start, dtype=torch.float32)
        for part in flat_parts(self._sharding.boxes(shard.name), shard.start, shard.stop):
            read_part(reader, part, flat[part.offset : part.offset + part.numel], prefix=f"{_OPTIMIZER}.{kind}.")
        return flat

    def _restart_optimizer(self) -> None:
        """Masters are the parameters that were loaded; moments and the warm-up begin anew."""
        self._optimizer.updates = 0
        parameters = dict(self._stage.named_parameters())
        for shard in self._shards:
            master = parameters[shard.name].detach().reshape(-1)[shard.start : shard.stop].float()
            shard.restore({MASTER: master}, steps=0)
        for optimizer in self._optimizer.inner:
            finish_restore(optimizer, steps=0)

    def _load_head(self, head: ContrastiveHead, reader: DistReader, plain: Plain, *, with_optimizer: bool) -> None:
        steps = plain["head_steps"] if with_optimizer else 0
        found = {
            name: _read_whole(reader, f"{_HEAD}.{name}", tensor)
            for name, tensor in head.tensors(with_moments=steps > 0).items()
        }
        head.restore(found, steps=steps, skipped=plain["head_skipped"])

    def _of_rank(self) -> dict[str, Tensor]:
        states = {f"buffer.{name}": buffer for name, buffer in self._stage.named_buffers()}
        states["random.cpu"] = torch.get_rng_state()
        if self._settings.device == "cuda":
            states["random.cuda"] = torch.cuda.get_rng_state()
        return states

    def _rank_key(self, name: str) -> str:
        return f"{_RANK}.{self._sharding.rank:05d}.{name}"

    def _load_of_rank(self, reader: DistReader, plain: Plain) -> list[str]:
        current = json.loads(json.dumps({key: asdict(getattr(self._settings, key)) for key in ("layout", "precision")}))
        changed = [key for key, value in current.items() if plain[key] != value]
        if changed:
            return [
                f"the checkpoint was written with another {' and another '.join(changed)}: random states"
                + (" and FP8 histories" if self._settings.precision.recipe == "delayed" else "")
                + " of its ranks are not restored"
            ]
        found = {name: _read_whole(reader, self._rank_key(name), tensor) for name, tensor in self._of_rank().items()}
        for name, buffer in self._stage.named_buffers():
            buffer.copy_(found[f"buffer.{name}"])
        torch.set_rng_state(found["random.cpu"])
        if self._settings.device == "cuda":
            torch.cuda.set_rng_state(found["random.cuda"])
        return []

    def _identity(self) -> dict[str, object]:
        contrastive = self._settings.contrastive
        head = None if contrastive is None else (contrastive.head, contrastive.head_size)
        return policy_identity(self._sharding.architecture, dtype=self._settings.dtype, head=head)

    def _check_identity(self, plain: Plain) -> None:
        found, wanted = plain["identity"], self._identity()
        differences = [
            f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
            for key in sorted({*found, *wanted})
            if found.get(key) != wanted.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"the training state belongs to another run: {'; '.join(differences)}. Resume with the same dtype, model "
                "and head, or start from the exported Hugging Face folder"
            )


def read_plain(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `POLICY_FILE`.

    Raises:
        CheckpointError: it is missing, no JSON object, or lacks a key.
    """
    path = folder / POLICY_FILE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _PLAIN_KEYS if key not in plain]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); take another checkpoint") from error
    if missing:
        raise CheckpointError(
            f"{path}: has no {', '.join(missing)}; take a checkpoint of this version of clipo_megatron"
        )
    return plain


def _whole(key: str, tensor: Tensor) -> StatePart:
    shape = tuple(tensor.shape)
    return StatePart(key=key, global_shape=shape, start=(0,) * len(shape), shape=shape, tensor=tensor.detach())


def _read_whole(reader: DistReader, key: str, like: Tensor) -> Tensor:
    if key not in reader.keys() or reader.shape(key) != tuple(like.shape):  # noqa: SIM118  not a dict
        raise CheckpointError(f"{key}: missing in the checkpoint, or of another shape than {tuple(like.shape)}")
    return reader.read_box(key, start=(0,) * like.dim(), shape=tuple(like.shape))
