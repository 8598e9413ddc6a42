"""Laws of an import that can't be done or is not done to its end: bad input leaves nothing, kill -9 loses one unit at most."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dist_folders import flip_one_bit
from support.model_imports import file_bytes, small_import, small_model
from support.tiny_models import make_tiny_hf
from torch import Tensor

from clipo_megatron.checkpoint.conversion_plan import smallest_layout
from clipo_megatron.checkpoint.conversion_record import RECORD_FILE
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.cli.main import main
from clipo_megatron.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the import of `source` that nothing disturbed."""
    return file_bytes(small_import(source, tmp_path_factory.mktemp("imports") / "whole", tp=2, pp=2).folder)


def _assert_nothing(target: Path) -> None:
    assert not os.path.lexists(target)
    assert not os.path.lexists(f"{target}.partial")


# --- what is refused ---


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """All tensors in one file, changed."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


NORM = "model.norm.weight"
SOURCE_FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: _shard(folder).unlink(), r"model-00002-of-\d+\.safetensors: no such file.*model\."),
    (lambda folder: os.truncate(_shard(folder), 1000), r"model-00002-of-\d+\.safetensors: "),
    (lambda folder: _rewrite(folder, lambda tensors: tensors.pop(NORM)), rf"{NORM} is missing"),
    (lambda folder: _rewrite(folder, lambda tensors: tensors.update(odd=torch.ones(2))), "odd is not known"),
    (
        lambda folder: _rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(3)})),
        rf"{NORM} has shape \(3,\)",
    ),
    (lambda folder: _edit_config(folder, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    (lambda folder: _edit_config(folder, vocab_size=100), "largest token id"),
    (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    (
        lambda folder: _rewrite(
            folder,
            lambda tensors: tensors.update(
                {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()}
            ),
        ),
        r"model\.layers\.1\.mlp\.up_proj\.weight is bfloat16.*convert them with --dtype",
    ),
]


@pytest.mark.parametrize(("damage", "rule"), SOURCE_FAULTS)
def test_a_damaged_source_is_refused_by_name_and_nothing_is_written(source, tmp_path, damage, rule):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    damage(folder)
    with pytest.raises(ConfigError, match=rule):
        small_import(folder, tmp_path / "target", tp=2)
    _assert_nothing(tmp_path / "target")


def test_an_index_that_names_an_absent_tensor_is_refused(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = _shard(folder).name
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.9\.mlp\.up_proj\.weight"):
        small_import(folder, tmp_path / "target")
    _assert_nothing(tmp_path / "target")


def test_tensors_of_one_parameter_may_differ_in_their_number_format_when_they_are_converted(source, tmp_path):
    folder, even = (Path(shutil.copytree(source, tmp_path / name)) for name in ("hf", "even"))
    changed = [f"model.layers.1.{name}.weight" for name in ("mlp.up_proj", "self_attn.k_proj", "self_attn.v_proj")]
    _rewrite(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16() for name in changed}))
    _rewrite(even, lambda tensors: tensors.update({name: tensors[name].bfloat16().float() for name in changed}))
    targets = [
        small_import(path, tmp_path / f"target-{path.name}", dtype="float16", tp=2).folder for path in (folder, even)
    ]
    found, expected = (file_bytes(target) for target in targets)
    assert {name for name in found if found[name] != expected[name]} == {RECORD_FILE}


def test_all_faults_of_source_target_and_layout_are_told_at_once(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    (folder / "tokenizer.json").unlink()
    (tmp_path / "target").mkdir()
    with pytest.raises(ConfigError) as refused:
        small_import(folder, tmp_path / "target", tp=3, vpp=2)
    text = str(refused.value)
    for rule in ("target: exists", "no tokenizer.json", "layout.tp = 3", "layout.vpp = 2: only a pipeline stage"):
        assert rule in text


MAKE: list[Callable[[Path], object]] = [
    lambda path: path.mkdir(),
    lambda path: path.write_text("mine"),
    lambda path: path.symlink_to("nowhere"),
    lambda path: (path.mkdir(), (path / "file").write_text("mine")),
]


@pytest.mark.parametrize("make", MAKE)
def test_a_target_that_exists_is_refused_and_left_as_it_is(source, tmp_path, make, capsys):
    target = tmp_path / "target"
    make(target)
    before = file_bytes(tmp_path)
    assert main(["ckpt", "import", str(source), str(target), "--layout", "tp=2"]) == 2
    assert f"{target}: exists" in capsys.readouterr().err
    assert file_bytes(tmp_path) == before
    assert os.path.lexists(target)
    assert not os.path.lexists(f"{target}.partial")


def test_files_of_others_under_the_name_of_the_partial_folder_are_never_removed(source, tmp_path):
    partial = tmp_path / "target.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"target\.partial: holds thesis\.txt, which no import wrote"):
        small_import(source, tmp_path / "target")
    assert (partial / "thesis.txt").read_text() == "mine"


def test_a_target_inside_the_source_is_refused(source):
    with pytest.raises(ConfigError, match="lies in"):
        small_import(source, source / "imported")
    _assert_nothing(source / "imported")


def test_too_little_disk_space_is_told_with_figures_before_the_start(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ConfigError, match=r"target: needs 67\.\d MB, its disk has 1\.00 MB free"):
        small_import(source, tmp_path / "target")
    _assert_nothing(tmp_path / "target")


def test_values_beyond_the_number_format_are_refused_by_name(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    _rewrite(folder, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].view(-1)[5:6].fill_(1e6))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: values that are not finite as torch\.float16"
    ):
        import_model(folder, tmp_path / "target", layout=smallest_layout({"tp": 2}), dtype="float16")
    _assert_nothing(tmp_path / "target")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_source_value_that_is_not_finite_is_refused_by_name_in_any_number_format(source, tmp_path, value, dtype):
    folder, name = Path(shutil.copytree(source, tmp_path / "hf")), "model.layers.1.self_attn.o_proj.weight"
    _rewrite(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}: holds values that are not finite"):
        import_model(folder, tmp_path / "target", layout=smallest_layout({"tp": 2}), dtype=dtype)
    _assert_nothing(tmp_path / "target")


# --- what ends an import ---


class _Stop(Exception):
    pass


def _stop_at(share: float, act: Callable[[], object]) -> Callable[[str, int, int], None]:
    """Acts once, when this share of the bytes is written."""
    is_done = False

    def on_progress(name: str, done: int, total: int) -> None:
        nonlocal is_done
        if done >= share * total and not is_done:
            is_done = True
            act()

    return on_progress


def _raise() -> None:
    raise _Stop


def _finished_units(target: Path) -> list[str]:
    return sorted(path.name for path in Path(f"{target}.partial", "units").glob("*.json"))


def _state_of_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change: a file that was written again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.distcp")}


def _in_child(act: Callable[[], object]) -> int:
    """Start a process that does `act` and ends; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        code = int(bool(act()))
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        os._exit(code)


