"""Bytes that the parts of a block keep for their backward pass, and what each makes for a moment in either pass.

A transcript of ``transformer``, ``attention``, ``moe`` and the kernels in sizes instead of tensors, which ``memory``
runs. torch is not imported, so the kernels' numbers that matter here are repeated; a test compares them.

Shapes: T tokens of a GPU, S streams, D hidden, H heads, C head dim, R rotated channels, N entries, k selected, I index
heads, J index dim, E experts of a GPU, K experts per token, F expert intermediate, M rows of the grouped products.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .config import AttentionKind, AttentionMode, LoRAConfig, ModelConfig
from .shapes import Part

Device = Literal["cpu", "gpu"]

# Elements that the kernels make at once: scores of attention and indexer, logits, dequantised experts.
PORTIONS: dict[str, dict[Device, int]] = {
    "attention": {"cpu": 2**18, "gpu": 2**26},
    "indexer": {"cpu": 2**20, "gpu": 2**26},
    "cross_entropy": {"cpu": 2**23, "gpu": 2**28},
    "moe": {"cpu": 2**22, "gpu": 2**26},
}
TILE, FP8_TILE = 16, 128  # rows of an expert come in whole tiles; those of FP8 products in whole groups of a scale

MIXING, ATTENTION, EXPERTS, CHOICES = "streams and mixing", "attention", "router and experts", "discrete choices"


class Stage(NamedTuple):
    """A part of a block.

    Attributes:
        kind: what the memory is for.
        kept: bytes from its forward pass to its backward pass.
        forward: bytes that its forward pass makes beside them, at the most.
        backward: bytes that its backward pass makes on top of all that is kept, at the most.
        products: bytes that the recomputation "selective" keeps: results of matrix products.
        choices: bytes that every recomputation keeps beside the block's input.
        parts: whose gradients the backward pass makes.
    """

    kind: str
    kept: float
    forward: float
    backward: float
    products: float = 0.0
    choices: float = 0.0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a GPU works on at once.

    Attributes:
        rows, length: length is that of whole rows, each of which ``context`` GPUs share.
        experts: routed experts on a GPU.
        width: bytes of a number in the compute dtype.
        casts: bytes of a weight's copy in the compute dtype, per element; 0 if it is held in that dtype.
        wide_casts: the same of weights that compute in float32 always.
        dequantized: whether frozen weights are held in FP8 and FP4, and unpacked where they are used.
        tile: rows of an expert are padded to a multiple of it.
    """

    config: ModelConfig
    rows: int
    length: int
    attention: AttentionMode
    indexer: bool
    experts: int
    width: int
    device: Device = "cpu"
    context: int = 1
    casts: int = 0
    wide_casts: int = 0
    dequantized: bool = False
    lora: LoRAConfig | None = None
    tile: int = TILE

    @property
    def tokens(self) -> int:
        return self.rows * self.length // self.context

    @property
    def hidden(self) -> int:
        """Elements ``T D``."""
        return self.tokens * self.config.hidden_size

    @property
    def streams(self) -> int:
        """Elements ``T S D``."""
        return self.hidden * self.config.hc_mult

    def wide(self, elements: float) -> float:
        """Bytes of a float32 copy, which is none if that is the compute dtype."""
        return 4 * elements if self.width < 4 else 0.0

    def portion(self, kernel: str) -> int:
        return PORTIONS[kernel][self.device]

    def stages(self, kind: AttentionKind, ratio: int, hash_routed: bool) -> list[Stage]:
        """Those of a block in the order of its forward pass; the streams that it returns belong to the next one."""
        return [
            self._read(("mHC", "norms")),
            self._norm(),
            self._queries(),
            *([self._compressor(kind == "csa", ratio)] if ratio else []),
            *([self._indexer(ratio)] if kind == "csa" else []),
            self._core(kind, ratio),
            self._output(),
            self._write()._replace(kept=self.width * self.streams),
            self._read(()),
            self._norm(),
            self._router(hash_routed),
            self._shared(),
            self._routed(),
            self._write(),
        ]

    def _read(self, parts: tuple[Part, ...]) -> Stage:
        """``mhc_pre``: the layer's input, and the coefficients of a token."""
        c, t, s = self.config, self.tokens, self.config.hc_mult
        columns = s * (s + 2)
        # Sinkhorn's matrices and their sums of every step, which its backward pass walks back through.
        steps = 2 * c.hc_sinkhorn_iters * (s * s + s) if c.hc_constraint == "sinkhorn" else 0
        coefficients = 4 * t * 5 * columns
        gradient = 4 * self.streams + (self.width * self.streams if self.width < 4 else 0)
        return Stage(
            MIXING,
            kept=self.width * self.hidden + 4 * t * (columns + 1 + s + s * s),
            forward=self.wide(self.streams) + coefficients + self.wide(self.hidden) + self._bags(1),
            backward=self.wide(self.streams) + coefficients + max(4 * t * (steps + 2 * s * s), gradient),
            products=4 * t * columns,
            parts=parts,
        )

    def _write(self) -> Stage:
        """``mhc_post``: new streams."""
        narrow = self.width < 4
        s = self.streams
        return Stage(
            MIXING,
            kept=0.0,
            forward=(8 if narrow else 0) * s + self._bags(self.config.hc_mult),
            backward=(10 if narrow else 4) * s + 4 * self.hidden + self._bags(self.config.hc_mult),
        )

    def _bags(self, count: int) -> float:
        """Indices and weights of sums over the streams, ``count`` sums for each token."""
        return self.tokens * count * (12 * self.config.hc_mult + 16)

    def _norm(self) -> Stage:
        """Weighted RMS normalisation of a layer's input."""
        n = self.hidden
        narrow = self.width < 4
        return Stage(MIXING, self.width * n + 4 * self.tokens, (8 if narrow else 0) * n, (16 if narrow else 12) * n)

    def _copies(self, *elements: int) -> tuple[float, float]:
        """Of weights in the compute dtype: bytes kept until the backward pass, and those of the largest unpacked."""
        return self.casts * sum(elements), self.width * max(elements) if self.dequantized else 0.0

    def _low(self, *targets: str) -> float:
        """Bytes kept by the adapters of linear maps: the products of their inputs with A."""
        if self.lora is None:
            return 0.0
        numbers = {"wo_a": self.config.o_groups, "shared_experts": 3, "compressor": 2, "indexer": 4}
        sites = sum(numbers.get(target, 1) for target in targets if target in self.lora.parts)
        return self.width * self.tokens * self.lora.rank * sites

    def _products(self, **sizes: float) -> float:
        """Bytes of the products of linear maps, by target: an adapter makes one more of the size, and a low one."""
        parts = self.lora.parts if self.lora is not None else ()
        return sum(size * (2 if target in parts else 1) for target, size in sizes.items()) + self._low(*sizes)

    def _queries(self) -> Stage:
        """Queries and window keys, up to the rotation."""
        c, t, w = self.config, self.tokens, self.width
        heads, low = c.num_attention_heads * c.head_dim, c.q_lora_rank
        rotated = 4 * t * c.qk_rope_head_dim
        casts, unpacked = self._copies(c.hidden_size * low, low * heads, c.hidden_size * c.head_dim)
        factors = 4 * t * (2 + c.num_attention_heads)
        return Stage(
            ATTENTION,
            kept=w * t * 2 * (low + heads + c.head_dim)
            + factors
            + 2 * rotated
            + casts
            + self._low("wq_a", "wq_b", "wkv"),
            forward=(10 if w < 4 else 4) * t * heads + 2 * rotated * c.num_attention_heads,
            backward=max((18 if w < 4 else 8) * t * heads, w * t * heads + 2 * rotated * c.num_attention_heads)
            + 3 * w * t * c.head_dim
            + unpacked,
            products=self._products(wq_a=w * t * low, wq_b=w * t * heads, wkv=w * t * c.head_dim),
            parts=("attention",),
        )

    def _entries(self, ratio: int) -> int:
        """Compressed entries that a GPU makes."""
        return self.rows * (self.length // ratio) // self.context

    def _pool(self, dim: int, overlap: bool, ratio: int) -> tuple[float, float, float, float]:
        """A compressor: bytes kept, made forward, made backward, and of its products."""
        t, entries = self.tokens, self._entries(ratio)
        slots = 4 * entries * ratio * dim * (2 if overlap else 1)  # kv or gate of all entries
        inputs = 4 * t * dim * (2 if overlap else 1)  # kv or gate of all tokens
        matrices = self.wide_casts * 2 * self.config.hidden_size * dim * (2 if overlap else 1)
        kept = self.wide(self.hidden) + matrices + 2 * slots + 8 * entries * ratio + (4 + self.width) * entries * dim
        forward = 2 * inputs + (4 if overlap else 2) * slots
        return kept, forward, (4 if overlap else 3) * slots, 2 * inputs

    def _compressor(self, overlap: bool, ratio: int) -> Stage:
        kept, forward, backward, products = self._pool(self.config.head_dim, overlap, ratio)
        if self.context > 1:  # every GPU gathers the entries of the whole row
            kept += self.width * self._entries(ratio) * (self.context - 1) * self.config.head_dim
        kept += self._low("compressor")
        products = self._products(compressor=products)
        return Stage(ATTENTION, kept, forward, backward, products, parts=("compressor",))

    def _index_inputs(self, ratio: int) -> float:
        """Bytes of the indexer's queries, keys and weights."""
        c = self.config
        own = self.tokens * c.index_n_heads * (c.index_head_dim + 1)
        return self.width * (own + self._entries(ratio) * self.context * c.index_head_dim)

    def _indexer(self, ratio: int) -> Stage:
        c, t = self.config, self.tokens
        sparse, learns = self.attention == "sparse", self.indexer or self.attention == "indexer_warmup"
        if not (sparse or learns):
            return Stage(ATTENTION, 0.0, 0.0, 0.0)
        in_row = self.length // ratio
        chosen = 8 * t * min(c.index_topk, in_row) if sparse else 0
        pool_kept, pool_forward, pool_backward, pool_products = self._pool(c.index_head_dim, True, ratio)
        inputs = self._index_inputs(ratio)
        queries = self.width * t * c.index_n_heads * c.index_head_dim
        rotation = 8 * t * c.index_n_heads * c.qk_rope_head_dim
        scores = 4 * min(self.portion("indexer"), t * in_row)
        tile = 4 * min(self.portion("indexer"), t * in_row * c.index_n_heads)
        work = max(inputs + 3 * scores + tile if sparse else 0, queries + inputs + rotation, pool_forward)
        products = self._products(indexer=queries + self.width * t * c.index_n_heads + pool_products)
        if not learns:
            return Stage(ATTENTION, chosen, work, 0.0, products, chosen)
        heads = max(c.index_n_heads, c.num_attention_heads)
        keys = min(c.index_topk, in_row) if sparse else in_row
        pairs = min(self.portion("indexer"), t * keys * heads) / heads  # of a token and an entry
        # The attention's logits, then the index scores, where they are positive, and their slopes.
        portion = pairs * max(4 * c.num_attention_heads, 9 * c.index_n_heads) + 16 * pairs
        portion += 2 * 4 * pairs * max(c.head_dim, c.index_head_dim) if sparse else 0  # keys of each token's own
        casts = self.casts * (c.q_lora_rank * c.index_head_dim + c.hidden_size) * c.index_n_heads
        # The gradients of queries, keys and weights are taken in the forward pass and kept.
        gradients = 2 * inputs if self.width < 4 else 0.0
        kept = chosen + pool_kept + casts + inputs + 4 * t * c.qk_rope_head_dim + self._low("indexer")
        work = max(work, inputs + gradients + portion)
        return Stage(ATTENTION, kept, work, 2 * inputs + rotation + pool_backward, products, chosen, ("indexer",))

    def _core(self, kind: AttentionKind, ratio: int) -> Stage:
        """Attention itself: its output, and what a group of tokens takes."""
        c, t, w = self.config, self.tokens, self.width
        heads, dim = c.num_attention_heads, c.head_dim
        length = self.length // self.context
        chunk = min(max(c.sliding_window // 2, 16), length)
        near = chunk + min(c.sliding_window, length) - 1
        in_row = self.length // ratio if ratio else 0
        selects = kind == "csa" and self.attention == "sparse"
        far = min(c.index_topk, in_row) if selects else in_row
        many = min(-(-length // chunk), max(1, self.portion("attention") // (self.rows * chunk * heads * (near + far))))
        group = self.rows * many * chunk  # tokens
        own = group * heads * dim
        scores = group * heads * max(near, far)
        keys = group * far * dim if selects else 0
        narrow = w < 4
        forward = w * own + 4 * 2 * own + 4 * group * heads * (near + far) + w * keys + (w * scores if narrow else 0)
        # Queries and their outputs' gradients one above the other and swapped, and scores of both against the keys.
        per_score = 4 * 2 + 4 + (w * 3 if narrow else 0)
        gradients = 4 * max(group / chunk * near * dim, keys if selects else self.rows * far * dim)
        backward = 6 * w * own + 2 * 4 * own + per_score * scores + w * keys + gradients
        kv = 4 * (t + self.rows * 3 * max(c.sliding_window, 16)) * dim
        entries = 4 * self.rows * in_row * dim
        return Stage(
            ATTENTION,
            kept=w * t * heads * dim + 4 * t * heads,
            forward=forward,
            backward=2 * w * t * heads * dim + kv + entries + backward,
        )

    def _output(self) -> Stage:
        """From attention's output back to the hidden size."""
        c, t, w = self.config, self.tokens, self.width
        heads, low = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
        turned = 8 * t * c.num_attention_heads * c.qk_rope_head_dim
        casts, unpacked = self._copies(heads // c.o_groups * low, low * c.hidden_size)
        return Stage(
            ATTENTION,
            kept=w * t * (heads + low)
            + 4 * t * c.qk_rope_head_dim
            + w * self.hidden
            + casts
            + self._low("wo_a", "wo_b"),
            forward=w * t * low + turned,
            backward=w * t * heads + max(2 * w * t * low, turned) + unpacked,
            products=self._products(wo_a=0.0, wo_b=w * self.hidden),
        )

    def _router(self, hash_routed: bool) -> Stage:
        c, t, e = self.config, self.tokens, self.config.n_routed_experts
        scores = 17 * t * e  # float32 of four steps, and a mask
        balance = 0 if hash_routed else 8 * t * e
        order = 0 if hash_routed else 8 * t * c.num_experts_per_tok
        return Stage(
            EXPERTS,
            kept=self.wide(self.hidden)
            + self.wide_casts * e * c.hidden_size
            + scores
            + balance
            + order
            + t * (16 * c.num_experts_per_tok + 8),
            forward=12 * t * e,
            backward=16 * t * e + 4 * self.hidden,
            products=4 * t * e,
            choices=2 * order,
            parts=("router",),
        )

    def _routed(self) -> Stage:
        """The routed experts, and the sum with the shared one."""
        c, t, w = self.config, self.tokens, self.width
        unit = 16 // w
        hidden, inner = (-(-n // unit) * unit for n in (c.hidden_size, c.moe_intermediate_size))
        copies = t * c.num_experts_per_tok
        ranks = c.n_routed_experts / self.experts
        # Experts that are spread evenly over the GPUs get as many rows as a GPU's tokens send.
        filled = min(self.experts, copies)
        rows = copies + filled * ((self.tile - 1) if self.device == "gpu" else (self.tile - 1) / 2)
        act, full = rows * inner, rows * hidden
        weights = 3 * self.experts * hidden * inner
        padded = 4 * weights if self.lora is None and (hidden, inner) != (c.hidden_size, c.moe_intermediate_size) else 0
        x = w * t * hidden if hidden != c.hidden_size else 0
        factors = 0.0
        if self.lora is not None and "experts" in self.lora.parts:  # scaled, cast and padded copies
            factors = w * self.experts * self.lora.rank * (2 * hidden + 3 * inner)
        exchange = 2 * w * copies * hidden if ranks > 1 else 0  # what the all-to-all sends and receives
        unpacked = self._unpacked(hidden * inner)
        narrow = w < 4
        graph = (28 + w if narrow else 20) * act  # clamps, silu and products, for the gradient of the activation
        copy = weights / 3 * (w if self.casts else 0)  # of the matrix at hand, in the compute dtype
        dense = copy + unpacked
        first = w * full + graph + w * act + max((16 if narrow else 8) * act, dense)
        second = 3 * w * full + 2 * w * act + dense
        gather = (w + 4 if narrow else w) * full + 2 * w * act + (4 + w if narrow else 4) * self.hidden
        return Stage(
            EXPERTS,
            kept=2 * w * act + 8 * rows + 12 * copies + padded + x + factors + w * self.hidden,
            forward=max(16 * act, 2 * w * full + 4 * self.hidden) + dense + exchange,
            backward=max(first, second, gather) + 4 * self.hidden + exchange,
            products=2 * w * act + w * full,
            parts=("routed experts",),
        )

    def _unpacked(self, matrix: int) -> float:
        """A few FP4 experts in the compute dtype, with their scales spread out and their codes."""
        if not self.dequantized:
            return 0.0
        many = min(self.experts, max(1, self.portion("moe") // matrix))
        return 2.0 * self.width * many * matrix

    def _shared(self) -> Stage:
        c, t, w = self.config, self.tokens, self.width
        inner = t * c.moe_intermediate_size
        casts, unpacked = self._copies(*(c.hidden_size * c.moe_intermediate_size,) * 3)
        return Stage(
            EXPERTS,
            kept=(22 if w < 4 else 24) * inner + casts + self._low("shared_experts"),
            forward=4 * inner + 8 * self.hidden,
            backward=12 * inner + (4 + 2 * w) * self.hidden + unpacked,
            products=self._products(shared_experts=w * (2 * inner + self.hidden)),
            parts=("shared expert",),
        )
