"""The training loop: steps, evaluation, checkpoints, metrics; resumes where it stood, stops when asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.checkpoint.manifest import Progress, last_sound, list_checkpoints
from clipo_megatron.checkpoint.retention import Retention
from clipo_megatron.checkpoint.training import Resume, RunIdentity
from clipo_megatron.checks.resume import has_optimizer, resume_notes
from clipo_megatron.checks.resume_model import reference_hash
from clipo_megatron.controller.clock import PhaseClock
from clipo_megatron.controller.evaluate import evaluate
from clipo_megatron.controller.metrics import MetricsWriter, is_evaluation, read_metrics
from clipo_megatron.controller.protocols import Engines, Policy
from clipo_megatron.controller.report import is_sound, mean_accuracy, step_metrics, write_answers, write_rollouts
from clipo_megatron.controller.saving import CheckpointSaver
from clipo_megatron.controller.step import Step
from clipo_megatron.controller.stop import StepAbandoned, StopRequest
from clipo_megatron.data.order import PromptOrder
from clipo_megatron.data.prompts import PromptSet
from clipo_megatron.errors import CheckError, ClipoError
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import Sampling
from clipo_megatron.rewards.pool import Verifiers
from clipo_megatron.slurm.job_folder import PHASE_FILE, write_beside

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """How a run ended."""

    progress: Progress
    stopped: bool
    """Ended early: asked to, or out of time."""
    checkpoint: Path | None
    """The newest one; None where time was too short for any."""
    exported: Path | None
    """Hugging Face folder; None when stopped early."""


class TrainingLoop:
    """Everything of one run that outlives a step."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        policy: Policy,
        engines: Engines,
        verifiers: Verifiers,
        train: PromptSet,
        evaluation: PromptSet | None,
        resume: Resume | None,
        on_row: Callable[[dict[str, float]], None],
        stop: StopRequest,
    ) -> None:
        self._recipe = recipe
        self._policy = policy
        self._engines = engines
        self._verifiers = verifiers
        self._train = train
        self._evaluation = evaluation
        self._resume = resume
        self._on_row = on_row
        self._stop = stop
        self._folder = run_folder(recipe)
        self._order = PromptOrder(len(train), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
        self._at_step = 0
        self._clock = PhaseClock(self._tell_phase)
        self._step = Step(
            recipe, policy, engines, verifiers, self._clock, while_sampling=stop.abandonable, after_sampling=self._poll
        )
        self._saver = _make_saver(recipe, policy, train, self._folder / "checkpoints")
        self._sound = True
        """Whether all losses and gradients since the newest checkpoint were finite."""
        self._unsound_steps = 0
        """In a row, up to now."""

    def run(self) -> RunOutcome:
        """Run to the last step, or until a stop is asked for or time is up.

        A step that has not got further than its rollouts is given up then: repeated, it is the same. Others are finished.
        An evaluation is given up, too, and made when the run goes on. The export of a finished run is left to the next start
        where time is too short for it.

        All checkpoints are complete when it returns, and also when it raises, if the ranks could still write them.

        Raises:
            CheckError: an invariant of the run is broken.
            CheckpointError: a checkpoint can't be written or loaded.
            WorkerError: a worker failed.
        """
        progress, resumed = self._restore()
        before = read_metrics(self._folder / "metrics.jsonl") if resumed else []
        for row in before:  # steps may have taken another time, on other nodes; saves have hardly
            self._stop.note({key: value for key, value in row.items() if key.startswith("checkpoint/")})
        writer = MetricsWriter(
            self._folder, tensorboard=self._recipe.run.tensorboard, resume_step=progress.step if resumed else None
        )
        try:
            self._step.sync(progress.version)
            if self._owes_evaluation(progress, before) and (measures := self._evaluate(progress)):
                self._write(writer, {"step": float(progress.step), "version": float(progress.version)} | measures)
            progress = self._all_steps(writer, progress, saved=progress if resumed else None)
        except (ClipoError, OSError):
            self._saver.rescue()
            raise
        finally:
            writer.close()
        stopped = progress.step < self._recipe.run.steps or not self._allows_export()
        return RunOutcome(
            progress=progress,
            stopped=stopped,
            checkpoint=next(reversed(list_checkpoints(self._folder / "checkpoints")), None),
            exported=None if stopped else self._export("final"),
        )

    def _all_steps(self, writer: MetricsWriter, progress: Progress, *, saved: Progress | None) -> Progress:
        section, accuracy = self._recipe.checkpoint, None
        while progress.step < self._recipe.run.steps and self._stop.allows_step():
            try:
                progress, row = self._one_step(progress)
            except StepAbandoned:
                logger.info("step %d is given up while it generates: asked to stop", progress.step + 1)
                break
            self._write(writer, row)
            self._stop.note(row)
            accuracy = mean_accuracy(row)
            self._sound = self._sound and is_sound(row)
            self._count_unsound(row, progress)
            self._poll()
            if self._is_due(progress.step, section.every) and self._save(progress, accuracy=accuracy):
                saved = progress
            if self._is_due(progress.step, section.hf_every):
                if self._allows_export():
                    self._export(f"step_{progress.step:08d}")
                else:
                    logger.warning("step %d: no export, too little time is left; see clipo ckpt export", progress.step)
        if saved != progress:
            self._save(progress, accuracy=accuracy)
        with self._clock.phase("save"):
            self._saver.finish()
        return progress

    def _count_unsound(self, row: dict[str, float], progress: Progress) -> None:
        self._unsound_steps = 0 if is_sound(row) else self._unsound_steps + 1
        limit = self._recipe.run.max_unsound_steps
        if not limit or self._unsound_steps < limit:
            return
        good = last_sound(self._folder / "checkpoints")
        raise CheckError(
            f"steps {progress.step - limit + 1} to {progress.step}: losses or gradients were not finite {limit} steps in a row "
            f"(run.max_unsound_steps); the last good checkpoint is {good or 'none'}. Look at policy/grad_norm, "
            "rollout/response_length_max and the rollouts of these steps; a lower optimizer.learning_rate, a tighter "
            "optimizer.clip_grad or a wider precision.recipe helps. To go on from there, remove the step folders after it"
        )

    def _one_step(self, progress: Progress) -> tuple[Progress, dict[str, float]]:
        algorithm, step = self._recipe.algorithm, progress.step + 1
        self._at_step = step
        rows = self._order.take(progress.prompts_taken, algorithm.prompts_per_step)
        report = self._step.run([self._train.prompts[row] for row in rows], step=step, version=progress.version)
        write_rollouts(self._folder / "rollouts" / f"step_{step:08d}.jsonl", report)
        progress = Progress(step=step, version=report.version, prompts_taken=progress.prompts_taken + len(rows))
        evaluation: dict[str, float] = {}
        if self._evaluates_after(step):
            evaluation = self._evaluate(progress)
        metrics = step_metrics(report, reward_floor=self._recipe.contrastive.reward_floor, seconds=self._clock.take())
        epoch = progress.prompts_taken / len(self._train)
        metrics |= evaluation | self._engines.take_metrics() | self._saver.take_metrics()
        return progress, {"step": float(step), "epoch": epoch} | metrics

    def _owes_evaluation(self, progress: Progress, before: list[dict[str, float]]) -> bool:
        """Whether one is due before any step: the first of a run, or one that was given up when the run was stopped."""
        if self._resume is None:
            return self._recipe.evaluation.at_start
        is_done = any(row["step"] == progress.step and any(map(is_evaluation, row)) for row in before)
        return not is_done and self._evaluates_after(progress.step)

    def _evaluates_after(self, step: int) -> bool:
        return step == self._recipe.run.steps or self._is_due(step, self._recipe.evaluation.every)

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        if self._evaluation is None:
            return {}
        section = self._recipe.evaluation
        sampling = Sampling(
            samples=section.samples,
            temperature=section.temperature,
            top_p=section.top_p,
            max_tokens=self._recipe.rollout.max_response_tokens,
            seed=self._recipe.run.seed,
            step=0,
        )
        try:
            with self._clock.phase("evaluate"), self._stop.abandonable():
                evaluation = evaluate(
                    self._evaluation.prompts, self._engines, self._verifiers, sampling, version=progress.version
                )
        except StepAbandoned:
            logger.info("the evaluation after step %d is given up: asked to stop", progress.step)
            return {}
        write_answers(self._folder / "rollouts" / f"evaluation_{progress.step:08d}.jsonl", evaluation.greedy)
        return {
            f"evaluation/{source}/{measure}": value
            for source, measures in evaluation.measures.items()
            for measure, value in measures.items()
        }

    def _restore(self) -> tuple[Progress, bool]:
        """Progress to go on from, and whether a checkpoint was loaded."""
        if self._resume is None:
            return Progress(), False
        checkpoint, progress = self._resume.checkpoint, self._resume.progress
        for note in resume_notes(self._recipe, checkpoint, data_hash=self._train.hash):
            logger.warning("%s", note)
        for warning in self._policy.load(checkpoint, with_optimizer=has_optimizer(checkpoint)):
            logger.warning("%s", warning)
        logger.info("resumed from %s, step %d", checkpoint, progress.step)
        return progress, True

    def _save(self, progress: Progress, *, accuracy: float | None) -> bool:
        """Whether the checkpoint was begun: one that would not be complete before the run is killed is not."""
        if not self._stop.allows_save():
            logger.warning("step %d: no checkpoint, the time that is left is too short for it", progress.step)
            return False
        with self._clock.phase("save"):
            self._saver.begin(progress, sound=self._sound, accuracy=accuracy)
        self._sound = True
        return True

    def _allows_export(self) -> bool:
        """Whether one can be expected to be complete before the run is killed; it is not longer than a save."""
        return not self._stop.is_asked and self._stop.allows_save()

    def _poll(self) -> None:
        with self._clock.phase("save"):
            self._saver.poll()

    def _export(self, name: str) -> Path:
        folder = self._folder / "hf" / name
        with self._clock.phase("save"):
            self._policy.export_hf(folder)
        return folder

    def _tell_phase(self, name: str) -> None:
        """For whoever watches the run: `PHASE_FILE` holds the step and what it is at."""
        write_beside(self._folder / PHASE_FILE, f"{self._at_step} {name}\n")

    def _write(self, writer: MetricsWriter, row: dict[str, float]) -> None:
        writer.write(row)
        self._on_row(row)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0


def _make_saver(recipe: Recipe, policy: Policy, train: PromptSet, folder: Path) -> CheckpointSaver:
    section = recipe.checkpoint
    run = RunIdentity(
        fingerprint=recipe.fingerprint,
        data_hash=train.hash,
        recipe=recipe.to_yaml(),
        model_path=Path(recipe.model.path),
        reference_hash=reference_hash(recipe),
    )
    retention = Retention(keep=section.keep, keep_every=section.keep_every, keep_best=section.keep_best)
    return CheckpointSaver(folder, policy, run=run, retention=retention, asynchronous=section.asynchronous)


def run_folder(recipe: Recipe) -> Path:
    """Folder of the run."""
    return Path(recipe.run.folder) / recipe.run.name


def limit_per_source(prompts: PromptSet, limit: int) -> PromptSet:
    """The first `limit` prompts of each source; all of them when `limit` is 0."""
    if limit == 0:
        return prompts
    taken: dict[str, int] = {}
    kept = []
    for prompt in prompts.prompts:
        taken[prompt.source] = taken.get(prompt.source, 0) + 1
        if taken[prompt.source] <= limit:
            kept.append(prompt)
    return replace(prompts, prompts=tuple(kept))
