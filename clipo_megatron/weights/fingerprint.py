"""A cheap fingerprint of a model folder's weights: other weights under the same names are noticed in a second."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clipo_megatron.weights.hf_folder import HFReader

_NUM_TENSORS = 256
_SAMPLE_BYTES = 4096


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of the names, formats and shapes of all tensors and of 4 KiB from the middle of at most 256 of them.

    Training moves nearly every weight, so another state of a model differs; a single changed value may go unnoticed.
    Files' names and times do not matter: a copy, or other shards of the same weights, has the same fingerprint.

    Args:
        folder: Hugging Face model folder; about 1 MiB of its weights is read.

    Raises:
        ConfigError: its files are damaged.
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    with HFReader(folder) as reader:
        names = reader.names()
        for name in names:
            digest.update(json.dumps([name, reader.dtype(name), reader.shape(name)]).encode())
        count = min(_NUM_TENSORS, len(names))
        for number in range(count):
            path, stored = reader.stored(names[number * len(names) // count])
            length = min(_SAMPLE_BYTES, stored.num_bytes)
            with path.open("rb") as file:
                file.seek(stored.start + (stored.num_bytes - length) // 2)
                digest.update(file.read(length))
    return digest.hexdigest()
