"""Published tensor names and formats, both ways: a folder of safetensors under the released names, and a model.

Our parameter names are the released ones (recipe 8.3) but for the routed experts, which are one stacked parameter here
and one tensor per expert there. Nothing is ever unpickled.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .transformer import Transformer

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
INDEX = "model.safetensors.index.json"

# What can be read, in safetensors' names.
_FLOATS, _INTEGERS = ("F32", "BF16", "F16"), ("I64", "I32")

# Kept in float32 in every format, as in the released files.
_ALWAYS_FP32 = ("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias")


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message names the file or tensors and the way out."""


def released_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Released name and tensor of everything in the model, experts one by one (as views), buffers included."""
    for name, tensor in model.state_dict().items():
        prefix, stacked, matrix = name.rpartition(".experts.")
        if stacked:
            for expert, weight in enumerate(tensor):
                yield f"{prefix}.experts.{expert}.{matrix}.weight", weight
        else:
            yield name, tensor


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    format: str = "bf16",
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model under the released names, with ``config.json``, and the tokenizer's files beside it.

    Args:
        folder: must not exist, or be empty; it appears whole or not at all.
        format: "fp32" or "bf16" (mHC, sink, position and selection biases stay float32, as released).
        tokenizer: a ``tokenizer.json``, or None for weights alone.
        max_shard_bytes: size beyond which the weights are split over several files.

    Raises:
        WeightsError: unknown format, folder in use, or the disk refused.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise WeightsError(f"format={format!r}: choose from {', '.join(FORMATS)}")
    with new_folder(folder) as temporary:
        write_weights(model, temporary, FORMATS[format], max_shard_bytes)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), temporary, model.config)


def write_weights(model: Transformer, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """``config.json`` and the safetensors files of a model, into an existing folder."""
    tensors = {name: (tensor, _stored_dtype(name, tensor, dtype)) for name, tensor in released_tensors(model)}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, (tensor, stored) in tensors.items():
        size = tensor.numel() * stored.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: tensors[name][0].detach().to(tensors[name][1]) for name in names})
    if count > 1:
        total = sum(tensor.numel() * stored.itemsize for tensor, stored in tensors.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = model.config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)


def copy_tokenizer(tokenizer: Path, folder: Path, config: ModelConfig) -> None:
    """``tokenizer.json`` and the ``tokenizer_config.json`` that lets transformers load it."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokens = {token["id"]: token["content"] for token in vocabulary.get("added_tokens", ())}
    tokens |= {
        id_: token for token, id_ in _vocabulary(vocabulary) if id_ in (config.bos_token_id, config.eos_token_id)
    }
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    names = {"bos_token": tokens.get(config.bos_token_id), "eos_token": tokens.get(config.eos_token_id)}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
        | {key: value for key, value in names.items() if value is not None}
        | ({"pad_token": names["eos_token"]} if names["eos_token"] is not None else {}),
    )


def load_pretrained(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Transformer:
    """Builds the model that ``folder`` describes and fills it, strictly.

    Args:
        folder: ``config.json`` and safetensors under the released names (float tensors of 16 or 32 bits).
        dtype: of the parameters; those that are released as float32 stay float32.

    Raises:
        WeightsError: missing, unexpected or misshapen tensors (all listed), damaged files, index entries that leave
            the folder. ModelConfigError: not a DeepSeek-V4 config.
    """
    folder = Path(folder)
    config = ModelConfig.from_json(folder)
    with torch.device("meta"):
        model = Transformer(config)
    check_weights(model, folder)  # before a wrong config.json makes us ask for its memory
    for name, tensor in model.state_dict().items():
        _assign(model, name, torch.empty_like(tensor, dtype=_stored_dtype(name, tensor, dtype), device=device))
    fill_weights(model, folder)
    return model


def fill_weights(model: Transformer, folder: Path) -> None:
    """Copies the tensors of ``folder`` into ``model``, whose dtypes and device stay; strict, as ``load_pretrained``."""
    files = check_weights(model, folder)
    wanted = dict(released_tensors(model))
    with torch.no_grad():
        for file in files:
            with open_tensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    wanted[name].copy_(tensors.get_tensor(name))


def check_weights(model: Transformer, folder: Path) -> list[Path]:
    """The files of ``folder``, after comparing the names and shapes in their headers with those of ``model``."""
    wanted = dict(released_tensors(model))
    files = weight_files(folder)
    found: dict[str, Path] = {}
    misshapen = []
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = file
                stored = tensors.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if name in wanted and shape != tuple(wanted[name].shape):
                    misshapen.append(f"{name} is {shape}, not {tuple(wanted[name].shape)}")
                elif name in wanted and dtype not in (_FLOATS if wanted[name].dtype.is_floating_point else _INTEGERS):
                    misshapen.append(f"{name} is of type {dtype}")
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {_shorten(names)}" for kind, names in problems.items() if names)
        raise WeightsError(f"{folder}: these weights do not fit its config.json ({listed})")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise WeightsError(f"{folder}: neither model.safetensors nor {INDEX}; name a folder of released weights")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not a safetensors index ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or name.startswith("."):
            raise WeightsError(f"{index}: weight_map entry {name!r} leaves the folder; refused")
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: named by the index but missing; copy the file again")
    return [folder / name for name in names]


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """``safe_open`` on the CPU, whose errors name the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: damaged or unreadable ({error}); copy or export it again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, on disk when this returns; OSError where the disk refuses."""
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    sync(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file, on disk when this returns."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` when the block ends well, and vanishes when it does not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: already there and not empty; remove it or choose another folder")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield temporary
        sync(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot write ({error}); free some space or choose another folder") from None
    finally:
        if temporary is not None and temporary.exists():
            with suppress(OSError):
                shutil.rmtree(temporary)


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not tensor.dtype.is_floating_point:
        return tensor.dtype
    return torch.float32 if name.endswith(_ALWAYS_FP32) else dtype


def _assign(model: Transformer, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module.register_parameter(leaf, torch.nn.Parameter(tensor))
    else:
        module.register_buffer(leaf, tensor)


def _shorten(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _vocabulary(tokenizer: Mapping[str, Any]) -> list[tuple[str, int]]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return list(vocabulary.items()) if isinstance(vocabulary, dict) else []
