"""Every tensor of a model, from its config alone: names, shapes, what part it belongs to, how it is released.

Nothing is built and torch is not imported, so that the 1.6T model is counted in milliseconds. Names are the released
ones (recipe 8.3); the routed experts of a block are one entry per matrix, whose name has ``*`` for the expert.

Shapes: S streams, D hidden, H heads, C head dim, E experts, K experts per token, F expert intermediate, V vocabulary.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, get_args

from .config import LoRAConfig, ModelConfig

Part = Literal[
    "embedding",
    "head",
    "attention",
    "compressor",
    "indexer",
    "router",
    "routed experts",
    "shared expert",
    "mHC",
    "norms",
    "MTP projections",
]
PARTS: tuple[Part, ...] = get_args(Part)

# How a tensor of the instruct models is released; the other formats follow from it (``accounting.tensor_bytes``).
Stored = Literal["fp32", "bf16", "fp8", "fp4", "int64"]
# Of a whole release (``model.released``).
Format = Literal["fp32", "bf16", "fp8", "fp4+fp8"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One tensor, or one for each routed expert of a block.

    Attributes:
        name: released, with ``*`` for the number of the expert.
        shape: of one of them, a matrix as ``(out, in)``.
        part: of the architecture.
        stored: how the instruct models are released (recipe 8.3).
        copies: how many tensors there are under the name.
        trained: a parameter; otherwise a buffer (selection biases, hash tables).
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    stored: Stored = "bf16"
    copies: int = 1
    trained: bool = True

    @property
    def numel(self) -> int:
        """Elements, over all copies."""
        return prod(self.shape) * self.copies

    @property
    def block(self) -> str:
        """``layers.3``, ``mtp.0``, or nothing for what belongs to no block."""
        kind, _, rest = self.name.partition(".")
        return f"{kind}.{rest.partition('.')[0]}" if kind in ("layers", "mtp") else ""

    @property
    def in_mtp(self) -> bool:
        return self.name.startswith("mtp.")

    @property
    def adapter(self) -> bool:
        return ".lora." in self.name

    @property
    def quantized(self) -> bool:
        """Released in FP8 or FP4: multiplies in the dtype of the streams, or as FP8 numbers."""
        return self.stored in ("fp8", "fp4")

    @property
    def matrix(self) -> bool:
        """A matrix that hidden vectors are multiplied by, which Muon trains: no table, bias, vector or adapter."""
        tables = self.part in ("embedding", "head") or self.name.endswith(".ape") or self.adapter
        return self.trained and len(self.shape) == 2 and not tables

    @property
    def parameter(self) -> str:
        """The name in ``Transformer``, where the experts of a block are stacked along a first dimension."""
        stack, routed, matrix = self.name.partition(".experts.*.")
        return f"{stack}.experts.{matrix.removesuffix('.weight')}" if routed else self.name

    @property
    def stacked(self) -> tuple[int, ...]:
        """The shape in ``Transformer``."""
        return (self.copies, *self.shape) if self.parameter != self.name else self.shape

    def names(self) -> Iterator[str]:
        """The released name of each copy."""
        if self.parameter == self.name:
            yield self.name
        else:
            yield from (self.name.replace("*", str(expert)) for expert in range(self.copies))


@functools.cache
def tensor_shapes(config: ModelConfig, mtp: bool = True) -> tuple[Shape, ...]:
    """All tensors of a model, ordered as ``Transformer(config).state_dict()``; without ``mtp`` not its MTP block."""
    main, d = config.num_hidden_layers, config.hidden_size
    shapes = [
        *_collapse(config),
        Shape("embed.weight", (config.vocab_size, d), "embedding"),
        *(s for layer in range(main) for s in _under(f"layers.{layer}", _block(config, layer))),
        Shape("norm.weight", (d,), "norms"),
        Shape("head.weight", (config.vocab_size, d), "head"),
    ]
    for depth in range(config.num_nextn_predict_layers if mtp else 0):
        block = list(_block(config, main + depth))
        mixing = sum(s.part == "mHC" for s in block)
        extra = [
            *(Shape(f"{name}.weight", (d, d), "MTP projections", "fp8") for name in ("e_proj", "h_proj")),
            *(Shape(f"{name}.weight", (d,), "norms") for name in ("enorm", "hnorm", "norm")),
        ]
        shapes += _under(f"mtp.{depth}", [*block[:mixing], *_collapse(config), *block[mixing:], *extra])
    return tuple(shapes)


def logical_rows(s: Shape, config: ModelConfig) -> tuple[int, ...]:
    """Rows of the logically independent matrices that a matrix stacks, as ``Transformer.row_splits`` (recipe 5)."""
    rows = s.shape[0]
    if s.name.endswith(("hc_attn_fn", "hc_ffn_fn")):
        return config.hc_mult, config.hc_mult, config.hc_mult**2
    if s.name.endswith("attn.wo_a.weight"):
        return (rows // config.o_groups,) * config.o_groups
    if ".compressor.w" in s.name and rows == 2 * (config.index_head_dim if ".indexer." in s.name else config.head_dim):
        return rows // 2, rows // 2
    return (rows,)


# What LoRA can adapt in a main layer: target -> the linear maps whose names have these ends (``model.lora``).
_ADAPTED = {
    **{name: (f"attn.{name}",) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")},
    "shared_experts": tuple(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")),
    "compressor": ("attn.compressor.wkv", "attn.compressor.wgate"),
    "indexer": tuple(f"attn.indexer.{name}" for name in ("wq_b", "weights_proj", "compressor.wkv", "compressor.wgate")),
}


@functools.cache
def adapter_shapes(config: ModelConfig, lora: LoRAConfig) -> tuple[Shape, ...]:
    """The factors A ``(rank, in)`` and B ``(out, rank)`` that ``model.lora.add_lora`` would add, under its names.

    Routed experts have a copy each; their gate and up projections share A.
    """
    linear = {f"{end}.weight" for part, ends in _ADAPTED.items() if part in lora.parts for end in ends}
    shapes: list[Shape] = []
    for s in tensor_shapes(config, mtp=False):
        out, into = (*s.shape, 0)[:2]
        site, routed, matrix = s.parameter.partition(".experts.")
        if routed:
            if "experts" not in lora.parts or matrix == "w3":
                continue
            name, rows = ("gate_up", 2 * out) if matrix == "w1" else ("down", out)
            site = f"{site}.experts.lora.{name}"
        elif s.name.removeprefix(f"{s.block}.") in linear:
            site, rows = f"{s.name.removesuffix('.weight')}.lora", out
        else:
            continue
        shapes += (
            Shape(f"{site}.A", (lora.rank, into), s.part, "fp32", s.copies),
            Shape(f"{site}.B", (rows, lora.rank), s.part, "fp32", s.copies),
        )
    return tuple(shapes)


def _under(prefix: str, shapes: Iterator[Shape] | list[Shape]) -> list[Shape]:
    return [replace(s, name=f"{prefix}.{s.name}") for s in shapes]


def _collapse(config: ModelConfig) -> list[Shape]:
    """What collapses the streams before an output head."""
    streams, rows = config.hc_mult, config.hc_mult * config.hidden_size
    shapes = {"fn": (streams, rows), "base": (streams,), "scale": (1,)}
    return [Shape(f"hc_head_{name}", shape, "mHC", "fp32") for name, shape in shapes.items()]


def _block(config: ModelConfig, layer: int) -> Iterator[Shape]:
    """A block of main model or MTP, names below it."""
    d, streams = config.hidden_size, config.hc_mult
    for site in ("attn", "ffn"):
        rows = streams * (streams + 2)
        for name, shape in (("fn", (rows, streams * d)), ("base", (rows,)), ("scale", (3,))):
            yield Shape(f"hc_{site}_{name}", shape, "mHC", "fp32")
    yield Shape("attn_norm.weight", (d,), "norms")
    yield from _attention(config, layer)
    yield Shape("ffn_norm.weight", (d,), "norms")
    yield from _moe(config, layer)


def _attention(config: ModelConfig, layer: int) -> Iterator[Shape]:
    d, low, heads = config.hidden_size, config.q_lora_rank, config.num_attention_heads * config.head_dim
    kind, ratio, grouped = config.kinds[layer], config.compress_ratios[layer], config.o_groups * config.o_lora_rank
    yield Shape("attn.attn_sink", (config.num_attention_heads,), "attention", "fp32")
    yield Shape("attn.wq_a.weight", (low, d), "attention", "fp8")
    yield Shape("attn.q_norm.weight", (low,), "norms")
    yield Shape("attn.wq_b.weight", (heads, low), "attention", "fp8")
    yield Shape("attn.wkv.weight", (config.head_dim, d), "attention", "fp8")
    yield Shape("attn.kv_norm.weight", (config.head_dim,), "norms")
    yield Shape("attn.wo_a.weight", (grouped, heads // config.o_groups), "attention", "fp8")
    yield Shape("attn.wo_b.weight", (d, grouped), "attention", "fp8")
    if ratio:
        yield from _compressor("attn.compressor", config, config.head_dim, ratio, kind == "csa", "compressor")
    if kind == "csa":
        width = config.index_n_heads * config.index_head_dim
        yield Shape("attn.indexer.wq_b.weight", (width, low), "indexer", "fp8")
        yield Shape("attn.indexer.weights_proj.weight", (config.index_n_heads, d), "indexer")
        yield from _compressor("attn.indexer.compressor", config, config.index_head_dim, ratio, True, "indexer")


def _compressor(name: str, config: ModelConfig, dim: int, ratio: int, overlap: bool, part: Part) -> Iterator[Shape]:
    width = 2 * dim if overlap else dim
    yield Shape(f"{name}.ape", (ratio, width), part, "fp32")
    yield Shape(f"{name}.wkv.weight", (width, config.hidden_size), part)
    yield Shape(f"{name}.wgate.weight", (width, config.hidden_size), part)
    yield Shape(f"{name}.norm.weight", (dim,), "norms")


def _moe(config: ModelConfig, layer: int) -> Iterator[Shape]:
    d, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield Shape("ffn.gate.weight", (experts, d), "router")
    if layer < min(config.num_hash_layers, config.num_hidden_layers):
        table = (config.vocab_size, config.num_experts_per_tok)
        yield Shape("ffn.gate.tid2eid", table, "router", "int64", trained=False)
    else:
        yield Shape("ffn.gate.bias", (experts,), "router", "fp32", trained=False)
    matrices = {"w1": (inner, d), "w2": (d, inner), "w3": (inner, d)}
    for name, shape in matrices.items():
        yield Shape(f"ffn.experts.*.{name}.weight", shape, "routed experts", "fp4", experts)
    for name, shape in matrices.items():
        yield Shape(f"ffn.shared_experts.{name}.weight", shape, "shared expert", "fp8")
