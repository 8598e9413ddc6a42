"""The two faults of vLLM's reload on CPUs that rollout/cpu_reload.py repairs: each is still there, and is repaired.

Where `test_vllm_alone_...` fails, vLLM has repaired the fault: take the module's part of the repair out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.engines import SAMPLING, load_reference, perturbed, random_prompts, tiny_engine, worst_difference
from support.tiny_models import make_tiny_hf, tiny_tokenizer
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from clipo_megatron.errors import EngineError
from clipo_megatron.rollout.engine import RolloutEngine


@dataclass
class Case:
    engine: RolloutEngine
    reference: PreTrainedModel
    changed: Path
    """Folder with the reference's weights, which are not those the engine started with."""

    def difference(self) -> float:
        """Nats between the engine's log-probs and the reference's."""
        groups = self.engine.generate(
            random_prompts((5, 17)), replace(SAMPLING, samples=2, max_tokens=16), version=None
        )
        return worst_difference(self.reference, groups)


def _make_moe(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=False, initializer_range=0.15, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tied head", "experts"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("start")
    folder = _make_moe(folder) if request.param == "experts" else make_tiny_hf(folder, "qwen3", tied=True)
    reference, changed = load_reference(folder), tmp_path_factory.mktemp("changed")
    perturbed(reference, seed=0)
    reference.save_pretrained(changed)
    with tiny_engine(folder) as engine:
        yield Case(engine, reference, changed)


def test_vllm_alone_samples_from_wrong_weights_after_a_reload(case: Case) -> None:
    case.engine._workers.require().collective_rpc("reload_weights", kwargs={"weights_path": str(case.changed)})
    assert case.difference() > 0.05


def test_repacking_makes_the_reload_right(case: Case) -> None:
    from clipo_megatron.rollout.cpu_reload import repack_after_reload

    running = case.engine._workers.require()
    running.collective_rpc("reload_weights", kwargs={"weights_path": str(case.changed)})
    repack_after_reload(running.collective_rpc("get_model")[0])
    assert case.difference() < 1e-4


def test_another_vllm_release_is_refused_on_a_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from clipo_megatron.rollout.cpu_reload import repack_after_reload

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(EngineError, match=r"vLLM 0\.33\.1 on a CPU: weights can be updated in 0\.32 only"):
        repack_after_reload(torch.nn.Linear(1, 1))
