"""Carries out what a plan has for one engine rank: strided copies out of the trainer's memory into the engine's own.

Everything is checked and laid out once; a sync is then a walk through two lists of views. The same code for CPUs and GPUs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.sync.checksums import checksum
from clipo_megatron.sync.plan import Shape, SyncPlan, Transfer
from clipo_megatron.sync.slices import (
    check_parameter,
    dtype_of,
    engine_tensors,
    source_views,
    target_views,
    zero_padding,
)

Sources = Mapping[int, Mapping[str, Tensor]]
"""Trainer rank -> name in the plan -> parameter."""
Progress = Callable[[int], object]
"""Called with the bytes copied so far; what it raises ends the copying."""
_BATCH_BYTES = 64 << 20
"""Copied between two calls of `Progress`."""
_DENSE_BYTES = 64 << 10
"""Runs from this size on are copies of their own: a GPU copies dense pairs many at a time."""


class _Slice(NamedTuple):
    """One transfer and the trainer's end of it."""

    transfer: Transfer
    parts: tuple[Tensor, ...]
    """Views; one for each parameter that the first dim runs over."""


class _Batch(NamedTuple):
    """Copies that are started by one call."""

    targets: list[Tensor]
    sources: list[Tensor]
    num_bytes: int


class PlannedCopies:
    """All copies into one rank of one engine, bound to the trainer's parameters. Kept over all syncs."""

    def __init__(self, plan: SyncPlan, sources: Sources, *, engine: int, engine_rank: int) -> None:
        """Lay out the trainer's end.

        Args:
            plan: of all engines.
            sources: parameters of every trainer rank that gives something to this engine rank, by the plan's names
                (`table_name` of weights/holdings.py); others may be among them. They are read again at every sync.
            engine: number of the engine.
            engine_rank: rank in the engine.

        Raises:
            EngineError: a parameter is missing or has another shape, dtype or layout than the plan says.
        """
        self._slices: dict[str, list[_Slice]] = defaultdict(list)
        checked: set[tuple[int, str]] = set()
        transfers = list(plan.into(engine, engine_rank))
        for transfer in transfers:
            wholes = [
                _source(
                    sources, transfer.source, name, plan.trainer_shapes[template], dtype_of(plan, template), checked
                )
                for template, name in zip(transfer.copy.source_parameters, transfer.source_parameters, strict=True)
            ]
            self._slices[transfer.parameter].append(_Slice(transfer, source_views(transfer.copy, wholes)))
        tensors = engine_tensors(plan)
        self.parameters = {name: shape for name, (shape, _) in tensors.items()}
        """Name in the plan -> shape of everything that the rank holds (`live_name` of weights/engine_parameters.py)."""
        self._dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
        self.num_bytes = sum(plan.num_bytes(transfer.copy) for transfer in transfers)
        """Of one whole sync."""

    def bind(self, targets: Mapping[str, Tensor]) -> BoundCopies:
        """Lay out the engine's end, for all its parameters or for some, say those of a layer.

        Rows that no tensor fills, the vocabulary's padding, are set to zero here, once.

        Args:
            targets: by the plan's names; in loading format, contiguous. Written by `BoundCopies.run`.

        Raises:
            EngineError: a name is not one of `parameters`, or a tensor has another shape, dtype or layout than the plan says.
        """
        bound: list[tuple[_Slice, tuple[Tensor, ...]]] = []
        for name, target in targets.items():
            if name not in self.parameters:
                raise EngineError(f"{name}: the plan has no such engine parameter among its {len(self.parameters)}")
            check_parameter(f"engine parameter {name}", target, self.parameters[name], self._dtypes[name])
            slices = self._slices.get(name, [])
            zero_padding(target, [of.transfer.copy for of in slices])
            bound += [(of, target_views(of.transfer.copy, target)) for of in slices]
        return BoundCopies(bound)


