"""Rollout routing replay (R3, arXiv 2510.11370): the trainer sends each token to the experts that the engine chose.

Rounding makes the two choose different experts for some tokens, which moves log-probs far more than rounding itself.
The weights of the chosen experts are the trainer's own, with gradient. Letters: T the tokens that this rank's routers
see (its share under context and sequence parallelism, padding included), L layers of the whole model, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from clipo_megatron.errors import CheckError
from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.records import Routes

TopK = Callable[..., tuple[Tensor, Tensor]]


class RouteReplay(RouterReplay):
    """What one TopKRouter asks for the experts of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        # The base class keeps every instance of the process, for control by global switches; ours are set one by one.
        RouterReplay.global_router_replay_instances.remove(self)
        self._next: Tensor | None = None
        self._has_next = False
        self._is_training = False
        # Forwards without graph whose backward will compute them again, which it does in the order of the forwards.
        self._to_recompute: deque[Tensor | None] = deque()
        self._agreeing: Tensor | int = 0
        self._replayed: Tensor | int = 0

    def set_next(self, routes_TK: Tensor | None, *, is_training: bool) -> None:
        """Set the routes of the next forward.

        Args:
            routes_TK: experts; a row of -1: the router decides. None: it decides for all tokens.
            is_training: whether a backward follows.
        """
        self._next, self._has_next, self._is_training = routes_TK, True, is_training

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Called by Megatron in place of its top-k.

        Args:
            scores: the router's logits, [T, experts].
            topk: K.
            num_groups: handed on to `default_compute_topk`.
            group_topk: handed on to `default_compute_topk`.
            default_compute_topk: the router's own choice.

        Returns:
            (scores of the chosen experts with graph, chosen experts), [T, K] each.

        Raises:
            CheckError: no routes were set for this forward, or those of another number of tokens.
        """
        assert default_compute_topk is not None
        routes_TK, is_first_time = self._routes_of_this_call()
        if routes_TK is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if routes_TK.shape != (len(scores), topk):
            raise CheckError(
                f"routing replay: routes of shape {tuple(routes_TK.shape)} for a router that has {len(scores)} tokens "
                f"and chooses {topk} experts: the micro-batch's routes were not split as its tokens were"
            )
        with torch.no_grad():
            routes_TK = routes_TK.long()
            _, own_TK = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            is_known_T1 = routes_TK[:, :1] >= 0
            chosen_TK = torch.where(is_known_T1, routes_TK, own_TK)
            if is_first_time:
                is_same_T1 = (chosen_TK.sort().values == own_TK.sort().values).all(1, keepdim=True)
                self._agreeing = self._agreeing + (is_same_T1 & is_known_T1).sum()
                self._replayed = self._replayed + is_known_T1.sum()
        return scores.gather(1, chosen_TK), chosen_TK

    def take_counts(self) -> tuple[Tensor | int, Tensor | int]:
        """(tokens whose own choice was the replayed one, tokens replayed) since the last call; starts again from 0.

        Raises:
            CheckError: a forward is still to be computed again by a backward, or routes were set and not used.
        """
        if self._to_recompute or self._has_next:
            raise CheckError(
                f"routing replay: {len(self._to_recompute)} forwards were not followed by their backward and "
                f"{int(self._has_next)} had no forward: other micro-batches would be given their routes"
            )
        counts = self._agreeing, self._replayed
        self._agreeing = self._replayed = 0
        return counts

    def _routes_of_this_call(self) -> tuple[Tensor | None, bool]:
        if self._has_next:
            routes_TK, self._next, self._has_next = self._next, None, False
            if self._is_training and not torch.is_grad_enabled():
                self._to_recompute.append(routes_TK)
            return routes_TK, True
        if not self._to_recompute:
            raise CheckError("routing replay: a forward for which no routes were set; set them before each forward")
        return self._to_recompute.popleft(), False


class RoutingReplay:
    """All the routers of this rank."""

    def __init__(self, replays: dict[torch.nn.Module, list[tuple[int, RouteReplay]]]) -> None:
        """Of each chunk: (layer in the whole model, from 0; its router's replay)."""
        self._replays = replays

    def set_routes(self, chunk: torch.nn.Module, routes_TLK: Tensor | None) -> None:
        """Set the routes of the next forward of `chunk`; needed before each.

        Args:
            chunk: one of those given to `install_replay`, or a wrapper around it.
            routes_TLK: integers [T, L, K]: the experts of each token, rows of -1 where the router decides. None: it
                decides for all tokens.
        """
        if chunk not in self._replays:
            inside = [module for module in chunk.modules() if module in self._replays]
            self._replays[chunk] = [layer for module in inside for layer in self._replays[module]]
        for layer, replay in self._replays[chunk]:
            routes_TK = None if routes_TLK is None else routes_TLK[:, layer]
            replay.set_next(routes_TK, is_training=chunk.training)

    def take_counts(self) -> Tensor:
        """How often the routers' own choice was the replayed one.

        No collective: a sum over all ranks of the policy gives the counts of the whole batch (times tp where all tensor
        parallel ranks see all tokens, in both numbers alike).

        Returns:
            float64 [2]: (token, layer) pairs that agree and all that were replayed, since the last call.

        Raises:
            CheckError: forwards and backwards since the last call do not pair up.
        """
        replays = {id(replay): replay for layers in self._replays.values() for _, replay in layers}
        counts = [replay.take_counts() for replay in replays.values()]
        agreeing, replayed = (sum(column) for column in zip((0, 0), *counts, strict=True))
        return torch.tensor([float(agreeing), float(replayed)], dtype=torch.float64)


def install_replay(chunks: Sequence[torch.nn.Module]) -> RoutingReplay:
    """Have all routers of a rank's model chunks ask for their experts; for models built without replay of their own."""
    replays: dict[torch.nn.Module, list[tuple[int, RouteReplay]]] = {}
    for chunk in chunks:
        replays[chunk] = []
        for router in (module for module in chunk.modules() if isinstance(module, TopKRouter)):
            assert router.layer_number is not None
            # The fused kernel chooses by itself and never asks.
            assert not router.config.moe_router_fusion, "routing replay needs moe_router_fusion=False"
            router.router_replay = RouteReplay()
            replays[chunk].append((router.layer_number - 1, router.router_replay))
    return RoutingReplay(replays)


def micro_batch_routes(
    column: Routes, micro_batch: MicroBatch, *, num_experts: int, shard: int, num_shards: int
) -> Tensor:
    """The batch's routes at the tokens that this rank's routers see.

    Args:
        column: `RolloutBatch.routed_experts`, [tokens of the batch, L, K].
        micro_batch: this cp rank's share of it.
        num_experts: of a layer.
        shard: tp rank under sequence parallelism, else 0.
        num_shards: tp under sequence parallelism, else 1.

    Returns:
        int16 [T, L, K] on the host, as all micro-batches of a step together are large; -1 on padding.

    Raises:
        CheckError: an expert that the model does not have.
    """
    source = micro_batch.source.chunk(num_shards)[shard].cpu().numpy()
    routes = column[micro_batch.token_of_source[source]]  # padding's -1 takes some token; overwritten next
    routes[source < 0] = -1
    is_known = routes >= 0
    ordered = np.sort(routes, axis=-1)
    is_twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if (is_known.any(-1) != is_known.all(-1)).any() or is_twice.any():
        raise CheckError(
            "routed experts of a micro-batch: a token has some experts only, or one twice; the engine must give each token "
            "as many different experts as the model chooses, or none"
        )
    if routes.size and not -1 <= routes.min() <= routes.max() < num_experts:
        raise CheckError(
            f"routed experts of a micro-batch are in [{routes.min()}, {routes.max()}], but the policy has {num_experts} "
            "experts: the engine runs another model"
        )
    return torch.from_numpy(np.ascontiguousarray(routes))
