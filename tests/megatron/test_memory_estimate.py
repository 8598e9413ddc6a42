"""The estimate of GPU memory against real workers on the CPU: bytes of parameters, gradients, optimizer, activations.

What Transformer Engine's modules keep can't be seen here: the CPU's modules keep more, and what more is counted below.
Not checked by anything: working memory, FP8 copies, offload, and the fixed overhead of a GPU.
"""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from support.policy_cases import VOCAB_SIZE, make_batch, make_worker, scored, share_scores
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.checks.activation_memory import LayerShare, layers_in_flight, saved_bytes
from clipo_megatron.checks.memory import estimate_memory
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.worker import PolicyWorker
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import RolloutBatch
from clipo_megatron.weights.architecture import read_architecture

STATES: dict[str, tuple[str, dict[str, int], dict[str, object]]] = {
    "tp2_pp2": ("qwen3", {"world_size": 4, "tp": 2, "pp": 2}, {}),
    "tied_pp2_dp2": ("qwen2_tied", {"world_size": 4, "pp": 2}, {}),
    "cp2_dp2": ("qwen3", {"world_size": 4, "cp": 2}, {}),
    "dp2_plain": ("qwen3", {"world_size": 2}, {"distributed_optimizer": False, "overlap_grad_reduce": False}),
    "vpp2": ("qwen3", {"world_size": 2, "pp": 2, "vpp": 2}, {}),
    "tp2_ep2_dp2": ("qwen3_moe", {"world_size": 4, "tp": 2, "ep": 2}, {}),
    "tp2_ep2_etp2": ("qwen3_moe", {"world_size": 4, "tp": 2, "ep": 2, "etp": 2}, {}),
}
FLIGHTS = {
    "1f1b": {"world_size": 2, "pp": 2},
    "interleaved": {"world_size": 2, "pp": 2, "vpp": 2},
    "interleaved_4": {"world_size": 4, "pp": 4, "vpp": 2},
}
# Sizes that no two dims share, and two key-value groups a rank: with one, Megatron gives views where it else copies.
LAYERS = {
    "qwen3": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "hidden_size": 48, "ffn_size": 104},
    "qwen3_moe": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "hidden_size": 48, "expert_ffn_size": 40},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_tiny_hf(folder / "qwen3", "qwen3", num_layers=4),
        "deep": make_tiny_hf(folder / "deep", "qwen3", num_layers=8),
        "qwen2_tied": make_tiny_hf(folder / "qwen2", "qwen2", num_layers=4, tied=True),
        "qwen3_moe": make_tiny_hf(folder / "moe", "qwen3_moe", num_layers=2),
    }


def _sum_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trained(worker: PolicyWorker, layout: ParallelLayout, batch: RolloutBatch) -> None:
    worker.train(scored(batch, share_scores(worker.score(batch, step=1, with_reference=True), layout)), step=1)


def _measure_states(folder: Path, layout: ParallelLayout, options: dict[str, object]) -> dict[str, int]:
    worker = make_worker(folder, layout, dtype="bfloat16", **options)
    _trained(worker, layout, make_batch())
    parameters = list(worker._stage.parameters())
    optimizers = worker._optimizer.inner
    states = [
        tensor for one in optimizers for state in one.state.values() for key, tensor in state.items() if key != "step"
    ]
    masters = [tensor for one in optimizers for group in one.param_groups for tensor in group["params"]]
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    assert not any(tensor.untyped_storage().data_ptr() in own for tensor in masters)
    buffers = [buffer for chunk in worker._stage.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    head = worker._head
    return {
        "weights": _sum_bytes(parameters),
        "gradients": _sum_bytes([parameter.main_grad for parameter in parameters]),
        "gradient_buffers": _sum_bytes([buffer.grad_data for buffer in buffers]),
        "optimizer": _sum_bytes(states) + _sum_bytes(masters),
        "head": 0
        if head is None
        else 2 * _sum_bytes(list(head.module.parameters()))
        + _sum_bytes([t for state in head.optimizer.state.values() for key, t in state.items() if key != "step"]),
    }


def _recipe(folder: Path, layout: dict[str, int], options: dict[str, object]) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "try"},
            "model": {"path": str(folder)},
            "data": {"train": ["train.parquet"]},
            "layout": layout | {key: value for key, value in options.items() if key != "contrastive"},
            "contrastive": {"head_size": 24},
        }
    )


@pytest.mark.parametrize("case", STATES)
def test_weights_gradients_and_optimizer_are_those_of_a_real_worker(case, models):
    model, degrees, options = STATES[case]
    layout = ParallelLayout(**degrees)
    found = run_ranks(_measure_states, models[model], layout, options, world_size=layout.world_size)
    estimate = estimate_memory(_recipe(models[model], degrees, options), read_architecture(models[model]))
    for number, stage in enumerate(estimate.stages):
        ranks = found[number * layout.stage_size : (number + 1) * layout.stage_size]
        for rank in ranks:
            assert (rank["weights"], rank["gradients"], rank["head"]) == (stage.weights, stage.gradients, stage.head)
            # Megatron starts each parameter at a multiple of 64 and pads buckets to 128 ranks: all of the difference.
            padding = 4 * (64 * 200 + 128 * layout.dp * layout.cp * 4)
            assert 0 <= rank["gradient_buffers"] - rank["gradients"] <= padding
        # Which rank holds how much depends on where the buffer is cut; together they hold each number once. Shares that
        # do not divide are rounded up in the estimate: 12 bytes, dense and experts.
        surplus = len(ranks) * stage.optimizer - sum(rank["optimizer"] for rank in ranks)
        assert 0 <= surplus <= len(ranks) * 2 * 12


# --- activations ---


