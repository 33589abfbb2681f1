"""Checkpoints: folders of safetensors with a manifest of checksums, published whole or not at all, never pickled.

<run>/checkpoints/step_N/  config.json, model*.safetensors   the weights, float32, under the released names:
                                                             `load_pretrained` and transformers read them as they are
                           adapter_config.json,              instead of them, in a LoRA run: the adapters alone, in
                           adapter_model.safetensors         PEFT's format
                           optimizer*.safetensors            momentum and moments, by parameter name, and each
                                                             process's random state; experts that were chosen ahead
                           state.json                        steps, tokens, data position
                           manifest.json                     size and SHA-256 of every other file, and its own
<run>/checkpoints/latest   the name of the newest; moved last
<run>/checkpoints/damaged_step_N   what a resume found damaged and left for an older one: nothing reads or removes it

A checkpoint has no topology: every tensor is in it once, whole, experts one by one under their global numbers,
whichever process wrote it. Where several wrote, each has files of its own, `model-00001-of-00004.safetensors`, and an
index (`model.safetensors.index.json`, `optimizer.safetensors.index.json`) tells where a tensor lies.
`checkpoint_writer` writes them.
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.config import WeightsError
from ..model.lora import CONFIG_FILE as ADAPTER_CONFIG
from ..model.lora import fill_adapter, load_adapter
from ..model.released import fill_weights, load_pretrained
from ..model.tensor_files import listed, locate_tensors, read_tensors, sync, write_text
from ..model.transformer import Transformer
from ..optim.groups import Optimizers
from .config import CheckpointError, DamageError
from .progress import progress_bar

FORMAT = 2
NO_STATES = ("rng.", "ahead.")  # what else is in the optimizer's files: random state, experts chosen ahead
STATE_KINDS = ("momentum", "exp_avg", "exp_avg_sq", "step")  # the states of Muon and AdamW (optim.groups)
_NAME = re.compile("step_[0-9]+")
_DAMAGED = "damaged: "  # how processes tell each other of a DamageError
# A parameter that stacks something of all experts, and how the released name of one of them continues.
_STACKED = re.compile(r"(?P<stack>.*\.experts)\.(?P<rest>w[123]|lora\..*)")
_SINGLE = re.compile(r"(?P<stack>.*\.experts)\.[0-9]+\.(?P<rest>w[123](?=\.weight$)|lora\..*)")


@dataclass
class TrainState:
    """Where a run stands; with weights and optimizer state, all that a resumed run needs to go on bit for bit."""

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # tokens of the global batches seen, padding included
    skipped: int = 0  # steps whose gradients were not finite
    data: dict[str, Any] | None = None  # Loader.state_dict()
    fingerprint: str = ""  # of the prepared data
    base: str = ""  # of the pretrained weights
    stability: dict[str, Any] = field(default_factory=dict)  # Guard.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        later: dict[str, Any] = {"base": "", "stability": {}}  # what older checkpoints do not have
        for key in vars(self):
            setattr(self, key, state.get(key, later[key]) if key in later else state[key])


@dataclass(frozen=True)
class Processes:
    """Those that write and read checkpoints together; by default one alone.

    Attributes:
        rank, world: of this process.
        agree: called by all of them with a text; returns, to each of them, the first text that is not empty, and not
            before all have called it. Only called where training stands still, never from another thread.
    """

    rank: int = 0
    world: int = 1
    agree: Callable[[str], str] = str

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails within on one process fails on all of them, as the same CheckpointError or DamageError."""
        problem, cause = "", None
        try:
            yield
        except CheckpointError as error:
            problem, cause = f"{_DAMAGED * isinstance(error, DamageError)}{error}", error.__cause__
        if problem := self.agree(problem):
            kind = DamageError if problem.startswith(_DAMAGED) else CheckpointError
            raise kind(problem.removeprefix(_DAMAGED)) from cause


ALONE = Processes()


# Names of experts: stacked in memory, single in files.


