"""The policy as a Megatron GPTModel, built from the Hugging Face architecture alone. One stage of it on each rank."""

from __future__ import annotations

import math
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu_modules import cpu_block_spec
from clipo_megatron.weights.architecture import Architecture, Llama3RopeScaling
from clipo_megatron.weights.names import padded_vocab_size


def transformer_config(
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    device: Literal["cpu", "cuda"],
    sequence_parallel: bool,
    recompute: Literal["none", "full"],
) -> TransformerConfig:
    """Megatron's configuration of `architecture` under `layout`; fused kernels on the GPU only."""
    on_gpu = device == "cuda"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_eps,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Weights come from the Hugging Face folder; nothing is drawn.
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=sequence_parallel,
        # Micro-batches hold different numbers of tokens, so stages tell each other the shapes.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # without experts too, the default is refused together with that
        deallocate_pipeline_outputs=True,
        # The loss is divided by the optimizer step's own denominator: no averaging over micro-batches or ranks.
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute == "full" else None,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def build_model(
    config: TransformerConfig,
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    rank: int,
    device: Literal["cpu", "cuda"],
) -> GPTModel:
    """This rank's stage, weights not yet set: Transformer Engine's layers on a GPU, plain torch on the CPU."""
    if device == "cuda":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
    else:
        spec = cpu_block_spec(config)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,  # pyright: ignore[reportArgumentType]  a block spec is taken too
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tp),
        max_sequence_length=architecture.max_positions,
        pre_process=layout.pp_rank(rank) == 0,
        post_process=layout.is_last_stage(rank),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=architecture.rope_base,  # pyright: ignore[reportArgumentType]  a float is taken too
    )
    if architecture.rope_scaling is not None:
        # Megatron 0.16.1 takes the factor alone and fixes the other three numbers to Llama 3.1's.
        rotary = model.rotary_pos_emb
        rotary.inv_freq = llama3_frequencies(rotary.inv_freq, architecture.rope_scaling)
    return model


def llama3_frequencies(frequency: torch.Tensor, scaling: Llama3RopeScaling) -> torch.Tensor:
    """Rotary frequencies stretched as Llama 3.1 does: long wavelengths by `factor`, short ones not, a ramp in between.

    Args:
        frequency: radians per position, float32 [head_dim / 2].
        scaling: the numbers of config.json.
    """
    # Turns that a frequency makes over the context the model was first trained on.
    turns = frequency * scaling.original_max_positions / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share_kept = ramp.clamp(0.0, 1.0)
    return frequency * (share_kept + (1 - share_kept) / scaling.factor)
