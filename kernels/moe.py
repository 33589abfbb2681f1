"""Mixture of experts: router scores, the choice of experts, and their clamped SwiGLU.

Shapes: M tokens (batch and length flattened), D hidden, E experts, K experts per token, F expert intermediate, R rows
of the grouped products: M K copies of tokens, sorted by expert, each expert's share padded to whole tiles.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import at_least_fp32

# An expert's share is padded to whole tiles. BLAS picks another summation order for products of few rows (measured:
# fewer than 12 with MKL), and then a token's output would depend on how many others, of whatever document, chose the
# same expert.
TILE = 16


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """sqrt(softplus(x W^T)), ``[M, E]`` float32 (recipe 3).

    Below a logit of -20 the value is exp(logit / 2) to 1e-9 relative; taking that branch keeps the gradient finite
    where softplus underflows to zero and the square root's slope does not.
    """
    logits = F.linear(at_least_fp32(x), at_least_fp32(weight))
    tail = logits < -20
    return torch.where(tail, (logits / 2).exp(), F.softplus(logits.masked_fill(tail, 0.0)).sqrt())


def top_experts(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best experts of each token, ``[M, K]`` int64; ties go to the lowest id."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def expert_weights(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Scores of the chosen experts, normalised to sum to ``scale``, ``[M, K]``."""
    chosen = scores.gather(1, ids)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), at least float32; no clamp if ``limit`` is 0 (recipe 3)."""
    gate, up = at_least_fp32(gate), at_least_fp32(up)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def clamp_hits(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Share of elements that ``clamped_swiglu`` clamps, 0-dim float32."""
    width = gate.shape[-1]
    return _clamped_rows(gate.reshape(-1, width), up.reshape(-1, width), limit).sum() / (2 * gate.numel())


def routed_experts_reference(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
) -> Tensor:
    """The output of ``routed_experts`` by a loop over experts, the oracle of the tests."""
    output = torch.zeros_like(x, dtype=at_least_fp32(x[:0]).dtype)
    for expert in range(len(w1)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (F.linear(x[token], w[expert].to(x.dtype)) for w in (w1, w3))
        hidden = (clamped_swiglu(gate, up, limit) * weights[token, slot].unsqueeze(-1)).to(x.dtype)
        output = output.index_add(0, token, at_least_fp32(F.linear(hidden, w2[expert].to(x.dtype))))
    return output


def routed_experts(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """Sum over each token's experts of weight * expert(x), nothing dropped.

    Tokens are sorted by expert and every projection is one grouped product. The routing weight multiplies before w2, as
    in the official code. Sums over a token's experts gather from a fixed place each, so that no atomic addition decides
    their order.

    Args:
        x: ``[M, D]``; ids, weights: ``[M, K]``; w1 (gate), w3 (up): ``[E, F, D]``; w2 (down): ``[E, D, F]``.

    Returns:
        output ``[M, D]``, at least float32 (experts are summed so), and the share of clamped elements (0-dim).
    """
    # Rows of whole 16 bytes: torch's grouped product asks for them, and with others BLAS sums a row by its place.
    unit = 16 // x.element_size()
    wide, inner = -x.shape[1] % unit, -w1.shape[1] % unit
    if wide or inner:
        x, w1, w3, w2 = (
            F.pad(x, (0, wide)),
            *(F.pad(w, (0, wide, 0, inner)) for w in (w1, w3)),
            F.pad(w2, (0, inner, 0, wide)),
        )
    output, hits = _RoutedExperts.apply(x, ids, weights, w1, w3, w2, limit)
    return output[:, : output.shape[1] - wide], hits * (w1.shape[1] / (w1.shape[1] - inner))


class _Layout(NamedTuple):
    """Where the copies of tokens stand in the grouped products."""

    ends: Tensor  # [E] int32: one past each expert's last row
    source: Tensor  # [R] token of each row; padding repeats token 0
    slot: Tensor  # [M, K] row of each token's copies

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> "_Layout":
        flat = ids.flatten()
        sizes = torch.bincount(flat, minlength=experts)
        padded = (sizes + (TILE - 1)) // TILE * TILE
        ends = padded.cumsum(0)
        # Off the CPU the number of rows is bounded, not read, so that the host does not wait; what follows the last
        # expert's rows belongs to none and is never read back.
        rows = int(ends[-1]) if ids.device.type == "cpu" else len(flat) + min(experts, len(flat)) * (TILE - 1)
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
    """Saves the two projections; gathered tokens and hidden activations are made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
    ) -> tuple[Tensor, Tensor]:
        layout = _Layout.of(ids, len(w1))
        rows = x.index_select(0, layout.source)
        gate, up = (layout.product(rows, w.to(x.dtype).mT) for w in (w1, w3))
        del rows
        hidden = (clamped_swiglu(gate, up, limit) * layout.scatter(weights)).to(x.dtype)
        output = layout.gather(layout.product(hidden, w2.to(x.dtype).mT))
        hits = _clamped_rows(gate, up, limit)[layout.slot].sum() / max(2 * layout.slot.numel() * gate.shape[1], 1)
        ctx.save_for_backward(x, weights, w1, w3, w2, gate, up, *layout)
        ctx.limit = limit
        ctx.mark_non_differentiable(hits)
        return output, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, w3, w2, gate, up, *layout = ctx.saved_tensors
        layout = _Layout(*layout)
        upper = gradient.to(x.dtype).index_select(0, layout.source)
        # A row of padding has weight 0: hidden and both slopes are 0 there, whatever token it repeats.
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (gate, up, layout.scatter(weights))]
            hidden = (clamped_swiglu(leaves[0], leaves[1], ctx.limit) * leaves[2]).to(x.dtype)
        to_w2 = layout.outer(upper, hidden.detach()).to(w2.dtype)
        to_gate, to_up, to_scale = torch.autograd.grad(hidden, leaves, layout.product(upper, w2.to(x.dtype)))
        del upper, hidden
        rows = x.index_select(0, layout.source)
        to_w1, to_w3 = (layout.outer(slope, rows).to(w1.dtype) for slope in (to_gate, to_up))
        del rows
        to_rows = layout.product(to_gate, w1.to(x.dtype)).add_(layout.product(to_up, w3.to(x.dtype)))
        return layout.gather(to_rows).to(x.dtype), None, to_scale[layout.slot].squeeze(-1), to_w1, to_w3, to_w2, None


def _clamped_rows(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """How many elements of each row ``clamped_swiglu`` clamps, ``[R]`` float32."""
    if limit <= 0:
        return gate.new_zeros(len(gate), dtype=torch.float32)
    return ((gate > limit).sum(1) + (up.abs() > limit).sum(1)).float()
