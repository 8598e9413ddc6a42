"""The model folder's tokenizer and its chat template. Questions are tokenised once; from then on only ids travel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from clipo_megatron.errors import ConfigError
from clipo_megatron.records import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = tuple[str, str]
"""(role, content)"""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; local files only.

    Raises:
        ConfigError: the folder does not exist, holds no tokenizer, or holds one that does not load.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"model.path = {path}: no such folder; give a Hugging Face folder on this machine")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(
            f"model.path = {path}: no tokenizer.json, tokenizer.model or vocab.json; copy the tokenizer files there"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path = {path}: its tokenizer does not load ({error}); copy its files again"
        ) from error


def render_prompts(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[Ids]:
    """Token ids of conversations in the chat template, with the generation prompt at the end.

    Args:
        tokenizer: one with a chat template.
        conversations: messages of each, the user's last.

    Returns:
        int32 [L] each.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; add a chat_template.jinja file to its folder")
    if not conversations:
        return []
    try:
        texts = _render(tokenizer, conversations)
    except TemplateError as error:
        raise ConfigError(
            f"the tokenizer's chat template does not render: {error}; mend chat_template.jinja"
        ) from error
    # The template has written the special tokens; the tokenizer must not add its own.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def _render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[str]:
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        )
        for messages in conversations
    ]
