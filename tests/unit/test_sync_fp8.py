"""Laws of FP8 syncs: the numbers, by loops in float64; plans of FP8 engines; what is quantised; what is refused."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.architectures import small_architecture
from support.fp8_oracle import awkward_matrix, blocks_by_loops, tensor_by_loops
from support.plans import Parameters, shapes_by_layer, sliced_engine_rank, trainer_shards, views_of

from clipo_megatron.cli.main import main
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.fp8 import (
    Fp8Shards,
    ShardBlocks,
    amax_of_blocks,
    block_scales,
    quantize_blocks_into,
    quantize_tensor_into,
    tensor_scale,
)
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.plan_json import from_json, to_json
from clipo_megatron.sync.plan_report import bytes_of_links
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.fp8_parameters import BLOCK, Scaling, is_quantized, kept_modules
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.holdings import table_name
from clipo_megatron.weights.names import hf_tensor_specs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QWEN3_30B = small_architecture(
    "qwen3_moe",
    vocab_size=151936,
    num_kv_heads=4,
    heads_per_group=8,
    head_dim=128,
    hidden_size=2048,
    num_layers=48,
    num_experts=128,
    expert_ffn_size=768,
)


def _whole(rows: int, columns: int) -> ShardBlocks:
    return ShardBlocks(
        num_rows=-(-rows // BLOCK),
        num_columns=-(-columns // BLOCK),
        row_R=torch.arange(rows) // BLOCK,
        first_column=0,
    )


def _codes(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.uint8).numpy()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([1, 700, 1 << 22]),
)
def test_blocks_are_those_of_loops_in_float64(
    rows: int, columns: int, seed: int, dtype: torch.dtype, chunk: int
) -> None:
    matrix, blocks = awkward_matrix(rows, columns, seed=seed, dtype=dtype), _whole(rows, columns)
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipo_megatron.sync.fp8._CHUNK_ELEMENTS", chunk)
        scales = block_scales(amax_of_blocks(matrix, blocks))
        quantize_blocks_into(values, matrix, scales, blocks)
    codes, expected = blocks_by_loops(matrix)
    assert np.array_equal(scales.numpy().view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(_codes(values), codes)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 200), columns=st.integers(1, 200), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES))
def test_a_scale_a_matrix_is_that_of_loops_in_float64(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    matrix = awkward_matrix(rows, columns, seed=seed, dtype=dtype)
    amax = matrix.abs().amax().float()
    assume(amax > 1e-30)
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = tensor_scale(amax.reshape(1))
    quantize_tensor_into(values, matrix, scale)
    codes, expected = tensor_by_loops(matrix, float(amax))
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(_codes(values), codes)


def test_zeros_stay_zeros_and_keep_their_sign() -> None:
    matrix = torch.tensor([[0.0, -0.0]] * 2)
    values = torch.empty(2, 2, dtype=torch.float8_e4m3fn)
    quantize_blocks_into(values, matrix, block_scales(amax_of_blocks(matrix, _whole(2, 2))), _whole(2, 2))
    assert _codes(values).tolist() == [[0, 128]] * 2
    scale = tensor_scale(torch.zeros(1))
    quantize_tensor_into(values, matrix, scale)
    assert torch.equal(values.float() * scale, torch.zeros(2, 2))


def test_a_value_that_is_not_finite_shows_in_its_block_and_in_no_other() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        matrix = torch.ones(256, 256)
        matrix[200, 3] = bad
        values, blocks = torch.empty(256, 256, dtype=torch.float8_e4m3fn), _whole(256, 256)
        scales = block_scales(amax_of_blocks(matrix, blocks))
        quantize_blocks_into(values, matrix, scales, blocks)
        assert scales.isfinite().tolist() == [[True, True], [False, True]]
        product = values.float() * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        assert not product[200, 3].isfinite()
        assert torch.equal(product[:128], torch.ones(128, 256))


@st.composite
def fp8_cases(draw: st.DrawFn) -> tuple[Architecture, ParallelLayout, EngineLayout]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    has_experts = FAMILIES[family].has_experts
    tp, engine_tp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    ep, etp = (draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))) if has_experts else (1, 1)
    expert_parallel = has_experts and draw(st.booleans())
    dp = max(1, ep * etp // tp)
    # Shards of the trainer may cut blocks anywhere; the engine's must not.
    head_dim, kv_heads = draw(st.sampled_from([(128, 1), (64, 2), (32, 4)]))
    kv_heads *= max(tp // kv_heads, engine_tp)
    arch = small_architecture(
        family,
        vocab_size=64,
        num_kv_heads=kv_heads,
        heads_per_group=draw(st.sampled_from([1, 3])),
        head_dim=head_dim,
        hidden_size=128 * draw(st.integers(1, 2)) + (0 if has_experts else draw(st.sampled_from([0, 24]))),
        ffn_size=128 * engine_tp * draw(st.integers(1, 3)),
        expert_ffn_size=128 * engine_tp,
        num_experts=4,
        num_layers=2,
    )
    trainer = ParallelLayout(world_size=tp * dp, tp=tp, ep=ep, etp=etp)
    return arch, trainer, EngineLayout(engines=1, tp=engine_tp, expert_parallel=expert_parallel)


def _random_folder(arch: Architecture, folder: Path) -> Parameters:
    tensors = {
        name: awkward_matrix(torch.Size(shape[:-1]).numel(), shape[-1], seed=number, dtype=torch.bfloat16).view(shape)
        for number, (name, shape) in enumerate(hf_tensor_specs(arch).items())
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _given_by_ranks(arch: Architecture, layout: ParallelLayout, folder: Path, scaling: Scaling) -> dict:
    """What each trainer rank gives, its amaxes reduced without a process group."""
    ranks = range(layout.world_size)
    with HFReader(folder) as reader:
        shards = {
            rank: Fp8Shards(
                {table_name(name, arch): tensor for name, tensor in trainer_shards(reader, arch, layout, rank).items()},
                arch,
                layout,
                rank=rank,
                scaling=scaling,
            )
            for rank in ranks
        }
    for of_rank in shards.values():
        of_rank.measure()
    # Ranks of one tp (etp) group hold the parts of the same tensors.
    for number, group_of in ((0, lambda rank: rank // layout.tp), (1, lambda rank: layout.ep_rank(rank))):
        for group in {group_of(rank) for rank in ranks}:
            buffers = [shards[rank].amax_buffers()[number] for rank in ranks if group_of(rank) == group]
            largest = torch.stack(buffers).amax(0)
            for buffer in buffers:
                buffer.copy_(largest)
    for of_rank in shards.values():
        of_rank.quantize()
    return {rank: of_rank.tensors() for rank, of_rank in shards.items()}


def _dtypes_by_layer(plan: SyncPlan, num_layers: int) -> dict[str, torch.dtype]:
    return {
        name.replace("{layer}", str(layer)): getattr(torch, dtype)
        for name, dtype in plan.dtypes.items()
        for layer in range(num_layers)
    }


def _carry_out(plan: SyncPlan, given_by: dict, rank: int, num_layers: int) -> Parameters:
    dtypes = _dtypes_by_layer(plan, num_layers)
    shapes = shapes_by_layer(plan.engine_shapes, num_layers)
    values = {name: torch.zeros(shape, dtype=dtypes.get(name, torch.bfloat16)) for name, shape in shapes.items()}
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for transfer in plan.into(0, rank):
        name = transfer.parameter
        for source, target in views_of(transfer, given_by[transfer.source], values[name]):
            assert source.dtype == target.dtype, name
            target.copy_(source)
        for _, count in views_of(transfer, given_by[transfer.source], counts[name]):
            count.add_(1)
    assert all((count == 1).all() for count in counts.values())
    return values


def _stacked(parameter: torch.Tensor) -> torch.Tensor:
    """[experts, rows, columns]; one where there are none."""
    return parameter if parameter.dim() == 3 else parameter[None]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=fp8_cases(), scaling=st.sampled_from(["block", "tensor"]))
def test_engine_ranks_get_what_quantising_their_own_weights_would_give(case, scaling) -> None:
    arch, trainer, engines = case
    with tempfile.TemporaryDirectory() as name:
        hf = _random_folder(arch, Path(name))
        given_by = _given_by_ranks(arch, trainer, Path(name), scaling)
    apart = place_apart(trainer_ranks=trainer.world_size, engine_ranks=engines.tp, gpus_per_node=8)
    plan = plan_sync(arch, trainer, engines, apart, dtype="bfloat16", fp8=scaling)
    plain = [
        sliced_engine_rank(arch, hf, tp=engines.tp, rank=rank, expert_parallel=engines.expert_parallel)
        for rank in range(engines.tp)
    ]
    for rank in range(engines.tp):
        got = _carry_out(plan, given_by, rank, arch.num_layers)
        suffix = "_scale_inv" if scaling == "block" else "_scale"
        assert {name for name in got if not name.endswith(suffix)} == set(plain[rank])
        for name, weight in plain[rank].items():
            if name + suffix not in got:
                assert torch.equal(got[name], weight), name
                continue
            for number, matrix in enumerate(_stacked(weight)):
                if scaling == "block":
                    codes, scales = blocks_by_loops(matrix)
                else:
                    # vLLM takes the maximum over its ranks where they split the matrix; with whole experts, one holds it.
                    is_apart = engines.expert_parallel and "experts" in name
                    parts = [plain[rank]] if is_apart else plain
                    amax = max(float(_stacked(part[name])[number].abs().max()) for part in parts)
                    codes, scales = tensor_by_loops(matrix, amax)
                found = got[name + suffix]
                of_expert = found[number] if weight.dim() == 3 else found
                assert np.array_equal(of_expert.numpy().reshape(scales.shape), scales), name
                assert np.array_equal(_codes(_stacked(got[name])[number]), codes), name


def _plan_30b(fp8: str, trainer: ParallelLayout) -> SyncPlan:
    engines = EngineLayout(engines=2, tp=2)
    apart = place_apart(trainer_ranks=trainer.world_size, engine_ranks=engines.num_ranks, gpus_per_node=8)
    return plan_sync(QWEN3_30B, trainer, engines, apart, dtype="bfloat16", fp8=fp8)


def test_matrices_move_in_half_the_bytes_and_a_scale_for_each_block() -> None:
    trainer = ParallelLayout(world_size=8, tp=2, ep=4)
    plain, fp8 = (sum(bytes_of_links(_plan_30b(kind, trainer)).values()) for kind in ("none", "block"))
    matrices = experts = 0
    for name, shape in hf_tensor_specs(QWEN3_30B).items():
        if "proj" in name:
            matrices += torch.Size(shape).numel()
            experts += torch.Size(shape).numel() if "experts" in name else 0
    assert experts > 0.9 * matrices
    # Two engines; no tensor is on two ranks of an engine but norms and routers, whose bytes stay.
    assert plain - fp8 == 2 * (matrices - 4 * matrices // BLOCK**2)
    assert fp8 < 0.53 * plain


def test_a_plan_of_fp8_engines_survives_json() -> None:
    plan = _plan_30b("block", ParallelLayout(world_size=4, tp=4))
    assert plan.dtypes
    assert from_json(to_json(plan)) == plan


def test_matrices_of_layers_are_quantised_and_nothing_else() -> None:
    quantized = {
        tensor.name.split(".")[-2]
        for family in FAMILIES.values()
        for rule in family.rules
        if is_quantized(rule)
        for tensor in rule.hf
    }
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert quantized == projections | {"w1", "w2", "w3"}
    assert all(
        tensor.name.endswith(".weight")
        for family in FAMILIES.values()
        for rule in family.rules
        if is_quantized(rule)
        for tensor in rule.hf
    )
    layers = range(small_architecture("llama").num_layers)
    assert kept_modules(small_architecture("llama")) == []
    assert kept_modules(small_architecture("qwen3_moe")) == [f"model.layers.{layer}.mlp.gate" for layer in layers]
    assert kept_modules(small_architecture("mixtral")) == [
        f"model.layers.{layer}.block_sparse_moe.gate" for layer in layers
    ]


@pytest.mark.parametrize(
    ("family", "sizes", "tp", "expert_parallel", "words"),
    [
        # Of two key heads of 64 rows, each rank has one.
        ("qwen3", {"head_dim": 64, "num_kv_heads": 2, "heads_per_group": 2, "ffn_size": 512}, 2, False, "k_proj"),
        # Gate and up of 192 rows each.
        ("qwen3", {"head_dim": 128, "num_kv_heads": 2, "ffn_size": 384}, 2, False, "gate_up_proj"),
        ("qwen3_moe", {"head_dim": 128, "num_kv_heads": 2, "expert_ffn_size": 192}, 1, False, "pads experts"),
        ("qwen3_moe", {"head_dim": 128, "num_kv_heads": 2, "expert_ffn_size": 128}, 2, False, "pads experts"),
    ],
)
def test_blocks_that_straddle_the_engine_s_parts_are_refused(family, sizes, tp, expert_parallel, words) -> None:
    arch = small_architecture(family, hidden_size=256, **sizes)
    engines = EngineLayout(engines=1, tp=tp, expert_parallel=expert_parallel)
    apart = place_apart(trainer_ranks=1, engine_ranks=tp, gpus_per_node=8)
    trainer = ParallelLayout(world_size=1)
    with pytest.raises(ConfigError, match=words) as raised:
        plan_sync(arch, trainer, engines, apart, dtype="bfloat16", fp8="block")
    assert "choose another rollout.tp" in str(raised.value)
    assert "model.layers.*." in str(raised.value)
    assert "{" not in str(raised.value)
    assert plan_sync(arch, trainer, engines, apart, dtype="bfloat16", fp8="tensor").dtypes
    if expert_parallel is False and family == "qwen3_moe" and sizes["expert_ffn_size"] % BLOCK == 0:
        whole = replace(engines, expert_parallel=True)
        assert plan_sync(arch, trainer, whole, apart, dtype="bfloat16", fp8="block").dtypes


def test_the_command_line_plans_fp8_engines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    example = Path(__file__).parents[2] / "examples" / "math_qwen3_30b_a3b" / "recipe.yaml"
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        "max_position_embeddings": 40960, "rope_theta": 1000000, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
        "eos_token_id": 151645, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "moe_intermediate_size": 768, "model_type": "qwen3_moe", "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    moved = {}
    for fp8 in ("none", "block"):
        file = tmp_path / f"{fp8}.json"
        arguments = ["plan", "sync", str(example), f"model.path={tmp_path}", "rollout.tp=2"]
        assert main([*arguments, "--fp8", fp8, "--json", str(file)]) == 0
        assert ("matrices in FP8" in capsys.readouterr().out) == (fp8 == "block")
        moved[fp8] = sum(entry[3] for entry in json.loads(file.read_text())["report"]["bytes"])
    assert 0.5 < moved["block"] / moved["none"] < 0.53
