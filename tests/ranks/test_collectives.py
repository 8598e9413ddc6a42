"""Collectives with gradients against the same computation on one rank."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from clipo_megatron.parallel.collectives import gather_rows, gather_shards, messages_within, reduce_gradients

NUM_ROWS, WIDTH = 7, 3
SHARES = {1: [[3, 0, 1, 2, 6, 5, 4]], 2: [[6, 0, 2, 5], [1, 4, 3]], 4: [[5], [6, 0, 2, 1], [], [4, 3]]}


def _loss(z_BD: torch.Tensor) -> torch.Tensor:
    return (z_BD @ z_BD.T).exp().mean().log()


def _inputs() -> tuple[torch.Tensor, torch.nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, WIDTH, bias=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return torch.randn(NUM_ROWS, 5, generator=generator), head


def _gathered_step() -> tuple[torch.Tensor, list[torch.Tensor]]:
    h_BH, head = _inputs()
    row_b = torch.tensor(SHARES[dist.get_world_size()][dist.get_rank()], dtype=torch.int64)
    z_BD = gather_rows(head(h_BH[row_b]), row_b, num_rows=NUM_ROWS, group=dist.group.WORLD)
    _loss(z_BD).backward()
    reduce_gradients(head.parameters(), dist.group.WORLD)
    return z_BD.detach(), [parameter.grad for parameter in head.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gathered_rows_give_the_gradient_of_the_whole_batch(world_size):
    h_BH, head = _inputs()
    want_BD = head(h_BH)
    _loss(want_BD).backward()
    for z_BD, gradients in run_ranks(_gathered_step, world_size=world_size):
        torch.testing.assert_close(z_BD, want_BD.detach())
        for gradient, parameter in zip(gradients, head.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def _shards() -> list[torch.Tensor]:
    return gather_shards(torch.full((2, 2), float(dist.get_rank())).T, dist.group.WORLD)


@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_come_in_the_order_of_the_group(world_size):
    for shards in run_ranks(_shards, world_size=world_size):
        assert [shard[0, 0].item() for shard in shards] == list(range(world_size))


def _one_sided_gradient() -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.zeros(2))
    if dist.get_rank() == 0:
        parameter.grad = torch.ones(2)
    reduce_gradients([parameter], dist.group.WORLD)
    return parameter.grad


def test_a_rank_without_a_gradient_counts_as_zero():
    assert all(gradient.tolist() == [1.0, 1.0] for gradient in run_ranks(_one_sided_gradient, world_size=2))


def _wait_in_vain() -> str:
    """Rank 1 does not come; what rank 0 is told, and how long the group waits afterwards."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=50))
    with messages_within(30.0, [group]):
        gather_shards(torch.ones(2), group)
    told = "nothing"
    if dist.get_rank() == 0:
        try:
            with messages_within(1.0, [group]):
                gather_shards(torch.ones(2), group)
        except RuntimeError as error:
            told = str(error)
    dist.barrier()
    return f"{told} {group._get_backend(torch.device('cpu')).options._timeout}"


def test_a_collective_waits_for_another_rank_no_longer_than_it_is_told():
    told = run_ranks(_wait_in_vain, world_size=2)
    assert "1000ms" in told[0]
    assert all(text.endswith(" 0:00:50") for text in told), "afterwards the group's own deadline holds again"
