"""Where trainer and engine ranks meet before they send slices to one another."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from clipo_megatron.sync.process_group_transport import Group, join


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
    """For joining, and for each message."""

    def join(self, rank: int) -> Group:
        """Connect this process.

        Args:
            rank: of the trainer; or trainer ranks + rank over all engines.
        """
        timeout = datetime.timedelta(seconds=self.timeout_s)
        store = TCPStore(self.host, self.port, is_master=False, timeout=timeout)
        prefixed = PrefixStore(f"sync {self.number}", store)
        return join(prefixed, rank=rank, size=self.size, device=self.device, timeout_s=self.timeout_s)
