"""From judged rollouts to one ragged batch. Rollouts that can't be learnt from are left out and counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from clipo_megatron.errors import CheckError
from clipo_megatron.records import Finish, Rollout, RolloutBatch, RolloutGroup, Routes, Verdict


def build_batch(groups: Sequence[RolloutGroup], *, group_size: int) -> RolloutBatch:
    """Lay the rollouts of a step out in columns.

    Args:
        groups: judged; a rollout's place in its group is its sample number.
        group_size: rollouts asked for each prompt; it makes `row_key`.

    Returns:
        Rows in the order of `groups`. `dropped` counts "aborted", "empty" and "undecided", a rollout under the first
        that applies. With nothing left the batch has no rows.

    Raises:
        CheckError: a rollout has not been judged, has another number of log-probs than ids or of routes than tokens,
            has routes where another one has none, or is one too many.
    """
    dropped: Counter[str] = Counter()
    kept: list[tuple[int, RolloutGroup, int, Rollout]] = []
    for group_id, group in enumerate(groups):
        if len(group.rollouts) > group_size:
            raise CheckError(
                f"prompt {group.prompt.index} has {len(group.rollouts)} rollouts; at most algorithm.group_size = "
                f"{group_size} were asked for"
            )
        for sample, rollout in enumerate(group.rollouts):
            reason = _reason_to_drop(group, sample, rollout)
            if reason is None:
                kept.append((group_id, group, sample, rollout))
            else:
                dropped[reason] += 1
    prompts = [group.prompt.token_ids for _, group, _, _ in kept]
    rollouts = [rollout for *_, rollout in kept]
    prompt_lengths = np.array([len(ids) for ids in prompts], dtype=np.int64)
    lengths = prompt_lengths + np.array([len(r.response_ids) for r in rollouts], dtype=np.int64)
    is_correct = np.array([rollout.verdict is Verdict.CORRECT for rollout in rollouts], dtype=np.bool_)
    ids = [part for p, r in zip(prompts, rollouts, strict=True) for part in (p, r.response_ids)]
    logprobs = [part for p, r in zip(prompts, rollouts, strict=True) for part in (np.zeros(len(p)), r.sampled_logprobs)]
    return RolloutBatch(
        input_ids=np.concatenate([np.zeros(0), *ids]).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=prompt_lengths,
        sampled_logprobs=np.concatenate([np.zeros(0), *logprobs]).astype(np.float32),
        group_id=np.array([group_id for group_id, *_ in kept], dtype=np.int64),
        row_key=np.array([group.prompt.index * group_size + n for _, group, n, _ in kept], dtype=np.int64),
        is_correct=is_correct,
        outcome=is_correct.astype(np.float32),
        truncated=np.array([rollout.finish is Finish.LENGTH for rollout in rollouts], dtype=np.bool_),
        routed_experts=_routes(kept),
        dropped=dict(dropped),
    )


def _routes(kept: Sequence[tuple[int, RolloutGroup, int, Rollout]]) -> Routes | None:
    found: list[Routes] = []
    for _, group, sample, rollout in kept:
        if rollout.routed_experts is None:
            continue
        num_tokens = len(group.prompt.token_ids) + len(rollout.response_ids)
        if len(rollout.routed_experts) != num_tokens:
            raise CheckError(
                f"prompt {group.prompt.index}, sample {sample}: routed experts of {len(rollout.routed_experts)} tokens "
                f"for {num_tokens} tokens of prompt and response; the engine must return a row for each"
            )
        found.append(rollout.routed_experts)
    if found and len(found) != len(kept):
        raise CheckError(
            f"{len(kept) - len(found)} of {len(kept)} rollouts have no routed experts; the engines must return them for "
            "all or for none"
        )
    return np.concatenate(found) if found else None


def _reason_to_drop(group: RolloutGroup, sample: int, rollout: Rollout) -> str | None:
    name = f"prompt {group.prompt.index}, sample {sample}"
    if len(rollout.sampled_logprobs) != len(rollout.response_ids):
        raise CheckError(
            f"{name}: {len(rollout.sampled_logprobs)} log-probs for {len(rollout.response_ids)} response tokens; the "
            "engine must return one for each sampled token"
        )
    if rollout.finish is Finish.ABORT:
        return "aborted"
    if not len(rollout.response_ids):
        return "empty"
    if rollout.verdict is None:
        raise CheckError(f"{name}: no verdict; judge the rollouts before they are laid out in a batch")
    return "undecided" if rollout.verdict is Verdict.UNDECIDED else None
