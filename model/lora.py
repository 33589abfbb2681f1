"""LoRA: low-rank adapters of frozen matrices, in place, merged, and as files in PEFT's format.

An adapter adds alpha / r * B A to a matrix ``[out, in]``, with A ``[r, in]`` and B ``[out, r]``. What can be adapted in
the main layers (transformers, which the files are for, has no MTP block):

    attention       wq_a, wq_b, wkv, wo_a, wo_b; each of the five is a target by its own name, too
    shared_experts  w1, w2, w3 of the shared expert
    experts         w1, w2, w3 of every routed expert; w1 and w3 of an expert share A
    compressor      wkv, wgate of the compressors of CSA and HCA layers
    indexer         wq_b, weights_proj and the own compressor's wkv, wgate of CSA layers; its loss alone trains them

PEFT adapts wo_a and the routed experts as parameters (``target_parameters``), the others as modules. Its names and
shapes are transformers' (recipe 8.4); how it stacks adapters of experts and nests those of one module was read off its
own files.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.moe import ExpertAdapters, LowRank
from ..kernels.norm import at_least_fp32
from .config import PEFT_PARAMETERS, LoRAConfig, ModelConfig, WeightsError
from .init import generator_of
from .layers import GroupedLinear, Linear
from .moe import Experts
from .released import first_expert
from .tensor_files import listed, new_folder, open_tensors, write_json, write_tensors
from .transformer import Transformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = ("F32", "BF16", "F16")

# Target -> our name and transformers' of each of its matrices, below a layer.
_MATRICES: dict[str, dict[str, str]] = {
    "wq_a": {"attn.wq_a": "self_attn.q_a_proj"},
    "wq_b": {"attn.wq_b": "self_attn.q_b_proj"},
    "wkv": {"attn.wkv": "self_attn.kv_proj"},
    "wo_a": {"attn.wo_a": "self_attn.o_a_proj"},
    "wo_b": {"attn.wo_b": "self_attn.o_b_proj"},
    "shared_experts": {
        "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
        "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
        "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    },
    "experts": {
        "ffn.experts.gate_up": "mlp.experts.gate_up_proj",
        "ffn.experts.down": "mlp.experts.down_proj",
    },
    "compressor": {
        "attn.compressor.wkv": "self_attn.compressor.kv_proj",
        "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    },
    "indexer": {
        "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
        "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
        "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
        "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    },
}

# Keys of PEFT's config that say nothing about the adapter's arithmetic. Every key beside these and those that are read
# is a variant of LoRA: refused if it is set.
_INDIFFERENT = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "layers_pattern", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "init_lora_weights"),
}
# Our name and PEFT's.
_NUMBERS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
# Those that leave the base weights alone; the others (pissa, olora, ...) subtract something from them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


class Adapter(nn.Module):
    """The adapter of a linear layer, or of a stack of matrices; float32, it computes in the dtype of its input.

    Args:
        shape: ``[out, in]`` or ``[E, out, in]`` of what is adapted.
        groups: of a ``GroupedLinear``, whose groups share A and have their own rows of B; None: a plain layer.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        scale: float,
        dropout: float = 0.0,
        groups: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        *stack, outputs, inputs = shape
        self.A = nn.Parameter(torch.empty(*stack, rank, inputs, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(*stack, outputs, rank, dtype=torch.float32, device=device))
        self.scale, self.groups = scale, groups
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.A.to(x.dtype)) * self.scale
        b = self.B.to(x.dtype)
        if self.groups is None:
            return F.linear(low, b)
        return torch.einsum("btgl,gol->btgo", low, b.unflatten(0, (self.groups, -1)))

    def low_rank(self) -> LowRank:
        """The same as a value."""
        return LowRank(self.A, self.B, self.scale)


class RoutedAdapters(nn.Module):
    """The adapters of all routed experts of a layer; ``Experts`` asks for them and computes with them."""

    gate_up: Adapter
    down: Adapter

    def forward(self) -> ExpertAdapters:
        return ExpertAdapters(self.gate_up.low_rank(), self.down.low_rank())


