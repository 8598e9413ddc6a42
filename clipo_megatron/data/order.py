"""The order of prompts: a pure function of (seed, epoch), so one integer resumes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.errors import ConfigError


class PromptOrder:
    """An endless sequence of row numbers; position p lies in epoch p // num_prompts."""

    def __init__(self, num_prompts: int, *, seed: int, shuffle: bool) -> None:
        """Set the order up; nothing is drawn yet.

        Args:
            num_prompts: rows of the data set, >= 1.
            seed: >= 0.
            shuffle: each epoch in an order of its own, or in the file's.

        Raises:
            ConfigError: there are no prompts.
        """
        if num_prompts < 1:
            raise ConfigError(f"data: {num_prompts} prompts; the order needs at least one, give more data")
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    def take(self, start: int, count: int) -> list[int]:
        """Row numbers at positions [start, start + count), across epoch borders."""
        rows = []
        for position in range(start, start + count):
            epoch, offset = divmod(position, self._num_prompts)
            rows.append(int(self._epoch(epoch)[offset]))
        return rows

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._permutation(epoch))
        return self._drawn[1]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self._num_prompts, dtype=np.int64)
        # numpy promises that the raw stream of a bit generator never changes; it does not for `permutation`.
        keys = np.random.Philox(np.random.SeedSequence((self._seed, epoch))).random_raw(self._num_prompts)
        return np.argsort(keys, kind="stable")
