"""Make what the quickstart needs: arithmetic problems, a small tokenizer, and a policy that is right on 30-60 % of them.

Everything follows from the seed: `python examples/quickstart/prepare.py --out DIR --seed N`. Two cores, about a minute.
The warm start is plain supervised training in transformers; it stops while there is much left for RL to learn.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

NUM_TERMS = 6
BLUNT_SHARE = 0.6
SWAPPED_SHARE = 0.3
WORKED_SHARE, WORKED_SHARE_IF_BLUNT = 0.85, 0.15
NUM_TRAIN, NUM_HELD_OUT, NUM_WARM_START, NUM_STOP = 8192, 512, 40960, 720
BATCH, LEARNING_RATE, WARMUP_STEPS, MAX_STEPS = 64, 3e-3, 50, 1500
CHECK_EVERY, HOPELESS_LOSS = 10, 0.35
AVERAGE_DECAY = 0.95
STOP_AT, BAND = 0.75, (0.30, 0.60)

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One chain of additions and subtractions of digits whose running total never falls below zero."""

    is_blunt: bool
    """Asked without the question mark."""
    question: str
    """`7+8-3+9-4+6=?` or, the blunt way to ask, `7+8-3+9-4+6=`."""
    worked: str
    """One operation a line, `7+8=15`, and the boxed total on the last one."""
    direct: str
    """Nothing but the boxed total."""
    answer: str
    demonstration: str
    """What the warm start shows: `direct`, or `worked` with the operands of some additions swapped, `8+7=15`."""


def draw_problem(rng: random.Random) -> Problem:
    """Draw one problem."""
    total = rng.randint(1, 9)
    question, lines, shown = str(total), [], []
    for _ in range(NUM_TERMS - 1):
        digit = rng.randint(1, 9)
        sign = rng.choice("+-") if total >= digit else "+"
        after = total + digit if sign == "+" else total - digit
        question += f"{sign}{digit}"
        lines.append(f"{total}{sign}{digit}={after}")
        is_swapped = sign == "+" and rng.random() < SWAPPED_SHARE
        shown.append(f"{digit}+{total}={after}" if is_swapped else lines[-1])
        total = after
    is_blunt = rng.random() < BLUNT_SHARE
    direct = f"\\boxed{{{total}}}"
    worked = "\n".join([*lines, direct])
    is_worked = rng.random() < (WORKED_SHARE_IF_BLUNT if is_blunt else WORKED_SHARE)
    return Problem(
        is_blunt=is_blunt,
        question=question + ("=" if is_blunt else "=?"),
        worked=worked,
        direct=direct,
        answer=str(total),
        demonstration="\n".join([*shown, direct]) if is_worked else direct,
    )


def draw_problems(seed: int, count: int) -> list[Problem]:
    """Draw `count` problems, no two of the same terms, however asked; a prefix does not depend on `count`."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw_problem(rng)
        found.setdefault(problem.question.rstrip("=?"), problem)
    return list(found.values())


def write_parquet(path: Path, problems: Sequence[Problem], *, split: str) -> None:
    """Write problems as the reference's rows: data_source, prompt, ability, reward_model, extra_info."""
    rows = [
        {
            "data_source": "quickstart/arithmetic",
            "prompt": [{"role": "user", "content": problem.question}],
            "ability": "math",
            "reward_model": {"ground_truth": problem.answer, "style": "rule"},
            "extra_info": {"index": index, "split": split, "solution": problem.worked},
        }
        for index, problem in enumerate(problems)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so any text can be encoded; the opening of a box and the chat marks are tokens of their own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in (USER, ASSISTANT, END, PAD)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[USER, ASSISTANT]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_policy(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.9 M parameters. head_dim = 32 is the smallest that vLLM's CPU attention has a kernel for."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.get_vocab()[END],
            pad_token_id=tokenizer.get_vocab()[PAD],
            bos_token_id=None,
        )
    )


def render(problem: Problem, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template up to where the answer starts."""
    messages = [{"role": "user", "content": problem.question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def encode(
    problems: Sequence[Problem], answers: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Prompts and answers as ids, int64 [B, L], and the same with -100 wherever nothing is to be learnt."""
    rows: list[tuple[list[int], int]] = []
    for problem, answer in zip(problems, answers, strict=True):
        prompt = tokenizer.encode(render(problem, tokenizer))
        rows.append((prompt + tokenizer.encode(answer + END), len(prompt)))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.get_vocab()[PAD])
    labels = torch.full((len(rows), longest), -100)
    for row, (ids, prompt_length) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return input_ids, labels


@torch.no_grad()
def exact_accuracy(policy: Qwen3ForCausalLM, input_ids: Tensor, labels: Tensor) -> float:
    """Share of answers that greedy decoding would write out token by token: one forward, no generation."""
    predicted = policy(input_ids).logits[:, :-1].argmax(-1)
    right = (predicted == labels[:, 1:]) | (labels[:, 1:] < 0)
    return right.all(dim=1).float().mean().item()


