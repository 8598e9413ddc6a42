"""Laws of sync plans over random models, layouts and placements; plans of published models from config.json alone."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import small_architecture
from support.plan_cases import Case, cases, shards_of
from support.plans import (
    UNWRITTEN,
    carry_out,
    numbered_folder,
    shapes_by_layer,
    sliced_engine_rank,
    views_of,
)

from clipo_megatron.cli.main import main
from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import Link, Placement, place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan, Transfer
from clipo_megatron.sync.plan_json import from_json, to_json
from clipo_megatron.sync.plan_report import Bandwidths, bytes_of_links, floor_seconds, traffic
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.families import FAMILIES

EXAMPLES = Path(__file__).parents[2] / "examples"
PUBLISHED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
QWEN3_30B = PUBLISHED | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "moe_intermediate_size": 768,
}
QWEN3_235B = PUBLISHED | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_every_engine_element_is_written_once_with_its_value_and_the_padding_never(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hf = numbered_folder(case.arch, Path(folder))
        shards = shards_of(case, Path(folder))
    plan = case.plan
    shapes = shapes_by_layer(plan.engine_shapes, case.arch.num_layers)
    for engine, rank in case.engine_ranks():
        values, counts = carry_out(plan.into(engine, rank), shards, shapes)
        expected = sliced_engine_rank(
            case.arch, hf, tp=case.engines.tp, rank=rank, expert_parallel=case.engines.expert_parallel
        )
        assert set(values) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(values[name], tensor), name
            assert torch.equal(counts[name], (tensor != UNWRITTEN).int()), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(max_ranks=8, most_layers=1))
def test_nothing_comes_from_afar_that_a_nearer_rank_holds(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        numbered_folder(case.arch, Path(folder))
        shards = shards_of(case, Path(folder))
    held = {rank: torch.cat([tensor.flatten() for tensor in shard.values()]) for rank, shard in shards.items()}
    plan, placement = case.plan, case.placement
    near_to_far = list(Link)
    for engine, rank in case.engine_ranks():
        to = engine * case.engines.tp + rank
        nearer: dict[Link, torch.Tensor] = {}
        for distance, link in enumerate(near_to_far):
            ranks = [other for other in held if near_to_far.index(placement.link(other, to)) < distance]
            nearer[link] = torch.cat([held[other] for other in ranks]) if ranks else torch.empty(0)
        for transfer in plan.into(engine, rank):
            target = torch.empty(shapes_by_layer(plan.engine_shapes, case.arch.num_layers)[transfer.parameter])
            for source, _ in views_of(transfer, shards[transfer.source], target):
                assert not torch.isin(source, nearer[placement.link(transfer.source, to)]).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(max_ranks=32, most_layers=5))
def test_an_engine_rank_receives_its_parameters_bytes_and_not_one_more(case: Case) -> None:
    plan, arch = case.plan, case.arch
    shapes = shapes_by_layer(plan.engine_shapes, arch.num_layers)
    whole = sum(math.prod(shape) for shape in shapes.values())
    received: Counter[int] = Counter()
    for (_, to), num_bytes in bytes_of_links(plan).items():
        received[to] += num_bytes
    for engine, rank in case.engine_ranks():
        share = -(-arch.vocab_size // 64) * 64 // case.engines.tp
        rows_held = min(arch.vocab_size, (rank + 1) * share) - min(arch.vocab_size, rank * share)
        padding = (share - rows_held) * arch.hidden_size * (1 if arch.tied else 2)
        to = engine * case.engines.tp + rank
        assert received[to] == 4 * (whole - padding)
        assert received[to] == sum(plan.num_bytes(transfer.copy) for transfer in plan.into(engine, rank))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(max_ranks=32, most_layers=5))
def test_both_ends_of_a_link_list_the_same_transfers_in_the_same_order(case: Case) -> None:
    plan = case.plan
    sent: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    received: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    for source in range(case.trainer.world_size):
        for transfer in plan.out_of(source):
            sent[transfer[:3]].append(transfer)
    for engine, rank in case.engine_ranks():
        for transfer in plan.into(engine, rank):
            received[transfer[:3]].append(transfer)
    assert sent == received


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(max_ranks=32, most_layers=5))
def test_ranks_that_hold_the_same_send_the_same_but_for_one_copy(case: Case) -> None:
    # Every GPU is a node of its own: all ranks are equally near.
    far = place_apart(trainer_ranks=case.trainer.world_size, engine_ranks=case.engines.num_ranks, gpus_per_node=1)
    plan = replace(case, placement=far).plan
    sent: Counter[int] = Counter()
    for (source, _), num_bytes in bytes_of_links(plan).items():
        sent[source] += num_bytes
    largest = max(map(plan.num_bytes, plan.copies))
    layout = case.trainer
    replicas = defaultdict(list)
    for rank in range(layout.world_size):
        key = layout.pp_rank(rank), layout.tp_rank(rank), layout.ep_rank(rank), layout.etp_rank(rank)
        replicas[key].append(sent[rank])
    for loads in replicas.values():
        assert max(loads) - min(loads) <= largest


def test_in_each_layer_engines_that_need_the_same_draw_on_all_that_hold_it() -> None:
    arch = small_architecture("qwen3", num_layers=8, hidden_size=64, ffn_size=64)
    trainer, engines = ParallelLayout(world_size=8, tp=2), EngineLayout(engines=4, tp=2)
    far = place_apart(trainer_ranks=8, engine_ranks=8, gpus_per_node=1)
    plan = plan_sync(arch, trainer, engines, far, dtype="float32")
    sent: dict[int, Counter[int]] = defaultdict(Counter)
    for source in range(8):
        for transfer in plan.out_of(source):
            if len(transfer.copy.shape) > 1 or transfer.copy.num_elements > arch.hidden_size:  # no norm
                sent[transfer.layer if "{layer}" in transfer.copy.parameter else -1][source] += (
                    transfer.copy.num_elements
                )
    for layer in range(8):
        assert len(sent[layer]) == 8
        assert len(set(sent[layer].values())) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tp=st.sampled_from([1, 2, 4]),
    dp=st.integers(1, 3),
    vocab_rows=st.integers(1, 3),
)
def test_on_the_same_gpus_in_the_same_layout_nothing_is_moved(family: str, tp: int, dp: int, vocab_rows: int) -> None:
    # Only where the vocabulary's paddings differ (128 a rank here, 64 in all there) are its rows shared out otherwise.
    arch = small_architecture(family, vocab_size=128 * tp * vocab_rows, expert_ffn_size=8)
    # Experts: etp = tp gives each trainer rank the slice of each expert that its engine rank holds.
    trainer = ParallelLayout(world_size=tp * dp, tp=tp, etp=tp if FAMILIES[family].has_experts else 1)
    engines = EngineLayout(engines=dp, tp=tp)
    together = Placement(trainer=tuple(range(tp * dp)), engines=tuple(range(tp * dp)), gpus_per_node=8)
    of_link = traffic(plan_sync(arch, trainer, engines, together, dtype="bfloat16"))
    assert (of_link[Link.SAME_NODE].num_bytes, of_link[Link.NETWORK].num_bytes) == (0, 0)
    assert of_link[Link.SAME_GPU].num_bytes >= 2 * parameter_count(arch) * dp


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(max_ranks=32, most_layers=3))
def test_a_plan_read_from_its_json_is_the_plan(case: Case) -> None:
    plan = case.plan
    assert from_json(to_json(plan)) == plan


def test_the_report_adds_up_and_its_floor_is_that_of_the_busiest_gpu() -> None:
    arch = small_architecture("qwen3", num_layers=4)
    trainer, engines = ParallelLayout(world_size=4, tp=2, pp=2), EngineLayout(engines=3, tp=2)
    placement = Placement(trainer=(0, 1, 2, 3), engines=(0, 1, 2, 3, 8, 9), gpus_per_node=4)
    plan = plan_sync(arch, trainer, engines, placement, dtype="bfloat16")
    of_link = traffic(plan)
    by_hand = {link: [0, Counter(), Counter()] for link in Link}
    for engine in range(3):
        for rank in range(2):
            for transfer in plan.into(engine, rank):
                to = 2 * engine + rank
                source_gpu, gpu = placement.trainer[transfer.source], placement.engines[to]
                link = (
                    Link.SAME_GPU
                    if source_gpu == gpu
                    else Link.SAME_NODE
                    if source_gpu // 4 == gpu // 4
                    else Link.NETWORK
                )
                num_bytes = 2 * math.prod(transfer.copy.shape)
                by_hand[link][0] += 1
                by_hand[link][1][transfer.source] += num_bytes
                by_hand[link][2][to] += num_bytes
    bandwidths = Bandwidths(same_node=4.0, network=0.5, memory=8.0)
    for link, (transfers, sent, received) in by_hand.items():
        assert (of_link[link].transfers, of_link[link].copies) == (transfers, transfers)
        assert (of_link[link].sent, of_link[link].received) == (sent, received)
        assert of_link[link].num_bytes == sum(sent.values()) > 0
        busiest = max(*sent.values(), *received.values())
        rate = {Link.SAME_GPU: 8e9 / 2, Link.SAME_NODE: 4e9, Link.NETWORK: 0.5e9}[link]
        assert floor_seconds(of_link[link], link, bandwidths) == pytest.approx(busiest / rate)


def _published(config: dict[str, object], folder: Path) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


LARGE = {
    "30B-A3B to 4 x tp 8": (QWEN3_30B, {"world_size": 32, "tp": 4, "ep": 8}, {"engines": 4, "tp": 8}),
    "30B-A3B to 16 x tp 2": (QWEN3_30B, {"world_size": 32, "tp": 4, "ep": 8}, {"engines": 16, "tp": 2}),
    "235B-A22B to 16 x tp 8": (QWEN3_235B, {"world_size": 128, "tp": 4, "pp": 2, "ep": 8}, {"engines": 16, "tp": 8}),
    "235B-A22B to 8 x tp 16": (QWEN3_235B, {"world_size": 128, "tp": 4, "pp": 2, "ep": 8}, {"engines": 8, "tp": 16}),
}


def test_large_models_are_planned_from_config_json_alone_in_seconds(tmp_path: Path) -> None:
    start = time.process_time()
    for config, trainer, engines in LARGE.values():
        _large_plan(config, trainer, engines, tmp_path)
    assert time.process_time() - start < 10


def _large_plan(
    config: dict[str, object], trainer: dict[str, int], engines: dict[str, int], folder: Path
) -> tuple[Architecture, SyncPlan]:
    arch, layout = _published(config, folder), EngineLayout(**engines)
    apart = place_apart(trainer_ranks=trainer["world_size"], engine_ranks=layout.num_ranks, gpus_per_node=8)
    return arch, plan_sync(arch, ParallelLayout(**trainer), layout, apart, dtype="bfloat16")


@pytest.mark.parametrize("name", LARGE)
def test_a_large_plan_is_minimal_balanced_and_has_no_entry_for_single_experts(name: str, tmp_path: Path) -> None:
    config, trainer, engines = LARGE[name]
    arch, plan = _large_plan(config, trainer, engines, tmp_path)
    tp, num_layers, hidden = engines["tp"], arch.num_layers, arch.hidden_size
    # Beyond the model once an engine: norms and routers on every rank, key and value heads where ranks outnumber them.
    on_all_ranks = hidden + num_layers * (2 * hidden + 2 * arch.head_dim + 128 * hidden)
    key_value = num_layers * 2 * hidden * arch.head_dim * max(0, tp - arch.num_kv_heads)
    expected = 2 * plan.engines.engines * (parameter_count(arch) + (tp - 1) * on_all_ranks + key_value)
    links = bytes_of_links(plan)
    assert sum(links.values()) == expected
    transfers = sum(1 for _ in plan.into(0, 0))
    # From each tp rank that has a share q, k and v together, output; 4 norms; router; for each of the trainer's 8 expert
    # ranks gate and up together, and down. The vocabulary's two tensors are cut in a part for each of 32 ranks at most.
    tp_ranks = max(1, trainer["tp"] // tp)
    assert transfers <= num_layers * (3 * tp_ranks + 4 + 1 + 2 * 8) + 2 * 32 + 1
    sent: Counter[int] = Counter()
    for (source, _), num_bytes in links.items():
        sent[source] += num_bytes
    assert len(sent) == trainer["world_size"]
    assert max(sent.values()) < 1.06 * sum(sent.values()) / len(sent)


def _table(text: str) -> dict[str, list[str]]:
    """Link -> the row's cells behind it."""
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "\u2502" in line]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("wanted", "colocated"), [([], False), (["--colocated"], True), (["rollout.colocate=true"], True)]
)
def test_the_command_shows_the_plan_s_figures_and_writes_it(
    wanted: list[str], colocated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = _published(QWEN3_30B, tmp_path)
    command = ["plan", "sync", str(EXAMPLES / "math_qwen3_30b_a3b" / "recipe.yaml"), *wanted, "--config", str(tmp_path)]
    command += ["--json", str(tmp_path / "plan.json"), "--network-gbs", "25"]
    assert main(command) == 0
    out = capsys.readouterr().out
    # Apart: each of four nodes has four trainer ranks and two engines of two.
    halves = [tuple(8 * (rank // 4) + 4 * half + rank % 4 for rank in range(16)) for half in (0, 1)]
    trainer, engines = (tuple(range(16)), tuple(range(16))) if colocated else halves
    plan = plan_sync(
        arch,
        ParallelLayout(world_size=16, tp=4, pp=2, ep=8),
        EngineLayout(engines=8, tp=2),
        Placement(trainer=trainer, engines=engines, gpus_per_node=8),
        dtype="bfloat16",
    )
    written = (tmp_path / "plan.json").read_text()
    assert from_json(written) == plan
    report = json.loads(written)["report"]
    links = {(source, 2 * engine + rank): num_bytes for source, engine, rank, num_bytes in report["bytes"]}
    assert links == bytes_of_links(plan)
    assert [link["num_bytes"] for link in report["links"]] == [found.num_bytes for found in traffic(plan).values()]
    rows = _table(out)
    total = sum(float(row[2].replace(",", "")) for row in rows.values())
    assert total == pytest.approx(sum(bytes_of_links(plan).values()) / 1e9, abs=0.02)
    of_network = traffic(plan)[Link.NETWORK]
    assert rows["network"][0] == f"{of_network.transfers:,}"
    floor = 1e3 * max(*of_network.sent.values(), *of_network.received.values()) / 25e9
    assert rows["network"][-1] == f"{floor:,.1f}"
    assert f"floor {floor:,.1f} ms (network)" in out
    assert (rows["same gpu"][2] != "0.00") == colocated


def test_the_command_names_all_faults_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _published(QWEN3_30B, tmp_path)
    recipe = str(EXAMPLES / "math_qwen3_30b_a3b" / "recipe.yaml")
    wrong = ["rollout.tp=3", "--nvlink-gbs", "0", "--gpus-per-node", "0", "--config", str(tmp_path)]
    assert main(["plan", "sync", recipe, *wrong]) == 2
    err = capsys.readouterr().err
    for fault in ("rollout.tp = 3", "--nvlink-gbs = 0.0: must be > 0", "--gpus-per-node = 0: must be >= 1"):
        assert fault in err


@pytest.mark.parametrize("wanted", [["rollout.engines=40", "--colocated"], ["rollout.tp=16", "rollout.engines=1"]])
def test_what_no_run_could_place_is_refused(
    wanted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _published(QWEN3_30B, tmp_path)
    recipe = str(EXAMPLES / "math_qwen3_30b_a3b" / "recipe.yaml")
    assert main(["plan", "sync", recipe, *wanted, "--config", str(tmp_path)]) == 2
    assert "rollout.tp" in capsys.readouterr().err


def test_layouts_and_placements_that_do_not_fit_are_refused() -> None:
    arch = small_architecture("qwen3")
    layout, engines = ParallelLayout(world_size=2, tp=2), EngineLayout(engines=1, tp=2)
    wrong = place_apart(trainer_ranks=3, engine_ranks=1, gpus_per_node=8)
    with pytest.raises(ConfigError) as raised:
        plan_sync(arch, layout, engines, wrong, dtype="int8")
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        "placement of the trainer",
        "placement of the engines",
        "dtype = int8",
    ]
    with pytest.raises(ConfigError, match="one rank each"):
        Placement(trainer=(0, 0), engines=(1,), gpus_per_node=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "KeyError"), ("[", "is no plan"), ('{"format": "clipo sync plan 0"}', "this release reads")],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        from_json(text)