def test_an_import_that_is_killed_in_the_middle_goes_on_without_its_finished_units(source, whole, tmp_path):
    target = tmp_path / "target"
    kill = _stop_at(0.6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    _, status = os.waitpid(_in_child(lambda: small_import(source, target, tp=2, pp=2, on_progress=kill)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not target.exists()
    finished = _finished_units(target)
    assert len(finished) >= 3
    names = {
        file["name"]
        for name in finished
        for file in json.loads(Path(f"{target}.partial", "units", name).read_text())["content"]
    }
    before = _state_of_files(Path(f"{target}.partial", "model"))
    report = small_import(source, target, tp=2, pp=2)
    after = _state_of_files(target)
    assert report.num_kept == len(finished) < report.num_units
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert file_bytes(target) == whole
    assert not os.path.lexists(f"{target}.partial")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 MB, so that the command's smallest units are about as many."""
    return make_tiny_hf(tmp_path_factory.mktemp("models") / "hf", "llama", num_layers=6, num_heads=8, ffn_size=1000)


def test_a_command_killed_at_ten_random_moments_leaves_nothing_that_looks_complete_and_ends_with_the_right_bits(
    larger, tmp_path, capsys
):
    def command(target: Path) -> list[str]:
        return ["ckpt", "import", str(larger), str(target), "--layout", "tp=2,pp=2", "--unit-mib", "1"]

    undisturbed = tmp_path / "undisturbed"
    started = time.perf_counter()
    assert os.waitpid(_in_child(lambda: main(command(undisturbed))), 0)[1] == 0
    duration = time.perf_counter() - started
    expected = file_bytes(undisturbed)
    moments = random.Random(0)
    ended = []
    for number in range(10):
        target = tmp_path / str(number)
        pid = _in_child(lambda target=target: main(command(target)))
        time.sleep(moments.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if target.exists():  # the moment came too late
            assert file_bytes(target) == expected
            ended.append("complete")
            continue
        finished = _finished_units(target)
        capsys.readouterr()
        assert main([*command(target), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["num_kept"] == len(finished)
        assert report["num_units"] >= 10
        assert file_bytes(target) == expected
        assert not os.path.lexists(f"{target}.partial")
        ended.append(f"{len(finished)} kept")
    assert len(set(ended)) > 1, ended  # the moments were not all the same


def test_an_interrupted_import_goes_on_and_an_error_before_the_first_unit_leaves_nothing(source, whole, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(_Stop):
        small_import(source, target, tp=2, pp=2, on_progress=_stop_at(0.5, _raise))
    assert len(_finished_units(target)) >= 2
    assert small_import(source, target, tp=2, pp=2).num_kept >= 2
    assert file_bytes(target) == whole
    with pytest.raises(_Stop):
        small_import(source, tmp_path / "other", tp=2, pp=2, on_progress=_stop_at(0, _raise))
    _assert_nothing(tmp_path / "other")


OTHERS: list[tuple[str, Callable[[Path, Path], object]]] = [
    ("layout", lambda source, target: small_import(source, target, tp=2)),
    ("dtype", lambda source, target: small_import(source, target, tp=2, pp=2, dtype="bfloat16")),
    (
        "block_elements, unit_bytes",
        lambda source, target: import_model(source, target, layout=smallest_layout({"tp": 2, "pp": 2})),
    ),
    (
        "source",
        lambda source, target: (
            os.utime(next(source.glob("*.safetensors"))),
            small_import(source, target, tp=2, pp=2),
        ),
    ),
]


@pytest.mark.parametrize(("key", "again"), OTHERS)
def test_units_made_from_something_else_are_not_kept_and_the_log_says_why(source, tmp_path, caplog, key, again):
    folder, target = Path(shutil.copytree(source, tmp_path / "hf")), tmp_path / "target"
    with pytest.raises(_Stop):
        small_import(folder, target, tp=2, pp=2, on_progress=_stop_at(0.7, _raise))
    with caplog.at_level(logging.INFO):
        again(folder, target)
    assert f"begun anew: made with another {key}" in caplog.text
    shutil.move(target, tmp_path / "resumed")
    again(folder, target)
    found, expected = file_bytes(tmp_path / "resumed"), file_bytes(target)
    assert {name for name in expected if found[name] != expected[name]} <= {
        RECORD_FILE
    }  # the time of the source's file
    assert found.keys() == expected.keys()


def test_a_finished_unit_whose_files_or_note_are_damaged_is_written_again(source, whole, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(_Stop):
        small_import(source, target, tp=2, pp=2, on_progress=_stop_at(0.7, _raise))
    finished = _finished_units(target)
    partial = Path(f"{target}.partial")
    note = partial / "units" / finished[0]
    note.write_text(note.read_text().replace("distcp", "distcq", 1))
    other = json.loads((partial / "units" / finished[1]).read_text())["content"][0]["name"]
    os.truncate(partial / "model" / other, 100)
    flipped = json.loads((partial / "units" / finished[2]).read_text())["content"][0]["name"]
    flip_one_bit(partial / "model" / flipped, byte=-5000)  # among the elements, of the same size
    assert small_import(source, target, tp=2, pp=2).num_kept == len(finished) - 3
    assert file_bytes(target) == whole


def test_a_disk_that_fills_up_is_told_with_the_file_and_the_import_can_go_on(source, whole, tmp_path, file_size_limit):
    before = file_bytes(source)
    target = tmp_path / "target"
    # Larger than the first stage's files of most units.
    with file_size_limit(17_000), pytest.raises(CheckpointError, match=r"target\.partial/.*File too large"):
        small_import(source, target, tp=2, pp=2)
    assert not target.exists()
    assert file_bytes(source) == before
    small_import(source, target, tp=2, pp=2)
    assert file_bytes(target) == whole


def test_a_source_that_changes_meanwhile_is_refused(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    with pytest.raises(CheckpointError, match="hf: changed while it was imported"):
        small_import(folder, tmp_path / "target", on_progress=_stop_at(0.5, lambda: os.utime(shard)))
    assert not (tmp_path / "target").exists()


def test_a_source_that_is_cut_meanwhile_is_refused_by_name(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    _rewrite(folder, lambda _: None)
    shard = folder / "model.safetensors"
    cut = _stop_at(0.2, lambda: os.truncate(shard, shard.stat().st_size // 2))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter while it was read"):
        small_import(folder, tmp_path / "target", on_progress=cut)
    assert not (tmp_path / "target").exists()


def test_two_imports_into_one_folder_do_not_mix(source, whole, tmp_path):
    target = tmp_path / "target"
    is_writing, may_go_on = threading.Event(), threading.Event()

    def wait(name: str, done: int, total: int) -> None:
        is_writing.set()
        assert may_go_on.wait(30)

    first = threading.Thread(target=lambda: small_import(source, target, tp=2, pp=2, on_progress=wait))
    first.start()
    try:
        assert is_writing.wait(30)
        with pytest.raises(CheckpointError, match="another process imports into it"):
            small_import(source, target, tp=2, pp=2)
    finally:
        may_go_on.set()
        first.join()
    assert file_bytes(target) == whole
    with pytest.raises(ConfigError, match="exists"):
        small_import(source, target, tp=2, pp=2)


# --- memory ---


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """An embedding of 168 MB; what an import takes are a few blocks."""
    folder = make_tiny_hf(tmp_path / "hf", "llama", tied=True, num_layers=1, num_heads=20, vocab_size=65_535)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 168e6

    def resident(field: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
        return 1024 * int(line.split()[1])

    def act() -> bool:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = resident("VmRSS")
        import_model(folder, tmp_path / "target", layout=smallest_layout({"tp": 2}), block_elements=4 << 20)
        (tmp_path / "peak").write_text(str(resident("VmHWM") - before))
        return False

    assert os.waitpid(_in_child(act), 0)[1] == 0
    assert int((tmp_path / "peak").read_text()) < 110e6
