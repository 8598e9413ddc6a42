"""`clipo train RECIPE.yaml [key=value ...]`: check everything, then run; resumes a run that was interrupted."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clipo_megatron.checkpoint.file_lock import take_lock
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.load import read_recipe

if TYPE_CHECKING:
    from clipo_megatron.controller.stop import StopRequest
    from clipo_megatron.data.prompts import PromptSet

EXIT_UNFINISHED = 85
"""Exit code of a run that was stopped, saved, and wants to go on; only where `REQUEUE_VARIABLE` is set, else it is 0."""
REQUEUE_VARIABLE, END_TIME_VARIABLE = "CLIPO_REQUEUE", "CLIPO_END_TIME"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("train", help="train a policy", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, e.g. examples/quickstart/recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. layout.tp=4 run.steps=10")
    parser.add_argument("--check", action="store_true", help="check, print the resolved recipe, start nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the recipe and its files, then train.

    Raises:
        ConfigError: all faults found before anything was started.
    """
    # Imported late here and below: each verifier process imports this module again, and has no use for torch.
    from clipo_megatron.checks.preflight import device_problems, file_problems

    recipe, problems = read_recipe(args.recipe, args.overrides)
    if recipe is not None:
        problems += file_problems(recipe)
    if problems or recipe is None:
        raise ConfigError(problems)
    if problems := device_problems(recipe):
        raise ConfigError(problems)
    train, evaluation = _load_data(recipe)
    if args.check:
        print(recipe.to_yaml(), end="")
        return 0
    return _train(recipe, train, evaluation)


def _load_data(recipe: Recipe) -> tuple[PromptSet, PromptSet | None]:
    from clipo_megatron.checks.preflight import data_problems
    from clipo_megatron.controller.loop import limit_per_source
    from clipo_megatron.data.prompts import load_prompts
    from clipo_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(recipe.model.path))
    train = load_prompts(recipe.data.train, tokenizer, max_prompt_tokens=recipe.data.max_prompt_tokens)
    if problems := data_problems(train, recipe):
        raise ConfigError(problems)
    if not recipe.data.evaluation:
        return train, None
    evaluation = load_prompts(recipe.data.evaluation, tokenizer, max_prompt_tokens=recipe.data.max_prompt_tokens)
    if not len(evaluation):
        raise ConfigError(
            f"data.evaluation: all {evaluation.num_overlong} prompts are longer than data.max_prompt_tokens"
        )
    return train, limit_per_source(evaluation, recipe.evaluation.max_prompts)


def _train(recipe: Recipe, train: PromptSet, evaluation: PromptSet | None) -> int:
    import torch

    from clipo_megatron.cluster.loopback import keep_to_this_machine

    keep_to_this_machine()
    from clipo_megatron.checkpoint.training import find_resume, list_checkpoints
    from clipo_megatron.checks.resume import resume_notes
    from clipo_megatron.cluster.session import place, ray_session
    from clipo_megatron.controller.loop import TrainingLoop, run_folder
    from clipo_megatron.rewards.pool import Verifiers

    device = "cuda" if torch.cuda.is_available() and recipe.run.device != "cpu" else "cpu"
    console = Console()
    folder = run_folder(recipe)
    lock = _prepare_folder(folder, recipe)
    console.print(
        f"run {folder}: {len(train)} training prompts ({train.num_overlong} over-long dropped), "
        f"{recipe.layout.world_size} policy ranks ({recipe.degrees or 'nothing split'}), "
        f"{recipe.rollout.engines} engines on {device}",
        highlight=False,
        soft_wrap=True,
    )
    if checkpoints := list_checkpoints(folder / "checkpoints"):
        console.print(f"checking all files of {checkpoints[-1]} before going on from it", soft_wrap=True)
    resume = find_resume(folder / "checkpoints")
    if resume is not None:
        for note in resume_notes(recipe, resume.checkpoint, data_hash=train.hash):
            console.print(note, highlight=False, soft_wrap=True)
    with (
        lock,
        Verifiers(recipe.rewards.workers, recipe.rewards.timeout_s, recipe.rewards.max_answer_chars) as verifiers,
        ray_session(recipe, device=device),
        stop_signals(_end_time()) as stop,
    ):
        verifiers.self_test()
        started = time.perf_counter()
        policy, engines = place(recipe, device=device, log_folder=folder / "logs")
        console.print(
            f"workers up after {time.perf_counter() - started:.0f} s, logs in {folder / 'logs'}", soft_wrap=True
        )
        with _progress(console, recipe.run.steps) as on_row:
            outcome = TrainingLoop(
                recipe,
                policy=policy,
                engines=engines,
                verifiers=verifiers,
                train=train,
                evaluation=evaluation,
                resume=resume,
                on_row=on_row,
                stop=stop,
            ).run()
    ended = f"done: metrics {folder / 'metrics.jsonl'}, Hugging Face checkpoint {outcome.exported}"
    if outcome.stopped:
        whence = outcome.checkpoint or "the beginning: time was too short for a checkpoint"
        ended = f"stopped after step {outcome.progress.step}; the same command goes on from {whence}"
    console.print(ended, soft_wrap=True)
    return EXIT_UNFINISHED if outcome.stopped and os.environ.get(REQUEUE_VARIABLE) else 0


