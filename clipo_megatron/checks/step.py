"""Step check: the recipe's policy trains on its longest micro-batches, saves, is killed in a save, and goes on.

On ranks of this machine, under the recipe's own layout. The driver's side; what a rank does: checks/step_ranks.py.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.checkpoint.dist_index import WrittenFile
from clipo_megatron.checkpoint.manifest import Progress
from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.checkpoint.training import RunIdentity, close_checkpoint, find_resume, open_checkpoint
from clipo_megatron.checks.host_memory import allowed_bytes
from clipo_megatron.checks.local_ranks import run_local_ranks, start_server
from clipo_megatron.checks.preflight import existing_folder
from clipo_megatron.errors import CheckError, ConfigError, WorkerError
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.counts import parameter_count

_RANK_MODULE = "clipo_megatron.checks.step_ranks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Longest:
    """The longest rollouts that a recipe allows."""

    prompt_tokens: int
    response_tokens: int
    group_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What was measured."""

    tokens: int
    """Of the largest micro-batch, padding included."""
    micro_batches: int
    """Of one rank."""
    train_s: float
    """Scoring and training of the slowest rank, the first of a process."""
    peak_bytes: int
    """Of the rank with most: memory that torch took of its GPU; on a CPU the process's."""
    saved_bytes: int
    save_s: float
    """Until all ranks' files are on the disk."""
    load_s: float
    """Checksums of all files and reading them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """What one rank did and saw."""

    state: dict[str, int]
    """Checksum of each tensor that this rank saves."""
    files: tuple[WrittenFile, ...] = ()
    plain: dict[str, object] | None = None
    """What is no tensor, from the rank that reports."""
    warnings: tuple[str, ...] = ()
    """Of the load."""
    tokens: int = 0
    micro_batches: int = 0
    train_s: float = 0.0
    save_s: float = 0.0
    load_s: float = 0.0
    peak_bytes: int = 0


def prepare_ranks() -> None:
    """Begin importing what the ranks need, in the background."""
    start_server([_RANK_MODULE])


def check_step(
    settings: PolicySettings, longest: Longest, folder: Path, *, timeout_s: float, on_stage: Callable[[str], None]
) -> StepReport:
    """Train on full micro-batches and save; kill all ranks in their next save; load in new ones and compare.

    Args:
        settings: of the recipe's policy.
        longest: of the recipe.
        folder: where the recipe's run shall be; files lie beside it for the time of the check.
        timeout_s: deadline of each start of the ranks.
        on_stage: told what begins.

    Raises:
        ConfigError: the model does not fit into this machine's memory.
        CheckError: what was loaded is not what was saved, or the killed save spoilt the one before.
        CheckpointError: the folder can't hold a checkpoint.
        WorkerError: a rank failed or was late: out of memory, say.
    """
    settings = replace(settings, routing_replay=False, algorithm=replace(settings.algorithm, updates_per_step=1))
    if settings.device == "cpu":
        _check_host_memory(settings)
    there = existing_folder(folder)
    scratch = Path(tempfile.mkdtemp(prefix=".clipo-step-", dir=there))
    try:
        with tempfile.TemporaryDirectory(prefix="clipo-step-") as told:
            return _in_folder(settings, longest, scratch, Path(told), timeout_s=timeout_s, on_stage=on_stage)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _in_folder(
    settings: PolicySettings,
    longest: Longest,
    scratch: Path,
    told: Path,
    *,
    timeout_s: float,
    on_stage: Callable[[str], None],
) -> StepReport:
    world_size, device = settings.layout.world_size, settings.device
    on_stage(f"{world_size} ranks: train on micro-batches of full length, save, and be killed in the next save")
    beside, killed = open_checkpoint(scratch, 1), open_checkpoint(scratch, 2)
    try:
        run_local_ranks(
            _train_and_die, settings, longest, beside, killed, told, world_size=world_size, device=device,
            timeout_s=timeout_s,
        )  # fmt: skip
    except WorkerError:
        left = [told / f"{rank}.pickle" for rank in range(world_size)]
        if not all(path.is_file() for path in left):  # else they have come as far as the kill
            raise
        ranks: list[RankStep] = [pickle.loads(path.read_bytes()) for path in left]
    else:
        raise CheckError("ranks that were to be killed have ended by themselves")
    run = RunIdentity(fingerprint="check", data_hash="", recipe="", model_path=settings.model_path)
    files = [file for rank in ranks for file in rank.files]
    _, saved_bytes = close_checkpoint(
        beside, progress=Progress(step=1), run=run, sound=True, accuracy=None, files=files, policy=_plain(ranks)
    )
    on_stage(f"{world_size} new ranks: load")
    started = time.perf_counter()
    resume = find_resume(scratch)
    if resume is None or resume.progress.step != 1:
        raise CheckError(f"{scratch}: the killed save of step 2 hides the finished one of step 1")
    checksums_s = time.perf_counter() - started
    loaded: list[RankStep] = run_local_ranks(
        _load, settings, resume.checkpoint, world_size=world_size, device=device, timeout_s=timeout_s
    )
    _compare(ranks, loaded)
    return StepReport(
        tokens=max(rank.tokens for rank in ranks),
        micro_batches=max(rank.micro_batches for rank in ranks),
        train_s=max(rank.train_s for rank in ranks),
        peak_bytes=max(rank.peak_bytes for rank in ranks),
        saved_bytes=saved_bytes,
        save_s=max(rank.save_s for rank in ranks),
        load_s=checksums_s + max(rank.load_s for rank in loaded),
    )


def _plain(ranks: list[RankStep]) -> dict[str, object]:
    (plain,) = (rank.plain for rank in ranks if rank.plain is not None)
    return plain


def _compare(ranks: list[RankStep], loaded: list[RankStep]) -> None:
    """Each rank's state, tensor by tensor, by checksums of its bytes."""
    for number, (saved, found) in enumerate(zip(ranks, loaded, strict=True)):
        if found.warnings:
            raise CheckError(f"rank {number}: not all of the state came back: {'; '.join(found.warnings)}")
        differ = sorted(
            name for name in saved.state.keys() | found.state.keys() if saved.state.get(name) != found.state.get(name)
        )
        if differ:
            raise CheckError(
                f"rank {number}: {len(differ)} of {len(saved.state)} tensors are other ones after a save and a load, first "
                f"{differ[0]}: the run folder's file system, or this layout, loses training state"
            )


def _check_host_memory(settings: PolicySettings) -> None:
    arch, available = read_architecture(settings.model_path), allowed_bytes()
    element = 4 if settings.dtype == "float32" else 2
    copies = settings.layout.dp * settings.layout.cp
    # Weights and float32 gradients on each copy; masters and two moments, and the snapshot of all that is saved.
    needed = parameter_count(arch) * (copies * (element + 4) + 2 * 12)
    if available is not None and needed > available:
        raise ConfigError(
            f"layout.world_size = {settings.layout.world_size}: all ranks on this machine need about "
            f"{size_text(needed, is_binary=True)} for weights, gradients and optimizer, {size_text(available, is_binary=True)} are "
            "free; run the check where the layout fits"
        )


def _train_and_die(settings: PolicySettings, longest: Longest, beside: Path, killed: Path, told: Path) -> None:
    # In the rank's process: the caller's own never imports megatron.
    from clipo_megatron.checks.step_ranks import train_and_die

    train_and_die(settings, longest, beside, killed, told)


def _load(settings: PolicySettings, checkpoint: Path) -> RankStep:
    from clipo_megatron.checks.step_ranks import load

    return load(settings, checkpoint)
