"""The policy as a Megatron GPTModel, built from the Hugging Face architecture alone. One stage of it on each rank."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu_modules import cpu_block_spec
from clipo_megatron.policy.precision import PrecisionSettings, megatron_fp8_options
from clipo_megatron.weights.architecture import Architecture, Llama3RopeScaling
from clipo_megatron.weights.names import padded_vocab_size

Device = Literal["cpu", "cuda"]
Recompute = Literal["none", "selective", "full"]


class PolicyModel(GPTModel):
    """A GPTModel whose last stage gives the states after the final norm: logits are made chunk by chunk, elsewhere."""

    # Megatron 0.19 has a public hook for it (`output_processor`), 0.16 has not.
    def _postprocess(self, hidden_states: Tensor, *_inputs: object, **_named_inputs: object) -> Tensor:
        return hidden_states


def transformer_config(
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    device: Device,
    sequence_parallel: bool,
    recompute: Recompute,
    precision: PrecisionSettings,
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
        # A stage's output is freed while it is being sent: NCCL's streams keep the memory until then, gloo does not.
        deallocate_pipeline_outputs=on_gpu,
        # The loss is divided by the optimizer step's own denominator: no averaging over micro-batches or ranks.
        calculate_per_token_loss=True,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_gpu,
        masked_softmax_fusion=False,
        # Apex's kernel adds weight gradients to the float32 buffer inside the matrix product.
        gradient_accumulation_fusion=on_gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        persist_layer_norm=False,
        **_parallel_options(layout, sequence_parallel=sequence_parallel),
        **_expert_options(architecture, layout, on_gpu=on_gpu),
        **megatron_fp8_options(precision, device=device),
    )


def _parallel_options(layout: ParallelLayout, *, sequence_parallel: bool) -> dict[str, Any]:
    is_interleaved = layout.vpp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if is_interleaved else None,
        "context_parallel_size": layout.cp,
        "sequence_parallel": sequence_parallel,
        # Micro-batches hold different numbers of tokens, so stages tell each other the shapes. The interleaved schedule
        # can't: with two stages both messages of an exchange go to the same peer. There all are padded alike.
        "variable_seq_lengths": not is_interleaved,
        # Two stages without overlap mix up tensors in the same way, and Megatron's core does not refuse it.
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
    }


def _expert_options(architecture: Architecture, layout: ParallelLayout, *, on_gpu: bool) -> dict[str, Any]:
    # Without experts too, the default dispatcher is refused together with variable lengths.
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    experts = architecture.experts
    if experts is None:
        return options
    return options | {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        # Softmax over the chosen experts alone: what renormalised probabilities are.
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        # Nothing but the reward moves the policy, and the loss does not depend on the micro-batches.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": on_gpu,
        "moe_permute_fusion": on_gpu,
    }


def build_chunks(
    config: TransformerConfig,
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    rank: int,
    device: Device,
    precision: PrecisionSettings,
) -> list[PolicyModel]:
    """This rank's model chunks, weights not yet set: Transformer Engine's layers on a GPU, plain torch on the CPU."""
    is_first = layout.pp_rank(rank) == 0
    return [
        _build_chunk(
            config,
            architecture,
            layout,
            spec=_block_spec(config, device=device, precision=precision, vp_stage=number if layout.vpp > 1 else None),
            pre_process=is_first and number == 0,
            post_process=layout.is_last_stage(rank) and number == layout.vpp - 1,
            vp_stage=number if layout.vpp > 1 else None,
        )
        for number in range(layout.vpp)
    ]


def _block_spec(
    config: TransformerConfig, *, device: Device, precision: PrecisionSettings, vp_stage: int | None
) -> TransformerBlockSubmodules:
    if device == "cpu":
        return cpu_block_spec(config, precision, vp_stage=vp_stage)
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage)


def _build_chunk(
    config: TransformerConfig,
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    spec: TransformerBlockSubmodules,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> PolicyModel:
    model = PolicyModel(
        config=config,
        transformer_layer_spec=spec,  # pyright: ignore[reportArgumentType]  a block spec is taken too
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tp),
        max_sequence_length=architecture.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=architecture.rope_base,  # pyright: ignore[reportArgumentType]  a float is taken too
        vp_stage=vp_stage,
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