def _end_time() -> float | None:
    """When this process will be killed, seconds since the epoch.

    Raises:
        ConfigError: the variable holds no number.
    """
    value = os.environ.get(END_TIME_VARIABLE, "")
    try:
        return float(value) if value else None
    except ValueError:
        raise ConfigError(f"{END_TIME_VARIABLE} = {value}: must be seconds since the epoch, as `date +%s`") from None


def _prepare_folder(folder: Path, recipe: Recipe) -> TextIO:
    """Make the run's folder this process's own; it is free again when the returned file is closed.

    Raises:
        ConfigError: another run has it, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    if not take_lock(lock.fileno(), folder, otherwise="choose a run.folder on another file system"):
        raise ConfigError(f"run.name = {recipe.run.name}: another run is using {folder}; choose another name")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    log = logging.FileHandler(folder / "driver.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(log)
    root.setLevel(logging.INFO)
    return lock


@contextmanager
def stop_signals(end_time: float | None) -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGUSR1 ask for a stop; a second one interrupts.

    Args:
        end_time: of `StopRequest`.
    """
    from clipo_megatron.controller.stop import StopRequest

    stop = StopRequest(end_time=end_time)

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.is_asked and number == signal.SIGUSR1:
            return  # as good as said once
        if stop.is_asked:
            raise KeyboardInterrupt
        logging.getLogger(__name__).info("%s: stopping", signal.Signals(number).name)
        stop.ask()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            # What is left to do must not be ended by a call to stop that comes again.
            is_repeated = stop.is_asked and number == signal.SIGUSR1
            signal.signal(number, signal.SIG_IGN if is_repeated else handler)


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A bar on a terminal, and one line a step everywhere."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps)

        def on_row(row: dict[str, float]) -> None:
            line = _line(row, steps)
            console.print(line, highlight=False, soft_wrap=True)
            logging.getLogger(__name__).info("%s", line)  # with its time: `clipo why` tells by it what the run outlived
            progress.update(task, completed=row["step"])

        yield on_row


def _line(row: dict[str, float], steps: int) -> str:
    parts = [f"step {int(row['step'])}/{steps}"]
    shown = (
        ("accuracy", "reward/accuracy", ".3f"),
        ("reward", "reward/total_mean", "+.3f"),
        ("contrastive loss", "contrastive/loss", ".3f"),
        ("KL", "policy/kl", ".4f"),
        ("length", "rollout/response_length_mean", ".0f"),
        ("s", "seconds/step", ".1f"),
    )
    parts += [f"{name} {row[key]:{form}}" for name, key, form in shown if key in row]
    parts += [f"{key.removeprefix('evaluation/')} {value:.3f}" for key, value in row.items() if _is_accuracy(key)]
    return "  ".join(parts)


def _is_accuracy(key: str) -> bool:
    return key.startswith("evaluation/") and key.endswith(("pass@1", "mean@n"))
