"""Laws of comparing hosts: what differs on one host is told of that host, and of no other."""

from __future__ import annotations

import json

import pytest

from clipo_megatron.cli.main import main
from clipo_megatron.doctor.finding import HostReport, Status, fail, ok, write_report
from clipo_megatron.doctor.hosts import CLOCK_FACT, compare_hosts
from clipo_megatron.doctor.shared_folder import FOLDER_FACT, NAME_FACT, mark_of

FACTS = {"package torch": "2.13.0", "model weights": "abc", "python": "3.11.9", "recipe": "f00", CLOCK_FACT: "0.01"}


def report(host, findings=(), **changed):
    facts = FACTS | {name.replace("_", " "): value for name, value in changed.items()}
    return HostReport(host=host, level="node", recipe="r.yaml", moment=0.0, findings=tuple(findings), facts=facts)


def told(reports, **options):
    return {
        (host, finding.status, finding.cause)
        for host, findings in compare_hosts(reports, **options).items()
        for finding in findings
    }


def test_equal_hosts_agree():
    ((host, status, _),) = told([report(f"n{n}") for n in range(4)])
    assert (host, status) == ("all hosts", Status.OK)


@pytest.mark.parametrize("fact", ["package torch", "model weights", "python", "recipe"])
def test_the_host_with_another_value_than_most_is_named_with_both_values(fact):
    reports = [report("n1"), report("n2", **{fact.replace(" ", "_"): "other"}), report("n3")]
    assert told(reports) == {("n2", Status.FAIL, f"{fact}: other on this host, {FACTS[fact]} on n1")}
    (finding,) = compare_hosts(reports)["n2"]
    assert finding.remedy not in ("", "make it equal on all nodes")


def test_of_two_hosts_the_second_is_named():
    assert {host for host, _, _ in told([report("n1"), report("n2", package_torch="2.12.0")])} == {"n2"}


def test_a_package_that_one_host_lacks_is_told():
    reports = [report("n1", package_vllm="0.32"), report("n2")]
    assert told(reports) == {("n2", Status.FAIL, "package vllm: none on this host, 0.32 on n1")}


@pytest.mark.parametrize(("ahead", "status"), [("1.5", None), ("-9.0", Status.WARN), ("3600.0", Status.FAIL)])
def test_a_clock_that_is_off_is_told(ahead, status):
    reports = [report("n1"), report("n2", clock_ahead=ahead), report("n3")]
    expected = set() if status is None else {("n2", status)}
    assert {(host, found) for host, found, _ in told(reports) if host != "all hosts"} == expected


def test_a_host_without_a_report_has_failed():
    found = told([report("n1"), report("n2")], expected=["n1", "n2", "n3"])
    assert {(host, status) for host, status, _ in found} == {("n3", Status.FAIL)}


@pytest.fixture
def shared(tmp_path):
    """Two hosts' reports and marks in a run folder, as the hosts left them."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for host in ("n1", "n2"):
        mark_of(folder, "r", host).write_text(host)
        facts = {FOLDER_FACT: str(folder), NAME_FACT: "r"}
        found = HostReport(
            host=host, level="node", recipe="r", moment=0.0, findings=(ok("shared folder", "marked"),), facts=facts
        )
        write_report(found, tmp_path / f"doctor-{host}.json")
    return tmp_path


def test_a_run_folder_that_all_hosts_share_passes_and_is_clean_afterwards(shared, capsys):
    assert main(["doctor", "--compare", str(shared), "--hosts", "n1,n2"]) == 0
    assert "the marks of 2 hosts are seen" in capsys.readouterr().out
    assert list((shared / "runs").iterdir()) == []


def test_a_run_folder_that_a_host_has_for_itself_is_found(shared, capsys):
    mark_of(shared / "runs", "r", "n2").unlink()
    assert main(["doctor", "--compare", str(shared)]) == 2
    assert f"what n2 wrote to {shared / 'runs'} is not seen" in capsys.readouterr().err


def test_what_failed_on_a_host_fails_the_comparison_in_its_name(shared, capsys):
    found = HostReport(
        host="n2", level="node", recipe="r", moment=0.0, findings=(fail("data", "gone", "copy it"),), facts={}
    )
    write_report(found, shared / "doctor-n2.json")
    mark_of(shared / "runs", "r", "n2").unlink()
    assert main(["doctor", "--compare", str(shared)]) == 2
    assert "clipo: error: n2: checks: gone; copy it" in capsys.readouterr().err


def test_a_folder_without_reports_or_with_a_damaged_one_is_refused(tmp_path, shared, capsys):
    assert main(["doctor", "--compare", str(shared / "runs")]) == 2
    (shared / "doctor-n2.json").write_text(json.dumps({"host": "n2"}))
    assert main(["doctor", "--compare", str(shared)]) == 2
    assert "doctor-n2.json: is no report" in capsys.readouterr().err
