"""Routed experts: every token through the experts it chose, nothing dropped.

Shapes: M tokens (batch and length flattened), D hidden, E experts, K experts per token, F expert intermediate, L rank
of adapters, R rows of the grouped products: M K copies of tokens, sorted by expert, each expert's share padded to whole
tiles.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation
from .fp8 import round_columns, round_rows
from .moe_triton import TritonRoutedExperts
from .norm import at_least_fp32
from .quantize import FP8_BLOCK, Quantized
from .router import expert_load
from .swiglu import clamped_rows, clamped_swiglu

# Elements of quantised experts that are dequantised at once.
CPU_ELEMENTS, GPU_ELEMENTS = 2**22, 2**26

# An expert's share is padded to whole tiles. BLAS picks another summation order for products of few rows (measured:
# fewer than 12 with MKL), and then a token's output would depend on how many others, of whatever document, chose the
# same expert.
TILE = 16


class LowRank(NamedTuple):
    """What an adapter adds to a matrix ``[out, in]`` (or to each of a stack of them): scale * b @ a."""

    a: Tensor  # [..., L, in]
    b: Tensor  # [..., out, L]
    scale: float

    def delta(self) -> Tensor:
        """The addition itself, ``[..., out, in]``, at least float32."""
        return at_least_fp32(self.b) @ at_least_fp32(self.a) * self.scale


class ExpertAdapters(NamedTuple):
    """An adapter of every routed expert, stacked."""

    gate_up: LowRank  # a [E, L, D], b [E, 2F, L]: the rows of w1, then those of w3
    down: LowRank  # a [E, L, F], b [E, D, L]


def routed_experts_reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    limit: float,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """The output of ``routed_experts`` by a loop over experts, adapters folded in: the oracle of the tests."""
    if adapters is not None:
        to_gate, to_up = adapters.gate_up.delta().chunk(2, 1)
        w1, w3, w2 = w1 + to_gate, w3 + to_up, w2 + adapters.down.delta()
    output = torch.zeros_like(x, dtype=at_least_fp32(x[:0]).dtype)
    for expert in range(len(w1)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (F.linear(x[token], w[expert].to(x.dtype)) for w in (w1, w3))
        hidden = (clamped_swiglu(gate, up, limit) * weights[token, slot].unsqueeze(-1)).to(x.dtype)
        output = output.index_add(0, token, at_least_fp32(F.linear(hidden, w2[expert].to(x.dtype))))
    return output


def routed_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor | Quantized,
    w3: Tensor | Quantized,
    w2: Tensor | Quantized,
    limit: float,
    adapters: ExpertAdapters | None = None,
    rounded: tuple[Tensor, Tensor, Tensor] | None = None,
    cast: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over each token's experts of weight * expert(x), nothing dropped.

    Tokens are sorted by expert and every projection is one grouped product. The routing weight multiplies before w2, as
    in the official code. Sums over a token's experts gather from a fixed place each, so that no atomic addition decides
    their order.

    Args:
        x: ``[M, D]``; ids, weights: ``[M, K]``; w1 (gate), w3 (up): ``[E, F, D]``; w2 (down): ``[E, D, F]``.
            Quantised ones are frozen, and dequantised a few experts at a time.
        adapters: low-rank products added to those of the matrices, which are never formed; they compute in the dtype
            of x like the matrices.
        rounded: w1, w3, w2 rounded to FP8, in the dtype of x (``kernels.fp8``); the products are then those of FP8, of
            activations and gradients rounded like those of ``fp8_linear``, groups of 128 tokens counted within an
            expert. The gradients go to w1, w3 and w2, unchanged by the rounding.
        cast: w1, w3, w2 in the dtype of x, where they were made before; of the arguments w1, w3 and w2 only shapes and
            dtypes matter then, and gradients go to them.

    Returns:
        output ``[M, D]``, at least float32 (experts are summed so), and the share of clamped elements (0-dim).
    """
    values, fp8 = (cast, False) if rounded is None else (rounded, True)
    dense = all(isinstance(w, Tensor) for w in (w1, w3, w2))
    if dense and adapters is None and ids.numel() and 0 not in w1.shape and implementation(x, weights) == "triton":
        routed: tuple[Tensor, Tensor] = TritonRoutedExperts.apply(x, ids, weights, w1, w3, w2, limit, values, fp8)
        return routed
    # Rows of whole 16 bytes: torch's grouped product asks for them, and with others BLAS sums a row by its place.
    unit = 16 // x.element_size()
    wide, inner = -x.shape[1] % unit, -w1.shape[1] % unit
    factors = () if adapters is None else _factors(adapters, x.dtype, wide, inner)
    if wide or inner:
        x = F.pad(x, (0, wide))
        w1, w3, w2 = (_padded(w1, inner, wide), _padded(w3, inner, wide), _padded(w2, wide, inner))
        if values is not None:
            v1, v3, v2 = values
            values = F.pad(v1, (0, wide, 0, inner)), F.pad(v3, (0, wide, 0, inner)), F.pad(v2, (0, inner, 0, wide))
    output, hits = _RoutedExperts.apply(x, ids, weights, w1, w3, w2, limit, values, fp8, *factors)
    return output[:, : output.shape[1] - wide], hits * (w1.shape[1] / (w1.shape[1] - inner))