class _Site(NamedTuple):
    """A matrix that can carry an adapter, or a stack of them."""

    name: str  # ours
    part: str  # which target it belongs to
    theirs: str  # transformers' name of the module, of experts: of the parameter
    shape: tuple[int, ...]  # [out, in], of experts [E, out, in]

    @property
    def owner(self) -> str:
        """Our name of the module whose ``lora`` the adapter is, or is in."""
        return self.name.rpartition(".")[0] if self.part == "experts" else self.name

    @property
    def lora(self) -> str:
        """Our name of the adapter."""
        return f"{self.owner}.lora{self.name.removeprefix(self.owner)}"

    @property
    def parameter(self) -> str:
        """Transformers' name of the parameter."""
        return self.theirs if self.part == "experts" else f"{self.theirs}.weight"

    @property
    def target(self) -> str:
        """The name by which PEFT is to target it."""
        return self.parameter if self.part in PEFT_PARAMETERS else self.theirs

    @property
    def key(self) -> str:
        """PEFT's name of the adapter: of two parameters of a module it wraps the second around the first."""
        module = re.sub(r"\.experts\.gate_up_proj$", ".experts.base_layer", self.theirs)
        return "base_model.model." + re.sub(r"\.experts\.down_proj$", ".experts", module)

    def peft_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of A and B in PEFT's files."""
        *stack, outputs, inputs = self.shape
        rows = rank * math.prod(stack)
        return {f"{self.key}.lora_A.weight": (rows, inputs), f"{self.key}.lora_B.weight": (outputs, rows)}

    def to_peft(self, low: LowRank) -> tuple[Tensor, Tensor]:
        """A and B as PEFT lays them out: A expert by expert, in B the experts vary fastest."""
        if self.part != "experts":
            return low.a, low.b
        return low.a.flatten(0, 1), low.b.permute(1, 2, 0).flatten(1)

    def from_peft(self, a: Tensor, b: Tensor, scale: float) -> LowRank:
        """The reverse of ``to_peft``, as views."""
        if self.part == "experts":
            a, b = a.unflatten(0, (self.shape[0], -1)), b.unflatten(1, (-1, self.shape[0])).permute(2, 0, 1)
        return LowRank(a, b, scale)

    def released(self, low: LowRank) -> Iterator[tuple[str, LowRank]]:
        """Released name of each single matrix, and its adapter (views)."""
        if self.part != "experts":
            yield f"{self.name}.weight", low
            return
        matrices = ("w1", "w3") if self.name.endswith("gate_up") else ("w2",)
        for expert, (a, b) in enumerate(zip(low.a, low.b, strict=True)):
            for matrix, rows in zip(matrices, b.chunk(len(matrices)), strict=True):
                yield f"{self.owner}.{expert}.{matrix}.weight", LowRank(a, rows, low.scale)


def _sites(model: Transformer, experts: int | None = None) -> Iterator[_Site]:
    """All matrices of the model that can carry adapters; with so many ``experts`` a layer, or as many as it holds."""
    for layer, block in enumerate(model.layers):
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                shapes[name] = (module.out_features, module.in_features)
            elif isinstance(module, Experts):
                (held, inner), hidden = module.w1.shape[:2], module.w2.shape[1]  # packed codes are narrower
                stack = held if experts is None else experts
                shapes |= {f"{name}.gate_up": (stack, 2 * inner, hidden), f"{name}.down": (stack, hidden, inner)}
        for part, matrices in _MATRICES.items():
            for ours, theirs in matrices.items():
                if ours in shapes:  # not every layer has a compressor or an indexer
                    yield _Site(f"layers.{layer}.{ours}", part, f"model.layers.{layer}.{theirs}", shapes[ours])


def _adapters(model: Transformer) -> dict[_Site, Adapter]:
    """The adapters that are in place."""
    modules = dict(model.named_modules())
    found = {site: modules.get(site.lora) for site in _sites(model)}
    return {site: module for site, module in found.items() if isinstance(module, Adapter)}


def adapter_shapes(model: Transformer, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what ``add_lora`` would add, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in _sites(model):
        *stack, outputs, inputs = site.shape
        if site.part in config.parts:
            shapes |= {
                f"{site.lora}.A": (*stack, config.rank, inputs),
                f"{site.lora}.B": (*stack, outputs, config.rank),
            }
    return shapes


def lora_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, e.g. ``layers.0.attn.wq_a.lora.A``: what is trained, saved, resumed."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora." in name}


