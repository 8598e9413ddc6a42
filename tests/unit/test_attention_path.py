"""What is said of Transformer Engine's attention path: only the slow one is a problem, and its text names the cause."""

from __future__ import annotations

import logging

import pytest
import torch

from clipo_megatron.errors import CheckError
from clipo_megatron.policy.attention_path import (
    AttentionEngine,
    AttentionWatch,
    decode_cudnn_version,
    path_of,
    slow_attention,
)

KEYS = {"flash": "use_flash_attention", "fused": "use_fused_attention", "unfused": "use_unfused_attention"}
SAME = AttentionEngine(transformer_engine="2.20.2", cudnn=(9, 19, 0), torch_cudnn=(9, 19, 0))
TWO = AttentionEngine(transformer_engine="2.20.2", cudnn=(9, 1, 0), torch_cudnn=(9, 19, 0))


def _selection(path: str | None) -> dict[str, object]:
    """As Transformer Engine keeps it: None everywhere before the first choice, then one True."""
    chosen = {key: None if path is None else name == path for name, key in KEYS.items()}
    return {"attention_params": None, "fused_attention_backend": None, **chosen}


@pytest.mark.parametrize("path", KEYS)
def test_the_path_is_the_chosen_one(path):
    assert path_of(_selection(path)) == path


def test_there_is_no_path_before_the_first_attention():
    assert path_of(_selection(None)) is None


def test_a_record_of_another_version_is_refused():
    with pytest.raises(CheckError, match="use_fused_attention"):
        path_of({"backend": "fused"})


@pytest.mark.parametrize("engine", [SAME, TWO])
def test_only_the_unfused_path_is_a_problem(engine):
    assert slow_attention("flash", engine) is None
    assert slow_attention("fused", engine) is None
    assert "unfused" in slow_attention("unfused", engine)


def test_two_versions_of_cudnn_are_named_with_what_to_set():
    text = slow_attention("unfused", TWO)
    assert "cuDNN 9.1.0 and torch 9.19.0" in text
    assert "CUDNN_HOME" in text
    assert "CUDNN_HOME" not in slow_attention("unfused", SAME)
    assert "NVTE_DEBUG" in slow_attention("unfused", SAME)


def test_versions_are_decoded_as_cudnn_encodes_them():
    assert decode_cudnn_version(8907) == (8, 9, 7)
    assert decode_cudnn_version(90100) == (9, 1, 0)
    assert decode_cudnn_version(91900) == (9, 19, 0)


def test_the_watch_leaves_a_cpu_alone(caplog):
    """Transformer Engine is not even imported: it is not installed there."""
    with caplog.at_level(logging.DEBUG):
        AttentionWatch(torch.device("cpu"))("score")
    assert not caplog.records
