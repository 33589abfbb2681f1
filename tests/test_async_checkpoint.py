"""Checkpoints of many processes, and those that are written while training goes on."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_cases import deal, in_threads, killer, tmpfs, whole_after_a_kill
from lora_cases import EVERYTHING, randomise
from model_cases import random_model
from process_cases import leave
from run_cases import contents, optimizers_of, trained
from safetensors.torch import load_file
from torch import Tensor, nn

import openv4.model.tensor_files as tensor_files
import openv4.train.checkpoint_writer as checkpoint_writer
from openv4.model import Transformer, load_pretrained
from openv4.model.config import LoRAConfig
from openv4.model.lora import add_lora, lora_parameters
from openv4.model.moe import Experts
from openv4.model.released import released_tensors
from openv4.optim.config import OptimConfig
from openv4.optim.groups import Optimizers, build_optimizers
from openv4.train.checkpoint import (
    Checkpoint,
    Processes,
    TrainState,
    join_experts,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    split_experts,
    verify,
)
from openv4.train.checkpoint_writer import CheckpointWriter, Snapshot, whole_snapshot
from openv4.train.config import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoRAConfig(rank=3, targets=EVERYTHING)


def adapted(seed: int, step: int = 1) -> tuple[Transformer, Optimizers, TrainState]:
    """A model with adapters that have optimizer state."""
    model, _, state = trained(seed, step)
    add_lora(model, LORA)
    randomise(model, seed)
    optimizers = build_optimizers(model.named_parameters(), {}, OptimConfig())
    for number, parameter in enumerate(lora_parameters(model).values()):
        parameter.grad = torch.full_like(parameter, 1e-3 * number)
    optimizers.step(1e-2, torch.zeros(()))
    return model, optimizers, state


def snapshot_of(seed: int = 0, step: int = 1, lora: bool = False) -> Snapshot:
    if lora:
        return whole_snapshot(*adapted(seed, step), (LORA, "some/base"))
    return whole_snapshot(*trained(seed, step))


def save_dealt(checkpoints: Path, snapshot: Snapshot, world: int, **options: Any) -> Path:
    """A checkpoint of so many processes, each of which writes its share."""

    def save(processes: Processes) -> None:
        with CheckpointWriter(checkpoints, 2, processes, **options) as writer:
            writer.save(deal(snapshot, processes.rank, world))

    assert in_threads(world, save) == [None] * world
    return checkpoints / f"step_{snapshot.state.step}"


def held_by(model: Transformer, rank: int, world: int) -> dict[str, range | list[int] | None]:
    """Parameters as ranks might own them: dense ones in turn, of stacks every so many experts."""
    held: dict[str, range | list[int] | None] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if ".experts." in name:
            if own := list(range(rank, len(parameter), world)):
                held[name] = own
        elif number % world == rank:
            held[name] = None
    return held


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@contextmanager
def refused(*texts: str) -> Iterator[None]:
    """A CheckpointError in one line that holds the texts, in this order."""
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, texts))) as error:
        yield
    assert "\n" not in str(error.value)


# Written by some, read by others.


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_as_one_process_reads_it(world: int, asynchronous: bool, tmp_path: Path) -> None:
    """Whoever wrote it: `load_pretrained` and a run of one process get every bit, optimizer state included."""
    model, optimizers, state = trained(0, 2)
    folder = save_dealt(tmp_path, whole_snapshot(model, optimizers, state), world, asynchronous=asynchronous)
    assert latest_checkpoint(tmp_path) == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_2"]
    files = [path.name for path in folder.glob("*.safetensors")]
    assert len(files) == 2 * world and len(list(folder.glob("*.index.json"))) == (0 if world == 1 else 2)
    assert ("model.safetensors" in files) == (world == 1)
    assert equal(load_pretrained(folder, torch.float32).state_dict(), model.state_dict())
    other = random_model(model.config, 5)
    other_optimizers, other_state = optimizers_of(other), TrainState()
    load_checkpoint(folder, other, other_optimizers, other_state)
    assert equal(other.state_dict(), model.state_dict())
    assert equal(other_optimizers.state_tensors(), optimizers.state_tensors())
    assert other_state == state


@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_as_other_numbers_of_processes_read_it(readers: int, tmp_path: Path) -> None:
    """Saved by four: each reader gets what it holds, weights and state, whole parameters and parts of the experts."""
    model, optimizers, state = trained(0)
    folder = save_dealt(tmp_path, whole_snapshot(model, optimizers, state), 4)
    weights = dict(model.named_parameters())
    states = optimizers.state_tensors()

    def read(processes: Processes) -> list[str]:
        checkpoint = Checkpoint(folder, processes)
        held = held_by(model, processes.rank, readers)

        def part(name: str, tensor: Tensor) -> Tensor:
            experts = held[name]
            return tensor if experts is None or tensor.ndim == 0 else tensor[list(experts)]

        wanted = {name: part(name, weights[name].detach()) for name in held}
        assert equal(checkpoint.weights(held), wanted)
        wanted = {key: part(key.partition(".")[2], t) for key, t in states.items() if key.partition(".")[2] in held}
        assert equal(checkpoint.optimizer_state(held, weights), wanted)
        return list(wanted)

    found = in_threads(readers, read)
    assert all(isinstance(names, list) for names in found), found
    assert {name for names in found for name in names} == set(states)  # type: ignore[union-attr]


def test_every_tensor_is_in_it_once(tmp_path: Path) -> None:
    """Under its released name; states under a kind and that name, experts one by one."""
    model, optimizers, state = trained(0)
    folder = save_dealt(tmp_path, whole_snapshot(model, optimizers, state), 3)
    stored = {
        stem: [load_file(path) for path in sorted(folder.glob(f"{stem}*.safetensors"))] for stem in ("model", "opt")
    }
    names = [name for file in stored["model"] for name in file]
    assert sorted(names) == sorted(dict(released_tensors(model)))
    assert all(tensor.dtype in (torch.float32, torch.int64) for file in stored["model"] for tensor in file.values())
    states = [name for file in stored["opt"] for name in file]
    assert len(states) == len(set(states))
    momenta = {name.removeprefix("momentum.") for name in states if name.startswith("momentum.")}
    assert momenta < set(names) and "layers.1.ffn.experts.2.w3.weight" in momenta
    assert sorted(name for name in states if name.startswith("rng.cpu.")) == ["rng.cpu.0", "rng.cpu.1", "rng.cpu.2"]


def test_large_files_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 60_000)
    model, optimizers, state = trained(0)
    for world in (1, 2):
        folder = save_dealt(tmp_path / str(world), whole_snapshot(model, optimizers, state), world)
        assert len(list(folder.glob("model-*.safetensors"))) > 2 * world
        assert equal(load_pretrained(folder, torch.float32).state_dict(), model.state_dict())
        other = random_model(model.config, 5)
        other_optimizers = optimizers_of(other)
        load_checkpoint(folder, other, other_optimizers, TrainState())
        assert equal(other_optimizers.state_tensors(), optimizers.state_tensors())


def test_transformers_reads_what_many_wrote(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="installed by `make test`")
    transformers.utils.logging.disable_progress_bar()
    model, optimizers, state = trained(0)
    one, four = (save_dealt(tmp_path / str(n), whole_snapshot(model, optimizers, state), n) for n in (1, 4))
    states = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").state_dict()
        for folder in (one, four)
    ]
    assert len(states[0]) > 10 and equal(*states)


def test_random_state_is_each_ranks_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer readers the first ranks get theirs, with more the others keep the seeding that they have."""

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.get_rng_state()

    monkeypatch.setattr(checkpoint_writer, "_random_state", lambda rank: {f"rng.cpu.{rank}": states[rank]})
    states = [seeded(0), seeded(1)]
    folder = save_dealt(tmp_path, snapshot_of(), 2)
    for rank, expected in enumerate([*states, seeded(7)]):
        torch.manual_seed(7)
        Checkpoint(folder, Processes(rank, 3)).restore_random_state()
        assert torch.equal(torch.get_rng_state(), expected)


