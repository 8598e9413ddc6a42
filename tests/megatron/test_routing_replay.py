"""Rollout routing replay in Megatron's routers: against float64 loops, against runs without recompute, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from support.policy_cases import make_batch
from support.ranks import run_ranks
from torch import Tensor

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.micro_batch import Padding, pack
from clipo_megatron.policy.routing import RouteReplay, install_replay, micro_batch_routes

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, FFN = 4, 8, 2, 16, 12
ONE = ParallelLayout(world_size=1)


class Chunk(torch.nn.Module):
    """Mixture-of-experts layers with their residual connections; `numbers` are their places in the whole model."""

    def __init__(self, numbers: list[int], layout: ParallelLayout) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=NUM_LAYERS, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=NUM_EXPERTS,
            moe_router_topk=TOP_K, moe_ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=F.silu,
            add_bias_linear=False, moe_router_dtype="fp32", moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0, moe_token_dispatcher_type="alltoall", perform_initialization=False,
            tensor_model_parallel_size=layout.tp, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1,
            sequence_parallel=layout.tp > 1,
        )  # fmt: skip
        spec = get_moe_module_spec(use_te=False, num_experts=NUM_EXPERTS, moe_grouped_gemm=False)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.layers = torch.nn.ModuleList([build_module(spec, config=config, pg_collection=groups) for _ in numbers])
        first_expert = layout.ep_rank(torch.distributed.get_rank()) * (NUM_EXPERTS // layout.ep)
        for number, layer in zip(numbers, self.layers, strict=True):
            layer.set_layer_number(number + 1)
            router, gate_up, down = weights(number)
            with torch.no_grad():
                layer.router.weight.copy_(router)
                for local, expert in enumerate(layer.experts.local_experts):
                    expert.linear_fc1.weight.copy_(gate_up[first_expert + local])
                    expert.linear_fc2.weight.copy_(down[first_expert + local])

    def forward(self, x_TH: Tensor, *, recompute: bool = False) -> Tensor:
        x = x_TH[:, None]
        for layer in self.layers:
            x = x + (checkpoint(lambda x, layer=layer: layer(x)[0], False, x) if recompute else layer(x)[0])
        return x[:, 0]


def weights(layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Router [E, H], gate and up of all experts [E, 2 F, H], down [E, H, F]."""
    generator = torch.Generator().manual_seed(layer)
    return (
        torch.randn(NUM_EXPERTS, HIDDEN, generator=generator),
        0.3 * torch.randn(NUM_EXPERTS, 2 * FFN, HIDDEN, generator=generator),
        0.3 * torch.randn(NUM_EXPERTS, HIDDEN, FFN, generator=generator),
    )


