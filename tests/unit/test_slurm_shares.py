"""Laws of the share of a node: before there is a Ray, it is what the run's own placement gives."""

from __future__ import annotations

import json

import pytest

from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import load_recipe
from clipo_megatron.slurm.job_folder import main, read_job
from clipo_megatron.slurm.render import HOME
from clipo_megatron.slurm.shares import ranks_per_node

LARGE, QUICK = (HOME / "examples" / name / "recipe.yaml" for name in ("math_qwen3_32b", "quickstart"))

SMALL_GROUPS = ("layout.tp=4", "layout.micro_batch_tokens=17408")


@pytest.mark.parametrize(
    ("overrides", "nodes", "share"),
    [
        ([], 4, 8),  # engines of 4 and tensor groups of 8 do not fit on a node together: the first two nodes train
        (["rollout.tp=2", *SMALL_GROUPS], 4, 4),  # each node has 4 ranks and an engine
        (["rollout.tp=2", "rollout.engines=8", *SMALL_GROUPS], 4, 4),
        (["rollout.tp=2", *SMALL_GROUPS], 8, 8),  # 4 engines can't be shared by 8 nodes
    ],
)
def test_a_share_is_what_the_runs_nodes_are_given(overrides, nodes, share):
    environment = {"CLIPO_NODES": str(nodes), "SLURM_GPUS_ON_NODE": "8"}
    assert ranks_per_node(load_recipe(LARGE, overrides), environment) == share


def test_on_cpus_a_node_has_as_many_slots_as_rays_cpus_and_too_few_are_told():
    recipe = load_recipe(QUICK, ["run.device=cpu", "layout.world_size=2", "layout.tp=1", "rollout.engines=2"])
    assert ranks_per_node(recipe, {"CLIPO_NODES": "2", "CLIPO_RAY_CPUS": "2"}) == 1
    with pytest.raises(ConfigError, match="the 1 nodes of the cluster have 2 slots"):
        ranks_per_node(recipe, {"CLIPO_NODES": "1", "CLIPO_RAY_CPUS": "2"})


def test_a_jobs_folder_tells_the_share_and_the_runs_folder_as_it_is(tmp_path, monkeypatch):
    for name, value in {"CLIPO_NODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "4"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / 'läufe "a\\b"'
    assert (
        main([str(tmp_path), str(LARGE), f"run.folder={json.dumps(str(run), ensure_ascii=False)}", "run.name=r"]) == 0
    )
    job = read_job(tmp_path)
    assert (job.policy_ranks, job.ranks_per_node, job.run_folder) == (16, 8, f"{run}/r")
    assert (tmp_path / "run_folder").read_text() == f"{run}/r\n"
