"""Which weights an engine holds: no tensors in here, only versions, and the rules by which they change."""

from __future__ import annotations

from collections.abc import Mapping

from clipo_megatron.errors import EngineError
from clipo_megatron.records import WeightBucket

Manifest = Mapping[str, tuple[int, ...]]
"""Shapes of all the tensors that one update must bring, by Hugging Face name."""


class SyncState:
    """Versions of one engine: serving -> receiving -> serving, or stale when an update did not come to its end.

    An update is sent, in buckets (`begin`, `receive`, `commit`), or pulled by the engine's workers (`begin_pull`, `pulled`,
    `commit_pull`); what belongs to the other way is refused.

    An engine that slept has lost its weights: it is stale until it got some, perhaps those that it held before.

    Version None is the model folder that the engine was started from. A stale engine serves nothing until a whole
    update has been committed. Whatever is refused during an update leaves the engine stale.
    """

    def __init__(self) -> None:
        """Version None is served."""
        self._held: int | None = None
        self._is_stale = False
        self._has_slept = False
        self._newest: int | None = None
        self._incoming: _Sent | _Pulled | None = None

    @property
    def version(self) -> int | None:
        """The version served, None for the model folder's own weights.

        Raises:
            EngineError: the engine holds no whole set of weights.
        """
        if self._incoming is not None:
            raise EngineError(f"the engine is receiving version {self._incoming.version}: commit or abort it first")
        if self._has_slept:
            raise EngineError("the engine's weights are gone since it slept: commit a whole update first")
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
        """Start receiving `version` in buckets; from here on nothing is served.

        Raises:
            EngineError: another update is under way, or the version is not newer than the newest one committed.
        """
        self._begin(_Sent(version, manifest))

    def begin_pull(self, version: int) -> None:
        """Start pulling `version`; from here on nothing is served.

        Raises:
            EngineError: as `begin`.
        """
        self._begin(_Pulled(version))

    def require_pull(self, version: int) -> None:
        """Pass if the pull of `version` is under way.

        Raises:
            EngineError: no pull is, or one of another version.
        """
        self._pull_under_way(version)

    def pulled(self, version: int) -> None:
        """Note that all workers have copied all that they hold.

        Raises:
            EngineError: as `require_pull`.
        """
        self._pull_under_way(version).is_whole = True

    def check_pulled(self, version: int) -> None:
        """Pass if all workers have copied all that they hold of `version`.

        Raises:
            EngineError: no pull under way, another version, or it is not whole.
        """
        if not self._pull_under_way(version).is_whole:
            self.abort()
            raise EngineError(f"version {version} was not pulled to its end: the update is aborted")

    def commit_pull(self, version: int) -> None:
        """Serve `version` from here on.

        Raises:
            EngineError: as `check_pulled`.
        """
        self.check_pulled(version)
        self._serve(version)

    def receive(self, bucket: WeightBucket) -> None:
        """Note one bucket.

        Raises:
            EngineError: no update under way, another version, an index out of order, a tensor that is unknown, has
                another shape or came before.
        """
        incoming = self._sending_under_way(bucket.version)
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
        incoming = self._sending_under_way(version)
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
        self._serve(version)

    def sleep(self) -> None:
        """Note that the weights are given back.

        Raises:
            EngineError: an update is under way.
        """
        if self._incoming is not None:
            raise EngineError(
                f"asked to sleep while version {self._incoming.version} is being received: commit or abort it first"
            )
        self._has_slept = True

    def abort(self) -> None:
        """Give up the update under way; the engine stays stale. Without one nothing changes."""
        self._incoming = None

    def _begin(self, incoming: _Sent | _Pulled) -> None:
        version = incoming.version
        if self._incoming is not None:
            raise EngineError(
                f"asked to receive version {version}, but version {self._incoming.version} is under way: "
                "commit or abort it first"
            )
        oldest = self._newest if self._has_slept or self._newest is None else self._newest + 1
        if oldest is not None and version < oldest:
            raise EngineError(f"asked to receive version {version}, but version {self._newest} has been held: too late")
        self._incoming = incoming
        self._is_stale = True

    def _serve(self, version: int) -> None:
        self._held, self._newest = version, version
        self._incoming, self._is_stale, self._has_slept = None, False, False

    def _sending_under_way(self, version: int) -> _Sent:
        incoming = self._under_way(version)
        if isinstance(incoming, _Sent):
            return incoming
        self.abort()
        raise EngineError(f"got a bucket of version {version}, which is being pulled: update aborted")

    def _pull_under_way(self, version: int) -> _Pulled:
        incoming = self._under_way(version)
        if isinstance(incoming, _Pulled):
            return incoming
        self.abort()
        raise EngineError(f"asked to pull version {version}, which is being sent in buckets: update aborted")

    def _under_way(self, version: int) -> _Sent | _Pulled:
        if self._incoming is None:
            raise EngineError(f"got a part of version {version}, but no update is under way: begin it first")
        if self._incoming.version != version:
            expected = self._incoming.version
            self.abort()
            raise EngineError(
                f"got a part of version {version} during the update to version {expected}: update aborted"
            )
        return self._incoming


class _Pulled:
    """How far a pull has come."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.is_whole = False


class _Sent:
    """What has come of one update in buckets."""

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
