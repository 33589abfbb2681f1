"""Checkpoints: folders of safetensors with a manifest of checksums, published whole or not at all, never pickled.

<run>/checkpoints/step_N/  config.json, model*.safetensors   the weights, float32, under the released names:
                                                             `load_pretrained` and transformers read them as they are
                           adapter_config.json,              instead of them, in a LoRA run: the adapters alone, in
                           adapter_model.safetensors         PEFT's format
                           optimizer.safetensors             momentum and moments, by parameter name
                           state.json                        steps, tokens, data position
                           manifest.json                     size and SHA-256 of every other file
<run>/checkpoints/latest   the name of the newest; moved last
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.config import LoRAConfig, WeightsError
from ..model.lora import CONFIG_FILE as ADAPTER_CONFIG
from ..model.lora import fill_adapter, load_adapter, write_adapter
from ..model.released import fill_weights, load_pretrained, write_weights
from ..model.tensor_files import new_folder, open_tensors, sync, write_json, write_tensors
from ..model.transformer import Transformer
from ..optim.groups import Optimizers
from .config import CheckpointError
from .progress import progress_bar

FORMAT = 1
_MAX_SHARD_BYTES = 5_000_000_000
_NAME = re.compile("step_[0-9]+")


@dataclass
class TrainState:
    """Where a run stands; with weights and optimizer state, all that a resumed run needs to go on bit for bit."""

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # tokens of the global batches seen, padding included
    skipped: int = 0  # steps whose gradients were not finite
    data: dict[str, Any] | None = None  # Loader.state_dict()
    fingerprint: str = ""  # of the prepared data
    base: str = ""  # of the pretrained weights

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in vars(self):
            setattr(self, key, state.get(key, "") if key == "base" else state[key])


def save_checkpoint(
    checkpoints: Path,
    model: Transformer,
    optimizers: Optimizers,
    state: TrainState,
    keep: int,
    adapter: tuple[LoRAConfig, str] | None = None,
) -> Path:
    """Writes ``step_N``, then points ``latest`` at it, then removes all but the newest ``keep``.

    ``adapter``: of a LoRA run, whose adapters alone are written; their config, and where the base model lies.
    """
    folder = checkpoints / f"step_{state.step}"
    if folder.exists():  # without a manifest: a complete one would have been resumed from
        shutil.rmtree(folder)
    try:
        with new_folder(folder) as temporary:
            if adapter is None:
                write_weights(model, temporary, "fp32", _MAX_SHARD_BYTES)
            else:
                write_adapter(model, adapter[0], temporary, adapter[1])
            write_tensors(temporary / "optimizer.safetensors", optimizers.state_tensors() | _random_state())
            write_json(temporary / "state.json", state.state_dict())
            files = {p.name: {"bytes": p.stat().st_size, "sha256": _checksum(p)} for p in sorted(temporary.iterdir())}
            write_json(temporary / "manifest.json", {"format": FORMAT, "step": state.step, "files": files})
        make_latest(folder, keep)
    except WeightsError as error:
        raise CheckpointError(f"checkpoint of step {state.step} not written: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{checkpoints}: cannot write ({error}); free some space and resume") from None
    return folder


def make_latest(folder: Path, keep: int) -> None:
    """Points ``latest`` at a checkpoint and removes all but the newest ``keep``: the end of every save, and done again
    on resume, where it completes a save that was killed before it."""
    checkpoints = folder.parent
    pointer = checkpoints / ".latest"
    pointer.write_text(folder.name + "\n")
    sync(pointer)
    pointer.rename(checkpoints / "latest")
    sync(checkpoints)
    for old in complete_checkpoints(checkpoints)[:-keep]:
        # Out of sight first: a kill during the removal leaves no half of a checkpoint.
        shutil.rmtree(old.rename(checkpoints / f".{old.name}-old"))


def load_checkpoint(folder: Path, model: Transformer, optimizers: Optimizers, state: TrainState) -> None:
    """Fills model, optimizers and state from a checkpoint, after comparing every file with its checksum.

    Raises:
        CheckpointError: a file is missing, changed or truncated, or the checkpoint is of another architecture.
    """
    verify(folder)
    try:
        (fill_adapter if (folder / ADAPTER_CONFIG).exists() else fill_weights)(model, folder)
        with open_tensors(folder / "optimizer.safetensors") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        _restore_random_state(tensors)
        optimizers.load_state_tensors(tensors)
        state.load_state_dict(json.loads((folder / "state.json").read_text()))
    except WeightsError as error:
        raise CheckpointError(f"{error}; is this a run of another model? choose another output folder") from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file of a checkpoint is there and as it was written."""
    way_out = f"remove {folder} to go on from an earlier checkpoint"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'manifest.json'}: unreadable ({error!r}); {way_out}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT}; {way_out}")
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if present != set(files):
        odd = ", ".join(sorted(present ^ set(files)))
        raise CheckpointError(f"{folder}: files missing or added: {odd}; {way_out}")
    for name, (size, checksum) in files.items():
        path = folder / name
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes instead of {size}; {way_out}")
        if (found := _checksum(path)) != checksum:
            raise CheckpointError(
                f"{path}: checksum {found[:12]} instead of {checksum[:12]}, the file changed; {way_out}"
            )
    # All that no checksum covers yet; without this, a flipped bit in it would pass.
    if manifest.get("step") != (step := json.loads((folder / "state.json").read_text())["step"]):
        found = manifest.get("step")
        raise CheckpointError(f"{folder / 'manifest.json'}: step {found!r}, but state.json says {step}; {way_out}")


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All published checkpoints, oldest first."""
    found = [path for path in checkpoints.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / "manifest.json").exists()), key=_step)


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest: what ``latest`` names, or a newer complete one, where a save was killed before it moved ``latest``.

    None if there is none. One that ``latest`` names need not be complete: loading it then tells what is missing.
    """
    found = complete_checkpoints(checkpoints)
    pointer = checkpoints / "latest"
    name = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
    if _NAME.fullmatch(name) and (checkpoints / name).is_dir():
        found.append(checkpoints / name)
    return max(found, key=_step, default=None)


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


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def remove_leftovers(checkpoints: Path) -> None:
    """Deletes what saves and removals that were killed left."""
    for path in checkpoints.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    (checkpoints / ".latest").unlink(missing_ok=True)
