"""Checkpoints: what is in them, that damage is found, that a save is whole or not at all, whatever stops it."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import killer, whole_after_a_kill
from model_cases import random_config, random_model
from run_cases import contents, optimizers_of, rows, tiny_config, trained
from safetensors import SafetensorError
from safetensors.torch import save_file

import openv4.model.tensor_files as tensor_files
import openv4.train.checkpoint as checkpoint
from openv4.model import load_pretrained
from openv4.train.checkpoint import (
    TrainState,
    complete_checkpoints,
    find_weights,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    remove_leftovers,
    verify,
)
from openv4.train.checkpoint_writer import save_checkpoint, whole_snapshot
from openv4.train.config import CheckpointError, TrainConfig
from openv4.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save_checkpoint(folder, whole_snapshot(*trained(0, step)), keep=2)
    return folder


@pytest.fixture
def saved(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A folder of the checkpoints of steps 1 and 2, to be spoiled."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def config(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of four steps that keeps the checkpoint of each; its folder is `straight`'s."""
    overrides = ("steps=4", "checkpoint.every=1", "checkpoint.keep=4")
    return tiny_config(small_data, tmp_path_factory.mktemp("straight") / "run", *overrides)


@pytest.fixture(scope="module")
def straight(config: TrainConfig, one_thread: None) -> Path:
    """The folder of that run, never interrupted; not to be written to."""
    return train(config)


def stopped(straight: Path, run: Path, step: int) -> Path:
    """A copy of the run as it was right after the checkpoint of a step."""
    shutil.copytree(straight, run)
    for later in range(step + 1, 5):
        shutil.rmtree(run / "checkpoints" / f"step_{later}")
    (run / "checkpoints" / "latest").write_text(f"step_{step}\n")
    (run / "summary.json").unlink()
    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def refused(*texts: str) -> Iterator[None]:
    """A CheckpointError in one line that holds the texts, in this order."""
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, texts))) as error:
        yield
    assert "\n" not in str(error.value)


# Content.


def test_everything_comes_back(saved: Path) -> None:
    """Weights, optimizer, counters, data position and random state, bit for bit, into a model of other weights."""
    assert names(saved) == ["latest", "step_1", "step_2"]
    assert names(saved / "step_2") == FILES
    assert (saved / "latest").read_text() == "step_2\n"
    model, optimizers, state = trained(0, 2)
    torch.manual_seed(7)
    folder = save_checkpoint(saved, whole_snapshot(model, optimizers, replace(state, step=3, skipped=1)), keep=2)
    drawn = torch.rand(3)

    other = random_model(model.config, 5)
    other_optimizers, other_state = optimizers_of(other), TrainState()
    load_checkpoint(folder, other, other_optimizers, other_state)
    assert torch.equal(torch.rand(3), drawn)
    assert asdict(other_state) == asdict(replace(state, step=3, skipped=1))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    ours, theirs = optimizers.state_tensors(), other_optimizers.state_tensors()
    assert ours.keys() == theirs.keys() and len(ours) > len(list(model.parameters()))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_is_a_folder_of_released_weights(saved: Path) -> None:
    model, _, _ = trained(0, 2)
    for loaded in (load_pretrained(saved / "step_2", torch.float32), load_model(saved / "step_2")):
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        tokens = torch.arange(20)[None]
        assert torch.equal(loaded(tokens), model(tokens))
    assert find_weights(saved.parent / saved.name / "step_2") == saved / "step_2"