def tokens_and_routes(num_tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States [T, H] and random routes [T, L, K]: a third of the rows are unknown."""
    generator = torch.Generator().manual_seed(100 + seed)
    routes = torch.rand(num_tokens, NUM_LAYERS, NUM_EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    routes[torch.arange(num_tokens) % 3 == 1] = -1
    return torch.randn(num_tokens, HIDDEN, generator=generator), routes.short()


def loop_layer(x_TH: Tensor, routes_TK: Tensor, layer: int) -> tuple[Tensor, Tensor, int]:
    """One layer token by token in float64: (output, router weight with graph, tokens that agree)."""
    router, gate_up, down = (weight.double() for weight in weights(layer))
    router.requires_grad_()
    rows, agreeing = [], 0
    for x, route in zip(x_TH, routes_TK.tolist(), strict=True):
        logits = router @ x
        own = sorted(logits.argsort(descending=True)[:TOP_K].tolist())
        chosen = own if route[0] < 0 else route
        agreeing += route[0] >= 0 and sorted(route) == own
        share = torch.stack([logits[expert] for expert in chosen]).softmax(0)
        row = x
        for weight, expert in zip(share, chosen, strict=True):
            gate, up = (gate_up[expert] @ x).chunk(2)
            row = row + weight * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows), router, agreeing


def on_ranks(work: Callable[..., object], *args: object, layout: ParallelLayout = ONE) -> list:
    def entry() -> object:
        with cuda_means_cpu():
            make_groups(layout, seed=0)
            return work(*args)

    return run_ranks(entry, world_size=layout.world_size)


def _one_layer() -> None:
    x, routes = tokens_and_routes(30)
    own = (x @ weights(2)[0].T).topk(TOP_K).indices.flip(1)
    routes[::6, 2] = own[::6].short()  # the router's own choice, in another order
    chunk = Chunk([2], ONE)
    replay = install_replay([chunk])
    replay.set_routes(chunk, routes)
    found = chunk(x.requires_grad_())
    (found * found.detach().cos()).sum().backward()

    x_64 = x.detach().double().requires_grad_()
    wanted, router, agreeing = loop_layer(x_64, routes[:, 2], 2)
    (wanted * wanted.detach().cos()).sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x_64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chunk.layers[0].router.weight.grad.double(), router.grad, rtol=1e-4, atol=1e-4)
    assert replay.take_counts().tolist() == [agreeing, 20.0]
    assert 5 <= agreeing < 20
    assert replay.take_counts().tolist() == [0.0, 0.0]


def test_known_tokens_go_to_the_replayed_experts_and_others_to_the_routers_own():
    on_ranks(_one_layer)


def _two_chunks() -> None:
    x, routes = tokens_and_routes(20)
    chunks = [Chunk([0, 2], ONE), Chunk([1, 3], ONE)]
    replay = install_replay(chunks)
    wrapped = [torch.nn.Sequential(chunk) for chunk in chunks]
    found = x
    for wrapper in wrapped:
        wrapper.eval()
        replay.set_routes(wrapper, routes)
        with torch.no_grad():
            found = wrapper(found)
    wanted, agreeing = x.double(), 0
    for layer in (0, 2, 1, 3):
        wanted, _, count = loop_layer(wanted, routes[:, layer], layer)
        agreeing += count
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    assert replay.take_counts().tolist() == [agreeing, 4 * 13.0]


def test_each_chunk_takes_the_routes_of_its_own_layers():
    on_ranks(_two_chunks)


def _in_flight(recompute: bool) -> list[Tensor]:
    """Gradients of three micro-batches, up to two of them in flight; without recompute, one after the other."""
    chunk = Chunk([0, 1, 2, 3], ONE)
    replay = install_replay([chunk])
    cases = [tokens_and_routes(length, seed=length) for length in (9, 12, 9)]
    cases[1] = (cases[1][0], None)  # one without replay among them
    losses: dict[int, Tensor] = {}
    for number, backward in [(0, -1), (1, 0), (2, 1), (-1, 2)] if recompute else [(0, 0), (1, 1), (2, 2)]:
        if number >= 0:
            x, routes = cases[number]
            replay.set_routes(chunk, routes)
            losses[number] = chunk(x.requires_grad_(), recompute=recompute).sin().sum()
        if backward >= 0:
            losses.pop(backward).backward()
    counts = replay.take_counts()
    return [counts, *(x.grad for x, _ in cases), *(parameter.grad for parameter in chunk.parameters())]


def test_recompute_replays_each_micro_batchs_routes_again():
    (found,) = on_ranks(_in_flight, True)
    (wanted,) = on_ranks(_in_flight, False)
    # Gradients of about 10, whose parts are summed in another order; with other experts they move by more than 0.1.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def _whole_or_shared(layout: ParallelLayout) -> dict[str, Tensor]:
    x, routes = tokens_and_routes(24)
    rank = torch.distributed.get_rank()
    x, routes = x.chunk(layout.tp)[rank].requires_grad_(), routes.chunk(layout.tp)[rank]
    chunk = Chunk([0, 1], layout)
    replay = install_replay([chunk])
    replay.set_routes(chunk, routes)
    out = chunk(x, recompute=True)
    out.sin().sum().backward()
    router_grad = torch.stack([layer.router.weight.grad for layer in chunk.layers])
    return {"out": out.detach(), "grad": x.grad, "router_grad": router_grad, "counts": replay.take_counts()}


def test_sequence_and_expert_parallel_ranks_replay_their_own_tokens():
    (wanted,) = on_ranks(_whole_or_shared, ONE)
    layout = ParallelLayout(world_size=2, tp=2, ep=2)
    shares = on_ranks(_whole_or_shared, layout, layout=layout)
    for name in ("out", "grad"):
        found = torch.cat([share[name] for share in shares])
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4)
    for name in ("router_grad", "counts"):
        torch.testing.assert_close(sum(share[name] for share in shares), wanted[name], rtol=1e-4, atol=1e-4)


def _ask(replay: RouteReplay, *, num_tokens: int = 3) -> None:
    replay.get_replay_topk(torch.rand(num_tokens, 4), 2, None, None, lambda scores, k, **_: scores.topk(k))


@pytest.mark.parametrize(("is_training", "with_graph"), [(True, True), (False, False), (False, True)])
def test_a_forward_that_is_not_computed_again_leaves_nothing_behind(is_training: bool, with_graph: bool):
    replay = RouteReplay()
    replay.set_next(torch.tensor([[0, 1]] * 3), is_training=is_training)
    with nullcontext() if with_graph else torch.no_grad():
        _ask(replay)
    assert replay.take_counts()[1] == 3
    with pytest.raises(CheckError, match="no routes were set"):
        _ask(replay)


def test_forwards_and_backwards_that_do_not_pair_up_are_found():
    replay = RouteReplay()
    for graph in (torch.no_grad(), nullcontext()):
        replay.set_next(torch.tensor([[0, 1]] * 3), is_training=True)
        scope: AbstractContextManager = graph
        with pytest.raises(CheckError, match="0 forwards were not followed by their backward and 1 had no forward"):
            replay.take_counts()
        with scope:
            _ask(replay)
        if isinstance(graph, torch.no_grad):
            with pytest.raises(CheckError, match="1 forwards were not followed"):
                replay.take_counts()
            _ask(replay)


def test_routes_of_other_tokens_are_refused():
    replay = RouteReplay()
    replay.set_next(torch.tensor([[0, 1]] * 3), is_training=True)
    with pytest.raises(CheckError, match=r"routes of shape \(3, 2\) for a router that has 4 tokens and chooses 2"):
        _ask(replay, num_tokens=4)


def test_the_replays_stay_out_of_megatrons_registry():
    before = list(RouteReplay.global_router_replay_instances)
    RouteReplay()
    assert before == RouteReplay.global_router_replay_instances


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 4), (2, 2)])
def test_each_packed_token_gets_its_routes_and_padding_gets_none(cp: int, tp: int):
    batch = make_batch()
    # Token t goes to experts 3 t, 3 t + 1 and 3 t + 2 in both layers.
    column = 3 * np.arange(len(batch.input_ids), dtype=np.int16)[:, None, None] + np.tile(
        np.arange(3, dtype=np.int16), (2, 1)
    )
    rows = (5, 0, 11, 7)
    padding = Padding(sequence_multiple=2 * cp, batch_multiple=8 * cp * tp, cp=cp)
    seen: list[int] = []
    for cp_rank in range(cp):
        part = pack(batch, rows, padding=padding, cp_rank=cp_rank, device=torch.device("cpu"))
        routes = [
            micro_batch_routes(column, part, num_experts=3 * len(column), shard=shard, num_shards=tp)
            for shard in range(tp)
        ]
        assert {len(shard) for shard in routes} == {part.input_ids.shape[1] // tp}
        found = torch.cat(routes)
        tokens = (found[:, 0, 0] // 3).tolist()
        wanted = [[[3 * token, 3 * token + 1, 3 * token + 2] if token >= 0 else [-1] * 3] * 2 for token in tokens]
        assert found.tolist() == wanted
        for token, input_id in zip(tokens, part.input_ids[0].tolist(), strict=True):
            assert token == -1 or batch.input_ids[token] == input_id
        seen += [token for token in tokens if token >= 0]
    wanted = [t for row in rows for t in range(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])]
    assert sorted(seen) == sorted(wanted)


def test_an_expert_that_the_policy_does_not_have_is_refused():
    batch = make_batch()
    column = np.tile(np.arange(6, 9, dtype=np.int16), (len(batch.input_ids), 2, 1))
    part = pack(batch, (0,), padding=Padding(), cp_rank=0, device=torch.device("cpu"))
    with pytest.raises(CheckError, match=r"in \[6, 8\], but the policy has 8 experts"):
        micro_batch_routes(column, part, num_experts=8, shard=0, num_shards=1)


@pytest.mark.parametrize("row", [[3, -1, 4], [3, 3, 4]], ids=["some_only", "one_twice"])
def test_routes_that_no_router_can_take_are_refused(row: list[int]):
    batch = make_batch()
    column = np.tile(np.arange(3, dtype=np.int16), (len(batch.input_ids), 2, 1))
    column[int(batch.cu_seqlens[0]), 1] = row
    part = pack(batch, (0,), padding=Padding(), cp_rank=0, device=torch.device("cpu"))
    with pytest.raises(CheckError, match="some experts only, or one twice"):
        micro_batch_routes(column, part, num_experts=8, shard=0, num_shards=1)
