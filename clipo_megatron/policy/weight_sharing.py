"""This rank's parameters, laid open for engines of its node, and the version that they hold."""

from __future__ import annotations

from clipo_megatron.errors import CheckError
from clipo_megatron.policy.stage import Stage
from clipo_megatron.sync.shared_parameters import SharedParameters, share
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.holdings import table_name


class WeightSharing:
    """Engines may read from `offer` to the next `withdraw`."""

    def __init__(self, stage: Stage, architecture: Architecture, *, rank: int) -> None:
        """Nothing is shared yet.

        Args:
            stage: of this rank, its optimizer and gradient buffers made.
            architecture: of the model.
            rank: of the trainer.
        """
        self._stage = stage
        self._architecture = architecture
        self._owner = f"trainer rank {rank}"
        self._shared: SharedParameters | None = None
        self._offered: int | None = None

    def share(self) -> str:
        """Share the parameters, once; returns how to open them, as JSON. A tied output layer that is a copy is left out.

        Raises:
            EngineError: there is no room for shared memory; nothing has been moved then.
        """
        if self._shared is None:
            named = ((table_name(name, self._architecture), tensor) for name, tensor in self._stage.named_parameters())
            self._shared = share({name: tensor.data for name, tensor in named if name}, owner=self._owner)
        return self._shared.handles.to_json()

    def withdraw(self) -> None:
        """To be called before a weight is changed."""
        self._offered = None
        if self._shared is not None:
            self._shared.begin_change()

    def offer(self, version: int) -> None:
        """Let engines read the weights as `version`, until `withdraw`.

        Raises:
            CheckError: they were not shared.
            EngineError: a parameter was moved since.
        """
        if self._shared is None:
            raise CheckError(
                f"{self._owner}: asked to offer version {version}, but its weights are not shared: share first"
            )
        self._shared.end_change(version)
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
