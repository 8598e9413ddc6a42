"""Which rank does what: pure arithmetic, the same order as Megatron's (tp fastest, then dp, then pp)."""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """How the trainer's ranks are split. `dp` is never set: it is what is left of `world_size`."""

    world_size: int
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout.{name} = {getattr(self, name)}: must be >= 1")
        if self.world_size % (self.tp * self.pp):
            raise ConfigError(
                f"layout.world_size = {self.world_size}: must be a multiple of tp * pp = {self.tp} * {self.pp} = "
                f"{self.tp * self.pp}"
            )

    @property
    def dp(self) -> int:
        """Data parallel degree."""
        return self.world_size // (self.tp * self.pp)

    def tp_rank(self, rank: int) -> int:
        """Place of `rank` in its tensor parallel group."""
        return rank % self.tp

    def dp_rank(self, rank: int) -> int:
        """Place of `rank` in its data parallel group."""
        return rank // self.tp % self.dp

    def pp_rank(self, rank: int) -> int:
        """Pipeline stage of `rank`."""
        return rank // (self.tp * self.dp)

    def rank(self, *, tp: int, dp: int, pp: int) -> int:
        """The inverse of the three above."""
        return tp + self.tp * (dp + self.dp * pp)

    def is_last_stage(self, rank: int) -> bool:
        """Whether `rank` holds the final norm, the output layer and the contrastive head."""
        return self.pp_rank(rank) == self.pp - 1