# A part of the experts.


def keep_experts(model: Transformer, first: int, count: int) -> Transformer:
    """The model as a process of an expert-parallel group holds it."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.first = first  # type: ignore[assignment]
            for name in ("w1", "w2", "w3"):
                setattr(module, name, nn.Parameter(getattr(module, name).detach()[first : first + count].clone()))
            for adapter in module.lora.children() if module.lora is not None else ():
                for factor in ("A", "B"):
                    part = getattr(adapter, factor).detach()[first : first + count].clone()
                    setattr(adapter, factor, nn.Parameter(part))
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_with_a_part_of_the_experts(lora: bool, tmp_path: Path) -> None:
    """Takes its part, and gives it under the global numbers."""
    model, optimizers, state = adapted(0) if lora else trained(0)
    snapshot = whole_snapshot(model, optimizers, state, (LORA, "base") if lora else None)
    folder = save_dealt(tmp_path, snapshot, 2)
    other = random_model(model.config, 5)
    if lora:
        add_lora(other, LORA, 5)
    part = keep_experts(other, 1, 2)
    Checkpoint(folder).fill(part)
    whole, wanted = (
        dict(model.named_parameters()),
        list(lora_parameters(part) if lora else dict(part.named_parameters())),
    )
    for name in wanted:
        ours = whole[name].detach()
        assert torch.equal(part.get_parameter(name).detach(), ours[1:3] if ".experts." in name else ours), name
    if not lora:
        released, all_released = dict(released_tensors(part)), dict(released_tensors(model))
        assert equal(released, {name: all_released[name] for name in released})
        assert len(all_released) - len(released) == 3 * 3 * (model.config.n_routed_experts - 2)


def test_another_model_is_refused_by_all(tmp_path: Path) -> None:
    """Also where a process holds a part of the experts, and where only one process finds fault."""
    folder = save_dealt(tmp_path, snapshot_of(), 2)
    model = trained(0)[0]
    smaller = keep_experts(random_model(replace(model.config, n_routed_experts=2), 0), 0, 1)
    with refused("step_1: these weights do not fit", "is this a run of another model?"):
        Checkpoint(folder).fill(smaller)
    models = [random_model(model.config, 1), random_model(replace(model.config, hidden_size=96), 1)]
    found = in_threads(2, lambda processes: Checkpoint(folder, processes).fill(models[processes.rank]))
    assert all(isinstance(error, CheckpointError) and "do not fit" in str(error) for error in found)


# Names of states.


def test_states_of_experts_split_and_join() -> None:
    stack, adapter, dense = torch.rand(3, 4, 5), torch.rand(3, 2, 5), torch.rand(4)
    tensors = {
        "momentum.layers.0.ffn.experts.w1": stack,
        "exp_avg.mtp.0.ffn.experts.lora.down.A": adapter,
        "step.mtp.0.ffn.experts.lora.down.A": torch.tensor(7.0),
        "exp_avg.norm.weight": dense,
        "layers.0.ffn.shared_experts.w1.weight": dense,
    }
    held = {
        "layers.0.ffn.experts.w1": [4, 9, 2],
        "mtp.0.ffn.experts.lora.down.A": range(3, 6),
        "norm.weight": None,
        "layers.0.ffn.shared_experts.w1.weight": None,
    }
    numbers = {name: experts for name, experts in held.items() if experts is not None}
    single = split_experts(tensors, numbers)
    assert torch.equal(single["momentum.layers.0.ffn.experts.9.w1.weight"], stack[1])
    assert torch.equal(single["exp_avg.mtp.0.ffn.experts.5.lora.down.A"], adapter[2])
    assert [single[f"step.mtp.0.ffn.experts.{e}.lora.down.A"].item() for e in (3, 4, 5)] == [7.0] * 3
    assert len(single) == 3 + 3 + 3 + 2
    assert equal(join_experts(single, held), tensors)
    assert set(split_experts({"layers.0.ffn.experts.w2": stack})) == {
        f"layers.0.ffn.experts.{e}.w2.weight" for e in range(3)
    }
    assert join_experts(single, {"head.weight": None}) == {}
    del single["momentum.layers.0.ffn.experts.9.w1.weight"]
    with refused("states do not make whole parameters (1 missing: momentum.layers.0.ffn.experts.9.w1.weight)"):
        join_experts(single, held)
    single["step.mtp.0.ffn.experts.4.lora.down.A"] = torch.tensor(8.0)
    with refused("1 different among the experts of a parameter: step.mtp.0.ffn.experts.lora.down.A"):
        join_experts(single, {"mtp.0.ffn.experts.lora.down.A": range(3, 6)})


def test_a_parameter_without_a_gradient_has_no_state(tmp_path: Path) -> None:
    model, _, state = trained(0)
    optimizers = optimizers_of(model)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizers.step(1e-3, torch.zeros(()))
    folder = save_dealt(tmp_path, whole_snapshot(model, optimizers, state), 2)
    other = optimizers_of(model)
    load_checkpoint(folder, model, other, state)
    assert set(other.state_tensors()) == {f"{kind}.head.weight" for kind in ("exp_avg", "exp_avg_sq", "step")}
    assert equal(other.state_tensors(), optimizers.state_tensors())


def test_states_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model, optimizers, state = trained(0)
    whole = whole_snapshot(model, optimizers, state)
    extra = {"momentum.layers.7.attn.wkv.weight": torch.zeros(3, 4), "variance.norm.weight": torch.zeros(3)}
    folder = save_dealt(tmp_path / "extra", replace(whole, optimizer={**whole.optimizer, **extra}), 2)
    with refused("step_1: optimizer state does not fit the model (2 unexpected: ", "layers.7.attn.wkv", "variance"):
        load_checkpoint(folder, model, optimizers, state)
    for dropped in ("exp_avg_sq.head.weight", "momentum.layers.0.ffn.experts.1.w2.weight"):
        kept = {name: tensor for name, tensor in whole.optimizer.items() if name != dropped}
        folder = save_dealt(tmp_path / dropped, replace(whole, optimizer=kept), 2)
        with refused("step_1: ", "missing", dropped):
            load_checkpoint(folder, model, optimizers, state)


def test_ownership_that_is_wrong_is_refused(tmp_path: Path) -> None:
    """A tensor that two processes own, one that none does, adapters that are not on rank 0: nothing is published."""
    whole = snapshot_of()

    def save(change: Callable[[Snapshot, int], Snapshot], snapshot: Snapshot = whole) -> list[BaseException | None]:
        def action(processes: Processes) -> None:
            with CheckpointWriter(tmp_path, 2, processes) as writer:
                writer.save(change(deal(snapshot, processes.rank, 2), processes.rank))

        found = in_threads(2, action)
        assert list(tmp_path.iterdir()) == []
        return found

    name = next(iter(whole.weights))
    found = save(lambda dealt, rank: replace(dealt, weights={**dealt.weights, name: whole.weights[name]}))
    assert all(f"two processes wrote the same tensors (1 model: {name})" in str(error) for error in found)
    found = save(lambda dealt, rank: replace(dealt, weights={n: t for n, t in dealt.weights.items() if n != name}))
    assert all(f"no process wrote some of the weights (1 missing: {name})" in str(error) for error in found)
    lora = snapshot_of(lora=True)
    found = save(lambda dealt, rank: replace(dealt, weights=lora.weights), lora)
    assert all("rank 1 has adapters to write; in a LoRA run rank 0 has all" in str(error) for error in found)


# Damage.


@pytest.mark.parametrize("lora", [False, True])
def test_a_flipped_bit_in_any_file_is_found_by_all(lora: bool, tmp_path: Path) -> None:
    """Three wrote, two read: each hashes a part of the files, both name the one that changed."""
    folder = save_dealt(tmp_path, snapshot_of(lora=lora), 3)
    assert in_threads(2, lambda processes: verify(folder, processes)) == [None, None]
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == (8 if lora else 11)
    for name in names:
        good = (folder / name).read_bytes()
        for place in (0, len(good) // 2, len(good) - 2):
            spoiled = bytearray(good)
            spoiled[place] ^= 4
            (folder / name).write_bytes(spoiled)
            found = in_threads(2, lambda processes: verify(folder, processes))
            assert all(isinstance(error, CheckpointError) for error in found), (name, place)
            assert str(found[0]) == str(found[1]) and "step_1" in str(found[0])
            if name != "manifest.json":
                assert f"step_1/{name}: checksum" in str(found[0])
        (folder / name).write_bytes(good)


def test_every_file_is_read_by_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_dealt(tmp_path, snapshot_of(), 4)
    hashed: list[str] = []
    whole = checkpoint_writer.file_checksum
    monkeypatch.setattr("openv4.train.checkpoint.file_checksum", lambda path: hashed.append(path.name) or whole(path))
    assert in_threads(3, lambda processes: verify(folder, processes)) == [None] * 3
    assert sorted([*hashed, "manifest.json"]) == sorted(path.name for path in folder.iterdir())


# Beside training.


class Gate:
    """Holds up the thread that writes, at the beginning of its part, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        write = checkpoint_writer._write_part

        def held_up(*arguments: Any) -> None:
            self.reached.set()
            assert self.open.wait(60)
            write(*arguments)

        monkeypatch.setattr(checkpoint_writer, "_write_part", held_up)


