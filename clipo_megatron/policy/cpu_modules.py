"""What Transformer Engine supplies on a GPU, in plain torch: RMSNorm and packed attention, put in by layer specs."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor


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
    """Causal attention of packed sequences with grouped queries: as a right-padded batch, so without a [T, T] mask."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

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
        lengths = packed_seq_params.cu_seqlens_q.diff().long()
        num_sequences, longest = len(lengths), int(packed_seq_params.max_seqlen_q)
        is_token = torch.arange(longest) < lengths[:, None]
        slot = is_token.flatten().nonzero().squeeze(1)  # of each packed token in the padded batch

        def unpack(x: Tensor) -> Tensor:
            padded = x.new_zeros(num_sequences * longest, *x.shape[1:]).index_copy(0, slot, x)
            return padded.view(num_sequences, longest, *x.shape[1:]).transpose(1, 2)

        # Padding is on the right: no real token sees it under the causal mask, and what it computes is thrown away.
        out = F.scaled_dot_product_attention(
            unpack(query), unpack(key), unpack(value), is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(num_sequences * longest, -1).index_select(0, slot)


def cpu_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's own local layers with the two modules above, for this pipeline stage."""
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer = cast("TransformerLayerSubmodules", spec.submodules)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = cast("SelfAttentionSubmodules", cast("ModuleSpec", layer.self_attention).submodules)
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config),
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]  a class is what Megatron's own block passes
    )
