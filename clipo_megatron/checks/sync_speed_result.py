"""What the sync benchmark measures on, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clipo_megatron.parallel.layout import ParallelLayout

_GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSpeedSettings:
    """What is measured."""

    model_path: Path
    """Hugging Face folder with weights; with a tokenizer if an engine is started."""
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    trainer: ParallelLayout
    """All of its ranks in one process; on a GPU all on the same one."""
    engine_tp: int
    """All ranks of the engine in turn; a real engine runs them at the same time."""
    repeats: int
    """Timed turns; one more is run before, untimed."""
    bucket_mib: int
    """Of the path with whole tensors."""
    with_engine: bool
    """Start a real engine; it takes 10 s or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSpeed:
    """Medians, in seconds; None where it was not measured."""

    num_bytes: int
    """Copied into all ranks of one engine."""
    copies: int
    memory_copy_s: float
    """As many bytes from one warm buffer of the process into another: the floor."""
    planned_s: float
    """The plan's copies out of the trainer's process, stamps checked before and after."""
    verify_s: float
    """Checksums of all slices on both sides."""
    open_s: float
    """Once: opening the trainer's memory, first touch of every page."""
    bind_s: float
    """Once: laying out all copies."""
    engine_planned_s: float | None
    """A real engine, begin to commit, by the plan; on a CPU it repacks all weights for its kernels."""
    engine_whole_s: float | None
    """A real engine, begin to commit, with whole tensors in buckets through vLLM's own loading."""
    vllm_ipc_s: float | None
    """The same engine, vLLM's own ipc transfer: start to finish, handles made for each update."""
    vllm_nccl_s: float | None
    """Another engine, vLLM's own nccl transfer from a second GPU, in packed buffers."""
    not_measured: dict[str, str]
    """Why vLLM's own transfers were not, by backend."""

    @property
    def of_floor(self) -> float:
        """Rate of the planned copies over that of a plain copy."""
        return self.memory_copy_s / self.planned_s

    @property
    def planned_gb_per_s(self) -> float:
        """Rate of the planned copies."""
        return self.num_bytes / _GB / self.planned_s

    @property
    def memory_gb_per_s(self) -> float:
        """Rate of a plain copy."""
        return self.num_bytes / _GB / self.memory_copy_s

    @property
    def engine_whole_over_planned(self) -> float | None:
        """A real engine's stall with whole tensors over its stall by the plan: like for like."""
        if self.engine_whole_s is None or self.engine_planned_s is None:
            return None
        return self.engine_whole_s / self.engine_planned_s

    @property
    def engine_whole_over_copies(self) -> float | None:
        """A real engine's stall with whole tensors over the planned copies alone, which no engine repacks."""
        return None if self.engine_whole_s is None else self.engine_whole_s / self.planned_s

    @property
    def times_faster_than_vllm(self) -> float | None:
        """The stall of vLLM's own ipc transfer over that of planned copies, in the same engine."""
        if self.vllm_ipc_s is None or self.engine_planned_s is None:
            return None
        return self.vllm_ipc_s / self.engine_planned_s

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the ratios."""
        return asdict(self) | {
            "of_floor": self.of_floor,
            "planned_gb_per_s": self.planned_gb_per_s,
            "memory_gb_per_s": self.memory_gb_per_s,
            "engine_whole_over_planned": self.engine_whole_over_planned,
            "engine_whole_over_copies": self.engine_whole_over_copies,
            "times_faster_than_vllm": self.times_faster_than_vllm,
        }