def test_training_goes_on_and_changes_nothing_of_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, state, counters, random numbers: those of the moment of the save."""
    model, optimizers, state = trained(0, 3)
    save_dealt(tmp_path / "reference", whole_snapshot(model, optimizers, state), 1)
    gate = Gate(monkeypatch)
    with CheckpointWriter(tmp_path / "run", 2, asynchronous=True) as writer:
        writer.save(whole_snapshot(model, optimizers, state))
        with torch.no_grad():
            for tensor in (*model.state_dict().values(), *optimizers.state_tensors().values()):
                tensor.zero_()
        state.step, state.tokens = 4, 0
        assert state.data is not None
        state.data["position"] = 99
        torch.rand(1)
        assert gate.reached.wait(60)
        assert writer.published() == [] and latest_checkpoint(tmp_path / "run") is None
        gate.open.set()
        writer.wait()
        assert writer.published() == [tmp_path / "run" / "step_3"] and writer.published() == []
    ours, theirs = contents(tmp_path / "run" / "step_3"), contents(tmp_path / "reference" / "step_3")
    assert ours == theirs


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers, state = trained(0)
    gate = Gate(monkeypatch)
    with CheckpointWriter(tmp_path, 3, asynchronous=True) as writer:
        writer.save(whole_snapshot(model, optimizers, replace(state, step=1)))
        assert gate.reached.wait(60)
        threading.Timer(0.3, gate.open.set).start()
        stalled = writer.save(whole_snapshot(model, optimizers, replace(state, step=2)))
        assert (tmp_path / "step_1" / "manifest.json").exists() and stalled >= 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_2"]
    assert writer.published() == [tmp_path / "step_1", tmp_path / "step_2"]


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of the state, in blocks that stay; a tensor larger than a block has one of its own."""
    monkeypatch.setattr(checkpoint_writer, "_BUFFER_BYTES", 1000)
    buffers = checkpoint_writer._Buffers()
    tensors = {str(n): torch.rand(n * 31 % 300) for n in range(20)} | {"scalar": torch.tensor(3.0)}
    others = {"odd": torch.arange(7, dtype=torch.uint8), "half": torch.rand(9).bfloat16(), "view": torch.rand(4, 6).T}
    for _ in range(2):
        copies = buffers.copy(tensors, others)
        assert equal(copies[0], tensors) and equal(copies[1], others)
        places = [block.data_ptr() for block in buffers._blocks]
        size = sum(block.numel() for block in buffers._blocks)
        used = sum(tensor.nbytes for tensor in (*tensors.values(), *others.values()))
        assert used <= size <= used + 64 * (len(tensors) + len(others))
    copies = buffers.copy({name: tensor * 2 for name, tensor in tensors.items()}, others)
    assert [block.data_ptr() for block in buffers._blocks] == places and copies[0]["scalar"] == 6


