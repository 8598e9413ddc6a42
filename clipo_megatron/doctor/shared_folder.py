"""Level node: are the run folder and the model folder the same on all hosts? Each host leaves marks that are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.doctor.finding import Finding, HostReport, Status, fail, host_name, ok, skip
from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe import Recipe
from clipo_megatron.weights.architecture import CONFIG_FILE
from clipo_megatron.weights.fingerprint import weights_fingerprint

FOLDER_FACT, NAME_FACT = "run.folder", "run.name"
_SMALL_FILES = (CONFIG_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_LARGEST_HASHED = 64 << 20


def check_shared_folder(recipe: Recipe) -> Finding:
    """Leave this host's mark beside the run folder; comparing the reports looks for the marks of all hosts."""
    name, mark = "shared folder", mark_of(Path(recipe.run.folder), recipe.run.name, host_name())
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"{host_name()}\n")
    except OSError as error:
        return skip(name, f"{mark.parent}: no mark could be left ({error.strerror or error})")
    return ok(name, f"{mark.parent}: marked")


def compare_marks(reports: Sequence[HostReport]) -> list[Finding]:
    """Whether the marks of all hosts are seen from here; removes those that are. One finding a host without one."""
    name, findings, marked = "shared folder", [], []
    for report in reports:
        if all(finding.check != name or finding.status is not Status.OK for finding in report.findings):
            continue  # it left none, and said why
        folder = Path(report.facts[FOLDER_FACT])
        mark = mark_of(folder, report.facts[NAME_FACT], report.host)
        if mark.is_file():
            mark.unlink(missing_ok=True)
            marked.append(report.host)
        else:
            cause = (
                f"run.folder: what {report.host} wrote to {folder} is not seen on {host_name()}: another disk is there"
            )
            findings.append(fail(name, cause, "choose a run.folder on a file system that all nodes share"))
    return findings or ([ok(name, f"the marks of {len(marked)} hosts are seen")] if marked else [])


def mark_of(folder: Path, run_name: str, host: str) -> Path:
    """Where a host leaves its mark: beside the run folder, which stays empty until the run begins."""
    return folder / f".clipo-host-{run_name}-{host}"


def model_facts(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the model folder's weights and small files and of the data, by name; "missing" where there is none."""
    folder = Path(recipe.model.path)
    try:
        weights = weights_fingerprint(folder)[:12] if folder.is_dir() else "missing"
    except (ConfigError, OSError):
        weights = "damaged"
    facts = {"model weights": weights, "model files": _files_fingerprint([folder / name for name in _SMALL_FILES])}
    facts["data"] = _files_fingerprint([Path(file) for file in (*recipe.data.train, *recipe.data.evaluation)])
    facts |= {FOLDER_FACT: str(Path(recipe.run.folder).absolute()), NAME_FACT: recipe.run.name}
    return facts | {"recipe": recipe.fingerprint}


def _files_fingerprint(files: Sequence[Path]) -> str:
    """12 hex digits over names, sizes and contents; of a large file, its ends. Absent files count as absent."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                if size <= _LARGEST_HASHED:
                    digest.update(opened.read())
                else:
                    digest.update(opened.read(1 << 20))
                    opened.seek(-(1 << 20), 2)
                    digest.update(opened.read())
            digest.update(str(size).encode())
        except OSError:
            digest.update(b"absent")
    return digest.hexdigest()[:12]
