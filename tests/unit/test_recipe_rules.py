"""Rules of layout, precision, optimizer and contrastive gradient: each told alone, cured by its own advice.

Oracles: the layout's own arithmetic, the packing's alignment, and plans for random batches under accepted recipes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.data.packing import alignment, least_rows, plan_micro_batches
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import fp8_multiple
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.layout_rules import layout_problems, token_multiples
from clipo_megatron.recipe.rules import recipe_problems

BASE = {"run": {"name": "try"}, "model": {"path": "policy"}, "data": {"train": ["train.parquet"]}}
RECIPES = ("none", "delayed", "tensorwise", "blockwise")
Values = dict[str, object]


def recipe_of(values: Values) -> Recipe:
    """A recipe with dotted keys set, its rules not yet applied."""
    content: dict[str, dict[str, object]] = {section: dict(keys) for section, keys in BASE.items()}
    for key, value in values.items():
        section, name = key.split(".")
        content.setdefault(section, {})[name] = value
    return Recipe.model_validate(content)


CASES: list[tuple[Values, str, Values]] = [
    # sync
    (
        {"sync.transport": "stream", "sync.verify": "always"},
        "sync.verify = always: has an effect only on planned copies, found sync.transport = stream",
        {"sync.verify": "first"},
    ),
    (
        {"sync.transport": "shm", "run.device": "cuda"},
        "sync.transport = shm: not on run.device = cuda; set it to ipc",
        {"sync.transport": "ipc"},
    ),
    (
        {"sync.transport": "ipc", "run.device": "cpu"},
        "sync.transport = ipc: not on run.device = cpu; set it to shm",
        {"sync.transport": "auto"},
    ),
    (
        {"sync.transport": "nccl", "run.device": "cpu"},
        "sync.transport = nccl: not on run.device = cpu; set it to gloo",
        {"sync.transport": "gloo"},
    ),
    (
        {"sync.transport": "gloo", "run.device": "cuda"},
        "sync.transport = gloo: not on run.device = cuda; set it to nccl",
        {"sync.transport": "nccl"},
    ),
    (
        {"sync.transport": "nccl", "rollout.colocate": True},
        "sync.transport = nccl: NCCL does not connect two processes on one GPU",
        {"sync.transport": "ipc"},
    ),
    # shared devices
    (
        {"layout.world_size": 4, "rollout.colocate": True, "rollout.engines": 3, "rollout.tp": 2},
        "rollout.colocate = true: rollout.engines * rollout.tp = 6 engine ranks share the GPUs of layout.world_size = 4",
        {"rollout.engines": 2},
    ),
    # ranks
    (
        {"layout.world_size": 6, "layout.cp": 4},
        "layout.world_size = 6: must be a multiple of tp * cp * pp = 1 * 4 * 1 = 4; use 8",
        {"layout.world_size": 8},
    ),
    ({"layout.vpp": 2}, "layout.vpp = 2: only a pipeline stage is cut", {"layout.vpp": 1}),
    ({"layout.vpp": 2}, "layout.vpp = 2: ", {"layout.pp": 2, "layout.world_size": 2}),
    (
        {"layout.world_size": 4, "layout.ep": 3},
        "layout.ep = 3, layout.etp = 1: ep * etp = 3 * 1 = 3 must divide the world_size / pp = 4 / 1 = 4 ranks of a stage",
        {"layout.ep": 4},
    ),
    (
        {"layout.world_size": 8, "layout.pp": 2, "layout.ep": 4, "layout.etp": 2},
        "layout.ep = 4, layout.etp = 2: ep * etp = 4 * 2 = 8 must divide the world_size / pp = 8 / 2 = 4",
        {"layout.etp": 1},
    ),
    (
        {"layout.world_size": 4, "layout.tp": 2, "layout.ep": 2, "layout.sequence_parallel": False},
        "layout.sequence_parallel = false: with layout.tp = 2 Megatron refuses to train experts",
        {"layout.sequence_parallel": True},
    ),
    (
        {"layout.world_size": 2, "layout.tp": 2, "layout.etp": 2, "layout.sequence_parallel": False},
        "layout.sequence_parallel = false: with layout.tp = 2",
        {"layout.sequence_parallel": True},
    ),
    # micro-batches
    (
        {"layout.world_size": 4, "layout.tp": 4, "layout.micro_batch_tokens": 8190},
        "layout.micro_batch_tokens = 8190: must be a multiple of 4, so that the split between",
        {"layout.micro_batch_tokens": 8192},
    ),
    (
        {"layout.world_size": 3, "layout.cp": 3, "layout.micro_batch_tokens": 8192},
        "layout.micro_batch_tokens = 8192: must be a multiple of 6, ",
        {"layout.micro_batch_tokens": 8196},
    ),
    (
        {"precision.recipe": "blockwise", "layout.micro_batch_tokens": 8200},
        "layout.micro_batch_tokens = 8200: must be a multiple of 128, ",
        {"layout.micro_batch_tokens": 8320},
    ),
    (
        {"layout.micro_batch_tokens": 2559},
        "layout.micro_batch_tokens = 2559: the longest sequence has data.max_prompt_tokens + rollout.max_response_tokens "
        "= 2560 tokens, and must fit into one micro-batch; use at least 2560",
        {"layout.micro_batch_tokens": 2560},
    ),
    (
        {"layout.world_size": 2, "layout.cp": 2, "data.max_prompt_tokens": 511, "layout.micro_batch_tokens": 2556},
        "layout.micro_batch_tokens = 2556: the longest sequence has data.max_prompt_tokens + rollout.max_response_tokens "
        "= 2559 tokens, 2560 with padding to a multiple of 4, ",
        {"layout.micro_batch_tokens": 2560},
    ),
    (
        {"layout.world_size": 2, "layout.micro_batch_tokens": 5119},
        "layout.micro_batch_tokens = 5119: every data parallel rank needs as many micro-batches, so one must hold two "
        "sequences of ",
        {"layout.micro_batch_tokens": 5120},
    ),
    (
        {"layout.world_size": 2, "layout.pp": 2, "layout.vpp": 2, "layout.micro_batch_tokens": 5119},
        "layout.micro_batch_tokens = 5119: every data parallel rank needs as many micro-batches, a multiple of layout.pp = 2 "
        "under layout.vpp = 2, so one must hold two",
        {"layout.micro_batch_tokens": 5120},
    ),
    # sequences of an update
    (
        {"layout.world_size": 4, "algorithm.prompts_per_step": 1, "algorithm.group_size": 3},
        "algorithm: one update has 3 sequences, and needs 4: one for each micro-batch of 4 data parallel ranks; ",
        {"algorithm.group_size": 4},
    ),
    (
        {
            "layout.world_size": 8,
            "layout.pp": 4,
            "layout.vpp": 2,
            "algorithm.prompts_per_step": 4,
            "algorithm.updates_per_step": 2,
            "algorithm.group_size": 3,
        },
        "algorithm: one update has 6 sequences, and needs 8: one for each micro-batch of 2 data parallel ranks, a multiple "
        "of layout.pp = 4 under layout.vpp = 2; ",
        {"algorithm.group_size": 4},
    ),
    # contrastive gradient
    (
        {"contrastive.policy_gradient_weight": 0.1},
        "contrastive.policy_gradient_weight = 0.1: has an effect only with gradient=policy",
        {"contrastive.gradient": "policy"},
    ),
    (
        {"contrastive.gradient": "policy"},
        "contrastive.policy_gradient_weight = 0.0: with contrastive.gradient = policy",
        {"contrastive.policy_gradient_weight": 0.1},
    ),
    (
        {
            "contrastive.gradient": "policy",
            "contrastive.policy_gradient_weight": 0.1,
            "algorithm.updates_per_step": 2,
        },
        "algorithm.updates_per_step = 2: with contrastive.gradient = policy",
        {"algorithm.updates_per_step": 1},
    ),
    (
        {"contrastive.enabled": False, "contrastive.gradient": "policy"},
        "contrastive.gradient = policy, contrastive.policy_gradient_weight = 0.0: have no effect",
        {"contrastive.gradient": "head_only"},
    ),
    (
        {"contrastive.head_frozen": True, "contrastive.head_learning_rate": 0.5},
        "contrastive.head_learning_rate = 0.5: has no effect on a frozen head",
        {"contrastive.head_learning_rate": 1e-3},
    ),
    # precision
    (
        {"precision.recipe": "delayed", "precision.first_last_layers_bf16": True},
        "precision.first_last_layers_bf16 = true: Megatron refuses it with precision.recipe = delayed",
        {"precision.recipe": "tensorwise"},
    ),
    (
        {"precision.first_last_layers_bf16": True},
        "precision.first_last_layers_bf16 = true: has an effect only with FP8",
        {"precision.recipe": "blockwise"},
    ),
    (
        {"precision.amax_history": 16},
        "precision.amax_history = 16: has an effect only with precision.recipe = delayed, found none",
        {"precision.recipe": "delayed"},
    ),
    (
        {"precision.recipe": "tensorwise", "precision.amax_history": 16},
        "precision.amax_history = 16: has an effect only with precision.recipe = delayed, found tensorwise",
        {"precision.amax_history": 1024},
    ),
    (
        {"model.dtype": "float32", "run.device": "cuda"},
        "model.dtype = float32: there is no attention kernel",
        {"run.device": "cpu"},
    ),
    (
        {"model.dtype": "float32", "precision.recipe": "tensorwise"},
        "model.dtype = float32: precision.recipe = tensorwise replaces bfloat16 products",
        {"run.device": "cpu"},
    ),
    # optimizer
    (
        {"optimizer.cpu_offload": True, "run.device": "cpu"},
        "optimizer.cpu_offload = true: has an effect only on a GPU",
        {"run.device": "cuda"},
    ),
    (
        {"optimizer.cpu_offload": True, "layout.distributed_optimizer": False},
        "optimizer.cpu_offload = true: needs the distributed optimizer",
        {"layout.distributed_optimizer": True},
    ),
    (
        {"rollout.quantization": "fp8_per_block", "model.dtype": "float32"},
        "rollout.quantization = fp8_per_block: vLLM quantises 16-bit weights only, found model.dtype = float32",
        {"model.dtype": "bfloat16"},
    ),
    # retention
    ({"checkpoint.keep_every": 25}, "checkpoint.keep_every = 25: must be a multiple of", {"checkpoint.keep_every": 30}),
    (
        {"checkpoint.keep_every": 25, "checkpoint.every": 0},
        "checkpoint.keep_every = 25: must be a multiple of checkpoint.every = 0, above 0",
        {"checkpoint.every": 5},
    ),
    (
        {"checkpoint.keep_best": 1, "data.evaluation": ["held.parquet"]},
        "checkpoint.keep_best = 1: needs steps with an evaluation and a checkpoint, found data.evaluation of 1 files, "
        "evaluation.every = 0, checkpoint.every = 10",
        {"evaluation.every": 20},
    ),
    (
        {"checkpoint.keep_best": 1, "evaluation.every": 5},
        "checkpoint.keep_best = 1: needs steps with an evaluation and a checkpoint, found data.evaluation of 0 files",
        {"data.evaluation": ["held.parquet"]},
    ),
    (
        {"checkpoint.keep_best": 1, "evaluation.every": 15, "data.evaluation": ["held.parquet"]},
        "checkpoint.keep_best = 1: compares the steps that have an evaluation and a checkpoint",
        {"evaluation.every": 5},
    ),
]


@pytest.mark.parametrize(("values", "start", "cure"), CASES)
def test_each_broken_rule_is_told_alone_and_its_advice_cures_it(values, start, cure):
    found = recipe_problems(recipe_of(values))
    assert len(found) == 1
    assert found[0].startswith(start)
    assert recipe_problems(recipe_of(values | cure)) == []


def test_the_faults_of_all_rules_are_told_together():
    values: Values = {
        "layout.world_size": 12,
        "layout.tp": 2,
        "layout.pp": 1,
        "layout.vpp": 2,
        "layout.ep": 8,
        "layout.sequence_parallel": False,
        "layout.micro_batch_tokens": 100,
        "layout.distributed_optimizer": False,
        "algorithm.prompts_per_step": 1,
        "algorithm.group_size": 3,
        "precision.recipe": "delayed",
        "precision.first_last_layers_bf16": True,
        "optimizer.cpu_offload": True,
        "contrastive.gradient": "policy",
        "run.device": "cpu",
    }
    keys = sorted(problem.split(" = ")[0].split(":")[0] for problem in recipe_problems(recipe_of(values)))
    assert keys == [
        "algorithm",
        "contrastive.policy_gradient_weight",
        "layout.ep",
        "layout.micro_batch_tokens",
        "layout.micro_batch_tokens",
        "layout.sequence_parallel",
        "layout.vpp",
        "optimizer.cpu_offload",
        "optimizer.cpu_offload",
        "precision.first_last_layers_bf16",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"layout.world_size": 32, "layout.tp": 2, "layout.pp": 2, "layout.vpp": 3, "layout.cp": 2, "layout.ep": 8},
        {"layout.world_size": 8, "layout.tp": 8, "layout.ep": 8},
        {"layout.world_size": 8, "layout.tp": 4, "layout.cp": 2, "layout.ep": 2, "layout.etp": 4},
        {"layout.sequence_parallel": False},
        {"layout.overlap_grad_reduce": False, "layout.distributed_optimizer": False},
        {"contrastive.enabled": False, "algorithm.updates_per_step": 2},
        {"precision.recipe": "delayed", "precision.amax_history": 1},
        {"precision.recipe": "blockwise", "precision.first_last_layers_bf16": True, "run.device": "cpu"},
        {"model.dtype": "float32"},
        {"model.dtype": "float32", "run.device": "cpu", "precision.recipe": "delayed"},
        {"optimizer.cpu_offload": True},
        {"experts.routing_replay": False, "experts.freeze_router": True},
    ],
)
def test_what_can_run_is_not_refused(values):
    assert recipe_problems(recipe_of(values)) == []


def test_exactly_the_layouts_that_can_be_laid_out_are_accepted():
    names = ("world_size", "tp", "pp", "cp", "ep", "etp")
    for degrees in itertools.product((1, 2, 4, 6, 12), (1, 2, 3), (1, 2), (1, 2), (1, 2, 3), (1, 2)):
        layout = dict(zip(names, degrees, strict=True))
        values = {f"layout.{name}": degree for name, degree in layout.items()} | {"layout.micro_batch_tokens": 9216}
        try:
            dp = ParallelLayout(**layout).dp
        except ConfigError:
            assert layout_problems(recipe_of(values))
        else:
            assert layout_problems(recipe_of(values)) == []
            assert recipe_of(values).dp == dp


@pytest.mark.parametrize("recipe", RECIPES)
def test_micro_batches_are_checked_against_what_packing_pads_to(recipe):
    for tp, cp, sequence_parallel in itertools.product((1, 2, 3, 8), (1, 2, 3, 4), (True, False)):
        checked = token_multiples(
            recipe_of(
                {
                    "layout.tp": tp,
                    "layout.cp": cp,
                    "layout.sequence_parallel": sequence_parallel,
                    "precision.recipe": recipe,
                }
            )
        )
        assert checked == alignment(
            tp=tp, cp=cp, sequence_parallel=sequence_parallel, fp8_multiple=fp8_multiple(recipe)
        )


@given(
    degrees=st.tuples(*[st.integers(1, 3)] * 4),
    vpp=st.integers(1, 2),
    sequence_parallel=st.booleans(),
    precision=st.sampled_from(RECIPES),
    prompt=st.integers(1, 30),
    budget=st.integers(1, 120),
    shares=st.lists(st.floats(0, 1), min_size=64, max_size=64),
    dropped=st.integers(0, 64),
)
def test_under_an_accepted_recipe_every_batch_of_enough_sequences_has_a_plan(
    degrees, vpp, sequence_parallel, precision, prompt, budget, shares, dropped
):
    dp, tp, pp, cp = degrees
    values: Values = {
        "layout.world_size": dp * tp * pp * cp,
        "layout.tp": tp,
        "layout.pp": pp,
        "layout.cp": cp,
        "layout.vpp": vpp,
        "layout.sequence_parallel": sequence_parallel,
        "precision.recipe": precision,
        "data.max_prompt_tokens": prompt,
        "rollout.max_response_tokens": 20,
    }
    of_sequence, of_batch = token_multiples(recipe_of(values))
    values["layout.micro_batch_tokens"] = budget * of_batch
    if recipe_problems(recipe_of(values)):
        return
    count_multiple = pp if vpp > 1 else 1
    num_rows = max(least_rows(dp=dp, count_multiple=count_multiple), len(shares) - dropped)
    longest = prompt + 20
    plan = plan_micro_batches(
        np.array([2 + int(share * (longest - 2)) for share in shares[:num_rows]]),
        dp=dp,
        token_budget=budget * of_batch,
        sequence_multiple=of_sequence,
        batch_multiple=of_batch,
        count_multiple=count_multiple,
        linear_cost=1000.0,
    )
    assert plan.num_micro_batches % count_multiple == 0
