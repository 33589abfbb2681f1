"""Writing checkpoints, by one process or many, while training waits or goes on. ``checkpoint`` says what is in them.

Every process writes the tensors that it owns, into files of its own in ``.step_N-writing``, and last ``part_R.json``:
what it wrote, with checksums. The process of rank 0 waits for all parts, adds the indices, config, state and manifest,
renames the folder to ``step_N`` and moves ``latest``. While training goes on, only the file system is shared: the
processes talk (``Processes.agree``) in ``save`` and ``wait`` alone, where all of them stand still. Whichever of them
dies, the checkpoint before is in force.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..model.config import LoRAConfig, ModelConfig
from ..model.lora import CONFIG_FILE as ADAPTER_CONFIG
from ..model.lora import WEIGHTS_FILE as ADAPTER_WEIGHTS
from ..model.lora import peft_files
from ..model.released import checkpoint_tensors, config_json, encode, split_by_size
from ..model.shapes import tensor_shapes
from ..model.tensor_files import listed, sync, write_index, write_json, write_tensors
from ..model.transformer import Transformer
from ..optim.groups import Optimizers
from .checkpoint import (
    ALONE,
    FORMAT,
    Processes,
    TrainState,
    complete_checkpoints,
    file_checksum,
    make_latest,
    remove,
    seal,
    split_experts,
)
from .config import CheckpointError

MAX_FILE_BYTES = 5_000_000_000
_BUFFER_BYTES = 2**30  # a power of two, to which torch rounds up pinned memory
_GRACE = 30.0  # seconds that a process which ends by an error still waits for the others' parts


@dataclass(frozen=True)
class Snapshot:
    """What one process gives to a checkpoint; ``config``, ``adapter`` and ``state`` are the same on all of them.

    Attributes:
        weights: by released name, those that this process owns. In a LoRA run by PEFT's name, all of them on rank 0.
        optimizer: by ``kind.name``, single experts (``checkpoint.split_experts``).
        state: what state.json holds.
        config: of the model.
        adapter: in a LoRA run, what adapter_config.json holds.
        ahead: experts chosen for steps to come, ``anticipation.Feed.tensors``.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: TrainState
    config: ModelConfig
    adapter: Mapping[str, Any] | None = None
    ahead: Mapping[str, Tensor] = field(default_factory=dict)


def whole_snapshot(
    model: Transformer, optimizers: Optimizers, state: TrainState, adapter: tuple[LoRAConfig, str] | None = None
) -> Snapshot:
    """Of a process that owns everything.

    Args:
        adapter: of a LoRA run, whose adapters alone are written; their config, and where the base model lies.
    """
    states = split_experts(optimizers.state_tensors())
    if adapter is None:
        return Snapshot(checkpoint_tensors(model), states, state, model.config)
    settings, tensors = peft_files(model, *adapter)
    return Snapshot(tensors, states, state, model.config, settings)