def _long_sequence(num_tokens: int) -> RolloutBatch:
    """One sequence: the CPU's attention pads shorter ones."""
    return dataclasses.replace(
        make_batch().select(np.array([0])),
        input_ids=np.arange(num_tokens, dtype=np.int32) % VOCAB_SIZE,
        cu_seqlens=np.array([0, num_tokens]),
        prompt_lengths=np.array([5]),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
    )


def _measure_saved(folder: Path, layout: ParallelLayout, recompute: str, num_tokens: int) -> int:
    """Bytes of the distinct storages that one forward saves for its backward, parameters left out."""
    worker = make_worker(folder, layout, micro_batch_tokens=num_tokens, recompute=recompute, contrastive=None)
    stage = worker._stage
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    (micro_batch,), _ = worker._packer(_long_sequence(num_tokens), with_routes=False)
    stage.train()
    with worker._scope(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = stage.forward(stage.wrapped[0], micro_batch)
    assert states.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def _of_one_layer(family: str, tp: int, recompute: str, folder: Path, num_tokens: int) -> tuple[float, LayerShare]:
    """(measured bytes of a layer on the first rank, the same share of a layer for the estimate)."""
    layout = ParallelLayout(world_size=tp, tp=tp, ep=tp if family == "qwen3_moe" else 1)
    found = []
    for num_layers in (1, 3):
        model = make_tiny_hf(folder / f"{family}{num_layers}", family, num_layers=num_layers, **LAYERS[family])
        found.append(run_ranks(_measure_saved, model, layout, recompute, num_tokens, world_size=tp))
    arch = read_architecture(model)
    share = LayerShare(arch=arch, tokens=num_tokens, tp=tp, etp=1, cp=1, is_split=tp > 1, element_bytes=4, is_fp8=False)
    return sum(three - one for one, three in zip(*found, strict=True)) / (2 * tp), share


def _kept_by_the_cpu_alone(share: LayerShare) -> int:
    """Bytes of a dense layer with norms of q and k that Transformer Engine's fused modules do not keep.

    Norms keep x / rms(x) and 1 / rms(x) besides x; the k norm's input is a view that holds the whole fused projection;
    rotary embedding keeps cosine and sine of q and of k, and q and k before they are laid out as a batch; attention keeps
    its output in that layout too, and the layout itself; SwiGLU in steps keeps sigmoid and SiLU of the gate.
    """
    arch, tokens = share.arch, share.tokens
    query, kv, heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim, arch.num_heads
    norms = share.shard_tokens * 2 * (arch.hidden_size + 1)
    split = (query + kv) + (heads + arch.num_kv_heads) + (query + kv) + (query + kv) + query + 2 * arch.ffn_size
    whole = 4 * arch.head_dim + 2
    return 4 * (norms + tokens * split // share.tp + tokens * whole)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_dense_layer_keeps_what_is_estimated_and_what_the_cpu_s_modules_add(tp, tmp_path):
    measured, share = _of_one_layer("qwen3", tp, "none", tmp_path, 96)
    assert measured == saved_bytes(share, recompute="none") + _kept_by_the_cpu_alone(share)


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_keep_what_is_estimated_within_the_cpu_s_surplus(tp, tmp_path):
    measured, share = _of_one_layer("qwen3_moe", tp, "none", tmp_path, 96)
    # Over both ranks every pair is counted once, however unevenly the router deals. Per pair the CPU adds SwiGLU's steps
    # (3 of the 3 widths), per token the surplus of attention and norms: at most as much again as is estimated.
    assert 1.0 < measured / saved_bytes(share, recompute="none") < 2.2


@pytest.mark.parametrize("family", LAYERS)
def test_full_recompute_keeps_a_layer_s_input_alone(family, tmp_path):
    measured, share = _of_one_layer(family, 2, "full", tmp_path, 96)
    assert measured == saved_bytes(share, recompute="full")


class _Kept:
    """A saved tensor, as autograd holds it until its backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Inputs:
    """Counts the inputs of layers that are held for full recompute: all states saved outside a backward and the last norm."""

    def __init__(self, worker: PolicyWorker) -> None:
        self._held = self.most = 0
        self._is_in_last_norm = False
        norm = worker._stage.chunks[-1].decoder.final_layernorm
        if norm is not None:
            norm.register_forward_pre_hook(lambda *_: setattr(self, "_is_in_last_norm", True))
            norm.register_forward_hook(lambda *_: setattr(self, "_is_in_last_norm", False))

    def keep(self, tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        is_in_backward = torch._C._current_graph_task_id() != -1
        if tensor.dim() == 3 and not is_in_backward and not self._is_in_last_norm:
            self._held += 1
            self.most = max(self.most, self._held)
            weakref.finalize(kept, self._release)
        return kept

    def _release(self) -> None:
        self._held -= 1


def _most_inputs_held(folder: Path, layout: ParallelLayout) -> int:
    worker = make_worker(folder, layout, recompute="full", micro_batch_tokens=64, contrastive=None)
    inputs = _Inputs(worker)
    with torch.autograd.graph.saved_tensors_hooks(inputs.keep, lambda kept: kept.tensor):
        _trained(worker, layout, make_batch(num_groups=16))
    return inputs.most


@pytest.mark.parametrize("schedule", FLIGHTS)
def test_each_stage_holds_as_many_layers_as_the_schedule_s_formula_says(schedule, models):
    layout = ParallelLayout(**FLIGHTS[schedule])
    found = run_ranks(_most_inputs_held, models["deep"], layout, world_size=layout.world_size)
    assert found == [
        layers_in_flight(num_layers=8, pp=layout.pp, pp_rank=stage, vpp=layout.vpp) for stage in range(layout.pp)
    ]