def test_nothing_is_pickled(saved: Path) -> None:
    """Every file is JSON or safetensors, and the manifest lists all others with their sizes."""
    manifest = json.loads((saved / "step_2" / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == FILES
    for name, data in contents(saved / "step_2").items():
        if name.endswith(".json"):
            json.loads(data)
        else:
            assert data[8:9] == b"{" and b'"format":"pt"' in data[:200]
        if name in manifest["files"]:
            assert manifest["files"][name]["bytes"] == len(data)


# Which ones there are.


def test_the_newest_stay(tmp_path: Path) -> None:
    """By number, not by name: 10 is newer than 9."""
    model, optimizers, state = trained(0)
    for step in (8, 9, 10, 11):
        snapshot = whole_snapshot(model, optimizers, replace(state, step=step))
        save_checkpoint(tmp_path, snapshot, keep=3 if step < 11 else 2)
        assert latest_checkpoint(tmp_path) == tmp_path / f"step_{step}"
        assert (tmp_path / "latest").read_text() == f"step_{step}\n"
    assert names(tmp_path) == ["latest", "step_10", "step_11"]


def test_the_newest_is_found_whatever_latest_says(saved: Path) -> None:
    assert latest_checkpoint(saved) == saved / "step_2"
    for text in ("step_1\n", "", "nonsense", "../step_9", "step_7\n", "step_", "\x00"):
        (saved / "latest").write_text(text)
        assert latest_checkpoint(saved) == saved / "step_2", text
    (saved / "latest").unlink()
    assert latest_checkpoint(saved) == saved / "step_2"
    for name in ("step_old", "step_10.bak", "step_"):  # a user's copies
        shutil.copytree(saved / "step_1", saved / name)
    assert [path.name for path in complete_checkpoints(saved)] == ["step_1", "step_2"]
    assert latest_checkpoint(saved / "step_1") is None
    assert latest_checkpoint(saved / "nowhere") is None


def test_a_damaged_newest_is_not_passed_over_in_silence(saved: Path) -> None:
    """`latest` names it, so it is loaded, and the error says how to go on from the one before."""
    (saved / "step_2" / "manifest.json").unlink()
    newest = latest_checkpoint(saved)
    assert newest == saved / "step_2"
    with refused("step_2/manifest.json: unreadable", f"remove {newest} to go on from an earlier checkpoint"):
        load_checkpoint(newest, *trained(0))
    shutil.rmtree(newest)
    assert latest_checkpoint(saved) == saved / "step_1"


def test_leftovers_are_removed_and_nothing_else(saved: Path) -> None:
    for name in (".step_3-abc", ".step_1-old"):
        shutil.copytree(saved / "step_1", saved / name)
    (saved / ".latest").touch()
    (saved / "notes.txt").touch()
    remove_leftovers(saved)
    assert names(saved) == ["latest", "notes.txt", "step_1", "step_2"]


# Damage.


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_flipped_bit_is_found(name: str, saved: Path) -> None:
    """Anywhere in a file, each of the eight bits of a byte; undone, all is well again."""
    path = saved / "step_2" / name
    good = path.read_bytes()
    places = sorted({0, 7, 8, 9, len(good) // 3, len(good) // 2, len(good) - 2, len(good) - 1})
    for index, place in enumerate(places):
        flipped = bytearray(good)
        flipped[place] ^= 1 << index % 8
        path.write_bytes(flipped)
        way_out = "step_2 to go on from an earlier checkpoint"
        with refused(f"step_2/{name}: checksum ", "the file changed; remove ", way_out):
            verify(saved / "step_2")
    path.write_bytes(good)
    verify(saved / "step_2")


def test_every_flipped_bit_of_the_manifest_is_found(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved / "step_2"
    sums = {path: checkpoint.file_checksum(path) for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "file_checksum", sums.__getitem__)  # some five thousand times the same files
    good = (folder / "manifest.json").read_bytes()
    unnoticed = []
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(flipped)
        try:
            verify(folder)
        except CheckpointError:
            continue
        unnoticed.append((bit, flipped[bit // 8 - 8 : bit // 8 + 8]))
    assert unnoticed == []
    (folder / "manifest.json").write_bytes(good)
    verify(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 1, -3])
def test_truncation_is_found(name: str, size: int, saved: Path) -> None:
    path = saved / "step_2" / name
    path.write_bytes(path.read_bytes()[:size])
    with refused(f"step_2/{name}: ", "remove "):
        verify(saved / "step_2")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, saved: Path) -> None:
    (saved / "step_2" / name).unlink()
    with refused("step_2", name, "remove "):
        verify(saved / "step_2")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "folder/x"])
def test_an_added_file_is_found(name: str, saved: Path) -> None:
    (saved / "step_2" / name).parent.mkdir(exist_ok=True)
    (saved / "step_2" / name).write_text("{}")
    with refused("step_2: files missing or added: ", name.split("/")[0], "remove "):
        verify(saved / "step_2")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": 3}', '{"files": {"a": {}}}', "\x00\xff"])
def test_a_manifest_that_is_none_is_refused(text: str, saved: Path) -> None:
    (saved / "step_2" / "manifest.json").write_text(text)
    with refused("step_2/manifest.json: unreadable (", "remove "):
        verify(saved / "step_2")


def test_another_format_is_refused(saved: Path) -> None:
    path = saved / "step_2" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 1}
    path.write_text(json.dumps(manifest | {"checksum": checkpoint.seal(manifest)}))
    with refused(
        "step_2: format 1, this version reads 2; go on with the version that wrote it, or choose another output"
    ):
        verify(saved / "step_2")


def test_damage_stops_a_load_before_anything_changed(saved: Path) -> None:
    path = saved / "step_2" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    model, optimizers, state = trained(1, 5)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with refused("step_2/optimizer.safetensors: checksum "):
        load_checkpoint(saved / "step_2", model, optimizers, state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert state.step == 5


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"hidden_size": 24}, "misshapen: "),
        ({"n_routed_experts": 11}, "missing: layers.0.ffn.experts.9.w1.weight"),
        ({"num_hash_layers": 0}, "1 missing: layers.0.ffn.gate.bias; 1 unexpected: layers.0.ffn.gate.tid2eid"),
        ({"num_hidden_layers": 1, "compress_ratios": (4, 0)}, "unexpected: layers.1."),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], listed: str, saved: Path) -> None:
    """What differs is listed; neither the model nor the checkpoint is touched."""
    fixed = {"num_hash_layers": 1, "num_hidden_layers": 2, "compress_ratios": (4, 8, 0), "layer_types": ()}
    model = random_model(random_config(0, **(fixed | change)), 9)
    before, files = [tensor.clone() for tensor in model.state_dict().values()], contents(saved)
    with refused("step_2: these weights do not fit", listed, "is this a run of another model? choose another output"):
        load_checkpoint(saved / "step_2", model, optimizers_of(model), TrainState())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert contents(saved) == files