def save_checkpoint(checkpoints: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes ``step_N`` alone and at once, then points ``latest`` at it, then removes all but the newest ``keep``."""
    CheckpointWriter(checkpoints, keep).save(snapshot)
    return checkpoints / f"step_{snapshot.state.step}"


class CheckpointWriter:
    """Writes the checkpoints of a run; leave it by ``with``, so that the last one is finished.

    Args:
        checkpoints: the folder of them; ``remove_leftovers`` has been there before.
        keep: so many of the newest stay.
        processes: who writes; all of them call ``save`` and ``wait``, in the same order.
        asynchronous: ``save`` copies the tensors and returns; a thread writes them. One copy of what this process owns
            stays allocated, in the CPU's memory.
        timeout: seconds that rank 0 waits for the others' parts at most.
    """

    def __init__(
        self,
        checkpoints: Path,
        keep: int,
        processes: Processes = ALONE,
        asynchronous: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        self.checkpoints, self.keep, self.processes = checkpoints, keep, processes
        self.asynchronous, self.timeout = asynchronous, timeout
        self._buffers = _Buffers()
        self._work: _Work | None = None  # under way
        self._thread: threading.Thread | None = None
        self._part_done = threading.Event()
        self._deadline = 0.0  # when rank 0 gives up waiting for parts
        self._error: CheckpointError | None = None
        self._published: list[Path] = []

    def save(self, snapshot: Snapshot) -> float:
        """Writes ``step_N``, or begins to; waits for the save before, if that is still under way.

        Tensors may be changed once this has returned.

        Returns:
            the seconds that it took: what training stood still.

        Raises:
            CheckpointError: this save (asynchronous: the one before) failed, in this or another process. The newest
                checkpoint that was published is whole and in force.
        """
        start = time.perf_counter()
        self.wait()
        folder = self.checkpoints / f"step_{snapshot.state.step}"
        weights: Mapping[str, Tensor] = snapshot.weights
        optimizer: Mapping[str, Tensor] = {
            **snapshot.optimizer,
            **snapshot.ahead,
            **_random_state(self.processes.rank),
        }
        with self.processes.together():
            self._open(folder, sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values())))
        values = json.loads(json.dumps(snapshot.state.state_dict()))
        if self.asynchronous:
            weights, optimizer = self._buffers.copy(weights, optimizer)
        self._work = work = _Work(folder, weights, optimizer, values, snapshot.config, snapshot.adapter)
        self._part_done.clear()
        self._deadline = time.monotonic() + self.timeout
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(work)
            self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the save under way, if any, is done in all processes.

        Raises:
            CheckpointError: it failed in one of them; said once.
        """
        if self._work is None:
            return
        # Met first with the part alone: what has died shows where all meet, not by a part that never comes.
        self._part_done.wait()
        try:
            with self.processes.together():
                if self._error is not None:
                    raise self._error
            if self._thread is None:
                self._publish(self._work)
        except BaseException as stopped:
            self._end(stopped)
            raise
        error = self._finish()
        with self.processes.together():
            if error is not None:
                raise error

    def published(self) -> list[Path]:
        """The checkpoints that rank 0 has published since this was asked last; none on other ranks."""
        published, self._published = self._published, []
        return published

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finishes the save under way; after an error, if the others do their part soon (the processes no longer meet,
        and what stops it is noted on the error)."""
        if error is None:
            self.wait()
        else:
            self._end(error)

    def _end(self, stopped: BaseException) -> None:
        """The save under way ends with an error: its own, of any process, or one that keeps this process from more."""
        if self._work is None:
            return
        temporary, own = _temporary(self._work.folder), isinstance(stopped, CheckpointError)
        self._deadline = min(self._deadline, time.monotonic() + (0.0 if own else _GRACE))
        failure = self._finish()
        if failure is not None and not own:
            stopped.add_note(str(failure))
        if self.processes.rank == 0:
            _abandon(temporary, 0, str(stopped))  # if it was not published meanwhile

    def _finish(self) -> CheckpointError | None:
        """The end of the save under way, and its error."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._work, self._error = self._error, None, None, None
        return error

    # In the thread, if there is one.

    def _run(self, work: "_Work") -> None:
        self._write(work)
        if self._error is None:
            self._publish(work)

    def _write(self, work: "_Work") -> None:
        """This process's part; its error is kept."""
        try:
            with self._failing(work):
                _write_part(_temporary(work.folder), work, self.processes)
        finally:
            self._part_done.set()

    def _publish(self, work: "_Work") -> None:
        """On rank 0, the rest, once all parts are there; its error is kept."""
        if self.processes.rank == 0:
            with self._failing(work):
                self._assemble(_temporary(work.folder), work, self._collect(_temporary(work.folder)))

    @contextmanager
    def _failing(self, work: "_Work") -> Iterator[None]:
        """Keeps an error for ``wait``, and takes away what was written."""
        failed, done = f"checkpoint of step {work.state['step']} not written: ", False
        try:
            yield
            done = True
        except CheckpointError as error:
            self._error = error
        except OSError as error:
            self._error = CheckpointError(f"{failed}{_refused(work.folder, error)}")
        except Exception as error:  # a mistake of ours; training must hear of it, and where it is
            self._error = CheckpointError(f"{failed}{error!r}")
            self._error.__cause__ = error
        finally:
            if not done:
                _abandon(_temporary(work.folder), self.processes.rank, str(self._error))

    def _assemble(self, temporary: Path, work: "_Work", parts: list[dict[str, Any]]) -> None:
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        places = {stem: _merged(temporary, stem, parts) for stem in ("model", "optimizer")}
        if work.adapter is None:
            _check_complete(temporary, places["model"], work.config)
            described = {"config.json": config_json(work.config, "fp32")}
        else:
            described = {ADAPTER_CONFIG: dict(work.adapter)}
        for name, values in {**described, "state.json": work.state}.items():
            write_json(temporary / name, values)
        parts_written = [_part(temporary, rank) for rank in range(self.processes.world)]
        files |= {path.name: _entry(path) for path in temporary.glob("*.json") if path not in parts_written}
        files = dict(sorted(files.items()))
        manifest = {"format": FORMAT, "step": work.state["step"], "files": files}
        write_json(temporary / "manifest.json", manifest | {"checksum": seal(manifest)})
        for path in parts_written:
            path.unlink()
        sync(temporary)
        if work.folder.exists():  # damaged, or of a run that went back and passes this step again
            remove(work.folder)
        temporary.rename(work.folder)
        self._published.append(work.folder)
        try:
            sync(self.checkpoints)
            make_latest(work.folder, self.keep)
        except OSError as error:
            raise CheckpointError(_refused(self.checkpoints, error)) from None

    def _collect(self, temporary: Path) -> list[dict[str, Any]]:
        """The parts of all processes, once they are there."""
        world, begun, pause = self.processes.world, time.monotonic(), 0.01
        while True:
            names = set(os.listdir(temporary))  # noqa: PTH208 (network file systems look again at a folder, not a file)
            for rank in range(world):
                if _failure(temporary, rank).name in names:
                    raise CheckpointError(_failure(temporary, rank).read_text() or f"rank {rank} could not write")
            missing = [rank for rank in range(world) if _part(temporary, rank).name not in names]
            if not missing:
                return [json.loads(_part(temporary, rank).read_text()) for rank in range(world)]
            if time.monotonic() > self._deadline:
                raise CheckpointError(
                    f"{temporary}: no part from rank {missing[0]} ({len(missing)} of {world} missing) after "
                    f"{time.monotonic() - begun:.0f} s; look at that process's output, then resume"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    # On the calling thread.

    def _open(self, folder: Path, size: int) -> None:
        """Makes the folder to write to, if there is space for ``size`` bytes, and for as much as the checkpoint before
        has, which the other processes' parts are in: the disk is not filled up first."""
        if self.processes.rank != 0:
            return
        temporary = _temporary(folder)
        try:
            self.checkpoints.mkdir(exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            for before in complete_checkpoints(self.checkpoints)[-1:]:
                size = max(size, sum(path.stat().st_size for path in before.iterdir()))
            disk = shutil.disk_usage(self.checkpoints)
            if disk.free < size and disk.total:  # some file systems tell nothing
                amounts = f"{disk.free / 1e9:.3g} GB are free, {size / 1e9:.3g} GB needed"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {amounts}")
            temporary.mkdir()
        except OSError as error:
            failed = f"checkpoint of {folder.name.replace('_', ' ')} not written: "
            raise CheckpointError(f"{failed}{_refused(temporary, error)}") from None


def _refused(path: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{path}: cannot write ({error}); {'free some space' if full else 'see to its file system'} and resume"


@dataclass(frozen=True)
class _Work:
    folder: Path
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]
    config: ModelConfig
    adapter: Mapping[str, Any] | None


class _Buffers:
    """Copies of tensors in the CPU's memory, in blocks that are used again: only the first copy costs page faults."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def copy(self, *groups: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """All are there when this returns. The copies before are overwritten."""
        tensors = {(g, name): tensor.detach() for g, group in enumerate(groups) for name, tensor in group.items()}
        sizes = {key: _aligned(tensor.nbytes) for key, tensor in tensors.items()}
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        copies: list[dict[str, Tensor]] = [{} for _ in groups]
        for number, keys in enumerate(split_by_size(sizes, _BUFFER_BYTES)):
            block, start = self._block(number, sum(sizes[key] for key in keys), pinned), 0
            for group, name in keys:
                tensor = tensors[group, name]
                copy = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies[group][name] = copy.copy_(tensor, non_blocking=True)
                start += sizes[group, name]
        if pinned:
            torch.cuda.synchronize()
        return copies

    def _block(self, number: int, size: int, pinned: bool) -> Tensor:
        if number == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if self._blocks[number].numel() < size:
            self._blocks[number] = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._blocks[number] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._blocks[number]


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


# The files of one process.


def _write_part(temporary: Path, work: _Work, processes: Processes) -> None:
    """This process's tensors, and what it wrote, last and at once."""
    part: dict[str, Any] = {"files": {}}
    if work.adapter is None:
        part["model"] = _write_stem(temporary, "model", work.weights, processes)
    elif processes.rank == 0:
        write_tensors(temporary / ADAPTER_WEIGHTS, work.weights)
        part["files"][ADAPTER_WEIGHTS] = _entry(temporary / ADAPTER_WEIGHTS)
    elif work.weights:
        raise ValueError(f"rank {processes.rank} has adapters to write; in a LoRA run rank 0 has all of them")
    part["optimizer"] = _write_stem(temporary, "optimizer", work.optimizer, processes)
    for stem in ("model", "optimizer"):
        for file in dict.fromkeys(part.get(stem, {}).values()):
            part["files"][file] = _entry(temporary / file)
    unnamed = temporary / f".part_{processes.rank}"
    write_json(unnamed, part)
    unnamed.rename(_part(temporary, processes.rank))
    sync(temporary)


def _write_stem(temporary: Path, stem: str, tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, str]:
    """The tensors in as many files as their size asks for; the file of each."""
    who = "" if processes.world == 1 else f"-{processes.rank + 1:05}-of-{processes.world:05}"
    lots = split_by_size({name: 4 * tensor.numel() for name, tensor in tensors.items()}, MAX_FILE_BYTES)
    places: dict[str, str] = {}
    for number, names in enumerate(lots if tensors else [], 1):
        file = f"{stem}{who}{'' if len(lots) == 1 else f'-{number:05}-of-{len(lots):05}'}.safetensors"
        stored = {name: tensors[name] for name in names}
        if stem == "model":
            stored = {name: encode(name, tensor, "fp32")[name] for name, tensor in stored.items()}
        write_tensors(temporary / file, stored)
        places |= dict.fromkeys(names, file)
    return places


def _abandon(temporary: Path, rank: int, problem: str) -> None:
    """Frees the space, and tells rank 0, or the others by taking the folder away. Whatever fails here changes nothing:
    the checkpoint is not published, and the first error is the one to tell."""
    with suppress(OSError):
        if rank == 0:
            shutil.rmtree(temporary.rename(temporary.with_name(temporary.name.replace("-writing", "-failed"))))
        else:
            for stem in ("model", "optimizer"):
                for path in temporary.glob(f"{stem}-{rank + 1:05}-of-*"):
                    path.unlink()
            _failure(temporary, rank).write_text(f"rank {rank}: {problem}")


# The files of all.


def _merged(temporary: Path, stem: str, parts: list[dict[str, Any]]) -> dict[str, str]:
    """The places of all tensors, and their index on disk unless they are in one file that needs none."""
    places: dict[str, str] = {}
    for part in parts:
        if twice := [name for name in part.get(stem, {}) if name in places]:
            raise CheckpointError(f"{temporary}: two processes wrote the same tensors ({listed({stem: twice})})")
        places |= part.get(stem, {})
    files = set(places.values())
    if files and files != {f"{stem}.safetensors"}:
        write_index(
            temporary, stem, dict(sorted(places.items())), sum((temporary / file).stat().st_size for file in files)
        )
    return places


def _check_complete(temporary: Path, names: Container[str], config: ModelConfig) -> None:
    wanted = [name for shape in tensor_shapes(config) for name in shape.names()]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(f"{temporary}: no process wrote some of the weights ({listed({'missing': missing})})")


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-writing")


def _part(temporary: Path, rank: int) -> Path:
    return temporary / f"part_{rank}.json"


def _failure(temporary: Path, rank: int) -> Path:
    return temporary / f"failed_{rank}"


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_checksum(path)}


def _random_state(rank: int) -> dict[str, Tensor]:
    states = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
    return states