def add_lora(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Puts adapters in place and freezes everything else. Their product is zero: the model's function stays.

    A is uniform in +-1 / sqrt(in), as PEFT draws it, from a generator of its own, seeded by ``seed`` and its name; B is
    0. Adapters are float32, on the device of what they adapt.

    Raises:
        ValueError: there are adapters already, or the model has nothing of a target.
    """
    sites = list(_sites(model))
    parts = {site.part for site in sites}
    if missing := [part for part in _MATRICES if part in config.parts - parts]:
        raise ValueError(
            f"lora.targets = {list(config.targets)}: no layer of this model has {' or '.join(missing)}; leave it out"
        )
    for site, adapter in _attach(
        model, {site: (config.rank, config.scale) for site in sites if site.part in config.parts}, config.dropout
    ).items():
        generator = generator_of(seed, f"{site.lora}.A")
        bound = adapter.A.shape[-1] ** -0.5
        shape: tuple[int, ...] = adapter.A.shape
        first = 0
        if site.part == "experts":  # of which this process may have some
            shape, first = (model.config.n_routed_experts, *shape[1:]), first_expert(model.get_submodule(site.owner))
        with torch.no_grad():
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            adapter.A.copy_(drawn[first : first + len(adapter.A)] if site.part == "experts" else drawn)


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Adds every adapter to the matrix that it adapts, in place, and takes it away; what is left can be trained whole.

    The sum is formed in float32 (float64 where the matrix is) and rounded once to the dtype of the matrix.

    Raises:
        ValueError: a matrix is held quantised. The model is unchanged then.
    """
    parameters = dict(model.named_parameters())
    adapters = [pair for site, adapter in _adapters(model).items() for pair in site.released(adapter.low_rank())]
    for weight, low in [(_matrix(parameters, name), low) for name, low in adapters]:
        weight.copy_(at_least_fp32(weight) + low.delta())
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.lora = None
    model.requires_grad_(True)


def save_adapter(model: Transformer, config: LoRAConfig, folder: str | Path, base: str = "") -> None:
    """Writes the adapters as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``, float32.

    ``peft.PeftModel.from_pretrained`` puts them on transformers' model.

    Args:
        config: with which they were added or loaded.
        folder: must not exist, or be empty; it appears whole or not at all.
        base: where the base model lies, for PEFT's ``base_model_name_or_path``.

    Raises:
        WeightsError: there are no adapters, the folder is in use, or the disk refused.
    """
    settings, tensors = peft_files(model, config, base)
    if not tensors:
        raise WeightsError(f"{folder}: the model has no adapters to save; add_lora or load_adapter puts them in place")
    with new_folder(Path(folder)) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors)
        write_json(temporary / CONFIG_FILE, settings)


