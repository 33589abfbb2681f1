"""Faults and bad inputs, in one process: disks that fail, damage, broken pipes, hostile files, degenerate numbers.

Each docstring begins with the fault's number in docs/reliability.md. What other files test of a fault is named there.
"""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import deal, in_threads, tmpfs
from model_cases import random_config, random_model, relative_rms
from run_cases import OVERRIDES, STEPS, contents, optimizers_of, plan, rows, tiny_config, trained
from torch.nn import Parameter

import openv4.model.tensor_files as tensor_files
import openv4.train.checkpoint_writer as checkpoint_writer
import openv4.train.loop as loop
import openv4.train.preflight as preflight
from openv4.data.loader import Batch, Loader
from openv4.data.shards import ShardStore, ShardWriter
from openv4.kernels.hyper_connection import sinkhorn
from openv4.model import load_pretrained
from openv4.model.config import ModelConfigError, WeightsError
from openv4.model.loss import Counts, training_losses
from openv4.model.released import save_pretrained
from openv4.optim.muon import Muon
from openv4.train.checkpoint import (
    Processes,
    complete_checkpoints,
    latest_checkpoint,
    load_newest,
    seal,
    set_aside,
    verify,
)
from openv4.train.checkpoint_writer import CheckpointWriter, save_checkpoint, whole_snapshot
from openv4.train.config import CheckpointError, ConfigError, DamageError, TrainConfig, from_yaml, load_config
from openv4.train.folder import claim_folder
from openv4.train.loop import train, training_step
from openv4.train.metrics import ExpertLoadFile, MetricsFile, read_lines, read_metrics
from openv4.train.preflight import PreflightError, check_memory

pytestmark = pytest.mark.usefixtures("one_thread")

COMMAND = Path(sys.executable).with_name("openv4")


