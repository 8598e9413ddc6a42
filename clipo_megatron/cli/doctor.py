"""`clipo doctor RECIPE.yaml [key=value ...]`: finds what would end the run, or spoil it, before the run starts.

Levels: static (a login node, seconds, without torch), node (a node of the job, static included), fabric (bandwidth between
ranks), model (the model's numbers; static included). Exit code 0: nothing failed; 2: something did.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipo_megatron.doctor.finding import (
    Finding,
    HostReport,
    Status,
    error_lines,
    host_name,
    of_problems,
    skip,
    worst_status,
    write_report,
)
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.recipe.load import read_recipe

_LEVELS = ("static", "node", "fabric", "model")
_COLORS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red", Status.SKIP: "dim"}
_WIDTH = 150
_FAILED = 2
_USUAL_GIB = 80.0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser("doctor", help="find what would end a run before it starts", description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", help="YAML file; not needed with --compare")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. layout.tp=4 run.device=cpu")
    parser.add_argument("--level", choices=_LEVELS, default="static", help="default: static")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write it to DIR/doctor-HOST.json, to be compared")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="compare the reports of DIR, and run no check")
    parser.add_argument("--hosts", default="", metavar="A,B", help="with --compare: hosts that must have reported")
    parser.add_argument("--ports", type=Path, metavar="FILE", help="lines NAME=PORT that must be free on this host")
    parser.add_argument(
        "--log-folder", type=Path, action="append", default=[], metavar="DIR", help="must be writable here"
    )
    parser.add_argument(
        "--gpu-gib",
        type=float,
        metavar="N",
        help="memory of one GPU (default: this host's at level node and model, else 80)",
    )
    parser.add_argument("--skip", action="append", default=[], metavar="CHECK", help="record this check as skipped")
    parser.add_argument("--quiet", action="store_true", help="no table, only the lines of what failed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print the table, write the reports.

    Raises:
        ConfigError: faults of the options, no recipe, no reports to compare.
    """
    if args.compare is not None:
        return _compare(args)
    problems = (
        []
        if args.gpu_gib is None or 0 < args.gpu_gib < math.inf
        else [f"--gpu-gib {args.gpu_gib}: must be > 0; give the GPU's memory in GiB"]
    )
    if args.recipe is None:
        raise ConfigError([*problems, "RECIPE: missing; give a YAML file, or --compare DIR"])
    if problems:
        raise ConfigError(problems)
    recipe, faults = read_recipe(args.recipe, args.overrides)
    findings, facts = of_problems("recipe", faults, otherwise=str(args.recipe)), {}
    if recipe is not None:
        more, facts = _check(recipe, args, is_sound=not faults)
        findings += more
    report = HostReport(
        host=host_name(),
        level=args.level,
        recipe=str(args.recipe),
        moment=time.time(),
        findings=tuple(_skipped(finding, args.skip) for finding in findings),
        facts=facts,
    )
    if not args.quiet and not _is_silent_rank(args.level):
        _print_table({report.host: report.findings})
    for path in (args.json, args.report and args.report / f"doctor-{report.host}.json"):
        if path:
            write_report(report, path)
    return _verdict({report.host: report.findings})


def _check(recipe: Recipe, args: argparse.Namespace, *, is_sound: bool) -> tuple[list[Finding], dict[str, str]]:
    from clipo_megatron.doctor.devices import smallest_gib
    from clipo_megatron.doctor.static import StaticCase, run_static

    level, facts = args.level, {}
    if level == "fabric":
        if not is_sound:
            return [skip("fabric", "the recipe has faults")], facts
        from clipo_megatron.doctor.fabric_run import run_fabric

        return run_fabric(recipe, folder=args.report), facts
    # A login node's GPUs are not the job's.
    here = smallest_gib() if level != "static" and args.gpu_gib is None else None
    findings = run_static(StaticCase(recipe=recipe, gpu_gib=args.gpu_gib or here or _USUAL_GIB))
    if level == "node":
        from clipo_megatron.doctor.node import NodeCase, run_node
        from clipo_megatron.slurm.ports import free_ports
        from clipo_megatron.slurm.ray_node import INTERFACE_VARIABLE, own_address
        from clipo_megatron.slurm.shares import ranks_per_node

        ports = None if args.ports is None else read_ports(args.ports)
        folders = list(dict.fromkeys(folder for folder in (*args.log_folder, args.report) if folder is not None))
        in_job = "SLURM_JOB_ID" in os.environ or INTERFACE_VARIABLE in os.environ
        case = NodeCase(
            recipe=recipe,
            log_folders=folders,
            ports=ports,
            find_ports=free_ports,
            find_address=own_address if in_job else None,
            find_share=ranks_per_node if "SLURM_JOB_ID" in os.environ else None,
        )
        more, facts = run_node(case)
        findings += more
    elif level == "model":
        from clipo_megatron.cli.doctor_model import run_model

        failed = not is_sound or worst_status(finding.status for finding in findings) is Status.FAIL
        findings += [skip("model", "the recipe or its files have faults")] if failed else run_model(recipe)
    return findings, facts


def read_ports(path: Path) -> dict[str, int]:
    """The ports of a file of lines NAME=PORT; other lines are passed over.

    Raises:
        ConfigError: no such file.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"--ports {path}: can't be read ({error}); give the file that names the job's ports"
        ) from error
    pairs = [line.partition("=") for line in lines]
    return {name.strip(): int(port) for name, _, port in pairs if port.strip().isdigit()}


def _compare(args: argparse.Namespace) -> int:
    from clipo_megatron.doctor.hosts import compare_hosts, read_reports
    from clipo_megatron.doctor.shared_folder import compare_marks

    reports = read_reports(args.compare)
    by_host: dict[str, list[Finding]] = {report.host: list(report.findings) for report in reports}
    for host, findings in compare_hosts(reports, expected=[name for name in args.hosts.split(",") if name]).items():
        by_host.setdefault(host, []).extend(findings)
    if len(reports) > 1:
        by_host.setdefault(host_name(), []).extend(compare_marks(reports))
    if not args.quiet:
        _print_table(by_host)
    return _verdict(by_host)


def _skipped(finding: Finding, names: Sequence[str]) -> Finding:
    if finding.check not in names:
        return finding
    return skip(finding.check, f"--skip; it said {finding.status}: {finding.cause}")


def _is_silent_rank(level: str) -> bool:
    """Of several ranks of a measurement the first one speaks."""
    return level == "fabric" and os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")) != "0"


def _print_table(findings: Mapping[str, Sequence[Finding]]) -> None:
    # A narrow terminal, or a pipe, must not cut the causes.
    console = Console(width=max(Console().width, _WIDTH))
    table = Table("host", "check", "", "found", "what to do", box=None, pad_edge=False)
    for host, of_host in findings.items():
        for finding in of_host:
            status = f"[{_COLORS[finding.status]}]{finding.status}[/]"
            table.add_row(host, finding.check, status, escape(finding.cause), escape(finding.remedy))
    console.print(table)


def _verdict(findings: Mapping[str, Sequence[Finding]]) -> int:
    for host, of_host in findings.items():
        for line in error_lines(host, of_host):
            print(line, file=sys.stderr)
    worst = worst_status(finding.status for of_host in findings.values() for finding in of_host)
    return _FAILED if worst is Status.FAIL else 0
