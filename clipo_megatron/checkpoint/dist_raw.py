"""Finds the elements of a tensor in an archive that torch saved.

No pickle is executed here: the tensor's description goes through an unpickler that builds plain values only.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass

import torch

from clipo_megatron.checkpoint.dist_archive import LOCAL_HEADER, STORAGE_NAMES, contiguous_strides

_DTYPES = {name: dtype for dtype, name in STORAGE_NAMES.items()}
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""What a damaged pickle can raise in an unpickler that finds no class but ours."""

_MAX_DESCRIPTION_BYTES, _MAX_ORDER_BYTES = 1 << 20, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RawTensor:
    """Where a tensor's elements lie in its archive."""

    start: int
    """Of the first element, in bytes from the beginning of the archive."""
    dtype: str
    shape: tuple[int, ...]
    is_contiguous: bool


class FileWindow(io.RawIOBase):
    """A part of an open file as a file of its own; any number of them read side by side.

    Args:
        descriptor: of the open file, which must outlive the window.
        offset: of the part.
        length: of the part, in bytes.
    """

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in the window."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, as in any file."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise ValueError(f"position {origin + offset} is before the beginning")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill a buffer as far as the window reaches; gives the number of bytes."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, all that are left if it is negative; never memory for more than there are."""
        left = max(0, self._length - self._position)
        buffer = bytearray(left if size < 0 else min(size, left))
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def at(self, position: int, count: int) -> bytes:
        """`count` bytes from `position` on.

        Raises:
            EOFError: there are fewer.
        """
        self.seek(position)
        found = self.read(count)
        if len(found) < count:
            raise EOFError(f"{len(found)} of {count} bytes at {position}")
        return found


def find_raw_tensor(window: FileWindow) -> RawTensor | None:
    """Where the elements are in an archive, or None where it is not one plain tensor in this machine's byte order.

    Raises:
        zipfile.BadZipFile: not an archive, or a damaged one.
        EOFError: the archive ends early.
    """
    with zipfile.ZipFile(window) as archive:
        records = archive.infolist()
    by_name = {record.filename: record for record in records}
    descriptions = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(by_name) != len(records) or len(descriptions) != 1:
        raise zipfile.BadZipFile(f"{len(descriptions)} descriptions of a tensor in one archive, must be 1")
    description = descriptions[0]
    folder = description.filename.removesuffix("data.pkl")
    order = by_name.get(folder + "byteorder")
    if description.file_size > _MAX_DESCRIPTION_BYTES or (order is not None and order.file_size > _MAX_ORDER_BYTES):
        return None
    if order is not None and window.at(_start(window, order), order.file_size) != sys.byteorder.encode():
        return None
    found = _described(window.at(_start(window, description), description.file_size))
    if found is None:
        return None
    storage, offset, shape, strides = found
    record = by_name.get(f"{folder}data/{storage.name}")
    if record is None:
        raise zipfile.BadZipFile(f"no record data/{storage.name}")
    item_bytes = getattr(torch, storage.dtype).itemsize
    if record.file_size != storage.count * item_bytes:
        raise zipfile.BadZipFile(
            f"record {record.filename} has {record.file_size} bytes, {storage.count} elements take "
            f"{storage.count * item_bytes}"
        )
    is_contiguous = all(
        length == 1 or stride == wanted
        for length, stride, wanted in zip(shape, strides, contiguous_strides(shape), strict=True)
    )
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if 0 not in shape and not 0 <= last < storage.count:
        raise zipfile.BadZipFile(f"a tensor of shape {shape} does not fit into {storage.count} stored elements")
    return RawTensor(
        start=_start(window, record) + offset * item_bytes,
        dtype=storage.dtype,
        shape=shape,
        is_contiguous=is_contiguous,
    )


def _start(window: FileWindow, record: zipfile.ZipInfo) -> int:
    """First byte of a record's content; it lies in the window as a whole."""
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise zipfile.BadZipFile(f"record {record.filename} is compressed, must be stored")
    fields = LOCAL_HEADER.unpack(window.at(record.header_offset, LOCAL_HEADER.size))
    if fields[0] != b"PK\3\4":
        raise zipfile.BadZipFile(f"no header of record {record.filename} at {record.header_offset}")
    start = record.header_offset + LOCAL_HEADER.size + fields[-2] + fields[-1]
    if start + record.file_size > window.seek(0, os.SEEK_END):
        raise EOFError(f"record {record.filename} ends behind the archive")
    return start


@dataclass(frozen=True, kw_only=True, slots=True)
class _Storage:
    dtype: str
    name: str
    count: int


class _Rebuilt:
    """The arguments of the call that would rebuild the tensor; nothing is called."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a tensor's description has a state")


class _OtherClass(pickle.UnpicklingError):
    """The description names a class that a plain tensor has not."""


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> object:
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuilt
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return dict
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        raise _OtherClass(f"{module_name}.{global_name}")

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(name), str(), int(count)) if dtype in STORAGE_NAMES and count >= 0:
                return _Storage(dtype=dtype, name=name, count=count)
        raise _OtherClass("an unknown kind of storage")


def _described(raw: bytes) -> tuple[_Storage, int, tuple[int, ...], tuple[int, ...]] | None:
    """(storage, offset in it, shape, strides in elements), or None where it is no plain tensor."""
    try:
        found = _DescriptionUnpickler(io.BytesIO(raw)).load()
    except _OtherClass:
        return None
    except PICKLE_ERRORS as error:
        raise zipfile.BadZipFile(f"the tensor's description is damaged ({error!r})") from error
    match found:
        case _Rebuilt(arguments=(_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), _)):
            numbers = (offset, *shape, *strides)
            if len(shape) == len(strides) and all(type(number) is int and number >= 0 for number in numbers):
                return storage, offset, shape, strides
    return None
