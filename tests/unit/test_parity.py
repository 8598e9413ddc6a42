"""The layout check's parts that need no rank: its command line, its batches, the model it runs, how errors are merged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.architectures import small_architecture
from support.tiny_models import make_tiny_hf

from clipo_megatron.checks.parity import merge_errors
from clipo_megatron.checks.parity_batch import batch_shape, draw_batch, without_right_rows
from clipo_megatron.checks.parity_model import check_memory, choose_model, make_model
from clipo_megatron.cli.check import parse_layout
from clipo_megatron.data.packing import plan_micro_batches
from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.recipe.sections import LayoutSection
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.layout_check import layout_problems
from clipo_megatron.weights.names import hf_tensor_specs

LAYOUTS = {
    "tp4": ParallelLayout(world_size=4, tp=4),
    "cp4": ParallelLayout(world_size=4, cp=4),
    "dp2": ParallelLayout(world_size=2),
    "dp8": ParallelLayout(world_size=8),
    "all": ParallelLayout(world_size=32, tp=4, cp=2, pp=2, vpp=2),
}


def _shape(layout: ParallelLayout, micro_batch_tokens: int = 4096):
    return batch_shape(layout, sequence_parallel=True, micro_batch_tokens=micro_batch_tokens, max_positions=2048)


def _rows_by_dp_rank(layout: ParallelLayout, batch, shape) -> list[list[list[int]]]:
    of_sequence = 2 * layout.cp if layout.cp > 1 else 1
    plan = plan_micro_batches(
        batch.lengths,
        dp=layout.dp,
        token_budget=shape.micro_batch_tokens,
        sequence_multiple=of_sequence,
        batch_multiple=math.lcm(of_sequence, layout.cp * layout.tp),
        count_multiple=layout.pp if layout.vpp > 1 else 1,
        linear_cost=500.0,
    )
    return [[list(rows) for rows in of_rank] for of_rank in plan.rows]


def test_a_layout_is_read_with_missing_degrees_as_one():
    assert parse_layout("tp=2, pp=4,vpp=2") == (
        {"tp": 2, "pp": 4, "vpp": 2, "cp": 1, "ep": 1, "etp": 1, "dp": 1},
        [],
    )
    assert parse_layout(None) == ({}, [])


def test_all_faults_of_a_layout_are_told_at_once():
    degrees, problems = parse_layout("tpp=2,pp=0,cp=two,ep,dp=2,dp=4,world=8")
    assert degrees == {}
    assert [problem.split(":")[0] for problem in problems] == ["--layout"] * 6
    for problem, words in zip(
        problems,
        (
            "did you mean 'tp'",
            "pp = 0",
            "cp = two",
            "'ep' must read KEY=NUMBER",
            "dp: given twice",
            "world: unknown key",
        ),
        strict=True,
    ):
        assert words in problem


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_batch_reaches_every_case_that_a_split_can_get_wrong(name):
    layout, arch = LAYOUTS[name], small_architecture("qwen3")
    shape = _shape(layout)
    batch = draw_batch(shape, arch, seed=1, with_routes=True).batch
    group_sizes = np.bincount(batch.group_id)
    right = np.bincount(batch.group_id, weights=batch.is_correct)
    assert batch.num_sequences == shape.num_rows
    assert len(set(group_sizes)) > 1, "groups must be uneven"
    assert right[0] == group_sizes[0], "a group must be all right"
    assert ((right >= 2) & (right < group_sizes)).any(), "a group must have anchors"
    assert (batch.response_lengths == 1).any()
    assert batch.response_lengths.min() >= 1
    assert batch.lengths.max() <= shape.longest
    ranks = _rows_by_dp_rank(layout, batch, shape)
    assert all(len(of_rank) >= 2 for of_rank in ranks), "every rank must have several micro-batches"
    if layout.dp > 1:
        dp_rank = np.zeros(batch.num_sequences, dtype=int)
        for number, of_rank in enumerate(ranks):
            dp_rank[[row for rows in of_rank for row in rows]] = number
        assert all(len(set(dp_rank[batch.group_id == group])) > 1 for group in range(3)), "groups must be split"


@pytest.mark.parametrize("name", ["dp2", "dp8"])
def test_a_batch_whose_last_rank_has_no_right_rollout_still_has_anchors(name):
    layout = LAYOUTS[name]
    shape = _shape(layout)
    batch = draw_batch(shape, small_architecture("qwen3"), seed=2, with_routes=False).batch
    rows = np.array([row for rows in _rows_by_dp_rank(layout, batch, shape)[-1] for row in rows])
    one_sided = without_right_rows(batch, rows)
    assert batch.is_correct[rows].any()
    assert not one_sided.is_correct[rows].any()
    right = np.bincount(one_sided.group_id, weights=one_sided.is_correct)
    assert ((right >= 2) & (right < np.bincount(one_sided.group_id))).sum() >= 2


def test_routes_are_as_an_engine_gives_them():
    arch = small_architecture("qwen3_moe", num_experts=6)
    batch = draw_batch(_shape(LAYOUTS["dp2"]), arch, seed=1, with_routes=True).batch
    routes = batch.routed_experts
    assert routes is not None
    assert routes.shape == (len(batch.input_ids), arch.num_layers, 2)
    assert (routes[batch.cu_seqlens[1:] - 1] == -1).all()
    known = routes[(routes >= 0).all((1, 2))]
    assert set(known.ravel().tolist()) == set(range(6))
    assert (known[..., 0] != known[..., 1]).all(), "a token must go to different experts"
    assert draw_batch(_shape(LAYOUTS["dp2"]), arch, seed=1, with_routes=False).batch.routed_experts is None


def test_micro_batches_never_exceed_the_recipes():
    for layout in LAYOUTS.values():
        assert _shape(layout, 4096).micro_batch_tokens <= 4096
    assert _shape(LAYOUTS["cp4"], 40).micro_batch_tokens == 40
    with pytest.raises(ConfigError, match=r"layout\.micro_batch_tokens = 8"):
        _shape(LAYOUTS["cp4"], 8)


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return make_tiny_hf(
        tmp_path_factory.mktemp("moe"), "qwen3_moe", num_layers=6, num_heads=16, num_kv_heads=4, num_experts=32
    )


def _choose(source: Path, *, num_layers=None, weights=None, is_shrunk=False, **degrees):
    return choose_model(source, LayoutSection(**degrees), num_layers=num_layers, weights=weights, is_shrunk=is_shrunk)


def test_by_default_the_fewest_layers_from_four_on_that_the_pipeline_divides_run_with_the_folders_weights(
    moe, tmp_path
):
    for degrees, num_layers in (({}, 4), ({"pp": 2, "world_size": 2}, 4), ({"pp": 3, "vpp": 2, "world_size": 3}, 6)):
        model, problems = _choose(moe, **degrees)
        assert problems == []
        assert model is not None
        assert (model.num_layers, model.weights) == (num_layers, "real")
    (tmp_path / "config.json").write_text((moe / "config.json").read_text())
    model, _ = _choose(tmp_path)
    assert model is not None
    assert model.weights == "random"


def test_all_faults_of_the_model_to_run_are_told_at_once(moe):
    model, problems = _choose(moe, num_layers=7, weights="real", pp=4, tp=3, world_size=12)
    assert model is None
    for words in ("--layers 7: the model has 6", "--layers 7: must be a multiple", "layout.tp = 3", "layout.pp = 4"):
        assert [problem for problem in problems if words in problem], (words, problems)
    assert "leave out --shrink" in _choose(moe, weights="real", is_shrunk=True)[1][0]


def test_a_truncated_weight_file_is_found_before_ranks_start(tmp_path):
    folder = make_tiny_hf(tmp_path, "qwen3")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert _choose(folder)[0] is None
    assert _choose(folder, weights="random", num_layers=2)[1] == []


def test_the_first_layers_run_with_the_weights_of_the_folder(moe, tmp_path):
    model, _ = _choose(moe, num_layers=2)
    assert model is not None
    folder = make_model(tmp_path, model, ParallelLayout(world_size=1), seed=0)
    arch = read_architecture(folder)
    assert replace(arch, num_layers=6) == read_architecture(moe)
    assert arch.num_layers == 2
    with HFReader(folder) as run, HFReader(moe) as whole:
        for name in hf_tensor_specs(arch):
            assert run.read(name).equal(whole.read(name))


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe", "mixtral"])
def test_a_shrunk_model_keeps_kinds_and_head_ratio_and_the_layout_divides_it(family, tmp_path):
    source = make_tiny_hf(
        tmp_path / "source",
        family,
        num_heads=24,
        num_kv_heads=8,
        num_experts=32,
        vocab_size=640,
        llama3_rope=family == "llama",
    )
    layout = (
        ParallelLayout(world_size=16, tp=2, ep=4, etp=2)
        if FAMILIES[family].has_experts
        else ParallelLayout(world_size=2, tp=2)
    )
    model, problems = _choose(source, is_shrunk=True, world_size=layout.world_size, tp=2, ep=layout.ep, etp=layout.etp)
    assert problems == []
    assert model is not None
    folder = make_model(tmp_path, model, layout, seed=0)
    whole, small = read_architecture(source), read_architecture(folder)
    kinds = {name.replace("layers.1", "layers.0") for name in hf_tensor_specs(replace(whole, num_layers=1))}
    if whole.experts is not None:
        kinds = {name for name in kinds if ".experts." not in name or ".experts.0." in name}
        assert small.experts is not None
        assert small.experts.num_experts < whole.experts.num_experts
    assert kinds <= set(hf_tensor_specs(small))
    assert small.num_heads / small.num_kv_heads == 3
    assert small.hidden_size * small.num_heads < whole.hidden_size * whole.num_heads
    assert (small.rope_scaling, small.tied, small.qkv_bias) == (whole.rope_scaling, whole.tied, whole.qkv_bias)
    degrees = {"tp": layout.tp, "pp": 1, "vpp": 1, "ep": layout.ep, "etp": layout.etp, "rollout_tp": 1}
    assert layout_problems(small, **degrees) == []
    with HFReader(folder) as reader:
        assert reader.names() == sorted(hf_tensor_specs(small))
        assert all(reader.read(name).any() for name in reader.names()), "no tensor may be zero"


def test_a_model_beyond_this_machines_memory_is_refused(moe, tmp_path):
    config = json.loads((moe / "config.json").read_text()) | {"hidden_size": 65536, "moe_intermediate_size": 65536}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = _choose(tmp_path)
    assert model is not None
    with pytest.raises(ConfigError, match="use --shrink"):
        check_memory(model, ParallelLayout(world_size=1))
    check_memory(replace(model, is_shrunk=True), ParallelLayout(world_size=1))


def _alone() -> list[dict[str, dict[str, tuple[float, float]]]]:
    return [
        {"policy_gradient": {"layers.0.w": (0.0, 3.0), "layers.1.w": (0.0, 4.0)}, "entropy": {"entropy": (0.0, 2.0)}}
    ]


def test_errors_of_a_kind_are_the_norm_over_layers_and_the_worst_over_ranks():
    split = [
        [{"policy_gradient": {"layers.0.w": (0.3, 3.0)}, "entropy": {"entropy": (0.0, 2.0)}}],
        [{"policy_gradient": {"layers.1.w": (0.1, 4.0)}}],
        [{"policy_gradient": {"layers.1.w": (0.4, 4.0)}}],
    ]
    assert merge_errors(_alone(), split) == {
        "policy_gradient": {"layers.*.w": pytest.approx(math.hypot(0.3, 0.4) / 5)},
        "entropy": {"entropy": 0.0},
    }


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_a_layout_that_gives_no_number_is_infinitely_wrong(nothing):
    split = [
        [
            {
                "policy_gradient": {"layers.0.w": (0.0, 3.0), "layers.1.w": (0.1, 4.0)},
                "entropy": {"entropy": (nothing, 2.0)},
            }
        ],
        [{"policy_gradient": {}, "entropy": {"entropy": (0.0, 2.0)}}],
    ]
    assert merge_errors(_alone(), split)["entropy"] == {"entropy": math.inf}


def test_a_tensor_that_no_rank_gives_is_an_error_of_its_own():
    split = [[{"policy_gradient": {"layers.0.w": (0.0, 3.0)}, "entropy": {"entropy": (0.0, 2.0)}}]]
    with pytest.raises(CheckError, match=r"layers\.1\.w"):
        merge_errors(_alone(), split)


def test_one_rank_without_numbers_is_no_reference():
    alone = [{"entropy": {"entropy": (math.nan, math.nan)}}]
    with pytest.raises(CheckError, match="not finite on one rank"):
        merge_errors(alone, [alone])
