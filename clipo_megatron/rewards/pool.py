"""Verdicts for many responses: rules of text here, the rest in processes that are killed when an answer hangs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.records import Verdict
from clipo_megatron.rewards.choice import judge_choice
from clipo_megatron.rewards.equality import is_hazardous, quick_verdict
from clipo_megatron.rewards.extract import gold_answer, response_answer
from clipo_megatron.rewards.processes import Pair, WorkerPool

logger = logging.getLogger(__name__)

Item = tuple[str, str, str]

_CHUNK_PAIRS = 16
_POISON = "9^{9^{9^{9}}}"
_KNOWN_PAIRS = (
    ("\\frac{1}{2}", "0.5", Verdict.CORRECT),
    ("2\\sqrt{3}", "\\sqrt{12}", Verdict.CORRECT),
    ("x^2+2x+1", "(x+1)^2", Verdict.CORRECT),
    ("\\left(3,\\frac{\\pi}{2}\\right)", "(3, \\pi/2)", Verdict.CORRECT),
    ("12", "13", Verdict.WRONG),
    ("4", "4\\sqrt(2)", Verdict.WRONG),
    ("1-1/e", "1+1/e", Verdict.WRONG),
)


class Verifiers:
    """A pool of verifier processes. Use it as a context manager, from a thread that lives as long as the pool."""

    def __init__(self, workers: int, timeout_s: float, max_answer_chars: int) -> None:
        """Start the processes; they are ready a second or two later.

        Args:
            workers: processes, >= 1.
            timeout_s: an answer that takes longer is undecided and its process is killed, seconds.
            max_answer_chars: longer boxed answers are undecided without being parsed.

        Raises:
            ConfigError: a number is out of range.
        """
        problems = [
            f"rewards.{key} = {value}: must be {rule}"
            for key, value, rule, is_right in (
                ("workers", workers, ">= 1", workers >= 1),
                ("timeout_s", timeout_s, "> 0 seconds", timeout_s > 0),
                ("max_answer_chars", max_answer_chars, ">= 1", max_answer_chars >= 1),
            )
            if not is_right
        ]
        if problems:
            raise ConfigError(problems)
        self._timeout_s = timeout_s
        self._max_chars = max_answer_chars
        self._pool = WorkerPool(workers)

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes. Further calls do nothing."""
        self._pool.close()

    def judge(self, items: Sequence[Item], *, use_shortcuts: bool = True) -> list[Verdict]:
        """Judge responses.

        Args:
            items: (verifier, gold answer, response text) each; verifier is "math" or "choice".
            use_shortcuts: false asks the worker processes even where the text alone would decide.

        Returns:
            One verdict an item, in order. A response without a box is wrong. Undecided are: time-outs, dead workers,
            answers that are not parsed for safety, gold answers that can't be read, and judges that disagree.

        Raises:
            ConfigError: an unknown verifier.
            WorkerError: the processes can't be started, or keep dying without an answer to blame.
        """
        decisions = [self._without_worker(*item, use_shortcuts=use_shortcuts) for item in items]
        # A group's rollouts often give the same answer: each pair is judged once.
        pairs = dict.fromkeys(decision for decision in decisions if not isinstance(decision, Verdict))
        verdicts = self._judge_pairs(list(pairs))
        return [d if isinstance(d, Verdict) else verdicts[d] for d in decisions]

    def why_unconfined(self) -> str:
        """Why the processes may use network and files on this system; empty where they may not."""
        return self._pool.why_unconfined()

    def self_test(self) -> None:
        """Judge known pairs and a poison pill in the processes that will judge the run; warn if they are not confined.

        Raises:
            CheckError: a verdict is not the known one; the message names the pair.
        """
        if reason := self.why_unconfined():
            logger.warning("verifier processes may use network and files here: %s", reason)
        items = [("math", gold, f"So it is \\boxed{{{answer}}}.") for gold, answer, _ in _KNOWN_PAIRS]
        found = self.judge(items, use_shortcuts=False)
        # The pill goes past the screen, on a short clock: it is the kill that is tested, and the life after it.
        killed = self._pool.run([[("1", _POISON)]], timeout_s=min(self._timeout_s, 2.0))[0]
        found += [Verdict.UNDECIDED if killed is None else killed[0], *self.judge(items[:1], use_shortcuts=False)]
        wanted = [*_KNOWN_PAIRS, ("1", _POISON, Verdict.UNDECIDED), _KNOWN_PAIRS[0]]
        for (gold, answer, expected), verdict in zip(wanted, found, strict=True):
            if verdict is not expected:
                raise CheckError(
                    f"verifier self-test: gold {gold!r}, answer {answer!r}: verdict {verdict}, must be {expected}; "
                    "check the installed math-verify (0.9.0) and sympy, and rewards.timeout_s"
                )

    def _without_worker(self, verifier: str, gold: str, response: str, *, use_shortcuts: bool) -> Verdict | Pair:
        """The verdict, or the (gold, answer) pair that a worker process has to judge."""
        if verifier == "choice":
            return judge_choice(gold, response)
        if verifier != "math":
            raise ConfigError(f"verifier = {verifier!r}: must be 'math' or 'choice'")
        answer = response_answer(response)
        if answer is None:
            return Verdict.WRONG
        right = gold_answer(gold)
        if right is None:
            return Verdict.UNDECIDED
        if use_shortcuts:
            return quick_verdict(right, answer, max_chars=self._max_chars) or (right, answer)
        return Verdict.UNDECIDED if is_hazardous(right, answer, max_chars=self._max_chars) else (right, answer)

    def _judge_pairs(self, pairs: list[Pair]) -> dict[Pair, Verdict]:
        chunks = [pairs[start : start + _CHUNK_PAIRS] for start in range(0, len(pairs), _CHUNK_PAIRS)]
        verdicts: dict[Pair, Verdict] = {}
        suspects: list[Pair] = []
        for chunk, found in zip(chunks, self._pool.run(chunks, timeout_s=self._timeout_s), strict=True):
            if found is None and len(chunk) > 1:
                suspects += chunk
            elif found is None:
                verdicts[chunk[0]] = Verdict.UNDECIDED
            else:
                verdicts.update(zip(chunk, found, strict=True))
        # One pair of such a chunk hangs or kills its process: alone, each answers for itself.
        alone = self._pool.run([[pair] for pair in suspects], timeout_s=self._timeout_s)
        for pair, found in zip(suspects, alone, strict=True):
            verdicts[pair] = Verdict.UNDECIDED if found is None else found[0]
        return verdicts
