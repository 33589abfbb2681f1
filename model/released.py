"""Published tensor names and formats, both ways: a folder of safetensors under the released names, and a model.

Our parameter names are the released ones (recipe 8.3) but for the routed experts, which are one stacked parameter here
and one tensor per expert there. The formats:

    fp4+fp8   as the instruct models: routed experts FP4, other large matrices FP8, scales E8M0
    fp8       as the Base models: routed experts FP8 as well, scales float32
    bf16      nothing quantised;  fp32 the same in float32

In each of them what is released as float32 (mHC, sinks, position and selection biases) is float32.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ..kernels.quantize import block_of, dequantize, quantize_fp4, quantize_fp8, scale_shape
from .config import ModelConfig, WeightsError, without_mtp
from .layers import Linear
from .moe import Experts
from .shapes import Format
from .tensor_files import (
    DTYPES,
    Entry,
    TensorFolder,
    inside,
    listed,
    new_folder,
    weight_files,
    write_index,
    write_json,
    write_tensors,
)
from .transformer import Transformer

FORMATS: tuple[Format, ...] = get_args(Format)
Key = TypeVar("Key")
Progress = Callable[[int, int], None]  # bytes read or written so far, and in all

_FLOATS, _INTEGERS = ("F32", "BF16", "F16"), ("I64", "I32")

# Kept in float32 in every format, as in the released files.
_ALWAYS_FP32 = ("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias")

_QUANTIZED = re.compile(
    r"(\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|\.(e_proj|h_proj)|\.ffn\.(experts\.\d+|shared_experts)\.w[123])\.weight"
)
_EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")

# Our names of the scales of what is held quantised.
_SCALE = re.compile(r"(\.|\.experts\.w[123]_)scale$")

# Copies of the embedding and the head that the MTP block shares with the main model; some releases store them.
_COPY = re.compile(r"mtp\.\d+\.(?:\w*emb\w*(?:\.\w+)*|(?:\w+\.)?head)\.weight")

# Places in each file that a fingerprint looks at.
_SAMPLES = 64

# Files beside the weights that serving and tokenising need.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "encoding_dsv4.py",
    "encoding/encoding_dsv4.py",
    "LICENSE",
)


class Weight(NamedTuple):
    """A tensor to be written: its shape and dtype in the model, its values, and the scale it was released with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    scale: Callable[[], Tensor | None]


# What ``write_release`` tells about each tensor: its name, its values, and what is written in their place.
Observer = Callable[[str, Tensor, Mapping[str, Tensor]], None]


def released_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Released name and tensor of everything in the model, experts one by one (as views), buffers included.

    Adapters are not part of a release. Of a model whose base is held quantised, codes and scales as they are. Of one
    that holds a part of the experts, that part, under their global numbers.
    """
    for name, tensor in model.state_dict().items():
        prefix, stacked, matrix = name.rpartition(".experts.")
        if ".lora." in name:
            continue
        if stacked:
            matrix, scale, _ = matrix.partition("_scale")
            for expert, weight in enumerate(tensor, first_expert(model.get_submodule(f"{prefix}.experts"))):
                yield f"{prefix}.experts.{expert}.{matrix}.{'scale' if scale else 'weight'}", weight
        else:
            yield name, tensor


def first_expert(experts: torch.nn.Module) -> int:
    """Global number of the first expert that is held; 0 where all are."""
    return int(experts.first)  # type: ignore[arg-type]


def checkpoint_tensors(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint holds of the model (or of this part of it), by name: ``released_tensors`` without gradients,
    and clones where the release that it was loaded from repeats a matrix under further names."""
    tensors = {name: tensor.detach() for name, tensor in released_tensors(model)}
    return tensors | {name: tensors[source].clone() for name, source in model.origin.copies.items()}


def scale_name(name: str) -> str:
    """The released name of the scale that goes with a weight."""
    return name.removesuffix("weight") + "scale"


# Writing.


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    format: str = "bf16",
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model under the released names, with ``config.json``, and the tokenizer's files beside it.

    A model that was loaded from a quantised release remembers its scales: blocks that did not change since get the same
    bits again, in the layout they came from.

    Args:
        folder: must not exist, or be empty; it appears whole or not at all.
        format: "fp32", "bf16", "fp8" or "fp4+fp8", as in the head of this file.
        tokenizer: a ``tokenizer.json``, or None for weights alone.
        max_shard_bytes: size beyond which the weights are split over several files.

    Raises:
        WeightsError: unknown format, weights that it cannot hold, folder in use, or the disk refused.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise WeightsError(f"format={format!r}: choose from {', '.join(FORMATS)}")
    refuse_unconstrained(model.config)
    with new_folder(folder) as temporary:
        write_weights(model, temporary, format, max_shard_bytes)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), temporary, model.config)


