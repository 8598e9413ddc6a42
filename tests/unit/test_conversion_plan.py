"""Laws of the import's plan: every element is read once and written once, by the first rank that holds it; sizes add up."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.architectures import small_architecture

from clipo_megatron import load_recipe
from clipo_megatron.checkpoint.conversion_plan import ImportPlan, plan_import, same_dtype, smallest_layout
from clipo_megatron.checks.memory import estimate_memory
from clipo_megatron.cli.main import main
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.global_tensors import boxes_of, dist_tensor_shapes
from clipo_megatron.weights.names import (
    hf_tensor_specs,
    is_expert,
    layer_numbers,
    megatron_parameter_names,
    padded_vocab_size,
)
from examples.quickstart import prepare

EXAMPLE = Path(prepare.__file__).parent.parent / "math_qwen3_30b_a3b" / "recipe.yaml"
PUBLISHED = EXAMPLE.parent.parent / "configs" / "qwen3_30b_a3b"
PUBLISHED_PARAMETERS = 30_532_122_624
DENSE = [{}, {"tp": 2}, {"tp": 4, "pp": 2}, {"pp": 2, "vpp": 2}]
OF_EXPERTS = [{"ep": 2}, {"tp": 4, "ep": 2}, {"tp": 2, "ep": 4, "pp": 2}, {"tp": 2, "etp": 2, "ep": 2}, {"etp": 4}]


def _cases() -> list[tuple[str, dict[str, int]]]:
    return [
        (family, degrees)
        for family in FAMILIES
        for degrees in DENSE + (OF_EXPERTS if FAMILIES[family].has_experts else [])
    ]


def _plan(arch: Architecture, degrees: dict[str, int], **sizes: int) -> ImportPlan:
    return plan_import(arch, smallest_layout(degrees), dtypes=same_dtype(arch, "float32"), **sizes)


def _small(family: str, *, tied: bool = False) -> Architecture:
    return small_architecture(family, num_layers=4, tied=tied)


@pytest.mark.parametrize(("family", "degrees"), _cases())
def test_every_element_is_read_once_and_written_once_under_every_layout(family, degrees):
    arch = _small(family)
    # So few elements that most tensors are cut, and uneven.
    plan = _plan(arch, degrees, unit_bytes=9000, block_elements=101)
    was_read = {name: np.zeros(math.prod(shape), dtype=int) for name, shape in hf_tensor_specs(arch).items()}
    was_written = {
        key: np.zeros(shape, dtype=int)
        for key, shape in dist_tensor_shapes(arch, padded_vocab=plan.padded_vocab).items()
    }
    for unit in plan.units:
        for block in plan.blocks(unit):
            assert block.num_elements <= 101 or block.rows == 1
            for read in block.reads:
                was_read[read.tensor][read.start : read.start + read.count] += 1
            for write in block.writes:
                assert write.global_shape == was_written[write.key].shape
                was_written[write.key][
                    tuple(slice(start, start + n) for start, n in zip(write.start, write.shape, strict=True))
                ] += 1
    assert all((count == 1).all() for count in was_read.values())
    assert all((count == 1).all() for count in was_written.values())


def _held(arch: Architecture, layout: ParallelLayout, rank: int) -> set[str]:
    """Names of a rank's parameters, from the layout's own words on its ranks."""
    stage = layout.pp_rank(rank)
    layers = [
        number
        for chunk in range(layout.vpp)
        for number in layer_numbers(arch.num_layers, pp=layout.pp, pp_rank=stage, vpp=layout.vpp, vpp_rank=chunk)
    ]
    names = set()
    for name in megatron_parameter_names(arch):
        parts = name.split(".")
        if parts[0] == "embedding":
            is_here = stage == 0
        elif parts[1] == "layers":
            is_here = int(parts[2]) in layers
        else:
            is_here = layout.is_last_stage(rank)
        if is_expert(name) and arch.experts is not None:
            expert = int(parts[parts.index("local_experts") + 1])
            is_here &= expert // (arch.experts.num_experts // layout.ep) == layout.ep_rank(rank)
        if is_here:
            names.add(name)
    return names


@pytest.mark.parametrize(("family", "degrees"), _cases())
def test_each_box_is_written_by_the_first_rank_that_holds_it(family, degrees):
    arch, layout = _small(family), smallest_layout(degrees)
    plan = _plan(arch, degrees)
    first: dict[tuple, int] = {}
    for rank in range(layout.world_size):
        for name in _held(arch, layout, rank):
            boxes = boxes_of(
                name,
                arch,
                tp=layout.tp,
                tp_rank=layout.tp_rank(rank),
                padded_vocab=plan.padded_vocab,
                etp=layout.etp,
                etp_rank=layout.etp_rank(rank),
            )
            for box in boxes:
                first.setdefault((box.key, box.global_start, box.global_extent), rank)
    writes = [write for unit in plan.units for block in plan.blocks(unit) for write in block.writes]
    assert {(write.key, write.start, write.shape): write.rank for write in writes} == first
    assert len(writes) == len(first)


@pytest.mark.parametrize("unit_bytes", [1, 5000, 10**9])
def test_units_hold_every_parameter_once_and_no_more_bytes_than_allowed(unit_bytes):
    arch = _small("qwen3_moe")
    plan = _plan(arch, {"tp": 2, "pp": 2, "vpp": 2}, unit_bytes=unit_bytes)
    names = [name for unit in plan.units for name in unit.parameters]
    assert sorted(names) == sorted(megatron_parameter_names(arch))
    assert [unit.number for unit in plan.units] == list(range(len(plan.units)))
    assert all(unit.num_bytes <= unit_bytes or len(unit.parameters) == 1 for unit in plan.units)
    shapes = dist_tensor_shapes(arch, padded_vocab=plan.padded_vocab)
    assert plan.num_bytes == 4 * sum(math.prod(shape) for shape in shapes.values())
    assert len(plan.units) == {1: len(names), 10**9: 2}.get(unit_bytes, len(plan.units))


@pytest.mark.parametrize("tied", [False, True])
def test_the_parameters_held_by_all_ranks_are_the_model_s_and_the_tied_copy_s(tied):
    arch = _small("llama", tied=tied)
    plan = _plan(arch, {"tp": 2, "pp": 2})
    shapes = dist_tensor_shapes(arch, padded_vocab=plan.padded_vocab)
    copies = {key: 1 if "linear" in key and "norm" not in key else 2 for key in shapes}  # norms are on both tp ranks
    copies |= {key: 1 + tied for key in shapes if "embedding" in key}  # tied: of the first and of the last stage
    copies |= {key: 1 for key in shapes if key.startswith("output_layer")}
    assert sum(share.parameters for share in plan.shares()) == sum(
        copies[key] * math.prod(shape) for key, shape in shapes.items()
    )


# --- the dry run ---


@pytest.fixture(scope="module")
def published() -> Path:
    """A folder with nothing but the published config.json."""
    return PUBLISHED


def _dry_run(*options: str) -> dict:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["ckpt", "import", *options, "--dry-run", "--json"]) == 0
    return json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def found(published: Path) -> dict:
    """The dry run of the example."""
    return _dry_run(str(published), "--recipe", str(EXAMPLE))


def test_a_dry_run_of_the_30b_example_adds_up_to_the_published_parameters(found):
    padding = 2 * (padded_vocab_size(151936, 4) - 151936) * 2048
    weights = 2 * (PUBLISHED_PARAMETERS + padding)
    chunks = sum(rank["num_chunks"] for rank in found["ranks"])
    assert 700 * chunks < found["num_bytes"] - weights < 900 * chunks  # what stands around each box in a file
    assert [rank["rank"] for rank in found["ranks"]] == list(range(16))
    assert sum(rank["num_files"] for rank in found["ranks"]) == found["num_files"]
    # Experts are held once each, by 8 ranks of a stage.
    of_experts = 48 * 128 * 3 * 2048 * 768
    assert sum(rank["expert_parameters"] for rank in found["ranks"]) == of_experts


def test_a_dry_run_s_memory_is_that_of_the_memory_estimate(found, published):
    estimate = estimate_memory(load_recipe(EXAMPLE), read_architecture(published))
    for rank in found["ranks"]:
        stage = estimate.stages[rank["stage"]]
        assert rank["memory"]["weights"] == stage.weights
        assert rank["memory"]["training"] == stage.weights + stage.gradients + stage.optimizer


def test_a_dry_run_prints_files_sizes_and_memory_and_writes_nothing(published, capsys, tmp_path):
    before = sorted(published.iterdir())
    target = tmp_path / "target"
    assert main(["ckpt", "import", str(published), str(target), "--dry-run", "--layout", "tp=4,pp=2,ep=8"]) == 0
    text = capsys.readouterr().out
    for words in ("4-7", "12-15", "61.1 GB", "3.74 GiB", "nothing was written", "float32 gradients", "rows to 152064"):
        assert words in text
    assert sorted(published.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_a_number_format_changes_a_dry_run_s_bytes_and_not_its_memory(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((PUBLISHED / "config.json").read_text()) | {"num_hidden_layers": 2})
    )
    options = [str(tmp_path), "--layout", "tp=2,ep=8"]
    stored, wide = _dry_run(*options), _dry_run(*options, "--dtype", "float32")
    for one, other in zip(stored["ranks"], wide["ranks"], strict=True):
        frames = 2 * one["num_bytes"] - other["num_bytes"]  # stand in both, once
        assert 700 * one["num_chunks"] <= frames <= 900 * one["num_chunks"]
        assert one["memory"] == other["memory"]


FAULTS = [
    (
        ["--layout", "tp=2,ppp=2,tp=1,ep=x"],
        ["ppp: unknown key; did you mean 'pp'?", "tp: given twice", "ep = x: must be"],
    ),
    (["--layout", "cp=2"], ["cp: unknown key; did you mean"]),
    (["--layout", "tp=8,pp=5,vpp=2,etp=5"], ["num_key_value_heads = 4", "num_hidden_layers = 48", "= 768"]),
    (["--layout", "vpp=2"], ["layout.vpp = 2: only a pipeline stage"]),
    (["--layout", "ep=3", "--unit-mib", "0"], ["number of experts = 128", "--unit-mib = 0"]),
    ([], ["no layout is told: add --layout"]),
    (["--layout", "tp=2", "--recipe", str(EXAMPLE)], [f"--layout tp=2 and --recipe {EXAMPLE}: both tell the layout"]),
    (["--recipe", "no.yaml"], ["no.yaml"]),
]


@pytest.mark.parametrize(("options", "rules"), FAULTS)
def test_all_faults_of_a_layout_are_told_at_once(published, capsys, options, rules):
    assert main(["ckpt", "import", str(published), "--dry-run", *options]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == len(rules)
    for rule in rules:
        assert rule in text


def test_an_import_without_a_target_is_refused(published, capsys):
    assert main(["ckpt", "import", str(published), "--layout", "tp=2"]) == 2
    assert "DST is missing" in capsys.readouterr().err


def test_a_folder_without_config_json_is_refused_by_name(tmp_path, capsys):
    assert main(["ckpt", "import", str(tmp_path), "--layout", "tp=2", "--dry-run"]) == 2
    assert f"{tmp_path / 'config.json'}: no such file" in capsys.readouterr().err


def test_the_smallest_layout_has_the_fewest_ranks_that_any_layout_of_its_degrees_can_have():
    for tp, pp, ep, etp in itertools.product((1, 2, 3, 4), (1, 2), (1, 2, 4), (1, 2, 3)):
        degrees = {"tp": tp, "pp": pp, "ep": ep, "etp": etp}
        legal = [size for size in range(1, 97) if size % (tp * pp) == 0 and size // pp % (ep * etp) == 0]
        assert smallest_layout(degrees).world_size == legal[0]
