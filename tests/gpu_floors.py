"""What an operation costs at least: the products it must form, the bytes it must move, counted from its shapes.

Bytes are those of inputs and outputs, each once, at the widths that training uses; what stays on the chip is free. One
multiplication and one addition are two operations. Defaults are the dims of DeepSeek-V4-Flash.
"""

from collections.abc import Mapping
from dataclasses import dataclass

BF16, FP32, FP8 = 2, 4, 1  # bytes of an element


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: products, operations per second by format, and a copy, bytes per second."""

    flops: Mapping[str, float]  # by "bf16", "fp8", "tf32", "fp32"
    bytes: float


# An H100, for counts that no run of its own goes with; tf32 and fp32 are not measured.
H100 = Ceilings({"bf16": 0.8e15, "fp8": 1.5e15, "tf32": 0.35e15, "fp32": 60e12}, 3.0e12)


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float
    format: str = "bf16"

    def seconds(self, ceilings: Ceilings) -> float:
        """Products and transfers at once, each at its ceiling."""
        return max(self.flops / ceilings.flops[self.format], self.bytes / ceilings.bytes)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.format)


def mhc_pre(tokens: int, hidden: int = 4096, streams: int = 4) -> Work:
    rows = streams * (streams + 2)
    flops = 2 * tokens * streams * hidden * (rows + 1)
    coefficients = rows * streams * hidden + tokens * streams * (1 + streams)
    return Work(flops, BF16 * tokens * hidden * (streams + 1) + FP32 * coefficients)


def mhc_post(tokens: int, hidden: int = 4096, streams: int = 4) -> Work:
    bytes = BF16 * tokens * hidden * (2 * streams + 1) + FP32 * tokens * streams * (1 + streams)
    return Work(2 * tokens * hidden * streams * (streams + 1), bytes)


def mhc_post_pre(tokens: int, hidden: int = 4096, streams: int = 4) -> Work:
    """Old streams and output in, new streams and the next layer's input out: the new streams are not read again."""
    apart = mhc_post(tokens, hidden, streams) + mhc_pre(tokens, hidden, streams)
    return Work(apart.flops, apart.bytes - BF16 * tokens * streams * hidden)


def mhc_post_pre_backward(tokens: int, hidden: int = 4096, streams: int = 4) -> Work:
    """Gradients of new streams and next input, old streams and output in; gradients of the last two out."""
    forward = mhc_post_pre(tokens, hidden, streams)
    coefficients = forward.bytes - BF16 * tokens * hidden * (2 * streams + 2)
    return Work(2 * forward.flops, BF16 * tokens * hidden * (3 * streams + 3) + 2 * coefficients)


def fp8_rows(tokens: int, columns: int, wide: int = 1) -> Work:
    """``wide`` bf16 rows in or out, one FP8 row with a scale per 128 out."""
    return Work(4 * tokens * columns, tokens * columns * (BF16 * wide + FP8) + FP32 * tokens * columns / 128, "fp32")


def fp4_weight(matrices: int, rows: int = 2048, columns: int = 4096, output: float = FP8) -> Work:
    """Float32 in, ``output`` bytes an element and a byte per group of 32 out."""
    return Work(0.0, matrices * rows * columns * (FP32 + output + 1 / 32), "fp32")


def visible_entries(tokens: int, ratio: int, most: int | None = None) -> int:
    """Sum over the tokens t of one document of min(floor((t + 1) / ratio), most)."""
    most = tokens if most is None else most
    return sum(min(seen // ratio, most) for seen in range(1, tokens + 1))


def index_scores(tokens: int, heads: int = 64, dim: int = 128, width: int = BF16) -> Work:
    """Scores of all visible entries, written in bf16, as an indexer that does not select would."""
    pairs = visible_entries(tokens, 4)
    operands = tokens * heads * dim + tokens // 4 * dim
    bytes = width * operands + BF16 * tokens * heads + BF16 * pairs
    return Work(2 * heads * dim * pairs, bytes, "bf16" if width == BF16 else "fp8")


def select_entries(tokens: int, top_k: int = 512, heads: int = 64, dim: int = 128, width: int = BF16) -> Work:
    """Scores and selection at once: the scores stay on the chip, int64 indices are written."""
    scores = index_scores(tokens, heads, dim, width)
    bytes = scores.bytes - BF16 * visible_entries(tokens, 4) + 8 * tokens * top_k
    return Work(scores.flops, bytes, scores.format)


def attention(
    tokens: int, ratio: int, top_k: int | None, backward: bool, heads: int = 64, dim: int = 512, window: int = 128
) -> Work:
    """The core of one layer on one document: two products forward, five backward, over window and entries."""
    keys = visible_entries(tokens, 1, window) + visible_entries(tokens, ratio, top_k)
    indices = 0 if top_k is None else 4 * tokens * top_k
    shared = tokens * (1 + 1 / ratio) * dim
    if not backward:
        return Work(4 * heads * dim * keys, BF16 * (2 * tokens * heads * dim + shared) + indices)
    bytes = BF16 * (4 * tokens * heads * dim + shared) + FP32 * (shared + tokens * heads) + indices
    return Work(10 * heads * dim * keys, bytes)


def experts(tokens: int, count: int, active: int, backward: bool, hidden: int = 4096, inner: int = 2048) -> Work:
    """``active`` experts a token of ``count``, three matrices each; gathered rows, gate, up and hidden pass memory."""
    rows = tokens * active
    work = Work(6 * rows * hidden * inner, BF16 * (3 * count * hidden * inner + rows * (2 * hidden + 3 * inner)))
    return Work(2 * work.flops, 2 * work.bytes) if backward else work


def router(tokens: int, count: int = 256, hidden: int = 4096) -> Work:
    return Work(2 * tokens * hidden * count, BF16 * tokens * hidden + FP32 * tokens * count, "tf32")


def newton_schulz(matrices: int, rows: int, columns: int) -> Work:
    """Ten iterations in the Gram form with one restart, of products with a symmetric result one half."""
    n, m = sorted((rows, columns))
    return Work(matrices * (6 * n * n * m + 36 * n**3), matrices * 2 * FP32 * n * m)


def cross_entropy(tokens: int, vocabulary: int = 129280, hidden: int = 4096) -> Work:
    """Forward and backward: three products, a bf16 head read twice, its float32 gradient."""
    head = vocabulary * hidden
    return Work(6 * tokens * head, (2 * BF16 + FP32) * head + 3 * BF16 * tokens * hidden)
