"""Laws of the batch script: it asks for what the recipe needs, survives any name, and holds nothing of a site."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from clipo_megatron.cli.main import main
from clipo_megatron.slurm.ports import first_ephemeral_port, free_ports
from clipo_megatron.slurm.render import HOME, SCRIPT

EXAMPLES = HOME / "examples"


def _render(capsys, *arguments: str) -> str:
    assert main(["launch", *arguments, "--render"]) == 0
    return capsys.readouterr().out


def _option(script: str, name: str) -> str:
    return re.search(rf"^#SBATCH --{name}=(.*)$", script, re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("arguments", "nodes", "gpus"),
    [
        (("math_qwen3_32b/recipe.yaml",), "4", "8"),  # 32 GPUs
        (("math_qwen3_32b/recipe.yaml", "--gpus-per-node=4"), "8", "4"),
        (("gsm8k_qwen2p5_3b/recipe.yaml",), "1", "8"),
        (("gsm8k_qwen2p5_3b/recipe.yaml", "--nodes=3"), "3", "8"),
        (("quickstart/recipe.yaml", "--nodes=2"), "2", "0"),
    ],
)
def test_a_job_asks_for_the_gpus_of_all_workers(capsys, arguments, nodes, gpus):
    script = _render(capsys, str(EXAMPLES / arguments[0]), *arguments[1:], "--time=1-02:00:00")
    assert (_option(script, "nodes"), _option(script, "gpus-per-node")) == (nodes, gpus)
    assert _option(script, "time") == "1-02:00:00"


def test_spare_nodes_are_asked_for_beside_and_outlive_a_lost_one(capsys):
    recipe = str(EXAMPLES / "math_qwen3_32b" / "recipe.yaml")
    script = _render(capsys, recipe, "--spare-nodes=1")
    assert _option(script, "nodes") == "5"
    lines = script.splitlines()
    assert lines.index("#SBATCH --no-kill") < lines.index("set -euo pipefail")
    assert "export CLIPO_SPARE_NODES=1" in lines
    plain = _render(capsys, recipe)
    assert "#SBATCH --no-kill" not in plain
    assert "export CLIPO_SPARE_NODES" not in plain
    assert main(["launch", recipe, "--spare-nodes=-1", "--render"]) == 2
    assert "--spare-nodes = -1: must be >= 0" in capsys.readouterr().err
    assert main(["launch", str(EXAMPLES / "gsm8k_qwen2p5_3b" / "recipe.yaml"), "--spare-nodes=1", "--render"]) == 2
    assert "--spare-nodes = 1: the run needs 1 node" in capsys.readouterr().err


def test_too_few_nodes_and_a_time_that_is_none_are_refused_together(capsys):
    recipe = str(EXAMPLES / "math_qwen3_32b" / "recipe.yaml")
    assert main(["launch", recipe, "--nodes=3", "--time=tomorrow", "--render"]) == 2
    errors = capsys.readouterr().err
    assert "--nodes = 3" in errors
    assert "need 4 nodes of 8" in errors
    assert "--time = tomorrow" in errors


def test_words_of_any_kind_reach_the_run_as_they_are(capsys, tmp_path):
    folder = tmp_path / "a folder; with $HOME `id` 'and' \"quotes\""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    shutil.copy(EXAMPLES / "quickstart" / "recipe.yaml", recipe)
    override = "data.train=[a b.parquet, $c.parquet]"
    script = _render(capsys, str(recipe), override)
    [line] = [line for line in script.splitlines() if line.startswith("set -- ")]
    shown = subprocess.run(["bash", "-c", line + '; printf "%s\\0" "$@"'], capture_output=True, check=True, text=True)
    assert shown.stdout.split("\0")[:-1] == [str(recipe), override]


@pytest.mark.parametrize("script", ["shipped", "rendered"])
def test_the_script_has_no_unquoted_variable_and_no_path_or_name_of_a_site(capsys, script):
    text = SCRIPT.read_text() if script == "shipped" else _render(capsys, str(EXAMPLES / "quickstart" / "recipe.yaml"))
    ours = text.replace(shlex.quote(str(EXAMPLES / "quickstart" / "recipe.yaml")), "RECIPE")
    assert not re.search(r"(?<![\w$}{\"./-])/(home|root|work|scratch|data|mnt|lustre|fsx|opt)\b", ours)
    assert not re.search(r"^#SBATCH.*(partition|account|qos|nodelist|container)", ours, re.MULTILINE)
    assert str(Path.home()) not in ours
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on PATH (Debian: apt-get install shellcheck)")
    command = [
        "shellcheck",
        "--shell=bash",
        "--enable=quote-safe-variables,check-unassigned-uppercase",
        "--exclude=SC2154",
        "-",
    ]
    found = subprocess.run(command, input=text, text=True, capture_output=True)
    unquoted = [line for line in found.stdout.splitlines() if "SC2086" in line or "SC2248" in line]
    assert not unquoted
    assert subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True).returncode == 0, found.stdout


def test_a_secret_of_the_environment_is_not_in_the_script(capsys, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setitem(os.environ, name, "s3cr3t")
    assert "s3cr3t" not in _render(capsys, str(EXAMPLES / "quickstart" / "recipe.yaml"))


def test_ports_are_free_distinct_and_below_those_that_the_system_gives_out():
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert max(ports) < first_ephemeral_port()


def test_ports_are_those_of_the_site_where_it_names_some(monkeypatch):
    lowest = first_ephemeral_port() - 3
    monkeypatch.setenv("CLIPO_PORTS", f"{lowest}-{lowest + 2}")
    with socket.create_server(("", lowest + 1)):
        assert set(free_ports(2)) == {lowest, lowest + 2}
        with pytest.raises(OSError, match="3 ports are needed, 2 of"):
            free_ports(3)


@pytest.mark.parametrize("told", ["20000", "20000-", "0-9", "9-8", "1-65536", "a-b", "\u0663-9"])
def test_what_is_no_range_of_ports_is_refused(monkeypatch, told):
    monkeypatch.setenv("CLIPO_PORTS", told)
    with pytest.raises(OSError, match=f"CLIPO_PORTS = {told}: must be FIRST-LAST"):
        free_ports(1)