def peft_files(
    model: Transformer, config: LoRAConfig, base: str = "", values: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT's two files are to hold: its config, and its tensors by its names, float32.

    Args:
        model, config, base: as in ``save_adapter``.
        values: the adapters by name (``lora_parameters``), those of all experts stacked; None takes the model's own.
    """
    adapters = _adapters(model)
    ranks = {site.target: (adapter.A.shape[-2], adapter.scale) for site, adapter in adapters.items()}
    # None differs, unless an adapter of PEFT's that was loaded brought other ranks.
    other = {re.escape(name): pair for name, pair in ranks.items() if pair != (config.rank, config.scale)}
    adapted, parameters = set(ranks), {site.target for site in adapters if site.part in PEFT_PARAMETERS}
    every = {site.target for site in _sites(model)}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _shortened(adapted - parameters, every),
        "target_parameters": _shortened(parameters, every) or None,
        "rank_pattern": {pattern: rank for pattern, (rank, _) in other.items()},
        "alpha_pattern": {pattern: _whole(scale * rank) for pattern, (rank, scale) in other.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors: dict[str, Tensor] = {}
    for site, adapter in adapters.items():
        low = adapter.low_rank()
        if values is not None:
            low = low._replace(a=values[f"{site.lora}.A"], b=values[f"{site.lora}.B"])
        pair = site.to_peft(low)
        names = site.peft_shapes(adapter.A.shape[-2])
        tensors |= {name: t.detach().float() for name, t in zip(names, pair, strict=True)}
    return settings, tensors


def load_adapter(model: Transformer, folder: str | Path) -> LoRAConfig:
    """Puts the adapters of a folder, ours or one that PEFT wrote for transformers' model, in place; freezes the rest.

    Returns:
        The config for ``save_adapter``. Its targets are those of which anything is adapted.

    Raises:
        ValueError: there are adapters already.
        WeightsError: not a plain LoRA adapter of this model: missing, unexpected or misshapen tensors (all listed),
            variants of LoRA (by name), damaged files. The model is unchanged then.
    """
    config, found = _read(Path(folder), list(_sites(model)))
    _copy(found, _attach(model, {site: (low.a.shape[-2], low.scale) for site, low in found.items()}, config.dropout))
    return config


def fill_adapter(model: Transformer, folder: str | Path) -> None:
    """Copies the adapters of a folder into those that the model has; of a part of the experts, that part.

    Raises:
        WeightsError: as ``load_adapter``, or the model has adapters in other places.
    """
    _, read = _read(Path(folder), list(_sites(model, model.config.n_routed_experts)))
    whole, adapters = {site.name: low for site, low in read.items()}, _adapters(model)
    same = whole.keys() == {site.name for site in adapters}
    found = {site: _held(model, site, whole[site.name]) for site in adapters} if same else {}
    if not same or any(found[site].a.shape != a.A.shape for site, a in adapters.items()):
        raise WeightsError(f"{folder}: these adapters have other targets or ranks than the model's")
    _copy(found, adapters)


def _held(model: Transformer, site: _Site, low: LowRank) -> LowRank:
    """Of adapters of all experts, those of the experts that the model holds."""
    if site.part != "experts":
        return low
    first = first_expert(model.get_submodule(site.owner))
    held = slice(first, first + site.shape[0])
    return low._replace(a=low.a[held], b=low.b[held])


@torch.no_grad()
def _copy(found: Mapping[_Site, LowRank], adapters: Mapping[_Site, Adapter]) -> None:
    for site, adapter in adapters.items():
        adapter.A.copy_(found[site].a)
        adapter.B.copy_(found[site].b)


def read_adapter(folder: str | Path, config: ModelConfig) -> dict[str, LowRank]:
    """The adapter of each matrix by its released name, e.g. ``layers.3.ffn.experts.7.w1.weight``, without a model.

    The factors are views of the mapped file; ``LowRank.delta`` forms what is added to the matrix, float32. Errors as in
    ``load_adapter``.
    """
    with torch.device("meta"):
        model = Transformer(config)
    _, found = _read(Path(folder), list(_sites(model)))
    return {name: single for site, low in found.items() for name, single in site.released(low)}


def _attach(model: Transformer, wanted: Mapping[_Site, tuple[int, float]], dropout: float) -> dict[_Site, Adapter]:
    """Freezes the model and puts adapters of given rank and scale in place; A is not filled yet."""
    if lora_parameters(model):
        raise ValueError("this model has adapters already; merge them (merge_lora) or load the base model again")
    model.requires_grad_(False)
    attached = {}
    for site, (rank, scale) in wanted.items():
        owner = model.get_submodule(site.owner)
        assert isinstance(owner, Linear | Experts)
        groups = owner.groups if isinstance(owner, GroupedLinear) else None
        device = (owner.w1 if isinstance(owner, Experts) else owner.weight).device
        adapter = Adapter(site.shape, rank, scale, dropout, groups, device).train(owner.training)
        if isinstance(owner, Experts):
            owner.lora = owner.lora or RoutedAdapters()
            setattr(owner.lora, site.name.rpartition(".")[2], adapter)
        else:
            owner.lora = adapter
        attached[site] = adapter
    return attached


def _matrix(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight of a released name; of routed experts, a view of the stack."""
    owner, stacked, single = name.partition(".experts.")
    expert, matrix, _ = single.split(".") if stacked else ("", "", "")
    parameter = f"{owner}.experts.{matrix}" if stacked else name
    if parameter not in parameters:
        raise ValueError(f"{parameter} is held quantised; fold its adapter with openv4 merge, or load it dequantised")
    return parameters[parameter][int(expert)] if stacked else parameters[parameter]


def _read(folder: Path, sites: list[_Site]) -> tuple[LoRAConfig, dict[_Site, LowRank]]:
    """The adapters of a folder, compared with what its config announces for these sites; views of the mapped file."""
    file = folder / CONFIG_FILE
    settings = _settings(file)
    try:
        found_at = {site: name for site in sites if (name := _hit(site, settings))}
        parts = tuple(part for part in _MATRICES if any(site.part == part for site in found_at))
        if not parts:
            raise ValueError("target_modules and target_parameters name nothing that openv4 adapts")
        numbers: dict[str, Any] = {ours: settings.get(theirs) for ours, theirs in _NUMBERS.items()}
        default = LoRAConfig(targets=parts, **numbers)
        configs = {}
        for site, name in found_at.items():
            rank = _by_pattern(settings.get("rank_pattern"), name, default.rank)
            alpha = _by_pattern(settings.get("alpha_pattern"), name, default.alpha)
            configs[site] = _effective(replace(default, rank=rank, alpha=alpha), settings)
        default = _effective(default, settings)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise WeightsError(f"{file}: {error}; correct the file or save the adapter again") from None
    layers = [site.name.rpartition(".")[0] for site in configs if site.part == "experts"]
    if alone := [layer for layer in layers if layers.count(layer) == 1]:
        raise WeightsError(
            f"{file}: adapts gate_up_proj or down_proj of {alone[0]} alone; openv4 needs both in target_parameters"
        )
    wanted = {name: shape for site, own in configs.items() for name, shape in site.peft_shapes(own.rank).items()}
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        _compare(folder, wanted, {name: (tuple(t.get_shape()), t.get_dtype()) for name, t in found.items()})
        adapters = {}
        for site, own in configs.items():
            a, b = (tensors.get_tensor(name).float() for name in site.peft_shapes(own.rank))
            adapters[site] = site.from_peft(a, b, own.scale)
        return default, adapters


def _compare(
    folder: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": [
            f"{name} is {shape}, not {wanted[name]}"
            for name, (shape, _) in found.items()
            if name in wanted and shape != wanted[name]
        ],
        "of other types": [f"{name} is {dtype}" for name, (_, dtype) in found.items() if dtype not in _FLOATS],
    }
    if any(problems.values()):
        raise WeightsError(
            f"{folder}: does not fit the model and its own {CONFIG_FILE} ({listed(problems)}); name an adapter of this "
            "model"
        )


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's config, after refusing what changes an adapter's meaning and is not read here."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not readable ({error}); name a folder with PEFT's {CONFIG_FILE}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise WeightsError(f"{file}: not the config of a LoRA adapter (peft_type LORA); name a folder that PEFT wrote")
    unread = {key: value for key, value in settings.items() if key not in _READ | _INDIFFERENT}
    refused = [f"{key}={value!r}" for key, value in unread.items() if value and value != "none"]
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        refused.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if refused:
        raise WeightsError(f"{file}: {', '.join(refused)} is no plain LoRA and not supported; train without it")
    return settings


