"""The sections of a recipe: one frozen pydantic model each, one docstring a field. No torch, no cross-field rules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which policy."""

    path: str
    """Hugging Face folder: config.json, safetensors, tokenizer. The architecture is read from its config.json alone."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the trainer's parameters and of the engines."""
    weights: str = ""
    """Folder of a distributed checkpoint ("torch_dist") whose weights a new run starts from: an imported model, or a step
    folder of another run. Empty: those of model.path, whose config.json and tokenizer hold in any case."""


class LayoutSection(Section):
    """How the trainer's ranks are split; data parallel is what is left: world_size / (tp * cp * pp)."""

    world_size: Positive = 1
    """Trainer ranks, one GPU each."""
    tp: Positive = 1
    """Tensor parallel degree."""
    pp: Positive = 1
    """Pipeline parallel degree."""
    vpp: Positive = 1
    """Model chunks of one pipeline stage; more than one: Megatron's interleaved schedule, with smaller bubbles."""
    cp: Positive = 1
    """Context parallel degree: ranks that share out the tokens of each sequence."""
    ep: Positive = 1
    """Expert parallel degree, over the ranks of a stage. Mixture of experts only."""
    etp: Positive = 1
    """Tensor parallel degree of one expert. Mixture of experts only."""
    sequence_parallel: bool = True
    """Split activations along the tokens between the tensor-parallel ranks; without effect at tp = 1."""
    micro_batch_tokens: Positive = 8192
    """Packed tokens of one forward at most, over all cp ranks, padding included; no sequence may be longer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass: selective: attention alone; full: stores each layer's input only."""
    distributed_optimizer: bool = True
    """Share out float32 masters and moments among the data (and context) parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass goes on; without effect at dp * cp = 1."""

    @property
    def dp(self) -> int:
        """Data parallel degree."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def degrees(self) -> str:
        """Degrees above 1 in words, e.g. "tp=2 dp=4"; empty on one rank."""
        found = {name: getattr(self, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
        return " ".join(f"{name}={degree}" for name, degree in found.items() if degree > 1)


class PrecisionSection(Section):
    """Number format of the policy's matrix products; embeddings, router, output layer and head are never FP8."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """FP8 scaling: delayed (per tensor, from the history of maxima), tensorwise (per tensor, of its own values),
    blockwise (128 x 128 weights, 1 x 128 the rest). Transformer Engine on a GPU, emulated in float on a CPU."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layer unquantised. Not with delayed."""
    amax_history: Annotated[int, Field(ge=1, le=16384)] = 1024
    """Steps of maxima that a scale is taken from. Delayed only."""


class ExpertsSection(Section):
    """Mixture-of-experts policies only.

    Load balancing losses and router biases are off: they would move the policy for other reasons than its reward.
    """

    routing_replay: bool = True
    """The trainer sends each token to the experts that the engine sent it to (R3)."""
    freeze_router: bool = False
    """Leave the routers as they are."""


class RolloutSection(Section):
    """How rollouts are sampled. Training always samples from the whole distribution: top_p = 1, top_k off."""

    engines: Positive = 1
    """vLLM engines; the prompts of a step are dealt among them."""
    tp: Positive = 1
    """Tensor parallel degree of one engine."""
    colocate: bool = False
    """Engines share the trainer's GPUs and take turns with it: they sleep while it trains (weights and KV cache freed), and its
    gradients and optimizer state leave the GPU while they generate. gpu_memory_utilization must leave room for the trainer's
    weights."""
    quantization: Literal["none", "fp8_per_tensor", "fp8_per_block"] = "none"
    """FP8 engines, by vLLM's names: the matrices of their layers are rounded to 8 bits at every sync, with a scale a matrix or a
    block of 128 x 128. Needs model.dtype = bfloat16. Log-probs of engines and trainer differ by more then: see
    run.gate_max_logprob_difference. On a CPU: fp8_per_tensor, dense models."""
    max_response_tokens: Positive = 2048
    """A response that reaches this length is cut and counted as truncated."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Used by sampling and by the trainer's log-probs alike. vLLM raises smaller ones to 0.01."""
    max_restarts: NotNegative = 20
    """Engines whose processes ended that are started again, over the whole run; the same step is completed. An engine that dies
    three times in a row without an answer in between ends the run whatever this allows."""
    max_num_seqs: Positive = 256
    """Requests that one engine runs at the same time."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the GPU's memory an engine may use. GPU only."""
    kv_cache_mib: Positive = 256
    """KV cache of one engine in MiB. CPU only."""
    enforce_eager: bool = False
    """Run the engines without CUDA graphs."""
    prefix_caching: bool = True
    """Reuse the KV cache of a group's common prompt; always dropped when new weights are committed."""


