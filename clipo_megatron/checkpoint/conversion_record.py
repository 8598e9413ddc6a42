"""`conversion.json` of a converted model folder: what it holds, where it came from, size and checksum of every file.

Like a training checkpoint's manifest it holds a checksum of itself, so that any changed byte of the folder is found.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from clipo_megatron import __version__
from clipo_megatron.errors import CheckpointError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.counts import parameter_count

RECORD_FILE = "conversion.json"
CONFIG_FOLDER = "config"
"""Subfolder with the source's config.json, generation config, tokenizer and chat template."""
IMPORTED_MODEL = "imported model"

_OWN_CHECKSUM = "record_checksum"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRecord:
    """What a converted folder holds."""

    kind: str
    """IMPORTED_MODEL."""
    source: str
    """Folder that was converted."""
    source_identity: str
    """SHA-256 of the names, sizes, times and headers of the source's files."""
    layout: dict[str, int]
    """Degrees that the chunks were cut by: tp, pp, vpp, ep, etp. Any layout can load them."""
    dtype: str
    """Number format of the weights: torch's names, several with commas between them."""
    architecture: dict[str, str | int | bool]
    """Family and main sizes, for readers."""
    versions: dict[str, str]
    """Of this package and of torch."""
    files: dict[str, int]
    """Bytes of each file, by its path in the folder with "/"; this record is left out."""
    checksums: dict[str, str]
    """`checksum.file_checksum` of each of `files`."""


def write_record(folder: Path, record: ConversionRecord) -> None:
    """Write `folder`/conversion.json and sync it to disk.

    Raises:
        OSError: it can't be written.
    """
    with (folder / RECORD_FILE).open("w", encoding="utf-8") as file:
        file.write(_text(record))
        file.flush()
        os.fsync(file.fileno())


def read_record(folder: Path) -> ConversionRecord:
    """Read `folder`/conversion.json. The other files are not looked at: see `file_faults`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / RECORD_FILE
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        found = content.pop(_OWN_CHECKSUM)
        record = ConversionRecord(**content)
        is_sound = text == _text(record)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a folder that `clipo ckpt import` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: can't be read ({error!r}); import the model again") from error
    if not is_sound:
        raise CheckpointError(
            f"{path}: does not have the content that its own checksum {found} says; import the model again"
        )
    return record


def file_faults(folder: Path, files: Mapping[str, int]) -> dict[str, str]:
    """Compare names and sizes of a folder's files with its record; contents are for `checksum.content_faults`.

    Args:
        folder: of the record.
        files: bytes of each file, as in the record.

    Returns:
        Path in the folder to what is wrong with that file, of files that are missing, of another size, or unknown.
    """
    faults: dict[str, str] = {}
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            faults[name] = f"is missing, {RECORD_FILE} says {size} bytes"
        elif (found := path.stat().st_size) != size:
            faults[name] = f"has {found} bytes, {RECORD_FILE} says {size} bytes"
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unknown = present - files.keys() - {RECORD_FILE}
    return faults | dict.fromkeys(sorted(unknown), f"is not in {RECORD_FILE}")


def architecture_summary(arch: Architecture, *, padded_vocab: int) -> dict[str, str | int | bool]:
    """The record's words about a model.

    Args:
        arch: of the model.
        padded_vocab: rows of the embedding as stored.
    """
    summary: dict[str, str | int | bool] = {
        "family": arch.family,
        "parameters": parameter_count(arch),
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "vocab_size": arch.vocab_size,
        "padded_vocab": padded_vocab,
        "tied": arch.tied,
    }
    return summary if arch.experts is None else summary | {"num_experts": arch.experts.num_experts}


def versions() -> dict[str, str]:
    """Of the packages whose code decides what a conversion writes."""
    return {"clipo_megatron": __version__, "torch": version("torch")}


def _text(record: ConversionRecord) -> str:
    """The one form that a record has."""
    content = asdict(record)
    own = zlib.crc32(json.dumps(content).encode())
    return json.dumps(content | {_OWN_CHECKSUM: f"{own:08x}"}, indent=1)