# Saves that fail.

FULL = OSError(errno.ENOSPC, "No space left on device")


def full_disk_at(call: int, function: Callable[..., Any], error: Exception = FULL) -> Callable[..., Any]:
    """``function`` up to that call, which fails, and so do all after it."""
    calls = 0

    def limited(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise error
        return function(*arguments, **options)

    return limited


WRITES = {"tensors": 2, "text": 5, "sync": 11}  # so many there are in a save


@pytest.mark.parametrize(("what", "call"), [(what, call) for what in WRITES for call in range(1, WRITES[what] + 2)])
def test_a_full_disk_leaves_what_was_there(what: str, call: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write it stops: no half of a checkpoint, one clear line, and with room again the next save is good."""
    model, optimizers, state = trained(0, 3)
    before = contents(saved)
    with monkeypatch.context() as patch:
        if what == "tensors":
            error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            patch.setattr(tensor_files, "save_file", full_disk_at(call, save_file, error))
        elif what == "text":
            patch.setattr(Path, "write_text", full_disk_at(call, Path.write_text))
        else:
            patch.setattr(os, "fsync", full_disk_at(call, os.fsync))
        if call > WRITES[what]:
            save_checkpoint(saved, whole_snapshot(model, optimizers, state), keep=2)
            return
        with refused("No space left on device", "; free some space"):
            save_checkpoint(saved, whole_snapshot(model, optimizers, state), keep=2)
    after = contents(saved)
    published = (saved / "step_3").exists()  # the disk was full for `latest` alone
    assert published == ((what, call) in [("text", 5), ("sync", 9), ("sync", 10), ("sync", 11)])
    moved = {"latest": b"step_3\n"} if (what, call) == ("sync", 11) else {}
    kept = {name: data for name, data in after.items() if not name.startswith("step_3/") and name != ".latest"}
    assert kept == before | moved
    newest = latest_checkpoint(saved)
    assert newest is not None and newest.name == ("step_3" if published else "step_2")
    verify(newest)
    if not published:
        save_checkpoint(saved, whole_snapshot(model, optimizers, state), keep=2)
        assert names(saved) == ["latest", "step_2", "step_3"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: the kernel refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_plot")
def test_a_run_whose_save_fails_goes_on_later(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    """The kernel refuses the end of the weights: one line says so, and the same command resumes from step 2."""
    limit = (straight / "checkpoints" / "step_4" / "model.safetensors").stat().st_size - 1
    run = stopped(straight, tmp_path / "run", 2)
    before = contents(run / "checkpoints")
    again = replace(config, output=str(run))
    message = ("checkpoint of step 3 not written: ", "step_3", "File too large", "free some space")
    with file_size_limit(limit), refused(*message):
        train(again)
    assert contents(run / "checkpoints") == before
    train(again)
    assert rows(run) == rows(straight)
    assert contents(run / "checkpoints") == contents(straight / "checkpoints")


# Saves that are killed.


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("pointer", ["step_2\n", "step_1\n", None])
def test_a_run_killed_before_latest_moved(
    pointer: str | None, config: TrainConfig, straight: Path, tmp_path: Path
) -> None:
    """step_3 is published, `latest` still names an older one or was never written: the same command just works."""
    run = stopped(straight, tmp_path / "run", 3)
    checkpoints = run / "checkpoints"
    (checkpoints / "latest").unlink()
    if pointer is not None:
        (checkpoints / "latest").write_text(pointer)
    again = replace(config, output=str(run), checkpoint=replace(config.checkpoint, keep=2))
    train(replace(again, steps=3))  # nothing left to train: the pointer is moved and what is too old goes
    assert names(checkpoints) == ["latest", "step_2", "step_3"]
    assert (checkpoints / "latest").read_text() == "step_3\n"
    train(again)
    assert names(checkpoints) == ["latest", "step_3", "step_4"]
    assert contents(checkpoints / "step_4") == contents(straight / "checkpoints" / "step_4")
    assert rows(run) == rows(straight)


@pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_line(stride: int, tmp_path: Path) -> None:
    """A process forked for each (tenth) line that a save executes, and killed there: see `save_killed_at_lines`."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path;"
        f"import test_checkpoint; test_checkpoint.save_killed_at_lines(Path({str(tmp_path)!r}), {stride})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines, resumed_at = done.stdout.split()
    assert int(lines) > 100
    assert resumed_at == "2,3"


def save_killed_at_lines(folder: Path, stride: int) -> None:
    """Saves step 3 beside steps 1 and 2, keeping two, in children that end without a word at their n-th line.

    After each, the newest checkpoint is whole and of step 2 or 3, and what resuming does first leaves the two newest
    and nothing else. Prints the number of lines, and the steps from which a run would have gone on.
    """
    torch.set_num_threads(1)
    before, after = folder / "before", folder / "after"
    model, optimizers, state = trained(0)
    for step in (1, 2):
        save_checkpoint(before, whole_snapshot(model, optimizers, replace(state, step=step)), keep=2)
    shutil.copytree(before, after)
    save_checkpoint(after, whole_snapshot(model, optimizers, replace(state, step=3)), keep=2)
    expected = contents(before) | contents(after)
    resumed_at = set()
    for line in range(1, 10_000, stride):
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        child = os.fork()
        if child == 0:
            sys.settrace(killer(line))
            save_checkpoint(work, whole_snapshot(model, optimizers, replace(state, step=3)), keep=2)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        newest = whole_after_a_kill(work, before, after, expected, line)
        resumed_at.add(newest.name.removeprefix("step_"))
        if not killed:
            assert newest.name == "step_3"
            print(line - 1, ",".join(sorted(resumed_at)))
            return
