"""Records on CPUs which experts vLLM sends each token to, as its option `enable_return_routed_experts` does on GPUs.

That option needs vLLM's second model runner, which needs Triton (https://github.com/vllm-project/vllm/pull/50721 and
`VllmConfig._verify_aux_output_compatibility`). The routers' own capture works with the first runner too; what is done
here is to find out whose tokens the rows are. tests/vllm/test_routed_experts.py fails once vLLM can do it itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)

from clipo_megatron.records import Routes
from clipo_megatron.rollout.cpu_release import require_checked_release

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class RouteRecorder:
    """The routes of one worker's requests.

    They are kept by cache slot, as keys and values are: so a request also gets the routes of a prompt whose cache it
    took over from another one.
    """

    def __init__(self, runner: GPUModelRunner, vllm_config: VllmConfig) -> None:
        """Record every forward from here on.

        Args:
            runner: the worker's; its model must have mixture-of-experts layers.
            vllm_config: the worker's.

        Raises:
            EngineError: another vLLM release than this is known to work for.
            ValueError: vLLM can't capture this model's routers.
        """
        require_checked_release("routed experts can be recorded")
        self._runner = runner
        self._capturer = RoutedExpertsCapturer(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config)
        bind_routed_experts_capturer(runner.get_model(), self._capturer)
        cache = runner.kv_cache_config
        num_slots = cache.num_blocks * cache.kv_cache_groups[0].kv_cache_spec.block_size
        self._by_slot = np.zeros((num_slots, *self._capturer.shape_per_token), dtype=np.int16)
        self._by_request: dict[str, Routes] = {}
        runner.get_model().register_forward_hook(self._after_forward)

    def take(self) -> dict[str, Routes]:
        """Routes of the requests that ran since the last call: [tokens fed, layers, experts per token] each.

        The keys are the ids that the requests were given from outside.
        """
        # vLLM makes ids unique by "-" and eight random characters.
        taken = {request.rpartition("-")[0]: routes for request, routes in self._by_request.items()}
        self._by_request = {}
        return taken

    def _after_forward(self, _model: torch.nn.Module, _inputs: object, _output: object) -> None:
        if get_forward_context().attn_metadata is None:
            return  # a trial run, without requests
        batch = self._runner.input_batch
        offsets = self._runner.query_start_loc.np[: batch.num_reqs + 1]
        rows = self._capturer.snapshot_routing_data(int(offsets[-1])).numpy()
        table = batch.block_table[0]
        slots: list[np.ndarray] = []
        for index in range(batch.num_reqs):
            start = int(batch.num_computed_tokens_cpu[index])
            position = np.arange(start + offsets[index + 1] - offsets[index])
            slot = table.block_table.np[index, position // table.block_size] * table.block_size
            slots.append(slot + position % table.block_size)
            self._by_slot[slots[-1][start:]] = rows[offsets[index] : offsets[index + 1]]
        # Only now: one request may have read what another one wrote in this very forward.
        for request, slot in zip(batch.req_ids, slots, strict=True):
            self._by_request[request] = self._by_slot[slot]
