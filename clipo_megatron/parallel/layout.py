"""Which rank does what: pure arithmetic in Megatron's order, tp fastest, then cp, then dp, then pp.

Expert parallelism deals the same ranks out a second time: inside a pipeline stage, etp fastest, then ep, and what is
left holds copies of the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """How the trainer's ranks are split. `dp` is never set: it is what is left of `world_size`."""

    world_size: int
    tp: int = 1
    """Tensor parallel degree."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Model chunks of one stage; more than one: the interleaved schedule."""
    cp: int = 1
    """Context parallel degree: ranks that share out the tokens of each sequence."""
    ep: int = 1
    """Expert parallel degree: ranks that share out the experts of a layer."""
    etp: int = 1
    """Tensor parallel degree of an expert."""

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "vpp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout.{name} = {getattr(self, name)}: must be >= 1")
        if self.world_size % (self.tp * self.cp * self.pp):
            raise ConfigError(
                f"layout.world_size = {self.world_size}: must be a multiple of tp * cp * pp = {self.tp} * {self.cp} * "
                f"{self.pp} = {self.tp * self.cp * self.pp}"
            )
        if self.stage_size % (self.ep * self.etp):
            raise ConfigError(
                f"layout.ep * layout.etp = {self.ep} * {self.etp}: must divide the {self.stage_size} ranks of a "
                "pipeline stage (world_size / pp)"
            )

    @property
    def dp(self) -> int:
        """Data parallel degree."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.pp

    def tp_rank(self, rank: int) -> int:
        """Place of `rank` in its tensor parallel group."""
        return rank % self.tp

    def cp_rank(self, rank: int) -> int:
        """Place of `rank` in its context parallel group."""
        return rank // self.tp % self.cp

    def dp_rank(self, rank: int) -> int:
        """Place of `rank` in its data parallel group."""
        return rank // (self.tp * self.cp) % self.dp

    def pp_rank(self, rank: int) -> int:
        """Pipeline stage of `rank`."""
        return rank // self.stage_size

    def etp_rank(self, rank: int) -> int:
        """Place of `rank` among those that split each of its experts."""
        return rank % self.stage_size % self.etp

    def ep_rank(self, rank: int) -> int:
        """Place of `rank` among those that share out the experts of a layer."""
        return rank % self.stage_size // self.etp % self.ep

    def rank(self, *, tp: int, dp: int, pp: int, cp: int = 0) -> int:
        """The inverse of the first four."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def is_last_stage(self, rank: int) -> bool:
        """Whether `rank` holds the final norm, the output layer and the contrastive head."""
        return self.pp_rank(rank) == self.pp - 1

    def ranks_of_weights(self, stage: int) -> list[int]:
        """Ranks that give out a stage's weights together: its first tp ranks, or all of it where experts are shared out."""
        first = stage * self.stage_size
        return list(range(first, first + (self.tp if self.ep * self.etp == 1 else self.stage_size)))