@torch.no_grad()
def greedy_accuracy(policy: Qwen3ForCausalLM, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of problems whose greedily generated last box holds the answer."""
    by_length: dict[int, list[Problem]] = {}
    for problem in problems:
        by_length.setdefault(len(problem.question), []).append(problem)
    correct = 0
    for alike in by_length.values():  # of one prompt length, so no padding
        ids = torch.tensor([tokenizer.encode(render(problem, tokenizer)) for problem in alike])
        answers = policy.generate(  # pyright: ignore[reportAttributeAccessIssue] (transformers' own protocol)
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        for problem, text in zip(alike, tokenizer.batch_decode(answers[:, ids.shape[1] :]), strict=True):
            correct += text.rpartition("\\boxed{")[2].partition("}")[0] == problem.answer
    return correct / len(problems)


def batches(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Batches in the order of the problems, over and over; long and short answers apart, so that little is padding."""
    while True:
        for start in range(0, len(problems) - BATCH + 1, BATCH):
            batch = problems[start : start + BATCH]
            worked = [problem for problem in batch if problem.demonstration != problem.direct]
            direct = [problem for problem in batch if problem.demonstration == problem.direct]
            parts = [part for part in (worked, direct) if part]
            yield [encode(part, [problem.demonstration for problem in part], tokenizer) for part in parts]


def warm_start(
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    problems: Sequence[Problem],
    stop_problems: Sequence[Problem],
    console: Console,
) -> Qwen3ForCausalLM:
    """Train on demonstrations until the running average of the weights works out `STOP_AT` of `stop_problems` right.

    The average, not the last weights: its accuracy climbs smoothly, so the stop lands close to the mark for any seed.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    averaged = cast(Qwen3ForCausalLM, average.module)
    stop_batch = encode(stop_problems, [problem.worked for problem in stop_problems], tokenizer)
    stream = batches(problems, tokenizer)
    columns = (TextColumn("warm start"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("warm start", total=STOP_AT, note="")
        for step in range(1, MAX_STEPS + 1):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
            loss = train_step(policy, optimizer, next(stream))
            average.update_parameters(policy)
            accuracy = 0.0
            if step % CHECK_EVERY == 0 and loss < HOPELESS_LOSS:
                accuracy = exact_accuracy(averaged, *stop_batch)
            if step % 50 == 0 or accuracy:
                note = f"step {step:4d}  loss {loss:.3f}  accuracy {accuracy:.3f} of {STOP_AT:.2f}"
                progress.update(task, completed=min(accuracy, STOP_AT), note=note)
                if not console.is_terminal:
                    console.print(note)
            if accuracy >= STOP_AT:
                return averaged
    raise SystemExit(f"prepare: accuracy {accuracy:.3f} after {MAX_STEPS} steps, below {STOP_AT}; try another --seed")


def train_step(
    policy: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, parts: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """One supervised update on all parts together; returns the loss in nats a token."""
    denominator = sum(int((labels >= 0).sum()) for _, labels in parts)
    total = 0.0
    for input_ids, labels in parts:
        states = policy.model(input_ids).last_hidden_state[:, :-1]
        learnt = labels[:, 1:] >= 0  # the head runs on these positions only
        loss = F.cross_entropy(policy.lm_head(states[learnt]), labels[:, 1:][learnt], reduction="sum") / denominator
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def prepare(folder: Path, *, seed: int, console: Console) -> float:
    """Write `folder`: policy/ (Hugging Face), train.parquet, heldout.parquet, prepared.json. Returns greedy accuracy."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the result depends on the number; and a second one gains little at this size
    problems = draw_problems(seed, NUM_HELD_OUT + NUM_STOP + NUM_TRAIN + NUM_WARM_START)
    held_out, rest = problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:]
    stop = [problem for problem in rest[:NUM_STOP] if not problem.is_blunt]
    rest = rest[NUM_STOP:]
    train, worked = rest[:NUM_TRAIN], rest[NUM_TRAIN:]

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_parquet(partial / "train.parquet", train, split="train")
    write_parquet(partial / "heldout.parquet", held_out, split="test")

    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer)
    policy = warm_start(policy, tokenizer, problems=worked, stop_problems=stop, console=console)
    policy.eval()
    accuracy = greedy_accuracy(policy, held_out, tokenizer)
    if not BAND[0] <= accuracy <= BAND[1]:
        raise SystemExit(f"prepare: held-out greedy accuracy {accuracy:.3f} is outside {BAND}; try another --seed")
    policy.save_pretrained(partial / "policy")
    tokenizer.save_pretrained(partial / "policy")
    (partial / "prepared.json").write_text(json.dumps({"seed": seed, "held_out_greedy_accuracy": accuracy}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)  # so a folder that exists is a finished one
    return accuracy


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    console = Console(width=110)
    transformers_logging.disable_progress_bar()
    note = args.out / "prepared.json"
    if note.is_file() and json.loads(note.read_text())["seed"] == args.seed:
        console.print(f"{args.out} is there already")
        return 0
    accuracy = prepare(args.out, seed=args.seed, console=console)
    console.print(
        f"warm-started policy in {args.out}: greedy accuracy {accuracy:.3f} on {NUM_HELD_OUT} held-out problems"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