@pytest.fixture(scope="module")
def config(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that keeps the checkpoint of every second step; its folder is `straight`'s."""
    output = tmp_path_factory.mktemp("straight") / "run"
    return tiny_config(small_data, output, "checkpoint.every=2", "checkpoint.keep=4")


@pytest.fixture(scope="module")
def straight(config: TrainConfig, one_thread: None) -> Path:
    """The folder of that run, which nothing befell; not to be written to."""
    return train(config)


def stopped(straight: Path, run: Path, step: int) -> Path:
    """A copy of the run as it was right after the checkpoint of a step."""
    shutil.copytree(straight, run)
    for later in range(step + 2, STEPS + 1, 2):
        shutil.rmtree(run / "checkpoints" / f"step_{later}")
    (run / "checkpoints" / "latest").write_text(f"step_{step}\n")
    (run / "summary.json").unlink()
    return run


def assert_same_end(run: Path, straight: Path) -> None:
    """The last checkpoint, byte for byte, and every row."""
    last = f"step_{STEPS}"
    assert contents(run / "checkpoints" / last) == contents(straight / "checkpoints" / last)
    assert rows(run) == rows(straight)


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 8
    path.write_bytes(data)


# A signal, and a second one.


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    """F5: the first asks for the end of a step that never comes; a second at once is the first on another way, one
    later ends the process as if nobody had caught it."""
    code = (
        "import time; from openv4.train.signals import StopSignal; StopSignal.SECONDS = 0.3\n"
        "with StopSignal() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "        print(stop.signal, flush=True) if stop.signal else None\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(10) == -signal.SIGTERM


# Disks.


def test_a_save_looks_for_space_before_it_takes_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F7: as much as it writes itself, or as the checkpoint before has; nothing is written, and nothing removed."""
    save_checkpoint(tmp_path, whole_snapshot(*trained(0, 1)), keep=2)
    before = contents(tmp_path)
    needed = sum((tmp_path / "step_1" / name).stat().st_size for name in contents(tmp_path / "step_1"))
    for free, fits in ((needed - 1, False), (needed, True)):
        disk = SimpleNamespace(total=1, free=free)
        monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _, disk=disk: disk)
        if fits:
            save_checkpoint(tmp_path, whole_snapshot(*trained(0, 2)), keep=2)
            verify(tmp_path / "step_2")
        else:
            with pytest.raises(CheckpointError, match=r"checkpoint of step 2 not written.* free, .* needed.*free some"):
                save_checkpoint(tmp_path, whole_snapshot(*trained(0, 2)), keep=2)
            assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_one_process_looks_for_space_at_start(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: as many processes do (test_preflight), before the first step."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**6, free=1000))
    with pytest.raises(
        PreflightError, match=r"0\.0 MB free at output=.*checkpoints need .* MB; free some space or choose"
    ):
        train(replace(config, output=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def failing(function: Callable[..., Any], number: int, first: int, times: int) -> Callable[..., Any]:
    """``function``, of which so many calls from the ``first`` on fail."""
    calls = 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if first <= calls < first + times:
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return called


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(("where", "what"), [(Path, "write_text"), (os, "fsync"), (tensor_files, "save_file")])
def test_a_disk_that_fails_for_a_moment(
    where: Any,
    what: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """F8: what it refused twice is written again, from its beginning, after growing pauses; the bytes are the same."""
    pauses: list[float] = []
    monkeypatch.setattr(tensor_files.time, "sleep", pauses.append)
    with monkeypatch.context() as patch:
        patch.setattr(where, what, failing(getattr(where, what), number, 2, 2))
        save_checkpoint(tmp_path / "a", whole_snapshot(*trained(0)), keep=1)
    assert pauses == [0.5, 1.0]
    assert capsys.readouterr().err.count(f"{os.strerror(number)}; writing it again in ") == 2
    save_checkpoint(tmp_path / "b", whole_snapshot(*trained(0)), keep=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("number", "pauses", "way_out"),
    [
        (errno.EIO, [0.5, 1.0, 2.0, 4.0], "see to its file system and resume"),
        (errno.EROFS, [], "see to its file system and resume"),
        (errno.ENOSPC, [], "free some space and resume"),
    ],
)
def test_a_disk_that_stays_broken(
    number: int, pauses: list[float], way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8: after some seconds, or at once where no time helps, a line says so; what was there is there."""
    save_checkpoint(tmp_path, whole_snapshot(*trained(0, 1)), keep=2)
    before, found = contents(tmp_path), list[float]()
    monkeypatch.setattr(tensor_files.time, "sleep", found.append)
    monkeypatch.setattr(tensor_files, "save_file", failing(tensor_files.save_file, number, 1, 99))
    with pytest.raises(CheckpointError) as told:
        save_checkpoint(tmp_path, whole_snapshot(*trained(0, 2)), keep=2)
    assert os.strerror(number) in str(told.value) and way_out in str(told.value) and "\n" not in str(told.value)
    assert found == pauses
    assert contents(tmp_path) == before


def test_a_file_system_that_turned_read_only(tmp_path: Path) -> None:
    """F8: a real one; the checkpoint that it holds stays good."""
    disk = tmp_path / "disk"
    with tmpfs(disk):
        save_checkpoint(disk, whole_snapshot(*trained(0, 1)), keep=2)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match=r"step 2 not written.*Read-only file system.*and resume"):
            save_checkpoint(disk, whole_snapshot(*trained(0, 2)), keep=2)
        verify(disk / "step_1")


@pytest.mark.usefixtures("no_plot")
def test_a_run_whose_folder_vanished(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F8: rows wait for it, the next save does not: it would make a folder that is no run's. Back again, it goes on."""
    run, away = tmp_path / "run", tmp_path / "away"
    again = replace(config, output=str(run))

    def vanish(*arguments: Any) -> Any:
        if arguments[1].step == 4 and run.exists():  # between a save and the next
            run.rename(away)
        return summarize(*arguments)

    summarize = loop.Meter.settle
    with monkeypatch.context() as patch:
        patch.setattr(loop.Meter, "settle", lambda *arguments: vanish(*arguments))
        with pytest.raises(CheckpointError, match=r"step 4 not written.*cannot write.*No such file"):
            train(again)
    assert not run.exists()
    assert f"{run / 'metrics.jsonl'}: cannot write" in capsys.readouterr().err
    away.rename(run)
    train(again)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))


# Readers beside a run, two runs in a folder.