def split_experts(tensors: Mapping[str, Tensor], held: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """Parameters or their states by name, what stacks experts cut into views of single ones under global numbers.

    ``momentum.layers.0.ffn.experts.w1`` ``[E, F, D]`` becomes ``momentum.layers.0.ffn.experts.3.w1.weight`` ``[F, D]``
    and so on. A 0-dim state (AdamW's ``step``) goes to every expert of its parameter. All else stays as it is.

    Args:
        held: by parameter name, the global numbers of its rows; what is not named holds all experts, from 0.
    """
    known = dict(held or {})
    for name, tensor in tensors.items():
        if tensor.ndim and _STACKED.fullmatch(name):
            known.setdefault(_without_kind(name), range(len(tensor)))
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _STACKED.fullmatch(name) is None:
            single[name] = tensor
            continue
        for row, expert in enumerate(known[_without_kind(name)]):
            single[_single_name(name, expert)] = tensor[row] if tensor.ndim else tensor.clone()
    return single


def join_experts(single: Mapping[str, Tensor], held: Mapping[str, Sequence[int] | None]) -> dict[str, Tensor]:
    """The reverse of ``split_experts``: the parameters or states of ``held`` that are among ``single``.

    Args:
        held: by parameter name, the global numbers of its rows, None for one that is no stack.

    Raises:
        CheckpointError: a stack of which some experts are missing, or whose experts differ in a 0-dim state.
    """
    joined: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {"missing": [], "different among the experts of a parameter": []}
    for parameter, experts in held.items():
        for name in (parameter, *(f"{kind}.{parameter}" for kind in STATE_KINDS)):
            names = _names_in_files(name, experts)
            found = [single[each] for each in names if each in single]
            if not found:
                continue
            if len(found) < len(names):
                problems["missing"] += [each for each in names if each not in single]
            elif experts is None:
                joined[name] = found[0]
            elif found[0].ndim:
                joined[name] = torch.stack(found)
            elif any(not torch.equal(found[0], other) for other in found):
                problems["different among the experts of a parameter"].append(name)
            else:
                joined[name] = found[0]
    if any(problems.values()):
        raise CheckpointError(f"these states do not make whole parameters ({listed(problems)})")
    return joined


def _names_in_files(name: str, experts: Sequence[int] | None) -> list[str]:
    return [name] if experts is None else [_single_name(name, expert) for expert in experts]


def _single_name(name: str, expert: int) -> str:
    stacked = _STACKED.fullmatch(name)
    assert stacked is not None, name
    end = "" if stacked["rest"].startswith("lora.") else ".weight"
    return f"{stacked['stack']}.{expert}.{stacked['rest']}{end}"


def _stacked_name(name: str) -> str:
    single = _SINGLE.match(name)
    return name if single is None else f"{single['stack']}.{single['rest']}"


def _without_kind(name: str) -> str:
    kind, _, rest = name.partition(".")
    return rest if kind in STATE_KINDS else name


def _is_state(name: str, parameters: Container[str]) -> bool:
    kind, _, single = name.partition(".")
    return kind in STATE_KINDS and _stacked_name(single) in parameters


# Publishing.


def make_latest(folder: Path, keep: int) -> None:
    """Points ``latest`` at a checkpoint and removes all but the newest ``keep``: the end of every save, and done again
    on resume, where it completes a save that was killed before it."""
    checkpoints = folder.parent
    pointer = checkpoints / ".latest"
    write_text(pointer, folder.name + "\n")
    pointer.rename(checkpoints / "latest")
    sync(checkpoints)
    for old in complete_checkpoints(checkpoints)[:-keep]:
        remove(old)


def remove(folder: Path) -> None:
    """Deletes a checkpoint; out of sight first: a kill during the removal leaves no half of one."""
    hidden = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(folder.rename(hidden))


def remove_leftovers(checkpoints: Path) -> None:
    """Deletes what saves and removals that were killed left. One process does it, before any of them saves."""
    for path in checkpoints.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    (checkpoints / ".latest").unlink(missing_ok=True)


# Reading.


class Checkpoint:
    """A published checkpoint, whose files were compared with their checksums, to be read by any number of processes.

    Raises:
        DamageError: a file is missing, changed or truncated.
        CheckpointError: it cannot be read, or is of another format.
    """

    def __init__(self, folder: Path, processes: Processes = ALONE) -> None:
        verify(folder, processes)
        self.folder, self.processes = folder, processes
        self.state = _state(folder)
        self._adapted = (folder / ADAPTER_CONFIG).exists()

    def fill(self, model: Transformer) -> None:
        """Copies the weights, or the adapters, into those that ``model`` has, in its dtypes; strict but for experts
        that other processes hold.

        Raises:
            CheckpointError: of another architecture; the model is unchanged then.
        """
        with self.processes.together():
            try:
                (fill_adapter if self._adapted else fill_weights)(model, self.folder)
            except WeightsError as error:
                raise CheckpointError(
                    f"{error}; is this a run of another model? choose another output folder"
                ) from None

    def weights(self, held: Mapping[str, Sequence[int] | None]) -> dict[str, Tensor]:
        """The float32 weights of parameters (not of adapters), as ``join_experts`` puts them together; to be copied,
        for some are views of the files.

        Args:
            held: by parameter name, the global numbers of the experts that it stacks, None for one that is no stack.
        """
        return self._read("model", held, held)

    def optimizer_state(
        self, held: Mapping[str, Sequence[int] | None], parameters: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """The states of parameters for ``Optimizers.load_state_tensors``; nothing for one that never had a gradient.

        Args:
            held: as in ``weights``; what other processes hold is left out.
            parameters: names of all that the model has, wherever they are held; None: those of ``held``.

        Raises:
            CheckpointError: the checkpoint has states of other parameters, or of a part of the experts of one.
        """
        names = [f"{kind}.{name}" for name in held for kind in STATE_KINDS]
        return self._read("optimizer", held, names, set(held if parameters is None else parameters))

    def restore_random_state(self) -> None:
        """Sets this process's random state to what it was; left alone where fewer processes saved."""
        states = {f"rng.{device}.{self.processes.rank}": device for device in ("cpu", "cuda")}
        with self.processes.together(), _named(self.folder):
            places = locate_tensors(self.folder, "optimizer")
            for name, state in read_tensors({name: places[name] for name in states if name in places}):
                if states[name] == "cpu":
                    torch.set_rng_state(state)
                elif torch.cuda.is_available():
                    torch.cuda.set_rng_state(state)

    def _read(
        self,
        stem: str,
        held: Mapping[str, Sequence[int] | None],
        names: Iterable[str],
        parameters: set[str] | None = None,
    ) -> dict[str, Tensor]:
        joined: dict[str, Tensor] = {}
        with self.processes.together(), _named(self.folder):
            places = locate_tensors(self.folder, stem)
            if parameters is not None:
                unknown = [
                    name for name in places if not name.startswith(NO_STATES) and not _is_state(name, parameters)
                ]
                if unknown:
                    raise CheckpointError(f"optimizer state does not fit the model ({listed({'unexpected': unknown})})")
            wanted = {each for name in names for each in _names_in_files(name, held[_without_kind(name)])}
            joined |= join_experts(dict(read_tensors({n: p for n, p in places.items() if n in wanted})), held)
        return joined


def load_checkpoint(
    folder: Path,
    model: Transformer,
    optimizers: Optimizers,
    state: TrainState,
    processes: Processes = ALONE,
    held: Mapping[str, Sequence[int] | None] | None = None,
) -> None:
    """Fills model, optimizers and state from a checkpoint, after comparing every file with its checksum.

    Args:
        held: the parameters of ``optimizers`` as in ``Checkpoint.weights``; None: all that the model trains, whole.

    Raises:
        DamageError: a file is missing, changed or truncated; nothing was filled.
        CheckpointError: the checkpoint cannot be read, or is of another format or architecture.
    """
    checkpoint = Checkpoint(folder, processes)
    checkpoint.fill(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    if held is None:
        held = {name: range(shape[0]) if _STACKED.fullmatch(name) else None for name, shape in shapes.items()}
    tensors = checkpoint.optimizer_state(held, shapes)
    with processes.together(), _named(folder):
        optimizers.load_state_tensors(tensors)
    checkpoint.restore_random_state()
    with _named(folder):
        state.load_state_dict(checkpoint.state)


def chosen_ahead(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Of a checkpoint that was loaded, the experts that were chosen for steps after it (``anticipation.Feed``)."""
    with _named(folder):
        places = locate_tensors(folder, "optimizer")
        yield from read_tensors({name: place for name, place in places.items() if wanted(name)})


def load_newest(
    checkpoints: Path, load: Callable[[Path], None], processes: Processes = ALONE
) -> tuple[Path | None, dict[Path, str]]:
    """Loads the newest checkpoint; where its files are damaged, the newest one that is whole.

    Args:
        load: ``load_checkpoint`` with its arguments, and what else is to be checked of a checkpoint.
        processes: rank 0 looks what there is; a network file system may show others a folder of some seconds ago.

    Returns:
        the checkpoint, None if there is none at all; and what is wrong with those newer than it, for ``set_aside``.

    Raises:
        DamageError: of the newest; no other one is whole.
    """
    names, damaged = "", dict[Path, str]()
    if processes.rank == 0 and (latest := latest_checkpoint(checkpoints)):
        older = [path for path in complete_checkpoints(checkpoints) if step_of(path) < step_of(latest)]
        names = " ".join(path.name for path in (latest, *reversed(older)))
    found = [checkpoints / name for name in processes.agree(names).split()]
    if not found:
        return None, damaged
    for folder in found:
        try:
            load(folder)
        except DamageError as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    raise DamageError(damaged[found[0]])


def set_aside(damaged: Mapping[Path, str]) -> list[str]:
    """Renames checkpoints to ``damaged_step_N``, which nothing reads or deletes; returns a line for each: what is wrong
    with it, and where it is now."""
    lines = []
    for folder, problem in damaged.items():
        before = sum(1 for _ in folder.parent.glob(f"damaged_{folder.name}*"))
        moved = folder.rename(folder.with_name(f"damaged_{folder.name}" + (f".{before}" if before else "")))
        lines.append(f"{problem.removesuffix(f'; {_way_out(folder)}')}; kept as {moved}")
    return lines


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors of content become CheckpointErrors that name the folder."""
    try:
        yield
    except WeightsError as error:  # names its file
        raise CheckpointError(str(error)) from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def verify(folder: Path, processes: Processes = ALONE) -> None:
    """Raises DamageError unless every file of a checkpoint is there and as it was written, CheckpointError if the file
    system fails or the format is another.

    Of several processes each reads some of the files, and all know the result.
    """
    with processes.together():
        try:
            manifest = _verify_files(folder, processes)
        except OSError as error:
            kind = DamageError if error.errno == errno.EIO else CheckpointError  # not what is closed or not mounted
            raise kind(f"{folder}: cannot be read ({error}); see to its file system; {_way_out(folder)}") from None
    # All that no checksum covers yet; without this, a flipped bit in it would pass.
    if manifest.get("step") != (step := _state(folder)["step"]):
        found, way_out = manifest.get("step"), _way_out(folder)
        raise DamageError(f"{folder / 'manifest.json'}: step {found!r}, but state.json says {step}; {way_out}")


def _state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Whoever wrote it may have written a right checksum of something else."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return state | {"step": state["step"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: unreadable ({error!r}); {_way_out(folder)}") from None


def _way_out(folder: Path) -> str:
    return f"remove {folder} to go on from an earlier checkpoint"


def _verify_files(folder: Path, processes: Processes) -> dict[str, Any]:
    way_out = _way_out(folder)
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{folder / 'manifest.json'}: unreadable ({error!r}); {way_out}") from None
    if manifest.get("checksum", seal(manifest)) != seal(manifest):
        raise DamageError(f"{folder / 'manifest.json'}: its checksum is not that of its content; {way_out}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT}; go on with the version that "
            "wrote it, or choose another output folder"
        )
    if odd := ", ".join(sorted(manifest.keys() - {"format", "step", "files", "checksum"})):
        raise DamageError(f"{folder / 'manifest.json'}: holds {odd}, which is not known; {way_out}")
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if present != set(files):
        odd = ", ".join(sorted(present ^ set(files)))
        raise DamageError(f"{folder}: files missing or added: {odd}; {way_out}")
    for name, (size, _) in files.items():
        path = folder / name
        if path.stat().st_size != size:
            raise DamageError(f"{path}: {path.stat().st_size} bytes instead of {size}; {way_out}")
    largest_first = sorted(files, key=lambda name: (-files[name][0], name))  # so that the processes get like portions
    for name in largest_first[processes.rank :: processes.world]:
        path, checksum = folder / name, files[name][1]
        if (found := file_checksum(path)) != checksum:
            raise DamageError(
                f"{path}: checksum {found[:12]} instead of {str(checksum)[:12]}, the file changed; {way_out}"
            )
    return manifest


def seal(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest, the key that holds it aside."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All published checkpoints, oldest first."""
    found = [path for path in checkpoints.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / "manifest.json").exists()), key=step_of)


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest: what ``latest`` names, or a newer complete one, where a save was killed before it moved ``latest``.

    None if there is none. One that ``latest`` names need not be complete: loading it then tells what is missing.
    """
    found = complete_checkpoints(checkpoints)
    pointer = checkpoints / "latest"
    name = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
    if _NAME.fullmatch(name) and (checkpoints / name).is_dir():
        found.append(checkpoints / name)
    return max(found, key=step_of, default=None)


def find_weights(path: str | Path) -> Path:
    """The folder of weights that ``path`` means: a run (its newest checkpoint), a checkpoint, an export or an adapter.

    Raises:
        CheckpointError: it is none of them, or a checkpoint that does not match its checksums.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run, a checkpoint or an exported model")
    if (path / "checkpoints").is_dir():
        newest = latest_checkpoint(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet; train it further")
        path = newest
    if (path / "manifest.json").exists() and (path / "state.json").exists():
        verify(path)
    if not any((path / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        raise CheckpointError(
            f"{path}: holds neither config.json nor {ADAPTER_CONFIG}; name a run, a checkpoint, an exported model "
            "or an adapter"
        )
    return path


def find_tokenizer(path: str | Path) -> Path | None:
    """The ``tokenizer.json`` of a run, a checkpoint or an export, if it has one."""
    path = Path(path).resolve()
    folders = [path, path.parent.parent]
    if (path / ADAPTER_CONFIG).exists():
        folders.append(base_of(path))
    return next((f / "tokenizer.json" for f in folders if (f / "tokenizer.json").is_file()), None)


def base_of(adapter: Path) -> Path:
    """The folder of weights that an adapter was trained on.

    Raises:
        CheckpointError: it is not named, or not there.
    """
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG}: names no base model ({error!r})") from None
    if not name or not Path(name).is_dir():
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG}: its base model {name!r} is not here; run this where the path is valid, or "
            "set base_model_name_or_path in the file"
        )
    return Path(name)


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """The model of a run, a checkpoint, an export (``find_weights``), or an adapter on its base model."""
    folder = find_weights(path)
    adapted = (folder / ADAPTER_CONFIG).exists()
    with progress_bar("loading") as advance:
        model = load_pretrained(base_of(folder) if adapted else folder, dtype, device, progress=advance)
    if adapted:
        load_adapter(model, folder)
    return model.eval()


def step_of(folder: Path) -> int:
    """The optimizer steps done at a checkpoint, by its name."""
    return int(folder.name.removeprefix("step_"))


def file_checksum(path: Path) -> str:
    """SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
