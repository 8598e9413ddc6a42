"""Which weights an engine holds: no tensors in here, only versions, and the rules by which they change."""

from __future__ import annotations

from collections.abc import Mapping

from clipo_megatron.errors import EngineError
from clipo_megatron.records import WeightBucket

Manifest = Mapping[str, tuple[int, ...]]
"""Shapes of all the tensors that one update must bring, by Hugging Face name."""


class SyncState:
    """Versions of one engine: serving -> receiving -> serving, or stale when an update did not come to its end.

    Version None is the model folder that the engine was started from. A stale engine serves nothing until a whole
    update has been committed. Whatever is refused during an update leaves the engine stale.
    """

    def __init__(self) -> None:
        """Version None is served."""
        self._held: int | None = None
        self._is_stale = False
        self._newest: int | None = None
        self._incoming: _Incoming | None = None

    @property
    def version(self) -> int | None:
        """The version served, None for the model folder's own weights.

        Raises:
            EngineError: the engine holds no whole set of weights.
        """
        if self._incoming is not None:
            raise EngineError(f"the engine is receiving version {self._incoming.version}: commit or abort it first")
        if self._is_stale:
            raise EngineError(
                f"the engine is stale: its last update was not finished (newest version committed: {self._newest}); "
                "commit a whole update first"
            )
        return self._held

    def ready(self, version: int | None) -> None:
        """Pass if exactly `version` is held.

        Raises:
            EngineError: another version is held, or none; names both.
        """
        try:
            held = self.version
        except EngineError as error:
            raise EngineError(f"asked for {_name(version)}, but {error}") from None
        if held != version:
            raise EngineError(f"asked for {_name(version)}, but the engine holds {_name(held)}")

    def begin(self, version: int, manifest: Manifest) -> None:
        """Start receiving `version`; from here on nothing is served.

        Raises:
            EngineError: another update is under way, or the version is not newer than the newest one committed.
        """
        if self._incoming is not None:
            raise EngineError(
                f"asked to receive version {version}, but version {self._incoming.version} is under way: "
                "commit or abort it first"
            )
        if self._newest is not None and version <= self._newest:
            raise EngineError(f"asked to receive version {version}, but version {self._newest} has been held: too late")
        self._incoming = _Incoming(version, manifest)
        self._is_stale = True

    def receive(self, bucket: WeightBucket) -> None:
        """Note one bucket.

        Raises:
            EngineError: no update under way, another version, an index out of order, a tensor that is unknown, has
                another shape or came before.
        """
        incoming = self._under_way(bucket.version)
        try:
            incoming.add(bucket)
        except EngineError:
            self.abort()
            raise

    def check_complete(self, version: int, expected_tensors: int) -> None:
        """Pass if every tensor of `version` has come.

        Raises:
            EngineError: no update under way, another version, tensors missing or not as many as the sender says.
        """
        incoming = self._under_way(version)
        try:
            incoming.check_complete(expected_tensors)
        except EngineError:
            self.abort()
            raise

    def commit(self, version: int, expected_tensors: int) -> None:
        """Serve `version` from here on.

        Raises:
            EngineError: as `check_complete`.
        """
        self.check_complete(version, expected_tensors)
        self._held, self._newest = version, version
        self._incoming, self._is_stale = None, False

    def abort(self) -> None:
        """Give up the update under way; the engine stays stale. Without one nothing changes."""
        self._incoming = None

    def _under_way(self, version: int) -> _Incoming:
        if self._incoming is None:
            raise EngineError(f"got a part of version {version}, but no update is under way: begin it first")
        if self._incoming.version != version:
            expected = self._incoming.version
            self.abort()
            raise EngineError(
                f"got a part of version {version} during the update to version {expected}: update aborted"
            )
        return self._incoming


class _Incoming:
    """What has come of one update."""

    def __init__(self, version: int, manifest: Manifest) -> None:
        self.version = version
        self._manifest = manifest
        self._names: set[str] = set()
        self._buckets = 0

    def add(self, bucket: WeightBucket) -> None:
        where = f"bucket {bucket.index} of version {self.version}"
        if bucket.index != self._buckets:
            raise EngineError(f"{where}: out of order, expected bucket {self._buckets}")
        for spec in bucket.specs:
            if spec.name in self._names:
                raise EngineError(f"{where}: tensor {spec.name} came before in this update")
            if spec.name not in self._manifest:
                raise EngineError(
                    f"{where}: tensor {spec.name} is not one of the model's {len(self._manifest)} tensors"
                )
            if spec.shape != self._manifest[spec.name]:
                raise EngineError(
                    f"{where}: tensor {spec.name} has shape {list(spec.shape)}, the model's has "
                    f"{list(self._manifest[spec.name])}"
                )
            self._names.add(spec.name)
        self._buckets += 1

    def check_complete(self, expected_tensors: int) -> None:
        missing = sorted(self._manifest.keys() - self._names)
        if missing:
            raise EngineError(
                f"version {self.version}: {len(missing)} of the model's {len(self._manifest)} tensors did not come, "
                f"first {missing[0]}: the update is aborted"
            )
        if len(self._names) != expected_tensors:
            raise EngineError(
                f"version {self.version}: {len(self._names)} tensors came, the sender says {expected_tensors}: "
                "the update is aborted"
            )


def _name(version: int | None) -> str:
    return "the model folder's own weights (version None)" if version is None else f"version {version}"