class KLSection(Section):
    """Penalty for leaving the reference policy, which is the model folder's weights."""

    coefficient: NotNegativeFloat = 0.001
    """Weight of the KL loss; 0 runs without a reference policy."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator: k1 = log-ratio, k2 = half its square, k3 = r - 1 - log r (low variance)."""


class AlgorithmSection(Section):
    """The baseline that the contrastive reward is added to."""

    prompts_per_step: Positive = 128
    """Prompts of one training step."""
    group_size: Positive = 16
    """Rollouts of one prompt."""
    updates_per_step: Positive = 1
    """Optimizer steps of one training step; whole groups are dealt among them."""
    advantage: Literal["group", "group_without_std"] = "group"
    """group: (R - mean) / (std + 1e-6) inside the prompt's group; group_without_std: R - mean."""
    clip_low: PositiveFloat = 0.2
    """Ratio clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Ratio clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Bound on the loss of tokens with a negative advantage: at most -dual_clip * advantage."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """token_mean: all response tokens of the optimizer step weigh the same; sequence_mean: all sequences do."""
    kl: KLSection = KLSection()


class ContrastiveSection(Section):
    """The contrastive head and the reward it pays (arXiv 2603.10101)."""

    enabled: bool = True
    """false: the plain baseline, same code."""
    loss: Literal["infonce", "supcon_in", "supcon_out", "soft_nn"] = "infonce"
    level: Literal["group", "batch", "cross"] = "group"
    """Candidate sets. group: both inside the prompt's group; batch: both over all rows; cross: positives inside the
    group, negatives over all rows."""
    similarity: Literal["cosine", "negative_cosine", "l2"] = "cosine"
    temperature: Annotated[float, Field(ge=1e-3)] = 0.05
    reward_weight: NotNegativeFloat = 0.2
    """Lambda: the reward is max(constant_reward - lambda * loss, reward_floor)."""
    reward_floor: float = -0.5
    constant_reward: float = 0.0
    """Added to every row, wrong ones too, as in the reference."""
    masked_label: Literal[-1, 0, 1] = 0
    """Rows of this verdict (0 wrong, 1 right) are no anchors; -1: all rows are."""
    skip_trivial: bool = True
    """Leave out anchors without a positive or without a negative."""
    numerics: Literal["exact", "reference"] = "exact"
    """exact: masked log-sum-exp; reference: the published code's log(sum + 1e-8) after subtracting the row maximum."""
    positive: Literal["sampled", "mean"] = "sampled"
    """InfoNCE's positive: one drawn by (seed, step, row), or the mean over all (the same as supcon_out)."""
    denominator: Literal["all_but_self", "sampled_plus_negatives"] = "all_but_self"
    """all_but_self is the paper's: it holds the other positives too. InfoNCE only."""
    head: Literal["linear", "mlp"] = "linear"
    head_size: Positive = 512
    """Outputs of the head."""
    head_learning_rate: PositiveFloat = 1e-3
    head_weight_decay: NotNegativeFloat = 0.01
    head_frozen: bool = False
    """Keep the head at its random start (the paper's ablation)."""
    warmup_steps: NotNegative = 0
    """First steps in which only the head learns and the policy waits. The reference's critic_warmup = w is w - 1 here."""
    gradient: Literal["head_only", "policy"] = "head_only"
    """head_only is the paper's: the loss trains the head alone. policy: its gradient reaches the policy as well, an
    auxiliary loss for research."""
    policy_gradient_weight: NotNegativeFloat = 0.0
    """Weight of that auxiliary loss; with gradient=policy only."""
    pool: Literal["decode", "response", "predictors"] = "decode"
    """Positions averaged, by the token at the input: decode o_1..o_(T-1), response o_1..o_T, predictors the prompt's
    last and o_1..o_(T-1)."""


class OptimizerSection(Section):
    """AdamW of the policy; constant learning rate after a linear warm-up."""

    learning_rate: PositiveFloat = 1e-6
    weight_decay: NotNegativeFloat = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    clip_grad: PositiveFloat = 1.0
    """Bound on the global gradient norm."""
    warmup_updates: NotNegative = 0
    """Optimizer steps of linear warm-up."""
    cpu_offload: bool = False
    """Keep masters and moments in host memory and update them there. GPU only."""


