"""What a model costs, from its config alone: parameters, floating-point operations, bytes of caches and files.

Nothing is built and torch is not imported. One multiplication and one addition are two operations. Counted are sums of
products: linear maps, attention, index scores, the mixing of the streams. What works element by element (norms,
rotations, softmax, activations, pooling, the optimizer) is not, as in ``torch.utils.flop_counter``.

Shapes: T tokens, S streams, D hidden, H heads, C head dim, I index heads, J index dim, E experts, K experts per token,
W window, V vocabulary.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .config import AttentionKind, AttentionMode, LoRAConfig, ModelConfig, Recompute
from .shapes import Format, Part, Shape, adapter_shapes, tensor_shapes

# Weights that share a scale: a block of an FP8 matrix, a group within a row of an FP4 matrix (recipe 8.1).
FP8_BLOCK, FP4_GROUP = 128, 32


# Parameters.


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; buffers (selection biases, hash tables) are not counted."""

    total: int  # without the MTP block
    active: int  # used by one token: body and head, without the embedding table and the MTP block
    mtp: int  # of the MTP block
    mtp_active: int


@functools.cache
def count_parameters(config: ModelConfig) -> ParameterCount:
    """Total and active parameters (recipe 12: 284.33B / 13.27B for Flash, 1573.0B / 48.85B for Pro)."""
    main, mtp = (list(parameters_by_part(config, mtp).values()) for mtp in (False, True))
    return ParameterCount(*(sum(pair[place] for pair in pairs) for pairs in (main, mtp) for place in (0, 1)))


def parameters_by_part(config: ModelConfig, mtp: bool = False) -> dict[Part, tuple[int, int]]:
    """Total and active parameters of each part, of the main model or of the MTP block alone."""
    parts: dict[Part, tuple[int, int]] = {}
    for s in tensor_shapes(config):
        if s.trained and s.in_mtp == mtp:
            total, active = parts.get(s.part, (0, 0))
            parts[s.part] = (total + s.numel, active + (0 if s.part == "embedding" else _used(s, config)))
    return parts


def _used(s: Shape, config: ModelConfig) -> int:
    """Weights that one token meets."""
    return s.numel // s.copies * config.num_experts_per_tok if s.copies > 1 else s.numel


def parameter_table(config: ModelConfig) -> list[tuple[str, str]]:
    """Lines for the start of a run: what was built and how large it is."""
    count = count_parameters(config)
    kinds = config.kinds[: config.num_hidden_layers]
    return [
        ("layers", f"{len(kinds)} ({kinds.count('swa')} SWA, {kinds.count('csa')} CSA, {kinds.count('hca')} HCA)"),
        ("experts", f"{config.n_routed_experts} routed, {config.num_experts_per_tok} active, 1 shared"),
        ("parameters", f"{_si(count.total)} total, {_si(count.active)} active, {_si(count.mtp)} in the MTP block"),
    ]


