"""Estimate of the GPU memory of a trainer rank, by pipeline stage: from recipe and architecture alone, no device needed.

Of each stage its first rank is estimated; its other ranks hold as much. Weights, gradients and optimizer are exact up to
the padding of Megatron's buffers. The rest is arithmetic that no GPU has confirmed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from clipo_megatron.checks.activation_memory import LayerShare, backward_bytes, layers_in_flight, saved_bytes
from clipo_megatron.recipe import Recipe
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.names import OUTPUT_LAYER, layer_numbers, padded_vocab_size
from clipo_megatron.weights.rules import Rule, Split, local_shape

GIB = 1 << 30
CHUNK_TOKENS, BLOCK_BYTES = 4096, 64 << 20
"""Of parallel/linear_logprob.py, which can't be imported without torch; a test compares them."""
FIXED_BYTES = 3 * GIB
_FLOAT32 = 4

ASSUMPTIONS = (
    f"{FIXED_BYTES // GIB} GiB for the CUDA context, NCCL's communicators and the workspaces of cuBLAS and Transformer "
    "Engine: assumed, not measured",
    "every micro-batch is as long as layout.micro_batch_tokens",
    "routers spread the tokens evenly over the experts",
    "the largest moment is a backward pass; fragmentation of the allocator is not in it",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on a GPU of one pipeline stage, each term at its largest."""

    weights: int
    """e P: e bytes of an element of the policy's dtype, P parameters of this rank (tied models: the last stage's copy of
    the embedding is one of them). Where FP8 engines are given FP8 copies (dense models, sync.transport = ipc or nccl): 1 byte
    more for each element of the layers' matrices."""
    gradients: int
    """4 P_t: float32 buffers of the parameters that are trained, whole on each rank with and without the distributed
    optimizer."""
    optimizer: int
    """b P_t / n: b = 12 (float32 masters and two moments; 8 where the parameters are float32 themselves), n = the dp x cp
    ranks, and for experts the (world_size / pp) / (ep etp) ranks with the same ones; n = 1 without the distributed
    optimizer. With cpu_offload b = 0."""
    head: int
    """Last stage: 16 bytes a parameter of the contrastive head (float32, gradient, two moments); 4 when it is frozen."""
    activations: int
    """Kept by the layers for the backward pass: `saved_bytes` x `layers_in_flight`."""
    fp8_weights: int
    """2 bytes a weight of the FP8 linear layers (rows and columns), for each micro-batch in flight: with the cache of
    quantised weights off, as here, every forward makes its own and keeps it. recompute = full: of one layer."""
    working: int
    """The larger of what a layer needs while it goes backward (`backward_bytes`, the largest weight's gradient before it
    is added to its buffer; with recompute = full all activations of the layer) and what the log-probs need
    (`_logprob_bytes`, last stage)."""
    fixed: int
    """CUDA context, NCCL, workspaces: an assumption."""

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def while_engines_generate(self) -> int:
        """What stays on the GPU with rollout.colocate: no gradients, no optimizer state, no forward under way."""
        return self.weights + self.head + self.fixed


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Of all pipeline stages."""

    stages: tuple[RankMemory, ...]
    host_bytes: int
    """Of one rank's host memory, on the worst stage: reference weights (and the policy's own while they are in use),
    offloaded masters, moments and gradients; with rollout.colocate the optimizer's state while engines generate."""

    @property
    def worst_stage(self) -> int:
        """Number of the stage with the largest total."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameters:
    """Numbers of parameters of one rank."""

    all: int
    trained: int
    trained_of_experts: int
    """Those of `trained` that experts own."""
    of_layer_matrices: int
    """Weights of the linear layers of its layers, which FP8 quantises."""
    largest_matrix: int
    """Of a layer; of all its experts at once, as their gradients are computed together."""
    vocabulary: int
    """Rows x hidden of its share of the embedding or the output layer."""


def estimate_memory(recipe: Recipe, arch: Architecture) -> MemoryEstimate:
    """Estimate all stages; takes milliseconds.

    Args:
        recipe: free of faults.
        arch: of its model; `weights.folder_check.layout_problems` finds no fault in the layout.

    Raises:
        ConfigError: pp * vpp does not divide the layers.
    """
    counts = [_count_parameters(recipe, arch, stage) for stage in range(recipe.layout.pp)]
    stages = tuple(_estimate_stage(recipe, arch, count, stage) for stage, count in enumerate(counts))
    return MemoryEstimate(stages=stages, host_bytes=max(_host_bytes(recipe, count) for count in counts))


def _estimate_stage(recipe: Recipe, arch: Architecture, count: _Parameters, stage: int) -> RankMemory:
    layout, is_last = recipe.layout, stage == recipe.layout.pp - 1
    bf16, fp8 = _layer_share(recipe, arch, is_fp8=False), _layer_share(recipe, arch, is_fp8=True)
    num_layers = arch.num_layers // layout.pp
    num_fp8 = _num_fp8_layers(recipe, arch, stage)
    heaviest = fp8 if num_fp8 else bf16
    in_flight = layers_in_flight(num_layers=arch.num_layers, pp=layout.pp, pp_rank=stage, vpp=layout.vpp)
    in_flight_fp8 = in_flight * num_fp8 // num_layers
    activations = in_flight_fp8 * saved_bytes(fp8, recompute=layout.recompute)
    activations += (in_flight - in_flight_fp8) * saved_bytes(bf16, recompute=layout.recompute)
    element = _element_bytes(recipe)
    of_layer = backward_bytes(heaviest) + element * count.largest_matrix
    if layout.recompute == "full":
        of_layer += saved_bytes(heaviest, recompute="none")
    elif layout.recompute == "selective":
        of_layer += saved_bytes(heaviest, recompute="none") - saved_bytes(heaviest, recompute="selective")
    # The embedding's gradient is as large as the output layer's, and comes when no layer is at work.
    of_ends = _logprob_bytes(recipe, arch, count) if is_last else element * count.vocabulary if stage == 0 else 0
    fp8_layers = min(num_fp8, 1) if layout.recompute == "full" else in_flight_fp8
    return RankMemory(
        weights=element * count.all + (count.of_layer_matrices if _gives_fp8_copies(recipe, arch) else 0),
        gradients=_FLOAT32 * count.trained,
        optimizer=_optimizer_bytes(recipe, count),
        head=_head_bytes(recipe, arch) if is_last else 0,
        activations=activations,
        fp8_weights=2 * count.of_layer_matrices // num_layers * fp8_layers,
        working=max(of_layer, of_ends),
        fixed=FIXED_BYTES,
    )


def _gives_fp8_copies(recipe: Recipe, arch: Architecture) -> bool:
    is_planned = recipe.sync.transport in ("ipc", "nccl")
    return is_planned and recipe.rollout.quantization != "none" and arch.experts is None


def _count_parameters(recipe: Recipe, arch: Architecture, stage: int) -> _Parameters:
    layout = recipe.layout
    padded_vocab = padded_vocab_size(arch.vocab_size, layout.tp)
    num_layers = len(layer_numbers(arch.num_layers, pp=layout.pp, pp_rank=stage, vpp=layout.vpp)) * layout.vpp
    num_experts = 0 if arch.experts is None else arch.experts.num_experts // layout.ep
    total = frozen = of_experts = matrices = largest = vocabulary = 0
    for rule in _rules_of_stage(recipe, arch, stage):
        degree = layout.etp if rule.is_of_expert else layout.tp
        shape = local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab)
        copies = num_experts if rule.is_of_expert else 1
        size = math.prod(shape) * copies
        total += size * (num_layers if rule.is_of_layer else 1)
        if rule.is_of_expert:
            of_experts += size * num_layers
        if rule.megatron.endswith(".mlp.router.weight") and recipe.experts.freeze_router:
            frozen += size * num_layers
        if rule.is_of_layer and rule.split is not Split.REPLICATED and len(shape) == 2:
            matrices += size * num_layers
            largest = max(largest, size)
        if rule.split is Split.VOCAB_PARALLEL:
            vocabulary = size
    return _Parameters(
        all=total,
        trained=total - frozen,
        trained_of_experts=of_experts,
        of_layer_matrices=matrices,
        largest_matrix=largest,
        vocabulary=vocabulary,
    )


def _rules_of_stage(recipe: Recipe, arch: Architecture, stage: int) -> Iterator[Rule]:
    """The layers' rules; before them the first stage's, after them the last stage's."""
    rules = FAMILIES[arch.family].rules
    first_of_layer = next(number for number, rule in enumerate(rules) if rule.is_of_layer)
    is_first, is_last = stage == 0, stage == recipe.layout.pp - 1
    for number, rule in enumerate(rules):
        is_here = rule.is_of_layer or (is_first if number < first_of_layer else is_last)
        # A tied model has an output layer of its own only where it is on another stage than the embedding.
        is_embedding = arch.tied and is_first and rule.megatron == OUTPUT_LAYER
        if is_here and not is_embedding:
            yield rule


