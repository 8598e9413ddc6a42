"""The archive of one tensor inside a `.distcp` file: what is written around its bytes.

An archive is what `torch.save` makes of one tensor: a zip file of stored records, the tensor's description as a pickle and
its bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch._utils
from torch import Tensor

STORAGE_NAMES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
"""Element type to the class that stands for it in a pickled tensor."""
_ALIGNMENT = 64
_FOLDER = "archive/"
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""Of a record in a zip file; its last two fields are the lengths of what stands between header and content."""
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64, _LOCATOR, _END = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI"), struct.Struct("<4s4H2IH")
_ZIP64_VERSION, _NO_DATE, _IN_ZIP64 = 45, 0x21, 0xFFFFFFFF


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor's elements, to be read or filled."""
    # One element may have any strides; as_strided says what view can't know.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def is_box(start: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a box of `shape` at `start` lies in a tensor of shape `whole`."""
    if not len(start) == len(shape) == len(whole):
        return False
    spans = zip(start, shape, whole, strict=True)
    return all(first >= 0 and length >= 0 and first + length <= end for first, length, end in spans)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each dim of a tensor stored row by row."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def archive_frame(dtype: str, shape: tuple[int, ...], *, num_bytes: int, checksum: int) -> tuple[bytes, bytes]:
    """What stands before and behind the bytes of a tensor, so that the three together are what `torch.load` reads.

    The tensor's record is always written with the 64-bit fields of the zip format: one form for all sizes.

    Args:
        dtype: one of STORAGE_NAMES.
        shape: of the tensor, stored row by row.
        num_bytes: of its elements.
        checksum: CRC-32 of its elements, as the zip format asks for.
    """
    head = bytearray()
    directory = bytearray()
    small = {"data.pkl": _description(dtype, shape), "byteorder": sys.byteorder.encode(), "version": b"3\n"}
    for name, content in small.items():
        path = (_FOLDER + name).encode()
        sums = (zlib.crc32(content), len(content), len(content), len(path))
        fixed = (_ZIP64_VERSION, 0, 0, 0, _NO_DATE)
        directory += _CENTRAL.pack(b"PK\1\2", _ZIP64_VERSION, *fixed, *sums, 0, 0, 0, 0, 0, len(head)) + path
        head += LOCAL_HEADER.pack(b"PK\3\4", *fixed, *sums, 0) + path + content
    path = (_FOLDER + "data/0").encode()
    sums = (checksum, _IN_ZIP64, _IN_ZIP64, len(path))
    sizes = struct.pack("<2H2Q", 1, 16, num_bytes, num_bytes)
    directory += _CENTRAL.pack(
        b"PK\1\2", _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, 0, _NO_DATE, *sums, len(sizes), 0, 0, 0, 0, len(head)
    )
    directory += path + sizes
    unpadded = len(head) + LOCAL_HEADER.size + len(path) + len(sizes) + 4
    padding = -unpadded % _ALIGNMENT
    extra = sizes + struct.pack("<2H", 0x4246, padding) + bytes(padding)
    head += LOCAL_HEADER.pack(b"PK\3\4", _ZIP64_VERSION, 0, 0, 0, _NO_DATE, *sums, len(extra)) + path + extra
    count, begin = len(small) + 1, len(head) + num_bytes
    tail = directory + _END64.pack(
        b"PK\6\6", _END64.size - 12, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, count, count, len(directory), begin
    )
    tail += _LOCATOR.pack(b"PK\6\7", 0, begin + len(directory), 1)
    tail += _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), min(begin, _IN_ZIP64), 0)
    return bytes(head), bytes(tail)


class _StorageMark:
    """Stands for the storage in a description that is written."""


class _TensorMark:
    """Stands for the tensor in a description that is written."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[object, ...]:
        strides = contiguous_strides(self._shape)
        return torch._utils._rebuild_tensor_v2, (_StorageMark(), 0, self._shape, strides, False, OrderedDict())


class _DescriptionPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: str, count: int) -> None:
        super().__init__(file, protocol=2)
        self._storage = ("storage", getattr(torch, STORAGE_NAMES[dtype]), "0", "cpu", count)

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        return self._storage if isinstance(obj, _StorageMark) else None


def _description(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    count = 1
    for length in shape:
        count *= length
    _DescriptionPickler(file, dtype, count).dump(_TensorMark(shape))
    return file.getvalue()