def _si(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return str(number)


# Training.

# The arithmetic of a product: matrices that may be FP8, routed experts that may be FP4, attention in BF16, the
# indexer's scores, what stays in FP32 or TF32 (router, compressors, mHC), the output head, adapters.
Kind = Literal["projection", "expert", "core", "index", "fp32", "head", "adapter"]
Task = Part | Literal["attention core", "index scores", "indexer loss", "stream mixing", "adapters"]


@dataclass(frozen=True)
class Work:
    """Operations of one kind of work, per token of a document: a mean over its tokens.

    Attributes:
        part: a part of the architecture for its matrices, or what is done without weights.
        kind: its arithmetic.
        mtp: of the MTP block.
        forward, backward: of a training step.
        replayed: forward work that recomputation does once more.
    """

    part: Task
    kind: Kind
    mtp: bool
    forward: float
    backward: float
    replayed: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.replayed


class _Product(NamedTuple):
    """Work, and how often each kind of recomputation does it again."""

    part: Task
    kind: Kind
    forward: float
    gradients: float  # backward work over forward work
    selective: float = 0.0  # replayed work over forward work
    full: float = 1.0


@functools.cache  # asked for with every logged step
def training_flops(
    config: ModelConfig,
    length: int,
    attention: AttentionMode = "sparse",
    mtp: bool = True,
    *,
    indexer_loss: bool = False,
    recompute: Recompute = "none",
    lora: LoRAConfig | None = None,
) -> tuple[Work, ...]:
    """Operations per token of training on documents of ``length`` tokens, by part and by kind of arithmetic.

    Backward work, as a multiple of forward work:

        matrices and output head             2: gradients of inputs and of weights; 1 where LoRA froze the weights
        attention core, stream mixing        2: of both factors
        matrices of the indexer              1 with the indexer's loss, else 0: their inputs get no gradient
        indexer loss                         2 of its scores, over what attention looks at; 0 of its target
        index scores of the selection        0
        everything but indexer and its loss  0 in an indexer warm-up, which has no MTP block either

    A dense pass without the loss does not run the indexer. The MTP block has a token less than the document. Attention
    kernels that compute scores again in their backward pass are counted without this.

    Args:
        length: tokens of each document, not of the row it is packed in.
        attention: what CSA layers attend to; a warm-up includes ``indexer_loss``.
        mtp: with the MTP block, if the model has one.
        indexer_loss: the indexers train as well.
        recompute: ``full`` does each block again but for the indexer's selection, ``selective`` attention cores, first
            output projections, stream mixing and indexer losses (``model.recompute``).
        lora: train these adapters, and nothing else.
    """
    warmup = attention == "indexer_warmup"
    loss = indexer_loss or warmup
    has_mtp = mtp and not warmup and config.num_nextn_predict_layers > 0
    products: list[tuple[bool, _Product]] = []
    adapters = adapter_shapes(config, lora) if lora else ()
    for s in (*tensor_shapes(config, has_mtp), *adapters):
        if (s.matrix or s.part == "head" or s.adapter) and (s.part != "indexer" or loss or attention == "sparse"):
            product = _matrix(s, config, warmup, loss, lora is not None)
            products += [
                (in_mtp, product) for in_mtp in ((False, True) if s.part == "head" and has_mtp else (s.in_mtp,))
            ]
    for in_mtp in (False, True) if has_mtp else (False,):
        collapse = 2 * config.hc_mult * config.hidden_size  # of the streams, before the head
        products.append((in_mtp, _Product("stream mixing", "fp32", collapse, 2.0, full=0.0)))
    for layer in range(config.num_hidden_layers + has_mtp):
        in_mtp = layer >= config.num_hidden_layers
        products += [(in_mtp, p) for p in _weightless(config, layer, length - in_mtp, attention, loss)]
    sums: dict[tuple[Task, Kind, bool], list[float]] = {}
    for in_mtp, p in products:
        frozen = warmup and p.part in ("attention core", "stream mixing")
        replayed = {"none": 0.0, "selective": p.selective, "full": p.full}[recompute]
        share = (length - 1) / length if in_mtp else 1.0
        work = sums.setdefault((p.part, p.kind, in_mtp), [0.0, 0.0, 0.0])
        for place, times in enumerate((1.0, 0.0 if frozen else p.gradients, 0.0 if warmup else replayed)):
            work[place] += share * times * p.forward
    return tuple(Work(*key, *work) for key, work in sums.items())


def training_flops_per_token(
    config: ModelConfig,
    length: int,
    attention: AttentionMode,
    mtp: bool = True,
    *,
    indexer_loss: bool = False,
    recompute: Recompute = "none",
    lora: LoRAConfig | None = None,
) -> float:
    """All of ``training_flops``. What a step is worth, and MFU is measured by, is without recomputation."""
    work = training_flops(config, length, attention, mtp, indexer_loss=indexer_loss, recompute=recompute, lora=lora)
    return sum(w.total for w in work)


def _matrix(s: Shape, config: ModelConfig, warmup: bool, loss: bool, frozen: bool) -> _Product:
    """The product with a matrix, or with a factor of an adapter."""
    kind: Kind = "fp32"
    if s.adapter:
        kind = "adapter"
    elif s.part == "head":
        kind = "head"
    elif s.part == "routed experts":
        kind = "expert"
    elif s.stored == "fp8" or s.name.endswith("weights_proj.weight"):
        kind = "projection"
    learns = s.adapter or not frozen
    gradients = 0.0 if warmup else 1.0 + learns
    if s.part == "indexer":  # whose inputs get no gradient; the input of B is the indexer's own
        gradients = float(loss and learns) * (2.0 if s.name.endswith(".B") else 1.0)
    times = config.hc_mult if s.name.endswith("h_proj.weight") else 1  # which maps each stream
    outside = s.part in ("head", "MTP projections") or "hc_head" in s.name  # of the blocks, which are replayed
    grouped = s.name.endswith(("attn.wo_a.weight", "attn.wo_a.lora.B"))  # a batched product, which is not kept
    forward = 2.0 * times * _used(s, config)
    return _Product("adapters" if s.adapter else s.part, kind, forward, gradients, float(grouped), float(not outside))


def _weightless(
    config: ModelConfig, layer: int, length: int, attention: AttentionMode, loss: bool
) -> Iterator[_Product]:
    """The products of a block that are not with a matrix of weights."""
    kind, ratio, streams = config.kinds[layer], config.compress_ratios[layer], config.hc_mult
    heads = config.num_attention_heads * config.head_dim
    visible = _mean_of_capped_count(length, ratio, length) if ratio else 0.0
    sparse = kind == "csa" and attention == "sparse"
    attended = _mean_of_capped_count(length, ratio, config.index_topk) if sparse else visible
    window = _mean_of_capped_count(length, 1, config.sliding_window)
    yield _Product("attention core", "core", 4 * heads * (window + attended), 2.0, 1.0)
    # At each of two sites: S to 1, then S and the layer's output to S.
    mixing = 2 * 2 * config.hidden_size * (streams + streams * (streams + 1))
    yield _Product("stream mixing", "fp32", mixing, 2.0, 1.0)
    if kind == "csa":
        # Each head's score, and their sum.
        scores = 2 * config.index_n_heads * (config.index_head_dim + 1)
        if sparse:
            yield _Product("index scores", "index", scores * visible, 0.0, 0.0, 0.0)
        if loss:  # whose gradient is taken at once, so that a replay does it all again
            yield _Product("indexer loss", "index", scores * attended, 2.0, 3.0, 3.0)
            yield _Product("indexer loss", "core", 2 * heads * attended, 0.0, 1.0)


def _mean_of_capped_count(length: int, ratio: int, cap: int) -> float:
    """Mean over tokens t of min(floor((t + 1) / ratio), cap), exactly."""
    full = min(length // ratio, cap)
    # Blocks 1 .. full - 1 are the last seen for `ratio` tokens each; everything later sees the cap or the last block.
    below = ratio * (full * (full - 1) // 2)
    return (below + (length - (full * ratio - 1)) * full) / length if full else 0.0


# Decoding.


@dataclass(frozen=True)
class FormatWeights:
    """What an operation costs in a number format, in units of an FP8 operation."""

    fp8: float = 1.0  # matrices, and the routed experts: FP4 times FP8 runs at the rate of FP8
    fp4: float = 0.5  # V4's index scores
    bf16: float = 2.0  # attention cores


# The paper prints ratios, no formula; this reproduces them (recipe 12).
INFERRED = FormatWeights()
UNWEIGHTED = FormatWeights(1.0, 1.0, 1.0)
FP4_AS_FP8 = FormatWeights(1.0, 1.0, 2.0)


@dataclass(frozen=True)
class SparseMLA:
    """DeepSeek-V3.2, the paper's yardstick: latent attention to the 2048 keys that an indexer chooses in each layer."""

    layers: int = 61
    active: float = 37.48e9
    heads: int = 128
    latent: int = 512  # the value, and with the rotated channels the key
    rope: int = 64
    top_k: int = 2048
    index_heads: int = 64
    index_dim: int = 128
    entry_bytes: int = 512 + 16 + 2 * 64  # FP8, four float32 scales, BF16
    key_bytes: int = 128 + 4  # FP8 and a float32 scale


V32 = SparseMLA()


def decode_flops(model: ModelConfig | SparseMLA, context: int, weights: FormatWeights = INFERRED) -> float:
    """Cost of one token as the last of ``context`` tokens, without MTP (recipe 12).

    Two operations per active parameter, 2 I J per entry that the indexer scores, 4 H C per key that attention reads.
    """
    if isinstance(model, SparseMLA):
        index = weights.fp8 * 2 * model.index_heads * model.index_dim * context
        keys = min(context, model.top_k)
        core = 2 * model.heads * (2 * model.latent + model.rope) * keys
        return weights.fp8 * 2 * model.active + model.layers * (index + weights.bf16 * core)
    index = core = 0
    for kind, ratio in _main_layers(model):
        entries = context // ratio if ratio else 0
        if kind == "csa":
            index += 2 * model.index_n_heads * model.index_head_dim * entries
            entries = min(entries, model.index_topk)
        core += 4 * model.num_attention_heads * model.head_dim * (entries + min(context, model.sliding_window))
    return weights.fp8 * 2 * count_parameters(model).active + weights.fp4 * index + weights.bf16 * core


def _main_layers(config: ModelConfig) -> list[tuple[AttentionKind, int]]:
    return list(zip(config.kinds, config.compress_ratios, strict=True))[: config.num_hidden_layers]


def cache_bytes(
    model: ModelConfig | SparseMLA, context: int, entry_bytes: float | None = None, key_bytes: float | None = None
) -> float:
    """Bytes of the cache of one document of ``context`` tokens (recipe 12: at a million tokens 5.036 GB for Pro,
    3.517 GB for Flash, 48.07 GB for V3.2).

    The windows, W tokens of every layer, and what ``cache_bytes_per_token`` says. Main layers only, for generation does
    not run the MTP block; of blocks that are not complete, only the share of the entry to come is counted.

    Args:
        entry_bytes: of a key/value, in a window or compressed; key_bytes: of an indexer's key. The defaults are those
            of the released formats (``v4_entry_bytes``, ``v4_key_bytes``).
    """
    per_token = context * cache_bytes_per_token(model, entry_bytes, key_bytes)
    if isinstance(model, SparseMLA):
        return per_token
    entry = _or(entry_bytes, v4_entry_bytes(model))
    return min(context, model.sliding_window) * model.num_hidden_layers * entry + per_token


def cache_bytes_per_token(
    model: ModelConfig | SparseMLA, entry_bytes: float | None = None, key_bytes: float | None = None
) -> float:
    """What each token adds to the cache on average, once the windows are full: an entry per ``ratio`` tokens in every
    layer that compresses, and a key of the indexer per ``ratio`` tokens in every CSA layer."""
    entry = _or(entry_bytes, model.entry_bytes if isinstance(model, SparseMLA) else v4_entry_bytes(model))
    key = _or(key_bytes, model.key_bytes if isinstance(model, SparseMLA) else v4_key_bytes(model))
    if isinstance(model, SparseMLA):
        return model.layers * (entry + key)
    return sum((entry + (key if kind == "csa" else 0)) / ratio for kind, ratio in _main_layers(model) if ratio)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def v4_entry_bytes(config: ModelConfig) -> int:
    """Bytes of a key/value in the released format (recipe 8.5): E4M3, but BF16 for the rotated channels, and a scale
    byte for each 64 of the others, filled up to whole 8 bytes."""
    still, turned = config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim
    return -(-(still + 2 * turned + -(-still // 64)) // 8) * 8


def v4_key_bytes(config: ModelConfig) -> int:
    """Bytes of an indexer's key in the released format (recipe 8.5): E2M1, and a scale byte for each 32 channels."""
    return -(-config.index_head_dim // 2) + -(-config.index_head_dim // FP4_GROUP)


# Files.


def release_bytes(config: ModelConfig, format: Format, mtp: bool = True) -> int:
    """Bytes of the tensors of a release, scales included, without the files' headers (recipe 8.3: 148.65 GiB for Flash
    in ``fp4+fp8``)."""
    return sum(tensor_bytes(s, format) for s in tensor_shapes(config, mtp))


def stored_elements(config: ModelConfig, format: Format, mtp: bool = True) -> int:
    """Elements of the tensors of a release, scales included; two FP4 weights are one element, a byte (recipe 8.3:
    158,069,433,298 for Flash in ``fp4+fp8``)."""
    return sum(_elements(s, _kind(s, format)) + _scales(s, _kind(s, format)) for s in tensor_shapes(config, mtp))


def tensor_bytes(s: Shape, format: Format) -> int:
    """Bytes of a tensor, all its copies, in a release of this format; with its scale (``model.released``)."""
    kind = _kind(s, format)
    size = {"fp32": 4, "bf16": 2, "fp8": 1, "fp4": 1, "int64": 8}[kind]
    return size * _elements(s, kind) + (1 if format == "fp4+fp8" else 4) * _scales(s, kind)


def _kind(s: Shape, format: Format) -> str:
    """How a format stores a tensor."""
    if s.stored == "int64" or format == "fp4+fp8":
        return s.stored
    if format == "fp8":
        return "fp8" if s.stored == "fp4" else s.stored
    return "fp32" if "fp32" in (format, s.stored) else "bf16"


def _elements(s: Shape, kind: str) -> int:
    return s.numel // 2 if kind == "fp4" else s.numel


def _scales(s: Shape, kind: str) -> int:
    if kind not in ("fp8", "fp4"):
        return 0
    rows, columns = (FP8_BLOCK, FP8_BLOCK) if kind == "fp8" else (1, FP4_GROUP)
    return s.copies * -(-s.shape[0] // rows) * -(-s.shape[1] // columns)


def checkpoint_bytes(
    config: ModelConfig, matrices: Literal["muon", "adamw"] = "muon", lora: LoRAConfig | None = None
) -> int:
    """Bytes of the tensors of a training checkpoint: weights in float32 and the optimizers' state; of a LoRA run, both
    of the adapters alone. What the optimizers hold for a tensor is ``optimizer_bytes``."""
    shapes = tensor_shapes(config) if lora is None else adapter_shapes(config, lora)
    # Expert by expert: AdamW's step of a stack is there once for each.
    return sum(tensor_bytes(s, "fp32") + s.copies * optimizer_bytes(replace(s, copies=1), matrices) for s in shapes)


def optimizer_bytes(s: Shape, matrices: Literal["muon", "adamw"] = "muon") -> int:
    """Bytes of the optimizer's float32 state of a tensor: Muon's momentum, or AdamW's two moments and its step."""
    if not s.trained:
        return 0
    return 4 * s.numel if s.matrix and matrices == "muon" else 8 * s.numel + 4
