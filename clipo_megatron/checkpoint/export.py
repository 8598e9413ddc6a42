"""Writing weights as a Hugging Face folder, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clipo_megatron.records import WeightBucket
from clipo_megatron.sync.bucket import unpack
from clipo_megatron.weights.hf_writer import HFWriter


def export_hf(buckets: Iterable[WeightBucket], *, source: Path, folder: Path) -> None:
    """Write all tensors of `buckets` to `folder` with the configuration and tokenizer of `source`.

    The folder appears under its name only when it is complete; one of that name is swapped for it.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape, or the disk is full.
    """
    with HFWriter(folder, source=source, overwrite=True) as writer:
        for bucket in buckets:
            for name, tensor in unpack(bucket):
                writer.add(name, tensor)
        writer.finish()
