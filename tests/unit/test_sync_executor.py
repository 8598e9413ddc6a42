"""Laws of planned copies: what arrives, what is zeroed, what the checksums see, what is refused."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import small_architecture
from support.plan_cases import Case, cases, shards_of
from support.plans import UNWRITTEN, Parameters, numbered_folder, shapes_by_layer, sliced_engine_rank

from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync import executor
from clipo_megatron.sync.checksums import checksum
from clipo_megatron.sync.executor import PlannedCopies
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout

GARBAGE = -7.0


def in_one_buffer(shard: Parameters, *, gap: int) -> Parameters:
    """The same values as views of one buffer, `gap` elements apart, as gradient buffers hold their parameters."""
    buffer = torch.full((sum(tensor.numel() + gap for tensor in shard.values()),), GARBAGE)
    views, reached = {}, gap
    for name, tensor in shard.items():
        views[name] = buffer[reached : reached + tensor.numel()].view(tensor.shape)
        views[name].copy_(tensor)
        reached += tensor.numel() + gap
    return views


def empty_targets(case: Case) -> Parameters:
    shapes = shapes_by_layer(case.plan.engine_shapes, case.arch.num_layers)
    return {name: torch.full(shape, GARBAGE) for name, shape in shapes.items()}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    case=cases(max_ranks=8),
    gap=st.integers(0, 3),
    dense_bytes=st.sampled_from([1, 8, 1 << 16]),
    batch_bytes=st.sampled_from([1, 200, 1 << 26]),
    by_parameter=st.booleans(),
)
def test_an_engine_rank_holds_its_slices_of_the_model_and_zeros_in_the_padding(
    case: Case, gap: int, dense_bytes: int, batch_bytes: int, by_parameter: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_DENSE_BYTES", dense_bytes)
        patch.setattr(executor, "_BATCH_BYTES", batch_bytes)
        hf = numbered_folder(case.arch, Path(folder))
        sources = {rank: in_one_buffer(shard, gap=gap) for rank, shard in shards_of(case, Path(folder)).items()}
        for engine, rank in case.engine_ranks():
            expected = sliced_engine_rank(
                case.arch, hf, tp=case.engines.tp, rank=rank, expert_parallel=case.engines.expert_parallel
            )
            copies = PlannedCopies(case.plan, sources, engine=engine, engine_rank=rank)
            targets = empty_targets(case)
            assert set(copies.parameters) == set(targets)
            groups = [{name: targets[name]} for name in targets] if by_parameter else [targets]
            reached: list[int] = []
            for group in groups:
                bound = copies.bind(group)
                bound.run(reached.append)
                bound.verify()
            assert sum(copies.bind(group).num_bytes for group in groups) == copies.num_bytes
            for name, tensor in expected.items():
                assert torch.equal(targets[name], torch.where(tensor == UNWRITTEN, 0.0, tensor)), name
            if not by_parameter:
                assert reached == sorted(reached)
                assert reached[-1] == copies.num_bytes


def small_case(family: str = "qwen3", **sizes: int) -> Case:
    arch = small_architecture(family, **sizes)
    trainer, engines = ParallelLayout(world_size=2, tp=2), EngineLayout(engines=1, tp=1)
    placement = place_apart(trainer_ranks=2, engine_ranks=1, gpus_per_node=8)
    return Case(arch, trainer, engines, placement, 1 << 21)


@pytest.fixture
def numbered(tmp_path: Path) -> tuple[Case, dict[int, Parameters]]:
    case = small_case()
    numbered_folder(case.arch, tmp_path)
    return case, shards_of(case, tmp_path)


def test_copies_laid_out_once_bring_what_the_trainer_holds_at_each_run(
    numbered: tuple[Case, dict[int, Parameters]],
) -> None:
    case, sources = numbered
    targets = empty_targets(case)
    bound = PlannedCopies(case.plan, sources, engine=0, engine_rank=0).bind(targets)
    for step in range(3):
        for shard in sources.values():
            for tensor in shard.values():
                tensor.add_(1.0)
        bound.run()
        embedding = torch.cat([sources[rank]["embedding.word_embeddings.weight"] for rank in (0, 1)])
        rows = case.arch.vocab_size
        assert torch.equal(targets["model.embed_tokens.weight"][:rows], embedding[:rows]), step
        bound.verify()


def test_checksums_of_the_trainers_own_computing_are_those_of_the_engine(
    numbered: tuple[Case, dict[int, Parameters]],
) -> None:
    case, sources = numbered
    targets = empty_targets(case)
    bound = PlannedCopies(case.plan, sources, engine=0, engine_rank=0).bind(targets)
    bound.run()
    told = bound.source_checksums()
    for shard in sources.values():
        for tensor in shard.values():
            tensor.zero_()
    bound.verify(told)
    with pytest.raises(CheckError, match=r"engine 0 rank 0: \d+ of \d+ slices differ"):
        bound.verify()


def test_a_single_wrong_bit_is_seen_and_its_slice_is_named(numbered: tuple[Case, dict[int, Parameters]]) -> None:
    case, sources = numbered
    targets = empty_targets(case)
    bound = PlannedCopies(case.plan, sources, engine=0, engine_rank=0).bind(targets)
    bound.run()
    name = "model.layers.1.mlp.gate_up_proj.weight"
    targets[name].view(torch.int32)[3, 5] ^= 1
    with pytest.raises(CheckError, match=rf"1 of \d+ slices differ.*first {name}.*trainer rank 0"):
        bound.verify()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_checksums_depend_on_bits_and_places_but_not_on_strides(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]))
    shape = data.draw(
        st.sampled_from([(1,), (5,), (8,), (4100,), (9001,), (16384,), (3, 4), (7, 3), (2, 5, 8), (2, 3, 5)])
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    count = math.prod(shape)
    values = torch.randint(0, 100, (count,), generator=generator).to(dtype).view(shape)
    expected = checksum([values])
    # The same in memory with gaps before, between and behind the rows.
    gap, offset = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 9))
    rows = torch.full((offset + count // shape[-1] * (shape[-1] + gap) + 8,), 77).to(dtype)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size + (gap if len(strides) == 1 else 0))
    view = rows.as_strided(shape, strides, offset)
    view.copy_(values)
    assert torch.equal(checksum([view]), expected)
    # Two elements that differ change places.
    flat = values.flatten().clone()
    first, second = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    swapped = flat.clone()
    swapped[first], swapped[second] = flat[second], flat[first]
    is_same = bool(flat[first] == flat[second])
    assert torch.equal(checksum([swapped.view(shape)]), expected) == is_same
    # Parts are weighted by their place, too.
    other = values + 1
    assert not torch.equal(checksum([values, other]), checksum([other, values]))


def test_what_a_deadline_raises_between_batches_ends_the_copying(
    numbered: tuple[Case, dict[int, Parameters]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_BATCH_BYTES", 64)
    case, sources = numbered
    targets = empty_targets(case)
    bound = PlannedCopies(case.plan, sources, engine=0, engine_rank=0).bind(targets)

    def late(done: int) -> None:
        if done > 2000:
            raise EngineError("late")

    with pytest.raises(EngineError, match="late"):
        bound.run(late)
    assert any((tensor == GARBAGE).any() for tensor in targets.values())


def test_trainers_and_engines_that_do_not_fit_the_plan_are_refused(
    numbered: tuple[Case, dict[int, Parameters]],
) -> None:
    case, sources = numbered
    plan, name = case.plan, "decoder.layers.0.mlp.linear_fc1.weight"

    def with_changed(tensor: torch.Tensor) -> dict[int, Parameters]:
        return sources | {1: sources[1] | {name: tensor}}

    whole = sources[1][name]
    wrong: list[tuple[dict[int, Parameters], str]] = [
        ({0: sources[0]}, "reads from trainer rank 1, whose parameters are not shared"),
        (sources | {1: {other: t for other, t in sources[1].items() if other != name}}, f"shares no parameter {name}"),
        (with_changed(whole[:-1]), rf"trainer rank 1: {name} is torch.float32 .*the plan says"),
        (with_changed(whole.bfloat16()), rf"trainer rank 1: {name} is torch.bfloat16"),
        (with_changed(whole.t().contiguous().t()), rf"trainer rank 1: {name} has strides"),
    ]
    for found, message in wrong:
        with pytest.raises(EngineError, match=message):
            PlannedCopies(plan, found, engine=0, engine_rank=0)

    copies = PlannedCopies(plan, sources, engine=0, engine_rank=0)
    with pytest.raises(EngineError, match=r"model\.unknown: the plan has no such engine parameter"):
        copies.bind({"model.unknown": torch.zeros(1)})
    with pytest.raises(EngineError, match=r"engine parameter model\.norm\.weight is torch\.float32 \[1\]"):
        copies.bind({"model.norm.weight": torch.zeros(1)})
