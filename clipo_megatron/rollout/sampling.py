"""What decides a sample besides the weights: the seed of each request and the ids that end a response."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

from clipo_megatron.errors import ConfigError


def rollout_seed(*, seed: int, step: int, prompt_index: int, sample: int) -> int:
    """Seed of one request, in [0, 2**63): a pure function, so samples do not depend on which engine draws them.

    Args:
        seed: seed of the run.
        step: training step.
        prompt_index: `Prompt.index`.
        sample: number of the sample inside its group.
    """
    # Hashed, not added up: (seed, step) and (seed + 1, step - 1) must not share their samples. All bits are mixed: the
    # CPU's generator only uses the lower 32.
    key = struct.pack("<4q", seed, step, prompt_index, sample)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def stop_token_ids(folder: str | Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Ids that end a response: every end-of-sequence id of config.json, generation_config.json and the tokenizer.

    The three often differ: an instruct model's chat template ends a turn with the tokenizer's id, while config.json
    still has the base model's.

    Args:
        folder: Hugging Face folder.
        tokenizer_eos: the tokenizer's `eos_token_id`.

    Raises:
        ConfigError: no such id in any of them, so that no response could ever stop.
    """
    ids: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("config.json", "generation_config.json"):
        file = Path(folder) / name
        if file.is_file():
            found: int | Iterable[int] | None = json.loads(file.read_text()).get("eos_token_id")
            if found is not None:
                ids |= {found} if isinstance(found, int) else set(found)
    if not ids:
        raise ConfigError(
            f"model folder {folder}: no eos_token_id in config.json, generation_config.json or the tokenizer: "
            "a response could never stop; add it to generation_config.json"
        )
    return tuple(sorted(ids))