def _layer_share(recipe: Recipe, arch: Architecture, *, is_fp8: bool) -> LayerShare:
    layout = recipe.layout
    return LayerShare(
        arch=arch,
        tokens=-(-layout.micro_batch_tokens // layout.cp),
        tp=layout.tp,
        etp=layout.etp,
        cp=layout.cp,
        is_split=layout.sequence_parallel and layout.tp > 1,
        element_bytes=_element_bytes(recipe),
        is_fp8=is_fp8,
    )


def _num_fp8_layers(recipe: Recipe, arch: Architecture, stage: int) -> int:
    layout, precision = recipe.layout, recipe.precision
    if precision.recipe == "none":
        return 0
    num_layers = arch.num_layers // layout.pp
    ends = (stage == 0) + (stage == layout.pp - 1) if precision.first_last_layers_bf16 else 0
    return max(0, num_layers - ends)


def _optimizer_bytes(recipe: Recipe, count: _Parameters) -> int:
    if recipe.optimizer.cpu_offload:
        return 0
    num_masters, num_moments = 1 if recipe.model.dtype == "bfloat16" else 0, 2
    return _FLOAT32 * (num_masters + num_moments) * _optimizer_share(recipe, count)


def _optimizer_share(recipe: Recipe, count: _Parameters) -> int:
    """Parameters that this rank updates."""
    layout = recipe.layout
    copies = recipe.dp * layout.cp if layout.distributed_optimizer else 1
    of_experts = layout.world_size // layout.pp // (layout.ep * layout.etp) if layout.distributed_optimizer else 1
    return -(-(count.trained - count.trained_of_experts) // copies) + -(-count.trained_of_experts // of_experts)


def _head_bytes(recipe: Recipe, arch: Architecture) -> int:
    section = recipe.contrastive
    if not section.enabled:
        return 0
    size = arch.hidden_size * section.head_size
    if section.head == "mlp":
        size += arch.hidden_size**2
    return size * (_FLOAT32 if section.head_frozen else 4 * _FLOAT32)


def _logprob_bytes(recipe: Recipe, arch: Architecture, count: _Parameters) -> int:
    """Log-probs of the last stage: 3 B + 2 (e + 4) c H + 3 e s H + e V H + (4 V H when there are several chunks).

    B: a tile of logits, its gradient and a block of the weight; c tokens of a chunk: their states, with the next chunk's,
    and float32 gradients of both; s: states before and after the final norm, and their gradient; V H: the gradient of this
    rank's rows of the output layer, summed in float32 over chunks and then rounded to e bytes.
    """
    share, element = _layer_share(recipe, arch, is_fp8=False), _element_bytes(recipe)
    chunk = min(CHUNK_TOKENS, share.tokens)
    states = 2 * (element + _FLOAT32) * chunk * arch.hidden_size + 3 * element * share.shard_tokens * arch.hidden_size
    gradient = element * count.vocabulary
    if share.tokens > CHUNK_TOKENS and element != _FLOAT32:
        gradient += _FLOAT32 * count.vocabulary
    return 3 * BLOCK_BYTES + states + gradient


def _host_bytes(recipe: Recipe, count: _Parameters) -> int:
    host = 0
    if recipe.algorithm.kl.coefficient > 0:
        host += 2 * _element_bytes(recipe) * count.all
    if recipe.optimizer.cpu_offload:
        host += 4 * _FLOAT32 * _optimizer_share(recipe, count)  # parameters, gradients, two moments
    if recipe.rollout.colocate:
        host += _optimizer_bytes(recipe, count)
    return host


def _element_bytes(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bfloat16" else _FLOAT32