def refuse_unconstrained(config: ModelConfig) -> None:
    """For what leaves the project: checkpoints, which write the same files, hold any model.

    Raises:
        WeightsError: the released format cannot describe the model.
    """
    if config.hc_constraint != "sinkhorn":
        raise WeightsError(
            f"model.hc_constraint={config.hc_constraint}: the released format knows mHC alone, and its readers would "
            "compute another model; train with hc_constraint=sinkhorn to export (checkpoints hold either)"
        )


def write_weights(model: Transformer, folder: Path, format: Format, max_shard_bytes: int) -> None:
    """``config.json`` and the safetensors files of a model, into an existing folder."""
    write_release(folder, model_weights(model), model.config, format, max_shard_bytes, model.origin.copies)


def model_weights(model: Transformer) -> dict[str, Weight]:
    """The weights of a model as ``write_release`` takes them."""
    tensors = dict(released_tensors(model))

    def weight(name: str, tensor: Tensor) -> Weight:
        tensor = tensor.detach()
        scale = tensors.get(scale_name(name), model.origin.scales.get(name))
        if not _is_quantized(tensor):
            return Weight(tuple(tensor.shape), tensor.dtype, lambda: tensor, lambda: scale)
        assert scale is not None
        return Weight(
            _dense_shape(tensor.shape, tensor.dtype),
            torch.bfloat16,
            lambda: dequantize(tensor, scale, torch.float32),
            lambda: scale,
        )

    return {name: weight(name, tensor) for name, tensor in tensors.items() if not name.endswith(".scale")}