# Saves that fail.


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_of_one_stops_all(
    failing: int, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told at the next save or at the end, by all of them, once; the checkpoint before stays, and the next is good."""
    save_dealt(tmp_path, snapshot_of(step=1), 2)
    before, write = contents(tmp_path), checkpoint_writer.write_tensors
    full = True

    def limited(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if full and path.name.startswith(f"optimizer-{failing + 1:05}"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", limited)

    def run(processes: Processes) -> str:
        nonlocal full
        writer = CheckpointWriter(tmp_path, 2, processes, asynchronous=asynchronous)
        if asynchronous:
            writer.save(deal(snapshot_of(step=2), processes.rank, 2))
        with pytest.raises(CheckpointError) as error:
            writer.save(deal(snapshot_of(step=3 if asynchronous else 2), processes.rank, 2))
        processes.agree("")
        if processes.rank == 0:
            assert contents(tmp_path) == before
            full = False
        processes.agree("")
        with writer:
            writer.save(deal(snapshot_of(step=3), processes.rank, 2))
        return str(error.value)

    messages = in_threads(2, run)
    assert messages[0] == messages[1]
    assert "checkpoint of step 2 not written: " in str(messages[0]) and "\n" not in str(messages[0])
    assert "No space left on device" in str(messages[0]) and "; free some space" in str(messages[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]
    verify(tmp_path / "step_3")


def save_and_fail(checkpoints: Path, error: Exception | None = None, *arguments: Any, **options: Any) -> None:
    """A save, and then an error of training."""
    with CheckpointWriter(checkpoints, 2, *arguments, asynchronous=True, **options) as writer:
        writer.save(deal(snapshot_of(), writer.processes.rank, writer.processes.world))
        if error is not None:
            raise error


def test_a_failure_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By leaving the writer; what no one foresaw with its traceback, and beside another error as a note to that."""
    monkeypatch.setattr(tensor_files, "save_file", lambda *_, **__: 1 / 0)
    with refused("checkpoint of step 1 not written: ZeroDivisionError('division by zero')"):
        save_and_fail(tmp_path)
    writer = CheckpointWriter(tmp_path, 2, asynchronous=True)
    writer.save(snapshot_of())
    with pytest.raises(CheckpointError) as told:
        writer.wait()
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    writer.wait()  # said once
    with pytest.raises(KeyError) as other:
        save_and_fail(tmp_path, KeyError("training failed"))
    assert "not written: ZeroDivisionError" in other.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_training_lets_the_save_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    with pytest.raises(KeyError):
        save_and_fail(tmp_path, KeyError("training failed"))
    verify(tmp_path / "step_1")


@pytest.mark.parametrize("how", ["timeout", "ending", "agreement"])
def test_a_process_that_died_is_not_waited_for_forever(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 never writes its part: rank 0 has waited long enough, or ends itself, or can no longer reach it."""
    monkeypatch.setattr(checkpoint_writer, "_GRACE", 0.2)
    calls = 0

    def agree(text: str) -> str:
        nonlocal calls
        calls += 1
        if how == "agreement" and calls > 1:
            raise RuntimeError("connection closed by peer")
        return text

    start = time.monotonic()
    ending = KeyError("training failed") if how == "ending" else None
    expected = {"timeout": CheckpointError, "ending": KeyError, "agreement": RuntimeError}[how]
    with pytest.raises(expected) as error:
        save_and_fail(tmp_path, ending, Processes(0, 2, agree), timeout=0.2 if how == "timeout" else 60.0)
    text = str(error.value) if how == "timeout" else error.value.__notes__[0]
    assert "no part from rank 1 (1 of 2 missing)" in text and "then resume" in text
    assert time.monotonic() - start < 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free_space_is_told", [True, False])
def test_a_file_system_that_is_full(free_space_is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, of two megabytes: the checkpoints that fit stay, the one that does not leaves nothing behind."""
    if not free_space_is_told:
        monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    small = tmp_path / "small"
    with tmpfs(small, "-o", "size=2m"):
        published = 0
        full = refused("not written: ", "No space left on device", "; free some space and resume")
        with full, CheckpointWriter(small, 99, asynchronous=True) as writer:
            for step in range(1, 99):
                writer.save(snapshot_of(step=step))
                published = step if free_space_is_told else step - 1  # told before a save begins, or by the next one
        names = sorted(path.name for path in small.iterdir() if path.name != ".latest")
        assert published > 1 and names == sorted(["latest", *(f"step_{step}" for step in range(1, published + 1))])
        newest = latest_checkpoint(small)
        assert newest == small / f"step_{published}"
        verify(newest)
        shutil.rmtree(small / "step_1")
        shutil.rmtree(small / "step_2")
        remove_leftovers(small)
        with CheckpointWriter(small, 99) as writer:
            writer.save(snapshot_of(step=99))
        verify(small / "step_99")


def test_a_step_that_is_passed_again(tmp_path: Path) -> None:
    """A run that went back: the second checkpoint of a step takes the place of the first."""
    for seed in (0, 1):
        save_dealt(tmp_path, snapshot_of(seed, step=5), 2)
        (tmp_path / ".step_5-old").mkdir(exist_ok=True)
        (tmp_path / ".step_5-old" / "left").touch()
    model = trained(1)[0]
    assert equal(load_pretrained(tmp_path / "step_5", torch.float32).state_dict(), model.state_dict())
    verify(tmp_path / "step_5")


# Writers that are killed.


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_one_of_two_killed_at_any_line(victim: int, stride: int, tmp_path: Path) -> None:
    """A process forked for each (tenth) line that one of two writers executes, and killed there."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path;"
        f"import test_async_checkpoint as t; t.killed_at_lines(Path({str(tmp_path)!r}), {victim}, {stride})"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines, resumed_at = done.stdout.split()
    assert int(lines) > (100 if victim == 0 else 40)
    assert resumed_at == "2,3"


def killed_at_lines(folder: Path, victim: int, stride: int) -> None:
    """Two processes save step 3 beside steps 1 and 2, keeping two; one of them ends without a word at its n-th line.

    Rank 1 goes first: rank 0 finds its part, or finds that it never comes. After each, the newest checkpoint is whole
    and of step 2 or 3, and what resuming does first leaves the two newest and nothing else. Prints the number of lines,
    and the steps from which a run would have gone on.
    """
    torch.set_num_threads(1)
    before, after = folder / "before", folder / "after"
    for step in (1, 2):
        save_dealt(before, snapshot_of(step=step), 2)
    shutil.copytree(before, after)
    third = snapshot_of(step=3)
    save_dealt(after, third, 2)
    expected = contents(before) | contents(after)
    resumed_at = set()
    for line in range(1, 10_000, stride):
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        (work / ".step_3-writing").mkdir()  # rank 0 makes it while both stand still
        killed = False
        for rank in (1, 0):
            child = os.fork()
            if child == 0:
                writer = CheckpointWriter(work, 2, Processes(rank, 2), timeout=0.0)
                writer._open = lambda *_: None  # type: ignore[method-assign]
                if rank == victim:
                    sys.settrace(killer(line))
                try:
                    writer.save(deal(third, rank, 2))
                except CheckpointError:
                    os._exit(1)
                os._exit(0)
            killed |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        newest = whole_after_a_kill(work, before, after, expected, line)
        resumed_at.add(newest.name.removeprefix("step_"))
        if not killed:
            assert newest.name == "step_3"
            print(line - 1, ",".join(sorted(resumed_at)))
            return


def real_process(folder: Path, rank: int, world: int, port: int, steps: int) -> None:
    """One of ``world`` real processes, which talk through gloo, save every step beside training, and resume."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    checkpoint_writer._GRACE = 1.0
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def agree(text: str) -> str:
        texts: list[Any] = [None] * world
        dist.all_gather_object(texts, text)
        return next(filter(None, texts), "")

    processes = Processes(rank, world, agree)
    model, optimizers, state = trained(0, 0)
    if rank == 0:
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
    agree("")
    newest = latest_checkpoint(folder)
    if newest is not None:
        load_checkpoint(newest, model, optimizers, state, processes)
    agree("")  # all have looked, before a save changes what there is
    print("resumed", state.step, flush=True)
    with CheckpointWriter(folder, 2, processes, asynchronous=True) as writer:
        while state.step < steps:
            state.step += 1
            for tensor in (*model.state_dict().values(), *optimizers.state_tensors().values()):
                if tensor.is_floating_point():
                    tensor.add_(0.125)
            whole = whole_snapshot(model, optimizers, state)
            writer.save(deal(whole, rank, world))
    leave()


def start(folder: Path, world: int, steps: int) -> list["subprocess.Popen[str]"]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {path!r}); from pathlib import Path; import test_async_checkpoint as t;"
        f"t.real_process(Path({str(folder)!r}), int(sys.argv[1]), {world}, {port}, {steps})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]


def finished(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append((process.returncode, out, err))
    return results


def state_after(steps: int) -> tuple[Transformer, Optimizers]:
    model, optimizers, _ = trained(0, 0)
    for _ in range(steps):
        for tensor in (*model.state_dict().values(), *optimizers.state_tensors().values()):
            if tensor.is_floating_point():
                tensor.add_(0.125)
    return model, optimizers


@pytest.mark.slow
def test_real_processes_killed_and_resumed(tmp_path: Path) -> None:
    """Two, through gloo: `kill -9` of one at any time; the newest checkpoint is whole, and the run goes on from it."""
    steps, newest = 60, None
    for attempt, delay in enumerate([0.4, 0.1, 0.25, 0.03]):
        processes = start(tmp_path / "run", 2, steps)
        assert processes[0].stdout is not None
        came_from = processes[0].stdout.readline().split()
        assert came_from == ["resumed", newest.name.removeprefix("step_") if newest is not None else "0"]
        time.sleep(delay)
        processes[attempt % 2].send_signal(signal.SIGKILL)
        assert -signal.SIGKILL in [code for code, _, _ in finished(processes)]
        newest = latest_checkpoint(tmp_path / "run")
        if newest is not None:
            model, _ = state_after(int(newest.name.removeprefix("step_")))
            verify(newest)
            assert equal(load_pretrained(newest, torch.float32).state_dict(), model.state_dict())
    assert newest is not None and newest.name != f"step_{steps}"
    results = finished(start(tmp_path / "run", 2, steps))
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[0][1].split() == results[1][1].split()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_59", "step_60"]
    model, optimizers = state_after(steps)
    other = random_model(model.config, 5)
    other_optimizers = optimizers_of(other)
    load_checkpoint(tmp_path / "run" / "step_60", other, other_optimizers, TrainState())
    assert equal(other.state_dict(), model.state_dict())
    assert equal(other_optimizers.state_tensors(), optimizers.state_tensors())
