"""What tests of the import share: a small model whose import has many units and blocks, as a large one's has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.conversion_plan import smallest_layout
from clipo_megatron.checkpoint.model_import import ImportReport, import_model

SMALL_MODEL = {
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 6,
    "ffn_size": 20,
    "expert_ffn_size": 10,
    "vocab_size": 307,
    "tokenizer_size": 280,
    "max_shard_size": "60KB",
}
UNIT_BYTES, BLOCK_ELEMENTS = 30_000, 500


def small_model(folder: Path) -> Path:
    return make_tiny_hf(folder, "qwen2", **SMALL_MODEL)


def small_import(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    **degrees: int,
) -> ImportReport:
    return import_model(
        source,
        target,
        layout=smallest_layout(degrees),
        dtype=dtype,
        unit_bytes=UNIT_BYTES,
        block_elements=BLOCK_ELEMENTS,
        on_progress=on_progress,
    )


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
