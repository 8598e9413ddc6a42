"""Where trainer and engine ranks meet before they send slices to one another."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from clipo_megatron.errors import EngineError
from clipo_megatron.sync.link_group import Group, join


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Plain values: they cross processes. All ranks of a plan join at the same time."""

    host: str
    port: int
    """Of a store that trainer rank 0 keeps."""
    number: int
    """Of no group before it: a group is made anew when an engine was started again."""
    size: int
    """Ranks of trainer and engines."""
    device: Literal["cpu", "cuda"]
    bucket_bytes: int
    """Of both ends; each rank takes two buffers of it."""
    timeout_s: float
    """Of each message."""
    patience_s: float
    """How long a rank waits for the others to come, and then to be connected."""

    def join(self, rank: int) -> Group:
        """Connect this process.

        Args:
            rank: of the trainer; or trainer ranks + rank over all engines.

        Raises:
            EngineError: some ranks did not come; they are named.
        """
        patience = datetime.timedelta(seconds=self.patience_s)
        store = PrefixStore(f"sync {self.number}", TCPStore(self.host, self.port, is_master=False, timeout=patience))
        # The group's own rendezvous would wait as long as for a message, and nobody could meet anew meanwhile.
        store.set(_seat(rank), "taken")
        try:
            store.wait([_seat(other) for other in range(self.size)], patience)
        except RuntimeError:
            missing = [other for other in range(self.size) if not store.check([_seat(other)])]
            raise EngineError(
                f"ranks {missing} of {self.size} (trainer ranks first, then those of the engines) did not come to meeting "
                f"{self.number} within {patience.total_seconds():g} s: they are gone or busy; look at their logs"
            ) from None
        try:
            return join(
                store,
                rank=rank,
                size=self.size,
                device=self.device,
                timeout_s=self.timeout_s,
                patience_s=self.patience_s,
            )
        except RuntimeError as error:
            raise EngineError(
                f"a rank came to meeting {self.number} and was gone before all were connected "
                f"({str(error).splitlines()[0]}): look at the logs of all"
            ) from error


def _seat(rank: int) -> str:
    return f"seat {rank}"