def _hit(site: _Site, settings: Mapping[str, Any]) -> str | None:
    """The name under which PEFT's config targets a site, None if it does not."""
    layers = settings.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    module = site.theirs
    if site.part != "experts" and _named(settings.get("target_modules"), module):
        excluded = _named(settings.get("exclude_modules"), module)
        if not excluded and (not layers or int(site.name.split(".")[1]) in layers):
            return module
    return site.parameter if _named(settings.get("target_parameters"), site.parameter) else None


def _named(targets: str | list[str] | None, name: str) -> bool:
    """Whether a pattern fits ``name`` or a list holds an end of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets or ())


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits an end of ``name``."""
    fitting = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(fitting, default)


def _effective(config: LoRAConfig, settings: Mapping[str, Any]) -> LoRAConfig:
    """With the alpha that rank-stabilised LoRA means: it divides by the root of the rank."""
    return replace(config, alpha=config.alpha * math.sqrt(config.rank)) if settings.get("use_rslora") else config


def _shortened(adapted: Set[str], every: Set[str]) -> list[str]:
    """Transformers' names without the layer, where all layers that have it are adapted; else whole."""
    single = {name.split(".", 3)[3] for name in every - adapted}  # model.layers.N.rest
    return sorted({name if (end := name.split(".", 3)[3]) in single else end for name in adapted})


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