def _padded(matrices: Tensor | Quantized, rows: int, columns: int) -> Tensor | Quantized:
    if isinstance(matrices, Quantized):
        return matrices._replace(padding=(rows, columns))
    return F.pad(matrices, (0, columns, 0, rows))


def _factors(adapters: ExpertAdapters, dtype: torch.dtype, wide: int, inner: int) -> tuple[Tensor, ...]:
    """a and b of gate and up, which share a, and of down: a1, b1, b3, a2, b2; scaled, cast, padded as the matrices."""
    (a1, both, up_scale), (a2, b2, down_scale) = adapters
    narrow, low = (-a.shape[1] % (16 // dtype.itemsize) for a in (a1, a2))
    padded = (
        F.pad(a1 * up_scale, (0, wide, 0, narrow)),
        *(F.pad(b, (0, narrow, 0, inner)) for b in both.chunk(2, 1)),
        F.pad(a2 * down_scale, (0, inner, 0, low)),
        F.pad(b2, (0, low, 0, wide)),
    )
    return tuple(factor.to(dtype) for factor in padded)


class _Layout(NamedTuple):
    """Where the copies of tokens stand in the grouped products."""

    ends: Tensor  # [E] int32: one past each expert's last row
    source: Tensor  # [R] token of each row; padding repeats token 0
    slot: Tensor  # [M, K] row of each token's copies

    @classmethod
    def of(cls, ids: Tensor, experts: int, tile: int = TILE) -> "_Layout":
        flat = ids.flatten()
        sizes = expert_load(ids, experts)
        padded = (sizes + (tile - 1)) // tile * tile
        ends = padded.cumsum(0)
        # Off the CPU the number of rows is bounded, not read, so that the host does not wait; what follows the last
        # expert's rows belongs to none and is never read back.
        rows = int(ends[-1]) if ids.device.type == "cpu" else len(flat) + min(experts, len(flat)) * (tile - 1)
        order = flat.argsort(stable=True)
        expert = flat[order]
        rank = torch.arange(len(flat), device=ids.device) - (sizes.cumsum(0) - sizes)[expert]
        row = (ends - padded)[expert] + rank
        source = torch.zeros(rows, dtype=torch.long, device=ids.device)
        source[row] = order // ids.shape[1]
        slot = torch.empty_like(flat)
        slot[order] = row
        return cls(ends.int(), source, slot.view_as(ids))

    def scatter(self, weights: Tensor) -> Tensor:
        """Routing weights ``[M, K]`` by row, ``[R, 1]``, 0 for padding."""
        rows = weights.new_zeros(len(self.source))
        rows[self.slot.flatten()] = weights.flatten()
        return rows.unsqueeze(1)

    def gather(self, rows: Tensor) -> Tensor:
        """Sum over each token's copies, ``[M, D]`` from ``[R, D]``, at least float32."""
        return F.embedding_bag(self.slot, at_least_fp32(rows), mode="sum")

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Each expert's rows times its matrix: ``[R, x]`` and ``[E, x, y]`` to ``[R, y]``."""
        if rows.dtype != torch.float64:  # torch's grouped product has none; this is for exact tests
            return torch._grouped_mm(rows, matrices, offs=self.ends)
        shares = zip(rows.split(self._sizes()), matrices.unbind(), strict=True)
        return torch.cat([share @ matrix for share, matrix in shares])

    def times(self, rows: Tensor, matrices: Tensor | Quantized, transposed: bool = False) -> Tensor:
        """``product`` with weights ``[E, O, I]``, O features to I; ``transposed``: I to O. In the dtype of the rows."""
        if isinstance(matrices, Tensor):
            dense = matrices.to(rows.dtype)
            return self.product(rows, dense.mT if transposed else dense)
        experts, outputs, inputs = matrices.shape
        budget = CPU_ELEMENTS if rows.device.type == "cpu" else GPU_ELEMENTS
        many = max(1, budget // (outputs * inputs))
        ends = [0, *self.ends.tolist()]
        result = rows.new_zeros(len(rows), outputs if transposed else inputs)
        for first in range(0, experts, many):
            last = min(first + many, experts)
            start, stop = ends[first], ends[last]
            if start < stop:
                dense = matrices.dequantize(slice(first, last), rows.dtype)
                share = _Layout(self.ends[first:last] - start, self.source[start:stop], self.slot)
                result[start:stop] = share.product(rows[start:stop], dense.mT if transposed else dense)
        return result

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum over each expert's rows of left^T right: ``[R, x]`` and ``[R, y]`` to ``[E, x, y]``."""
        if left.dtype != torch.float64:
            return torch._grouped_mm(left.mT, right, offs=self.ends)
        shares = zip(left.split(self._sizes()), right.split(self._sizes()), strict=True)
        return torch.stack([a.mT @ b for a, b in shares])

    def _sizes(self) -> list[int]:
        sizes: list[int] = self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()
        sizes[-1] += len(self.source) - int(self.ends[-1])  # rows of no expert, which must be split off as well
        return sizes


class _RoutedExperts(torch.autograd.Function):
    """Saves the two projections; gathered tokens and hidden activations are made again.

    ``values``: what to multiply by in place of w1, w3, w2; ``fp8``: whether these are FP8's, and so are the products;
    ``factors``: none, or what ``_factors`` returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        w1: Tensor | Quantized,
        w3: Tensor | Quantized,
        w2: Tensor | Quantized,
        limit: float,
        values: tuple[Tensor, Tensor, Tensor] | None,
        fp8: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layout = _Layout.of(ids, w1.shape[0], FP8_BLOCK if fp8 else TILE)
        matrices = (w1, w3, w2)
        v1, v3, v2 = values or matrices
        rows = x.index_select(0, layout.source)
        if fp8:
            rows = round_rows(rows)
        gate, up = (layout.times(rows, v, transposed=True) for v in (v1, v3))
        if factors:
            a1, b1, b3, a2, b2 = factors
            low = layout.product(rows, a1.mT)
            gate.add_(layout.product(low, b1.mT))
            up.add_(layout.product(low, b3.mT))
        del rows
        hidden = (clamped_swiglu(gate, up, limit) * layout.scatter(weights)).to(x.dtype)
        down = layout.times(round_rows(hidden) if fp8 else hidden, v2, transposed=True)
        if factors:
            down.add_(layout.product(layout.product(hidden, a2.mT), b2.mT))
        output = layout.gather(down)
        hits = clamped_rows(gate, up, limit)[layout.slot].sum() / max(2 * layout.slot.numel() * gate.shape[1], 1)
        learned = (w if isinstance(w, Tensor) else None for w in matrices)
        ctx.save_for_backward(x, weights, *(values or learned), gate, up, *layout, *factors)
        ctx.fp8 = fp8
        ctx.dtypes = [None if isinstance(w, Quantized) else w.dtype for w in matrices]
        ctx.quantized = [None if isinstance(w, Tensor) else w for w in matrices]
        ctx.limit = limit
        ctx.mark_non_differentiable(hits)
        return output, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: unpacking makes a checkpoint run again
        (x, weights, *learned, gate, up), layout = saved[:7], saved[7:]
        w1, w3, w2 = (w if q is None else q for w, q in zip(learned, ctx.quantized, strict=True))
        layout, factors = _Layout(*layout[: len(_Layout._fields)]), layout[len(_Layout._fields) :]
        _, _, _, w1_learns, w3_learns, w2_learns, *_ = ctx.needs_input_grad  # not those below adapters
        rows_of = round_rows if ctx.fp8 else lambda rows: rows

        def weight_gradient(left: Tensor, right: Tensor, index: int) -> Tensor:
            if ctx.fp8:
                left, right = round_columns(left).float(), round_columns(right).float()
            return layout.outer(left, right).to(ctx.dtypes[index])

        to_w1 = to_w3 = to_w2 = None
        to_factors: tuple[Tensor, ...] = ()
        upper = gradient.to(x.dtype).index_select(0, layout.source)
        if ctx.fp8:  # what padding repeats would move the scales of its group
            real = layout.scatter(torch.ones_like(weights, dtype=x.dtype))
            upper = upper * real
        # A row of padding has weight 0: hidden and both slopes are 0 there, whatever token it repeats.
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (gate, up, layout.scatter(weights))]
            hidden = (clamped_swiglu(leaves[0], leaves[1], ctx.limit) * leaves[2]).to(x.dtype)
        if w2_learns:
            to_w2 = weight_gradient(upper, hidden.detach(), 2)
        to_hidden = layout.times(rows_of(upper), w2)
        if factors:
            a1, b1, b3, a2, b2 = factors
            low, to_low = layout.product(hidden.detach(), a2.mT), layout.product(upper, b2)
            to_hidden.add_(layout.product(to_low, a2))
            to_factors = (layout.outer(to_low, hidden.detach()), layout.outer(upper, low))
        to_gate, to_up, to_scale = torch.autograd.grad(hidden, leaves, to_hidden)
        del upper, hidden, to_hidden
        rows = x.index_select(0, layout.source)
        if ctx.fp8:
            rows = rows * real
        if w1_learns:
            to_w1 = weight_gradient(to_gate, rows, 0)
        if w3_learns:
            to_w3 = weight_gradient(to_up, rows, 1)
        to_rows = layout.times(rows_of(to_gate), w1).add_(layout.times(rows_of(to_up), w3))
        if factors:
            low, to_low = layout.product(rows, a1.mT), layout.product(to_gate, b1).add_(layout.product(to_up, b3))
            to_rows.add_(layout.product(to_low, a1))
            outers = (layout.outer(to_low, rows), layout.outer(to_gate, low), layout.outer(to_up, low))
            to_factors = (*outers, *to_factors)
        to_weights = to_scale[layout.slot].squeeze(-1)
        return layout.gather(to_rows).to(x.dtype), None, to_weights, to_w1, to_w3, to_w2, None, None, None, *to_factors
