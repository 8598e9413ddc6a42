"""Weight buckets: whole Hugging Face tensors packed into one run of bytes, and back without a copy."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.errors import CheckError
from clipo_megatron.records import TensorSpec, WeightBucket

ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a view needs its item size, vectorised copies like a cache line."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8)
}


def pack_buckets(tensors: Iterable[tuple[str, Tensor]], *, version: int, bucket_bytes: int) -> Iterator[WeightBucket]:
    """Pack named tensors into buckets, in their order.

    A tensor is never split: one larger than `bucket_bytes` travels alone. Each tensor is copied before the next is
    asked for, so the iterator may reuse its memory.

    Args:
        tensors: Hugging Face names and whole tensors, on any device.
        version: policy version of the weights.
        bucket_bytes: size that a bucket of several tensors never exceeds.

    Raises:
        CheckError: a name comes twice, or a tensor has a number format that buckets do not carry.
    """
    index, used = 0, 0
    specs: list[TensorSpec] = []
    payload = np.empty(bucket_bytes, np.uint8)
    names: set[str] = set()
    for name, tensor in tensors:
        spec = _spec(name, tensor, offset=_aligned(used))
        if name in names:
            raise CheckError(f"weights of version {version}: tensor {name} comes twice; the exporter must send it once")
        names.add(name)
        if specs and spec.offset + spec.num_bytes > bucket_bytes:
            yield _bucket(version, index, specs, payload[:used])
            index, used, specs = index + 1, 0, []
            payload = np.empty(bucket_bytes, np.uint8)
            spec = _spec(name, tensor, offset=0)
        if spec.num_bytes > len(payload):
            payload = np.empty(spec.num_bytes, np.uint8)
        payload[used : spec.offset] = 0  # the gap is part of the checksum
        _bytes_of(payload, spec).copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        specs.append(spec)
        used = spec.offset + spec.num_bytes
    if specs:
        yield _bucket(version, index, specs, payload[:used])


def unpack(bucket: WeightBucket) -> list[tuple[str, Tensor]]:
    """The bucket's tensors: views into its payload, which may be read-only and must then not be written through them.

    Raises:
        CheckError: the payload does not have the bucket's checksum, or a tensor's description does not fit the payload.
    """
    where = f"bucket {bucket.index} of version {bucket.version}"
    checksum = zlib.crc32(bucket.payload.data)
    if checksum != bucket.checksum:
        raise CheckError(
            f"{where}: CRC-32 of the payload is {checksum:#010x}, expected {bucket.checksum:#010x}: "
            "the bytes changed on the way"
        )
    for spec in bucket.specs:
        _check_spec(spec, len(bucket.payload), where)
    return [
        (spec.name, _bytes_of(bucket.payload, spec).view(_DTYPES[spec.dtype]).view(spec.shape)) for spec in bucket.specs
    ]


def _bucket(version: int, index: int, specs: list[TensorSpec], payload: NDArray[np.uint8]) -> WeightBucket:
    return WeightBucket(
        version=version, index=index, specs=tuple(specs), payload=payload, checksum=zlib.crc32(payload.data)
    )


def _spec(name: str, tensor: Tensor, *, offset: int) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise CheckError(f"tensor {name}: number format {dtype}; buckets carry {sorted(_DTYPES)}")
    return TensorSpec(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype,
        offset=offset,
        num_bytes=tensor.numel() * tensor.element_size(),
    )


def _check_spec(spec: TensorSpec, payload_bytes: int, where: str) -> None:
    if spec.dtype not in _DTYPES:
        raise CheckError(f"{where}: tensor {spec.name} has number format {spec.dtype}; known are {sorted(_DTYPES)}")
    expected = math.prod(spec.shape) * _DTYPES[spec.dtype].itemsize
    if spec.num_bytes != expected:
        raise CheckError(
            f"{where}: tensor {spec.name} has {spec.num_bytes} bytes; {spec.dtype} {list(spec.shape)} needs {expected}"
        )
    if spec.offset < 0 or spec.offset % ALIGNMENT_BYTES or spec.offset + spec.num_bytes > payload_bytes:
        raise CheckError(
            f"{where}: tensor {spec.name} lies at bytes {spec.offset}..{spec.offset + spec.num_bytes} of "
            f"{payload_bytes}; it must lie inside, at a multiple of {ALIGNMENT_BYTES}"
        )


def _bytes_of(payload: NDArray[np.uint8], spec: TensorSpec) -> Tensor:
    with warnings.catch_warnings():
        # A payload out of an object store or a shared mapping is read-only; torch warns although nobody writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        span = payload[spec.offset : spec.offset + spec.num_bytes]
        return torch.from_numpy(span)  # pyright: ignore[reportUnknownMemberType]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