def test_who_holds_a_folder_is_named(config: TrainConfig, tmp_path: Path) -> None:
    """F10: the process and its machine."""
    again = replace(config, output=str(tmp_path / "run"))
    with ExitStack() as stack:
        claim_folder(tmp_path / "run", again, stack)
        with pytest.raises(ConfigError, match=rf"another process \(process {os.getpid()} on .+\) trains here"):
            train(again)


def test_a_checkpoint_removed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F10: a run's retention takes it from under a reader: one line, and the next try finds the newer one."""
    save_checkpoint(tmp_path, whole_snapshot(*trained(0, 1)), keep=1)
    old = tmp_path / "step_1"
    verify(old)
    save_checkpoint(tmp_path, whole_snapshot(*trained(0, 2)), keep=1)
    with pytest.raises((WeightsError, ModelConfigError)) as told:
        load_pretrained(old)
    assert str(old) in str(told.value) and "\n" not in str(told.value)
    newest = latest_checkpoint(tmp_path)
    assert newest == tmp_path / "step_2"
    load_pretrained(newest)


# Damage.


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_resume_passes_over_a_damaged_checkpoint(
    name: str, config: TrainConfig, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F11: weights, momenta and random states, counters and data position, manifest: the one before is used, the other
    kept, both are told, and the run ends bit for bit as if nothing had been."""
    run = stopped(straight, tmp_path / "run", 6)
    flip(run / "checkpoints" / "step_6" / name)
    spoiled = contents(run / "checkpoints" / "step_6")
    train(replace(config, output=str(run)))
    assert_same_end(run, straight)
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "damaged_step_6", "latest", "step_2", "step_4", "step_6", "step_8"
    ]  # fmt: skip
    assert contents(checkpoints / "damaged_step_6") == spoiled
    (event,) = [event for event in read_lines(run / "events.jsonl") if event["kind"] == "damaged"]
    assert event["text"].startswith(f"{checkpoints / 'step_6' / name}: ")
    assert event["text"].endswith(f"; kept as {checkpoints / 'damaged_step_6'}, going on from step_4")
    assert f"damaged: {event['text']}\n" in capsys.readouterr().err
    train(replace(config, output=str(run)))  # said once
    assert [event["kind"] for event in read_lines(run / "events.jsonl")].count("damaged") == 1


@pytest.mark.usefixtures("no_plot")
def test_several_damaged_and_none_whole(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    """F11: the newest two, one without its manifest; then all, which is refused, and nothing is moved."""
    run = stopped(straight, tmp_path / "run", 6)
    checkpoints = run / "checkpoints"
    (checkpoints / "step_6" / "manifest.json").unlink()
    flip(checkpoints / "step_4" / "optimizer.safetensors")
    (checkpoints / "damaged_step_4").mkdir()
    train(replace(config, output=str(run)))
    assert_same_end(run, straight)
    assert {path.name for path in checkpoints.glob("damaged*")} == {
        "damaged_step_4", "damaged_step_4.1", "damaged_step_6"
    }  # fmt: skip
    for folder in complete_checkpoints(checkpoints):
        flip(folder / "model.safetensors")
    before = contents(checkpoints)
    with pytest.raises(DamageError, match=f"step_8/model.safetensors: checksum .*remove .*step_{STEPS} to go on"):
        train(replace(config, output=str(run)))
    assert contents(checkpoints) == before


def test_other_refusals_move_nothing(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    """F11: a newest checkpoint of another format, or that may not be read, is no damage."""
    run = stopped(straight, tmp_path / "run", 6)
    manifest = run / "checkpoints" / "step_6" / "manifest.json"
    values = json.loads(manifest.read_text()) | {"format": 9}
    manifest.write_text(json.dumps(values | {"checksum": seal(values)}))
    with pytest.raises(CheckpointError, match="format 9, this version reads 2"):
        train(replace(config, output=str(run)))
    manifest.unlink()
    manifest.symlink_to(manifest)  # ELOOP: neither missing nor damaged
    with pytest.raises(CheckpointError, match=r"cannot be read .*see to its file system"):
        train(replace(config, output=str(run)))
    assert not list((run / "checkpoints").glob("damaged*"))


def test_processes_agree_on_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F11: each hashes other files; whichever of them finds the damage, all go on from step 1."""
    for step in (1, 2):
        save_checkpoint(tmp_path, whole_snapshot(*trained(0, step)), keep=2)
    good = contents(tmp_path / "step_2")

    def read(processes: Processes) -> Any:
        return load_newest(tmp_path, lambda folder: verify(folder, processes))

    for name in good:
        flip(tmp_path / "step_2" / name)
        found = in_threads(3, read)
        assert found == [found[0]] * 3 and not isinstance(found[0], BaseException)
        used, damaged = found[0]
        assert used == tmp_path / "step_1" and list(damaged) == [tmp_path / "step_2"]
        assert f"step_2/{name}: " in damaged[tmp_path / "step_2"]
        (tmp_path / "step_2" / name).write_bytes(good[name])
    assert in_threads(3, read) == [(tmp_path / "step_2", {})] * 3
    set_aside({tmp_path / "step_2": "spoiled"})
    assert in_threads(2, read) == [(tmp_path / "step_1", {})] * 2


def test_a_flipped_bit_in_any_tensor_is_found(tmp_path: Path) -> None:
    """F11: one in each weight, momentum, moment, step and random state of a checkpoint, and in the space between."""
    folder = save_checkpoint(tmp_path, whole_snapshot(*trained(0)), keep=1)
    tensors = 0
    for stem in ("model", "optimizer"):
        path = folder / f"{stem}.safetensors"
        good = path.read_bytes()
        (length,) = struct.unpack("<Q", good[:8])
        for name, entry in json.loads(good[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            flip(path, 8 + length + (start + end) // 2)
            with pytest.raises(DamageError, match=f"{stem}.safetensors: checksum"):
                verify(folder)
            path.write_bytes(good)
            tensors += 1
    assert tensors > 150
    verify(folder)


def test_files_of_equal_size_that_changed_places(tmp_path: Path) -> None:
    """F12: nothing but their checksums tells."""
    whole = replace(whole_snapshot(*trained(0)), optimizer={"momentum.a": torch.ones(4), "momentum.b": torch.zeros(4)})

    def save(processes: Processes) -> None:
        CheckpointWriter(tmp_path, 1, processes).save(deal(whole, processes.rank, 2))

    assert in_threads(2, save) == [None, None]
    first, second = sorted((tmp_path / "step_1").glob("optimizer-*.safetensors"))
    assert first.stat().st_size == second.stat().st_size
    verify(tmp_path / "step_1")
    contents_of_first = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents_of_first)
    with pytest.raises(DamageError, match=r"optimizer-0000[12]-of-00002.safetensors: checksum"):
        verify(tmp_path / "step_1")


# Headers of safetensors. Others: test_released.


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,', 1),  # a hole, and a tensor too short
        lambda text: text.replace('"dtype":"F32"', '"dtype":"BF16"', 1),  # half of the bytes
        lambda text: text.replace('{"__metadata__"', '{"norm.weight":3,"__metadata__"', 1),
        lambda text: text.replace('"norm.weight":', '"norm.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
                                  '"norm.weight":', 1),
        lambda text: text.replace('"shape":[', '"shape":[1],"shape":[', 1),
        lambda text: text[:-1] + "," * 100,
        lambda text: "{" * 100_000,
    ],
    ids=["hole", "dtype", "no tensor", "name twice", "key twice", "commas", "braces"],
)  # fmt: skip
def test_headers_that_lie(change: Callable[[str], str], tmp_path: Path) -> None:
    """F13: offsets with a hole, another dtype, a name twice, no JSON: refused in a line that names the file."""
    save_pretrained(random_model(random_config(0), 0), tmp_path / "weights", format="fp32")
    file = tmp_path / "weights" / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = change(content[8 : 8 + length].decode().rstrip()).encode()
    assert text != content[8 : 8 + length].rstrip()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(WeightsError) as told:
        load_pretrained(tmp_path / "weights")
    assert str(file) in str(told.value) and "\n" not in str(told.value)


# Data.


def test_documents_of_no_token_and_of_ten_millions(tmp_path: Path) -> None:
    """F15: a long document is cut into rows, an empty one takes no place; every token comes once an epoch."""
    writer = ShardWriter(tmp_path, "train", np.uint16, 1 << 20)
    lengths = [0, 10_000_000, 0, 5, 0]
    for number, length in enumerate(lengths):
        writer.add(np.full(length, number, dtype=np.uint16))
    entry = writer.finish(0)
    assert (entry.documents, entry.tokens, entry.longest) == (5, 10_000_005, 10_000_000)
    store = ShardStore(tmp_path, entry)
    begun = time.process_time()
    loader = Loader([store], [1.0], 0)
    counts = np.zeros(5, dtype=np.int64)
    while loader.state_dict()["sources"][0]["epoch"] == 0:
        batch = loader.next_batch(64, 65536)
        first = [piece for row in batch.pieces for piece in row if piece[1] == 0]
        for _, _, document, _, length in first:
            counts[document] += length
        if len(first) < sum(map(len, batch.pieces)):
            break
        assert (batch.tokens[batch.segments >= 0] == 1).sum() + 5 >= (batch.segments >= 0).sum()
    assert counts.tolist() == lengths
    assert time.process_time() - begun < 30


# Numbers.


def test_steps_without_a_token_to_learn_from() -> None:
    """F17: micro-batches of padding alone beside one that is not: the step is that of this one; alone, loss 0 over
    count 0 is 0, and no weight becomes anything but smaller by its decay."""
    config = random_config(0, num_hidden_layers=2, num_hash_layers=1, compress_ratios=(4, 8, 0), layer_types=())
    tokens = torch.arange(24).remainder(config.vocab_size)[None]
    full, empty = (Batch(tokens, torch.full((1, 24), segment), ((),)) for segment in (0, -1))
    outcomes = []
    for batches in ([full], [empty, full, empty], [empty]):
        model = random_model(config, 0)
        report = training_step(model, optimizers_of(model), batches, plan(), 1.0)
        outcomes.append((report, model.state_dict()))
    (alone, weights), (beside, same), (none, decayed) = outcomes
    assert alone.counts.main == beside.counts.main and relative_rms(beside.main, alone.main) < 1e-6
    assert all(
        relative_rms(same[name], tensor) < 1e-5 for name, tensor in weights.items() if tensor.is_floating_point()
    )
    assert (float(none.main), float(none.counts.main), float(none.grad_norm), float(none.found_inf)) == (0, 0, 0, 0)
    before = random_model(config, 0).state_dict()
    for name, tensor in decayed.items():
        assert torch.isfinite(tensor.float()).all() and tensor.float().norm() <= before[name].float().norm() * 1.001, (
            name
        )


@pytest.mark.parametrize(
    "gradient",
    [
        torch.zeros(16, 24),
        torch.outer(torch.arange(16.0) - 8, torch.arange(24.0) - 11),
        torch.diag(torch.logspace(0, -6, 16)),
        torch.randn(1, 40, generator=torch.Generator().manual_seed(0)),
        torch.full((16, 24), 1e-30),
    ],
    ids=["zero", "rank one", "condition 1e6", "one row", "tiny"],
)
def test_muon_of_difficult_gradients(gradient: torch.Tensor) -> None:
    """F20: updates are finite and no larger than specified, in each singular direction; a zero gradient only decays."""
    start = torch.ones(gradient.shape)
    parameter = Parameter(start.clone())
    muon = Muon([parameter], lr=0.1, weight_decay=0.5, update_rms=0.18)
    parameter.grad = gradient.clone()
    muon.step()
    update = parameter.detach() - start * (1 - 0.1 * 0.5)
    assert torch.isfinite(parameter).all()
    bound = 0.1 * 0.18 * max(gradient.shape) ** 0.5  # of the spectral norm, by which full rank has the RMS 0.18
    assert torch.linalg.matrix_norm(update, 2) < 1.02 * bound
    if not gradient.any():
        assert not update.any()
    else:
        assert torch.linalg.matrix_norm(update, 2) > 0.9 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_of_extreme_logits(dtype: torch.dtype) -> None:
    """F21: finite forward and backward, columns that sum to one. Rows come to within 1e-3 where a doubly stochastic
    matrix is near; for signs of 1e4, of which exp makes zeros and ones, there may be none, and twenty iterations end
    within a tenth."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(64, 4, 4, generator=generator)
    cases = {
        "signs": (1e4 * random.sign(), 0.1),
        "uniform": (1e4 * (2 * torch.rand(64, 4, 4, generator=generator) - 1), 0.1),
        "one row": (random[:, :1].expand(64, 4, 4), 1e-3),
        "equal": (torch.full((3, 4, 4), 1e4), 1e-3),
        "identity": (1e4 * torch.eye(4)[None], 1e-3),
    }
    rounding = 1e-3 if dtype == torch.float32 else 4 * 2.0**-8
    for name, (logits, tolerance) in cases.items():
        logits = logits.to(dtype).clone().requires_grad_()
        mixing = sinkhorn(logits, 20, 1e-6)
        mixing.float().square().sum().backward()
        assert mixing.dtype == dtype and torch.isfinite(mixing).all() and (mixing >= 0).all(), name
        assert (mixing.float().sum(-2) - 1).abs().max() < rounding, name
        assert (mixing.float().sum(-1) - 1).abs().max() < tolerance + rounding, name
        assert logits.grad is not None and torch.isfinite(logits.grad).all(), name


def test_rows_of_documents_of_one_token() -> None:
    """F23: nothing to predict, and nothing to look at but itself: each token's logits are those of it alone."""
    config = random_config(2)
    model = random_model(config, 2)
    tokens = torch.arange(40).remainder(config.vocab_size)[None]
    segments = torch.arange(40)[None]
    losses = training_losses(model, tokens, segments)
    total = losses.total(Counts.of([segments]), 0.3, 0.0)
    total.backward()
    assert float(losses.main.detach()) == float(total.detach()) == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    together = model(tokens, segments)[0]
    for position in (0, 17, 39):
        assert relative_rms(together[position], model(tokens[:, position : position + 1])[0, 0]) < 1e-5


# Loading, configs, plans.


@pytest.mark.usefixtures("no_plot")
def test_a_reading_thread_that_fails_ends_the_run_in_a_line(
    config: TrainConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F32: no document is passed over; the same command goes on where the batch is missing, bit for bit."""
    again = replace(config, output=str(tmp_path / "run"), data=replace(config.data, workers=2))
    read, reads = ShardStore.read, 0

    def broken(store: ShardStore, *arguments: int) -> Any:
        nonlocal reads
        reads += 1
        if reads > 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "tokens-00000.npy")
        return read(store, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "read", broken)
        with pytest.raises(OSError, match=r"Input/output error: 'tokens-00000\.npy'"):
            train(again)
    assert threading.active_count() < 20
    last = read_lines(tmp_path / "run" / "events.jsonl")[-1]
    assert last["kind"] == "failed" and "tokens-00000.npy" in last["text"]
    assert 0 < len(rows(tmp_path / "run")) < STEPS
    train(again)
    assert_same_end(tmp_path / "run", straight)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"line 2: \*a repeats another value"),
        ("a: &a [*a]", r"line 1: \*a repeats another value"),
        ("model: &m {hidden_size: 8}\noptim:\n  <<: *m\n", r"line 3: \*m repeats"),
        ("seed: 1\nsteps: 2\nseed: 2\n", "found duplicate key seed"),
        ("model:\n  hidden_size: 8\n  hidden_size: 16\n", "found duplicate key hidden_size"),
        ("a: " + "[" * 3_000 + "]" * 3_000, "a"),
        ("a: " + "{b: " * 3_000 + "1" + "}" * 3_000, "a"),
    ],
    ids=["bomb", "itself", "merged", "twice", "twice below", "lists", "mappings"],
)
def test_yaml_that_grows_or_contradicts_itself(text: str, message: str) -> None:
    """F33: twenty lines that stand for 9^21 values, a key that is given twice, nests without end: one line, at once."""
    begun = time.process_time()
    with pytest.raises(ConfigError, match=message) as told:
        from_yaml(TrainConfig, text)
    assert "\n" not in str(told.value)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("overrides", [["run=pretrain_pro"], ["run=smoke", "model=v4_flash"]])
def test_a_run_that_no_memory_here_holds(overrides: list[str], small_data: Path, tmp_path: Path) -> None:
    """F34: refused before torch is there, with what it takes and what there is."""
    code = (
        "import sys, time; from openv4.launch.cli import main\n"
        "try: main()\n"
        "finally: print(time.process_time(), 'torch' in sys.modules)"
    )
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        "train",
        *overrides,
        f"data={small_data}",
        f"output={tmp_path / 'run'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, imported = result.stdout.split()
    assert result.returncode == 2 and float(seconds) < 4 and imported == "False"  # 0.5 s on an idle machine
    assert result.stderr.count("\n") == 1
    assert "of memory, this machine has" in result.stderr and "openv4 plan" in result.stderr
    assert not (tmp_path / "run").exists()


def test_memory_is_asked_for_by_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """F34: a run that fits is let go on, on one process or several; on half of what it takes none is."""
    config = load_config(["run=smoke", "model=tiny", "device=cpu", f"output={tmp_path}"])
    needed = []
    for processes in (1, 2):
        low, high = 0, 2**40
        while high - low > 1_000_000:
            middle = (low + high) // 2
            monkeypatch.setattr(preflight, "machine_memory", lambda middle=middle: middle)
            try:
                check_memory(config, processes, processes)
            except ConfigError:
                low = middle
            else:
                high = middle
        needed.append(high)
    assert needed[0] > needed[1] > 10_000_000
    check_memory(config, 8, 1)  # the other seven are elsewhere
    monkeypatch.undo()
    assert preflight.machine_memory() > 10**9


# What a run says of itself.


@pytest.mark.parametrize("how", ["gone", "full"])
def test_rows_wait_for_their_disk(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F35: the folder is gone for three rows, or there is no space for a whole one: none is lost or torn, and it is
    said once."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    file, load = MetricsFile(path, 0), ExpertLoadFile(path.with_name("expert_load.jsonl"), 0)
    write, full = os.write, False
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2] if full else data))
    for step in range(1, 7):
        if step == 3:
            full = how == "full"
            path.parent.rename(tmp_path / "away") if how == "gone" else None
        if step == 6:
            full = False
            (tmp_path / "away").rename(path.parent) if how == "gone" else None
        file.write({"step": step, "train/loss": 1.0 / step})
        load.write(step, {"layers.0": [1.0, 1.0]})
        if how == "full":
            written = min(step, 2) if full else step
            assert path.read_text().endswith("\n") and [row["step"] for row in read_metrics(path)][-1] == written
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_lines(load.path)] == [1, 2, 3, 4, 5, 6]
    told = capsys.readouterr().err
    assert told.count("cannot write") == told.count("3 lines that had waited are written") == 2  # of each file
    assert "training goes on" in told


@pytest.mark.usefixtures("no_plot")
def test_a_clock_that_jumps_changes_nothing(
    config: TrainConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F35: ten years back and forth with every look at it."""
    clock, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return clock() + (-1) ** looks * 3e8

    monkeypatch.setattr(time, "time", jumping)
    train(replace(config, output=str(tmp_path / "run")))
    assert_same_end(tmp_path / "run", straight)
    assert all(0 < row["system/step_seconds"] < 60 for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(
    "output", ["2>&1 | head -1", *(pytest.param(o, marks=pytest.mark.slow) for o in ("> /dev/full", ">&- 2>&-"))]
)
def test_a_run_outlives_who_reads_it(output: str, small_data: Path, straight: Path, tmp_path: Path) -> None:
    """F35: a pipe that nobody reads any more, for errors too; a log on a full disk; no output at all."""
    run = tmp_path / "run"
    words = [str(COMMAND), "train", *OVERRIDES, "checkpoint.every=2", "checkpoint.keep=4", f"data={small_data}"]
    script = f'set -o pipefail; "$@" {output}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words, f"output={run}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done
    assert_same_end(run, straight)
    assert read_lines(run / "events.jsonl")[-1]["kind"] == "end"