class BoundCopies:
    """Copies with both ends laid out. To be made by `PlannedCopies.bind`; `run` as often as the sources change."""

    def __init__(self, bound: Sequence[tuple[_Slice, tuple[Tensor, ...]]]) -> None:
        """See `PlannedCopies.bind`."""
        self._bound = bound
        pairs = [
            pair
            for of, parts in bound
            for source, target in zip(of.parts, parts, strict=True)
            for pair in _pairs(source, target)
        ]
        self._batches = _batches(pairs)
        self.num_bytes = sum(batch.num_bytes for batch in self._batches)
        """Copied by each `run`."""
        self.num_copies = len(pairs)

    @torch.no_grad()
    def run(self, on_progress: Progress | None = None) -> None:
        """Copy everything. On a GPU it is in the current stream when this returns; `wait` for it before a check.

        Args:
            on_progress: called between batches of 64 MiB; what it raises ends the copying, say, a missed deadline.
        """
        done = 0
        for batch in self._batches:
            # Dense pairs of a batch are one launch on a GPU; on a CPU it is the loop that costs least.
            torch._foreach_copy_(batch.targets, batch.sources)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            if on_progress is not None:
                done += batch.num_bytes
                on_progress(done)

    def wait(self) -> None:
        """Return when all that was copied is there."""
        if self._batches and self._batches[0].targets[0].is_cuda:
            torch.cuda.synchronize(self._batches[0].targets[0].device)

    def source_checksums(self) -> list[int]:
        """Checksum of each transfer's slice in the trainer's memory, in the order of binding."""
        return _values([checksum(of.parts) for of, _ in self._bound])

    def target_checksums(self) -> list[int]:
        """Checksum of each transfer's slice in the engine's memory, in the order of binding."""
        return _values([checksum(parts) for _, parts in self._bound])

    def verify(self, expected: Sequence[int] | None = None) -> None:
        """Pass if every slice in the engine's memory has the checksum of the trainer's.

        Args:
            expected: `source_checksums` of the trainer's own computing; None: they are computed here.

        Raises:
            CheckError: names the slices that differ, the first in full.
        """
        wanted = self.source_checksums() if expected is None else expected
        found = self.target_checksums()
        wrong = [of.transfer for (of, _), a, b in zip(self._bound, wanted, found, strict=True) if a != b]
        if wrong:
            first = wrong[0]
            raise CheckError(
                f"engine {first.engine} rank {first.engine_rank}: {len(wrong)} of {len(found)} slices differ from the "
                f"trainer's after the copy, first {first.parameter} from offset {first.copy.offset} on, out of "
                f"{first.source_parameters[0]} of trainer rank {first.source}: the update must not be served"
            )


def _source(
    sources: Sources, rank: int, name: str, shape: Shape, dtype: torch.dtype, checked: set[tuple[int, str]]
) -> Tensor:
    if rank not in sources:
        raise EngineError(
            f"the plan reads from trainer rank {rank}, whose parameters are not shared: {sorted(sources)}"
        )
    if name not in sources[rank]:
        raise EngineError(f"trainer rank {rank} shares no parameter {name}; plan and trainer must have the same layout")
    whole = sources[rank][name]
    if (rank, name) not in checked:
        check_parameter(f"trainer rank {rank}: {name}", whole, shape, dtype)
        checked.add((rank, name))
    return whole


def _pairs(source: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(target, source) of the dense runs if these are large, else of the whole."""
    shape = source.shape
    is_one = source.dim() == 1 or source.stride(-1) != 1 or target.stride(-1) != 1
    if is_one or shape[-1] * source.element_size() < _DENSE_BYTES:
        return [(target, source)]
    return [(target[place], source[place]) for place in itertools.product(*map(range, shape[:-1]))]


def _batches(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Batch]:
    """Dense pairs first, then the others: one of these would keep a GPU from taking its whole batch at once."""
    batches: list[_Batch] = []
    for wants_dense in (True, False):
        batch = _Batch([], [], 0)
        for target, source in pairs:
            if (target.is_contiguous() and source.is_contiguous()) != wants_dense:
                continue
            batch.targets.append(target)
            batch.sources.append(source)
            batch = batch._replace(num_bytes=batch.num_bytes + target.nbytes)
            if batch.num_bytes >= _BATCH_BYTES:
                batches.append(batch)
                batch = _Batch([], [], 0)
        if batch.targets:
            batches.append(batch)
    return batches


def _values(checksums: Sequence[Tensor]) -> list[int]:
    return [int(value.item()) for value in torch.stack(list(checksums)).cpu()] if checksums else []
