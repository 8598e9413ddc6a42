"""Laws of the weight buckets: unpack is the inverse of pack, sizes are bounded, damage is seen."""

from __future__ import annotations

import dataclasses
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.errors import CheckError
from clipo_megatron.sync.bucket import ALIGNMENT_BYTES, pack_buckets, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tensors(shapes: list[tuple[int, ...]]) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (f"layer.{number}.weight", torch.randn(shape, generator=generator).to(DTYPES[number % 3]))
        for number, shape in enumerate(shapes)
    ]


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=12),
    st.sampled_from([1, 64, 200, 4096]),
)
def test_unpack_is_the_inverse_of_pack(shapes: list[tuple[int, ...]], bucket_bytes: int) -> None:
    tensors = _tensors(shapes)
    buckets = list(pack_buckets(tensors, version=3, bucket_bytes=bucket_bytes))
    got = [pair for bucket in buckets for pair in unpack(bucket)]

    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert {bucket.version for bucket in buckets} <= {3}
    assert [name for name, _ in got] == [name for name, _ in tensors]
    for (_, expected), (_, tensor) in zip(tensors, got, strict=True):
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 1000))
def test_a_bucket_of_several_tensors_never_exceeds_its_size(lengths: list[int], bucket_bytes: int) -> None:
    tensors = [(str(number), torch.zeros(length)) for number, length in enumerate(lengths)]
    for bucket in pack_buckets(tensors, version=0, bucket_bytes=bucket_bytes):
        assert len(bucket.specs) == 1 or len(bucket.payload) <= bucket_bytes
        assert all(spec.offset % ALIGNMENT_BYTES == 0 for spec in bucket.specs)


def test_a_tensor_is_copied_before_the_next_is_asked_for() -> None:
    memory = torch.empty(4)

    def reused() -> object:
        for number in range(3):
            yield f"t{number}", memory.fill_(number)

    (bucket,) = pack_buckets(reused(), version=0, bucket_bytes=4096)  # pyright: ignore[reportArgumentType]
    assert [tensor.tolist() for _, tensor in unpack(bucket)] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_a_strided_tensor_arrives_with_its_values() -> None:
    tensor = torch.arange(12.0).view(3, 4).T[1:]
    (bucket,) = pack_buckets([("t", tensor)], version=0, bucket_bytes=4096)
    assert torch.equal(unpack(bucket)[0][1], tensor)


def test_unpacked_tensors_share_the_payload() -> None:
    (bucket,) = pack_buckets([("t", torch.zeros(2))], version=0, bucket_bytes=64)
    ((_, tensor),) = unpack(bucket)
    bucket.payload[:] = np.array([1.0, 2.0], np.float32).view(np.uint8)
    assert tensor.tolist() == [1.0, 2.0]


def test_a_read_only_payload_unpacks_without_a_warning() -> None:
    (bucket,) = pack_buckets(_tensors([(2, 3), (4,)]), version=0, bucket_bytes=4096)
    bucket.payload.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(unpack(bucket)) == 2


@pytest.mark.parametrize("byte", [0, 70, -1])
def test_one_changed_byte_is_seen(byte: int) -> None:
    (bucket,) = pack_buckets(_tensors([(5,), (5,)]), version=7, bucket_bytes=4096)
    bucket.payload[byte] ^= 1
    with pytest.raises(CheckError, match="bucket 0 of version 7: CRC-32"):
        unpack(bucket)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 64}, "lies at bytes"),
        ({"offset": -64}, "lies at bytes"),
        ({"offset": 4}, "at a multiple of 64"),
        ({"shape": (9,)}, "needs 36"),
        ({"dtype": "object"}, "number format object"),
    ],
)
def test_a_description_that_does_not_fit_the_payload_is_refused(change: dict[str, object], message: str) -> None:
    (bucket,) = pack_buckets([("t", torch.zeros(8))], version=0, bucket_bytes=4096)
    spec = dataclasses.replace(bucket.specs[0], **change)
    with pytest.raises(CheckError, match=message):
        unpack(dataclasses.replace(bucket, specs=(spec,)))


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(CheckError, match="tensor a comes twice"):
        list(pack_buckets([("a", torch.zeros(1)), ("a", torch.zeros(1))], version=0, bucket_bytes=64))


def test_a_number_format_without_a_name_on_the_wire_is_refused() -> None:
    with pytest.raises(CheckError, match="number format complex64"):
        list(pack_buckets([("a", torch.zeros(1, dtype=torch.complex64))], version=0, bucket_bytes=64))


def test_the_checksum_is_the_crc32_of_the_whole_payload() -> None:
    (bucket,) = pack_buckets(_tensors([(5,), (3,)]), version=0, bucket_bytes=4096)
    assert bucket.checksum == zlib.crc32(bucket.payload.tobytes())
