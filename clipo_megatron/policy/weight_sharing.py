"""This rank's parameters, laid open for engines of its node, and the version that they hold."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.groups import Groups
from clipo_megatron.policy.stage import Stage
from clipo_megatron.sync.fp8 import Fp8Shards
from clipo_megatron.sync.meeting import Meeting
from clipo_megatron.sync.plan_json import from_json
from clipo_megatron.sync.process_group_transport import PlannedSends
from clipo_megatron.sync.shared_parameters import SharedParameters, share
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.fp8_parameters import Fp8
from clipo_megatron.weights.holdings import table_name


class WeightSharing:
    """Engines may read from `offer` to the next `withdraw`."""

    def __init__(
        self,
        stage: Stage,
        architecture: Architecture,
        layout: ParallelLayout,
        groups: Groups,
        *,
        rank: int,
        fp8: Fp8,
    ) -> None:
        """Nothing is shared yet.

        Args:
            stage: of this rank, its optimizer and gradient buffers made.
            architecture: of the model.
            layout: of the trainer.
            groups: of this rank.
            rank: of the trainer.
            fp8: which copies of its matrices engines get in place of these; made anew for every version.
        """
        self._layout = layout
        self._groups = groups
        self._fp8: Fp8 = fp8
        self._fp8_shards: Fp8Shards | None = None
        self._is_quantized = False
        """Whether the copies are those of the weights as they are."""
        self._stage = stage
        self._architecture = architecture
        self._rank = rank
        self._owner = f"trainer rank {rank}"
        self._sends: PlannedSends | None = None
        self._shared: SharedParameters | None = None
        self._offered: int | None = None

    def share(self) -> str:
        """Share the parameters, once; returns how to open them, as JSON. A tied output layer that is a copy is left out.

        Raises:
            EngineError: there is no room for shared memory; nothing has been moved then.
        """
        if self._shared is None:
            self._shared = share(self._named(), owner=self._owner)
        return self._shared.handles.to_json()

    def open_links(self, plan: str, meeting: Meeting) -> None:
        """Meet the engines' ranks, which must do so at the same time, and lay out what this rank sends them.

        Args:
            plan: of the whole sync, as JSON.
            meeting: of all ranks.

        Raises:
            EngineError: the plan does not fit the parameters, or a rank did not come.
        """
        self._sends = None  # its connections may be to engines that are gone
        try:
            group = meeting.join(self._rank)
        except RuntimeError as error:
            raise EngineError(f"{self._owner}: the engines can't be met: {str(error).splitlines()[0]}") from error
        self._sends = PlannedSends(from_json(plan), self._rank, self._named(), group, bucket_bytes=meeting.bucket_bytes)

    def send(self, version: int, *, verify: bool, only: Collection[int] | None) -> None:
        """Send the weights, which are offered as `version`; see `PlannedSends.send`.

        Raises:
            CheckError: they are not offered so, or no links are open.
            EngineError: an engine rank is late or gone.
        """
        self.confirm(version)
        if self._sends is None:
            raise CheckError(f"{self._owner}: asked to send version {version}, but no links are open: open them first")
        self._sends.send(version, verify=verify, only=only)

    def _named(self) -> dict[str, Tensor]:
        """By the plan's names, FP8 copies with them; a tied output layer that is a copy is left out."""
        named = ((table_name(name, self._architecture), tensor) for name, tensor in self._stage.named_parameters())
        weights = {name: tensor.data for name, tensor in named if name}
        if self._fp8 == "none":
            return weights
        if self._fp8_shards is None:
            self._fp8_shards = Fp8Shards(weights, self._architecture, self._layout, rank=self._rank, scaling=self._fp8)
        return self._fp8_shards.tensors()

    def withdraw(self) -> None:
        """To be called before a weight is changed."""
        self._offered = None
        self._is_quantized = False
        if self._shared is not None:
            self._shared.begin_change()

    def offer(self, version: int) -> None:
        """Let engines have the weights as `version`, until `withdraw`. FP8 copies are made here, by all ranks together.

        Collectives: those of `Fp8Shards.refresh`, the first time after `withdraw`.

        Raises:
            CheckError: they were not shared, and no links are open.
            EngineError: a parameter was moved since.
        """
        if self._fp8_shards is not None and not self._is_quantized:
            self._fp8_shards.refresh(self._groups.tp, self._groups.etp)
            self._is_quantized = True
        if self._shared is not None:
            self._shared.end_change(version)
        elif self._sends is None:
            raise CheckError(
                f"{self._owner}: asked to offer version {version}, but its weights are not shared: share first"
            )
        self._offered = version

    def confirm(self, version: int) -> None:
        """Pass if the weights are still offered as `version`.

        Raises:
            CheckError: they are not.
        """
        if self._offered != version:
            raise CheckError(
                f"{self._owner}: offers {'nothing' if self._offered is None else f'version {self._offered}'}, version "
                f"{version} was being pulled: what engines have got is of no use; sync again"
            )