class DataSection(Section):
    """What to train and evaluate on."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parquet or JSONL files."""
    evaluation: tuple[str, ...] = ()
    """Files evaluated during training; none: no evaluation."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are dropped and counted."""
    shuffle: bool = True
    """Order of an epoch: a permutation drawn from (seed, epoch), or the file's order."""


class RewardSection(Section):
    """The verifiers' worker processes."""

    workers: Positive = 2
    timeout_s: PositiveFloat = 10.0
    """An answer that takes longer is undecided and its worker is killed."""
    max_answer_chars: Positive = 2000
    """A boxed answer longer than this is undecided without being parsed."""


class SyncSection(Section):
    """Moving the weights to the engines."""

    transport: Literal["auto", "stream", "shm", "ipc", "gloo", "nccl"] = "auto"
    """stream: whole Hugging Face tensors in buckets, through vLLM's own loading. The others move slices by a plan. shm (CPU),
    ipc (GPU): engines of the trainer's node copy them straight out of its parameters. gloo (CPU), nccl (GPU): trainer ranks send
    them straight to the engine ranks, also to other nodes. auto: the first kind on one node, the second on several, where they
    are tested (today CPUs with vLLM 0.32 and the families of this project), else stream; the log says why."""
    verify: Literal["first", "always", "never"] = "first"
    """Compare the checksum of each copied slice with the trainer's: in the first sync of a start, in all, in none. Buckets
    of a stream always have checksums."""
    bucket_mib: Positive = 256
    """Size of one bucket of whole Hugging Face tensors, or of slices that are sent between nodes; a larger one travels alone."""
    timeout_s: PositiveFloat = 600.0
    """Deadline of each phase of a sync (begin, transfer, commit). Past it engines that are late are killed and started again;
    where it is a policy rank, or in the first sync, the run ends and names who is late."""


class CheckpointSection(Section):
    """What is kept on disk."""

    every: NotNegative = 10
    """Steps between checkpoints; 0: only at the end and when stopped, so that a killed run starts anew."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; false: the step waits for the disk."""
    keep: Positive = 2
    """Newest checkpoints kept. Beside these and those of the next two keys, the newest one without a loss or gradient that
    was not finite is kept as long as all newer ones have had one."""
    keep_every: NotNegative = 0
    """Checkpoints of every n-th step are kept for ever; 0: of none."""
    keep_best: NotNegative = 0
    """Checkpoints kept for their evaluation, by pass@1, mean over the sources."""
    hf_every: NotNegative = 0
    """Steps between Hugging Face exports; 0: only at the end."""


class EvaluationSection(Section):
    """Evaluation during training: pass@1 greedy, and mean@n where samples > 1."""

    every: NotNegative = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    at_start: bool = True
    samples: Positive = 1
    """n of mean@n; 1: greedy only."""
    temperature: PositiveFloat = 0.6
    """Of the n samples."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Of the n samples."""
    max_prompts: NotNegative = 0
    """First prompts of each source evaluated; 0: all."""


class RunSection(Section):
    """The run itself."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder of the run: FOLDER/NAME."""
    folder: str = "runs"
    steps: Positive = 100
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of the run folder; never: refuse a run folder that is not empty."""
    accept: tuple[Literal["recipe", "data", "reference", "no_optimizer"], ...] = ()
    """Changes under which a run may go on from its checkpoint, though its numbers change: recipe (keys of the recipe), data
    (the training prompts), reference (the weights that the KL loss refers to), no_optimizer (a checkpoint without optimizer
    state: fresh moments). Another layout needs none."""
    max_unsound_steps: NotNegative = 3
    """Steps in a row with a loss or gradient that is not finite (their updates are left out) after which the run ends; 0: never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False
    """Write TensorBoard event files besides metrics.jsonl."""
    gate_max_logprob_difference: PositiveFloat = 1.0
    """Step-0 gate: the run stops when |sampled - scored log-prob| of any token is above this. In float32 1e-3 is right."""
    gate_mean_logprob_difference: PositiveFloat = 0.05
    """Step-0 gate on the mean over tokens. In float32 1e-4 is right."""
    start_timeout_s: PositiveFloat = 1800.0
    """Deadline for all policy ranks or all engines to load the model and be ready."""
    worker_timeout_s: PositiveFloat = 1800.0
    """Deadline of one phase (generate, score, train) on every worker. Past it engines that are late are killed and started again;
    where it is a policy rank, the run ends and names who is late."""
