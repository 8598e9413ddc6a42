"""What Transformer Engine supplies on a GPU, in plain torch: RMSNorm and packed attention, put in by layer specs."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.parallel.collectives import gather_tokens
from clipo_megatron.policy.fp8_modules import fp8_linears
from clipo_megatron.policy.micro_batch import held_positions
from clipo_megatron.policy.precision import PrecisionSettings


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees a part of the tokens; Megatron sums the gradients of marked weights.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class PackedAttention(MegatronModule):
    """Causal attention of packed sequences with grouped queries: as a right-padded batch, so without a [T, T] mask.

    Under context parallelism keys and values are gathered over the cp ranks; queries stay where they are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.scale = softmax_scale
        self.cp_group = cast("dist.ProcessGroup", pg_collection.cp)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[tokens, heads, head_dim] each (key and value with fewer heads) to [tokens, heads * head_dim]."""
        assert packed_seq_params is not None, "the policy only runs packed sequences"
        offsets = packed_seq_params.cu_seqlens_q.numpy().astype(np.int64)
        cp, cp_rank = self.cp_group.size(), self.cp_group.rank()
        held = [held_positions(offsets, cp=cp, cp_rank=rank) for rank in range(cp)]
        queries = _Slots(held[cp_rank], offsets)
        keys = queries
        if cp > 1:
            key, value = gather_tokens(key, self.cp_group), gather_tokens(value, self.cp_group)
            keys = _Slots(np.concatenate(held), offsets)
        # Padding has the last place, so no real query sees it; what a padded query computes is thrown away.
        mask = None if cp == 1 else (keys.place[:, None, :] <= queries.place[:, :, None])[:, None]
        out = F.scaled_dot_product_attention(
            queries.spread(query),
            keys.spread(key),
            keys.spread(value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return queries.collect(out)


class _Slots:
    """Packed tokens, some of each sequence, as the rows of a batch padded on the right."""

    def __init__(self, position: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        """Of tokens at `position` among all packed tokens, in the order in which a rank holds them."""
        sequence = np.searchsorted(offsets[1:], position, side="right")
        order = np.lexsort((position, sequence))
        counts = np.bincount(sequence, minlength=len(offsets) - 1)
        self._shape = (len(counts), int(counts.max()))
        column = np.empty_like(position)
        column[order] = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._slot = torch.from_numpy(sequence * self._shape[1] + column)
        place = np.full(self._shape[0] * self._shape[1], int(np.diff(offsets).max()))
        place[self._slot.numpy()] = position - offsets[sequence]
        self.place = torch.from_numpy(place).view(self._shape)
        """[sequences, width] place in the sequence; beyond all of them for padding."""

    def spread(self, x: Tensor) -> Tensor:
        """[tokens, heads, head_dim] to [sequences, heads, width, head_dim]."""
        padded = x.new_zeros(self._shape[0] * self._shape[1], *x.shape[1:]).index_copy(0, self._slot, x)
        return padded.view(*self._shape, *x.shape[1:]).transpose(1, 2)

    def collect(self, x: Tensor) -> Tensor:
        """The inverse, heads joined: [tokens, heads * head_dim]."""
        return x.transpose(1, 2).reshape(self._shape[0] * self._shape[1], -1).index_select(0, self._slot)


def cpu_block_spec(
    config: TransformerConfig, precision: PrecisionSettings, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Megatron's own local layers with the modules above, for one model chunk of this pipeline stage."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    last = config.num_layers - 1
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(config, None if precision.first_last_layers_bf16 and layer in (0, last) else precision)
            for layer in layers
        ],
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]  a class is what Megatron's own block passes
    )


def _layer_spec(config: TransformerConfig, precision: PrecisionSettings | None) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = cast("TransformerLayerSubmodules", spec.submodules)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts is not None:
        # Checkpoints have Transformer Engine's names. Its norm before the experts is a module of its own, but Megatron
        # 0.16.1 renames the local one as if it were fused into a dense MLP.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = cast("SelfAttentionSubmodules", cast("ModuleSpec", layer.self_attention).submodules)
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if precision is not None and precision.recipe != "none":
        column, row = fp8_linears(
            precision.recipe,
            amax_history=precision.amax_history,
            amax_group=cast("dist.ProcessGroup", parallel_state.get_amax_reduction_group(with_context_parallel=True)),
        )
        attention.linear_qkv, attention.linear_proj = column, row
        mlp = _mlp_submodules(cast("ModuleSpec", layer.mlp))
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    return spec


def _mlp_submodules(mlp: ModuleSpec) -> MLPSubmodules:
    """Of the layer's MLP, or of its experts."""
    submodules = mlp.submodules
    if isinstance(submodules, MoESubmodules):
        return cast("MLPSubmodules", cast("ModuleSpec", submodules.experts).submodules)
    return cast("MLPSubmodules", submodules)