def write_release(
    folder: Path,
    weights: Mapping[str, Weight],
    config: ModelConfig,
    format: Format,
    max_shard_bytes: int,
    copies: Mapping[str, str] | None = None,
    observe: Observer | None = None,
    progress: Progress | None = None,
) -> None:
    """``config.json`` and safetensors files into an existing folder, one file's tensors in memory at a time.

    Args:
        weights: by released name.
        copies: further names, and the weight that each repeats.
        observe: is shown every tensor and what is stored of it.

    Raises:
        WeightsError: values that are not finite, or a matrix that FP4 cannot pack. OSError: the disk refused.
    """
    named = {**{name: name for name in weights}, **(copies or {})}
    sizes = {
        name: stored_bytes(source, weights[source].shape, weights[source].dtype, format)
        for name, source in named.items()
    }
    total, done = sum(sizes.values()), 0
    shards = split_by_size(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        stored: dict[str, Tensor] = {}
        for name in names:
            source = named[name]
            value = weights[source].read()
            encoded = encode(source, value, format, weights[source].scale())
            if name != source:
                encoded = {name: encoded[source].clone()}  # safetensors stores no tensor twice
            elif observe is not None:
                observe(name, value, encoded)
            stored |= encoded
            done += sizes[name]
            if progress is not None:
                progress(done, total)
        write_tensors(folder / file, stored)
        weight_map |= dict.fromkeys(stored, file)
    if len(shards) > 1:
        write_index(folder, "model", weight_map, total)
    write_json(folder / "config.json", config_json(config, format))


def config_json(config: ModelConfig, format: Format) -> dict[str, Any]:
    """What ``config.json`` says beside weights of a format."""
    return config.to_json() | _format_keys(format)


def encode(name: str, value: Tensor, format: Format, scale: Tensor | None = None) -> dict[str, Tensor]:
    """What is stored of a tensor: itself in the format's dtype, or codes and their scale.

    Args:
        name: released, decides what the format does with it; scale: of an earlier quantisation (``quantize_fp8``).
    """
    kind = _kind(name, value.dtype, format)
    if isinstance(kind, torch.dtype):
        return {name: value.to(kind)}
    if not torch.isfinite(value).all():
        raise WeightsError(f"{name}: holds values that are not finite; {format} cannot store them")
    fits = scale is not None and tuple(scale.shape) == _scale_shape(value.shape, kind)
    try:
        codes, new_scale = (quantize_fp4 if kind == "fp4" else quantize_fp8)(value, scale if fits else None)
    except ValueError as error:
        raise WeightsError(f"{name}: {error}; choose format=fp8") from None
    return {name: codes, scale_name(name): new_scale if format == "fp4+fp8" else new_scale.float()}


def copy_tokenizer(tokenizer: Path, folder: Path, config: ModelConfig) -> None:
    """``tokenizer.json`` and the ``tokenizer_config.json`` that lets transformers load it."""
    try:
        vocabulary: dict[str, Any] = dict(json.loads(tokenizer.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{tokenizer}: not a Hugging Face tokenizer.json ({error}); give one that is") from None
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


def copy_companions(source: Path, folder: Path) -> None:
    """The ``COMPANIONS`` that a release has, into another folder."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(inside(source, name), folder / name)


# Reading.


class Release:
    """A folder of weights: its config, and its tensors by released name, dequantised one at a time.

    Raises:
        WeightsError: damaged or foreign files, tensors that do not fit ``config.json`` (all listed).
        ModelConfigError: not a DeepSeek-V4 config.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = ModelConfig.from_json(self.folder)
        self.tensors = TensorFolder(self.folder, _from_transformers)
        self.entries = self.tensors.entries
        _refuse_foreign(self.folder, self.entries)
        foreign = any(entry.key.startswith("model.") for entry in self.entries.values())
        if foreign and not any(name.startswith("mtp.") for name in self.entries):
            self.config = without_mtp(self.config)  # transformers has no MTP block, but leaves its number in the config
        # Copies of shared matrices, and what each repeats.
        self.copies = {
            name: "head.weight" if name.endswith("head.weight") else "embed.weight"
            for name in self.entries
            if _COPY.fullmatch(name)
        }

    def is_quantized(self, name: str) -> bool:
        return self.entries[name].dtype in ("I8", "F8_E4M3")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the dequantised tensor."""
        entry = self.entries[name]
        return (*entry.shape[:-1], 2 * entry.shape[-1]) if entry.dtype == "I8" else entry.shape

    def scale(self, name: str) -> Tensor | None:
        """The scale of a quantised weight, a copy; None for others.

        Raises:
            WeightsError: it holds something that is no power of two.
        """
        if not self.is_quantized(name):
            return None
        scale = self.tensors.read(scale_name(name)).clone()
        if scale.dtype == torch.float8_e8m0fnu:
            good = bool((scale.view(torch.uint8) != 255).all())
        else:
            mantissa, exponent = torch.frexp(scale.float())
            good = bool(((mantissa == 0.5) & (exponent >= -126) & (exponent <= 128)).all())
        if not good:
            raise WeightsError(
                f"{self.entries[scale_name(name)].file}: {scale_name(name)} holds numbers that are no powers of two, "
                "as the scales of DeepSeek-V4 are; copy the file again"
            )
        return scale

    def read(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor | None]:
        """A tensor and the scale it is stored with: dequantised to ``dtype``, or, without a scale, as it is.

        Raises:
            WeightsError: NaN codes, or values beyond the range of ``dtype``.
        """
        scale = self.scale(name)
        codes = self.tensors.read(name).to(device)
        if scale is None:
            return codes, None
        if codes.dtype == torch.float8_e4m3fn and ((codes.view(torch.uint8) & 0x7F) == 0x7F).any():
            raise WeightsError(f"{self.entries[name].file}: {name} holds NaN; copy the file again")
        weight = dequantize(codes, scale.to(device), dtype)
        exponent = torch.frexp(scale.float()).exponent
        # Beyond these some codes leave bfloat16's range.
        extreme = bool(((exponent > 120) | (exponent < -123)).any())
        if extreme and not torch.equal(weight.double(), dequantize(codes, scale.to(device), torch.float64)):
            raise WeightsError(f"{self.entries[name].file}: {name} has values beyond the range of {dtype}")
        return weight, scale

    @property
    def format(self) -> Format:
        """The format that the tensors are in."""
        kinds = {entry.dtype for entry in self.entries.values()}
        if "I8" in kinds or "F8_E4M3" in kinds:
            return "fp4+fp8" if "I8" in kinds else "fp8"
        return "fp32" if self.entries.get("embed.weight", Entry(self.folder, "", (), "")).dtype == "F32" else "bf16"

    def check(self, wanted: Mapping[str, Tensor], elsewhere: Container[str] = ()) -> None:
        """Compares names, shapes and types, from the headers alone, with the tensors of a model.

        Args:
            elsewhere: names that may be there besides, since other processes hold them.

        Raises:
            WeightsError: what is missing, unexpected or misshapen, all of it.
        """
        problems = self.problems(wanted)
        problems["unexpected"] = [name for name in problems["unexpected"] if name not in elsewhere]
        if any(problems.values()):
            raise WeightsError(f"{self.folder}: these weights do not fit its config.json ({listed(problems)})")

    def problems(self, wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """What ``check`` would raise: names that are missing or unexpected, and what is misshapen."""
        expected = set(wanted) | set(self.copies)
        missing: list[str] = []
        misshapen: list[str] = []
        for name, tensor in wanted.items():
            if name.endswith(".scale"):  # of a model that keeps the codes; it was built from these headers
                continue
            if name not in self.entries:
                missing.append(name)
                continue
            entry, shape = self.entries[name], tuple(tensor.shape)
            if _is_quantized(tensor):
                shape = _dense_shape(shape, tensor.dtype)
            if self.is_quantized(name) and _may_be_quantized(name, entry.dtype):
                expected.add(scale_name(name))
                problem = self._scale_problem(name)
                if problem:
                    (missing if problem == scale_name(name) else misshapen).append(problem)
            elif entry.dtype not in (_INTEGERS if tensor.dtype in (torch.int64, torch.int32) else _FLOATS):
                misshapen.append(f"{name} is of type {entry.dtype}")
                continue
            if self.shape(name) != shape:
                misshapen.append(f"{name} is {self.shape(name)}, not {shape}")
        dropped = ("mtp.",) if self.config.num_nextn_predict_layers and not _has_mtp(wanted) else ()
        unexpected = [name for name in self.entries if name not in expected and not name.startswith(dropped or " ")]
        return {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}

    def _scale_problem(self, name: str) -> str | None:
        scale = self.entries.get(scale_name(name))
        if scale is None:
            return scale_name(name)
        wanted = _scale_shape(self.shape(name), "fp4" if self.entries[name].dtype == "I8" else "fp8")
        if scale.dtype not in ("F8_E8M0", "F32"):
            return f"{scale_name(name)} is of type {scale.dtype}, not F8_E8M0 or F32"
        return None if scale.shape == wanted else f"{scale_name(name)} is {scale.shape}, not {wanted}"

    def weights(self, scales: "Release | None" = None) -> dict[str, Weight]:
        """All tensors, as ``write_release`` takes them; ``scales``: another release, whose scales to keep."""
        kept = scales or self

        def scale(name: str) -> Tensor | None:
            return kept.scale(name) if name in kept.entries else None

        def weight(name: str) -> Weight:
            dtype = torch.bfloat16 if self.is_quantized(name) else DTYPES[self.entries[name].dtype]
            return Weight(self.shape(name), dtype, lambda: self.read(name)[0].clone(), lambda: scale(name))

        names = (name for name in self.entries if not name.endswith(".scale") and name not in self.copies)
        return {name: weight(name) for name in names}

    def check_copies(self, sources: Container[str]) -> None:
        """Raises WeightsError where a stored copy of embedding or head, if among ``sources``, differs from it."""
        for name, source in ((name, source) for name, source in self.copies.items() if source in sources):
            copy = self.tensors.read(name).clone()
            if not torch.equal(copy, self.tensors.read(source)):
                raise WeightsError(
                    f"{self.entries[name].file}: {name} differs from {source}, which DeepSeek-V4's MTP block shares"
                )


def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    mtp: bool = True,
    keep_quantized: bool = False,
    owned: Callable[[str], bool] | None = None,
    progress: Progress | None = None,
    spread: Callable[[Transformer], None] = lambda model: None,
) -> Transformer:
    """Builds the model that ``folder`` describes and fills it, strictly, one tensor in memory at a time.

    Args:
        folder: ``config.json`` and safetensors under the released names, in any of the formats above, or as
            transformers writes them.
        dtype: of the parameters; those that are released as float32 stay float32. float32 and bfloat16 hold every
            quantised value exactly.
        mtp: False leaves the MTP block out, and its tensors unread.
        keep_quantized: matrices that are stored as FP8 or FP4 stay so in memory; they are dequantised while they are
            used, and cannot be trained.
        owned: tells by released name which tensors to read; parameters of which none is owned stay on the meta device.
        progress: is called with the bytes read and those to read.
        spread: is given the model, on the meta device, to leave in it the experts that this process is to have; what
            others have is not read.

    Raises:
        WeightsError: missing, unexpected or misshapen tensors (all listed), damaged files, index entries that leave
            the folder, files of other models. ModelConfigError: not a DeepSeek-V4 config.
    """
    release = Release(folder)
    with torch.device("meta"):
        model = Transformer(release.config if mtp else without_mtp(release.config))
    release.check(dict(released_tensors(model)))  # before a wrong config.json makes us ask for its memory
    spread(model)
    if keep_quantized:
        _keep_quantized(model, release)
    for name, tensor in model.state_dict().items():
        if owned is None or any(owned(part) for part in _parts(name, tensor)):
            resident = _is_quantized(tensor) or _SCALE.search(name)
            stored = tensor.dtype if resident else _stored_dtype(name, tensor.dtype, dtype)
            _assign(model, name, torch.empty_like(tensor, dtype=stored, device=device))
    _fill(model, release, owned, progress)
    return model


def fill_weights(model: Transformer, folder: Path, progress: Progress | None = None) -> None:
    """Copies the tensors of ``folder`` into ``model``, whose dtypes and device stay; strict, as ``load_pretrained``.

    A model that holds a part of the experts takes that part.
    """
    release = Release(folder)
    release.check(dict(released_tensors(model)), _elsewhere(model))
    _fill(model, release, None, progress)


def check_weights(model: Transformer, folder: Path) -> None:
    """Compares the names, shapes and types in the headers of ``folder`` with those of ``model``."""
    Release(folder).check(dict(released_tensors(model)))


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of a folder's headers and of samples of its data: tells other weights without reading all of them."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            head = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(head))
            for sample in range(_SAMPLES):
                stream.seek(8 + head + (size - 8 - head) * sample // _SAMPLES)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def pretrained_config(folder: Path) -> ModelConfig:
    """The architecture of a folder of weights; raises as ``load_pretrained`` does, and reads headers only."""
    return Release(folder).config


def _fill(model: Transformer, release: Release, owned: Callable[[str], bool] | None, progress: Progress | None) -> None:
    wanted = {name: tensor for name, tensor in released_tensors(model) if owned is None or owned(name)}
    if model.mtp:
        release.check_copies(wanted)
        model.origin.copies = dict(release.copies)
    total, done = sum(release.entries[name].bytes for name in wanted), 0
    with torch.no_grad():
        for name in [name for name in release.entries if name in wanted]:  # as they lie in the files
            target = wanted[name]
            if _is_quantized(target) or name.endswith(".scale"):
                target.copy_(release.tensors.read(name))
            else:
                weight, scale = release.read(name, target.dtype, target.device)
                target.copy_(weight)
                if scale is not None:
                    model.origin.scales[name] = scale
            done += release.entries[name].bytes
            if progress is not None:
                progress(done, total)
    release.tensors.close()


def _elsewhere(model: Transformer) -> set[str]:
    """Released names of the experts, and their scales, that a model which holds a part of them does not hold."""
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            first = first_expert(module)
            others = set(range(model.config.n_routed_experts)) - set(range(first, first + len(module.w1)))
            parts = [f"{matrix}.{part}" for matrix in ("w1", "w2", "w3") for part in ("weight", "scale")]
            names |= {f"{name}.{expert}.{part}" for expert in others for part in parts}
    return names


def _keep_quantized(model: Transformer, release: Release) -> None:
    """Turns the parameters that are stored quantised into buffers of codes and scales."""

    def like(name: str) -> Tensor:
        entry = release.entries[name]
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    for name, module in model.named_modules():
        if isinstance(module, Linear) and release.is_quantized(f"{name}.weight"):
            module.hold_quantized(like(f"{name}.weight"), like(f"{name}.scale"))
        elif isinstance(module, Experts):
            for matrix in ("w1", "w2", "w3"):
                if release.is_quantized(f"{name}.0.{matrix}.weight"):
                    pair = (like(f"{name}.0.{matrix}.{part}") for part in ("weight", "scale"))
                    module.hold_quantized(matrix, *(t.expand(len(module.w1), *t.shape) for t in pair))


def _parts(name: str, tensor: Tensor) -> list[str]:
    prefix, stacked, matrix = name.removesuffix("_scale").rpartition(".experts.")
    return [f"{prefix}.experts.{e}.{matrix}.weight" for e in range(len(tensor))] if stacked else [name]


def _refuse_foreign(folder: Path, entries: Mapping[str, Any]) -> None:
    """Names the relatives of DeepSeek-V4 whose files look like its own (recipe, head; 8.3)."""
    drafter = [name for name in entries if "markov" in name or re.match(r"mtp\.[1-9]", name)]
    if drafter:
        raise WeightsError(
            f"{folder}: these are files of DeepSeek-V4-Flash-0731 or another DSpark model ({drafter[0]}): what they "
            "store as mtp.* is a DSpark drafter, not an MTP block; use DeepSeek-V4-Flash, -Pro or their -Base"
        )
    if any("engram" in name for name in entries):
        raise WeightsError(f"{folder}: these are files of DeepSeek-V4.1, another architecture; use DeepSeek-V4")
    internal = [name for name in entries if ".self_attn." in name or ".mlp." in name]
    if internal:
        raise WeightsError(
            f"{folder}: {internal[0]} is a name that transformers uses inside; save the model again with its "
            "save_pretrained(save_original_format=True), the default"
        )
    experts = {name: entry for name, entry in entries.items() if _EXPERT.search(name)}
    kinds = Counter(entry.dtype for entry in experts.values()).most_common()
    if len(kinds) > 1:
        name, odd = next((name, entry) for name, entry in experts.items() if entry.dtype == kinds[-1][0])
        raise WeightsError(
            f"{odd.file}: {name} is of type {odd.dtype}, other experts of type {kinds[0][0]}; a release has them "
            "all in one, so files are mixed: copy the folder again"
        )


_TRANSFORMERS = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def _from_transformers(name: str) -> str:
    """The released name of what transformers 5.23 writes: a prefix more, and one norm under another name."""
    if name in _TRANSFORMERS:
        return _TRANSFORMERS[name]
    if not name.startswith("model."):
        return name
    return re.sub(r"\.attn\.norm\.weight$", ".attn.kv_norm.weight", name.removeprefix("model."))


def _kind(name: str, dtype: torch.dtype, format: Format) -> torch.dtype | Literal["fp8", "fp4"]:
    """How a format stores a tensor."""
    if not dtype.is_floating_point or format in ("fp32", "bf16") or not _QUANTIZED.search(name):
        return _stored_dtype(name, dtype, torch.float32 if format == "fp32" else torch.bfloat16)
    return "fp4" if format == "fp4+fp8" and _EXPERT.search(name) else "fp8"


def stored_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, format: Format) -> int:
    """Size of a tensor in a format, its scale included."""
    kind = _kind(name, dtype, format)
    elements = prod(shape)
    if isinstance(kind, torch.dtype):
        return elements * kind.itemsize
    scales = prod(_scale_shape(shape, kind)) * (1 if format == "fp4+fp8" else 4)
    return scales + (elements // 2 if kind == "fp4" else elements)


def split_by_size(sizes: Mapping[Key, int], most: int) -> list[list[Key]]:
    """The names in lots of at most so many bytes, in their order; what is larger has a lot of its own."""
    shards: list[list[Key]] = [[]]
    room = most
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _format_keys(format: Format) -> dict[str, Any]:
    """What ``config.json`` says about the format, in the released spelling."""
    if format in ("fp32", "bf16"):
        return {"torch_dtype": "float32" if format == "fp32" else "bfloat16"}
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    expert = {"expert_dtype": "fp4"} if format == "fp4+fp8" else {}
    return {"torch_dtype": "bfloat16", "quantization_config": quantization, **expert}


def _is_quantized(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.float8_e4m3fn)


def _may_be_quantized(name: str, dtype: str) -> bool:
    return bool((_EXPERT if dtype == "I8" else _QUANTIZED).search(name))


def _dense_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    return (*shape[:-1], 2 * shape[-1]) if dtype == torch.int8 else tuple(shape)


def _scale_shape(shape: tuple[int, ...], kind: Literal["fp8", "fp4"]) -> tuple[int, ...]:
    like = torch.empty(0, dtype=torch.int8 if kind == "fp4" else torch.float8_e4m3fn)
    return scale_shape(tuple(shape), block_of(like))


def _has_mtp(names: Mapping[str, Any]) -> bool:
    return any(name.startswith("mtp.") for name in names)


def _stored_dtype(name: str, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    if not own.is_floating_point:
        return own
    return torch.float32 if name.endswith(_ALWAYS_FP32) else dtype


def _assign(model: Transformer, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module.register_parameter(leaf, torch.nn.Parameter(tensor))
    else:
        module.register_buffer(leaf, tensor)


def _vocabulary(tokenizer: Mapping[str, Any]) -> list[tuple[str, int]]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return list(vocabulary.items()) if isinstance(vocabulary, dict) else []
