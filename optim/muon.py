"""Muon, the optimizer of every weight matrix: the step around `newton_schulz`, which is the mathematics.

`Muon` decides which rows of which parameters are logically independent matrices, stacks all matrices of one shape, and
runs each stack as one batch.

Shapes: b matrices in a stack, n x m one matrix; inside a stack n <= m (tall matrices are transposed on the way in).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.newton_schulz import NEWTON_SCHULZ_COEFFICIENTS, newton_schulz, newton_schulz_reference

__all__ = ["NEWTON_SCHULZ_COEFFICIENTS", "Muon", "momentum_dtype", "newton_schulz", "newton_schulz_reference"]

# On the CPU a stack holds 512 KiB per thread, so that the passes of a step and the n x n products stay in the L2 cache:
# 10 to 15 % faster for 48 experts of 128 x 256.
CPU_ELEMENTS_PER_THREAD = 2**17

# Of each update so many rows are kept until the next step, for `residual`.
SAMPLED_ROWS = 8


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay and matched update RMS (DeepSeek-V4, Algorithm 1).

    For each logical matrix W `[n, m]` with gradient G: M <- mu M + G; O = NS(mu M + G) sqrt(max(n, m)) gamma;
    W <- (1 - lr lambda) W - lr O. The RMS of O is gamma, so one learning rate serves Muon and AdamW.

    A parameter is `[..., rows, m]`: its leading dimensions count matrices (stacked experts), and `row_splits` of its
    parameter group cuts the rows into logically independent matrices, e.g. `(4, 4, 16)` for an mHC projection.
    A parameter whose gradient is None is left alone: neither decay nor momentum.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim.Optimizer takes them; every option
            below but `max_elements` may differ by group.
        lr: learning rate, until the caller sets `group["lr"]`.
        momentum: mu, of the heavy-ball sum (no 1 - mu factor), used with Nesterov's look-ahead.
        weight_decay: lambda.
        update_rms: gamma.
        row_splits: rows of the consecutive logical matrices of each parameter; empty for one matrix.
        max_elements: bound on the elements of one stack (up to eight times as many are alive at once), lower on the
            CPU. Results do not depend on it beyond rounding. A single matrix is never cut.

    Attributes:
        found_inf: None, or a 0-dim float tensor: where it is not 0, the step changes nothing, bit for bit, whatever
            the gradients hold. It is read on the device only, as torch's fused AdamW reads its own.
        state: `state[p]["momentum"]`, shaped like p, float32 (float64 for float64 parameters).

    Raises:
        ValueError: a parameter has fewer than two dimensions, or `row_splits` do not add up to its rows.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        row_splits: tuple[int, ...] = (),
        max_elements: int = 2**26,
    ) -> None:
        self.max_elements = max_elements
        self._square_sums: dict[Tensor, list[Tensor]] = {}
        self._sampled: dict[Tensor, list[tuple[int, Tensor]]] = {}  # by parameter: n, and rows [b, k, m], of each block
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "update_rms": update_rms,
            "row_splits": row_splits,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        splits = group["row_splits"]
        for index, parameter in enumerate(group["params"]):
            name = group["param_names"][index] if "param_names" in group else f"parameter {index}"
            shape = tuple(parameter.shape)
            if len(shape) < 2:
                raise ValueError(f"Muon: {name} has shape {shape}; only matrices can be orthogonalised, use AdamW")
            if splits and (min(splits) < 1 or sum(splits) != shape[-2]):
                raise ValueError(f"Muon: {name} has shape {shape}, but row_splits {splits} must add up to {shape[-2]}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: gradients are accumulated
        """Update every parameter that has a gradient, by the `lr` of its group."""
        self._square_sums.clear()
        self._sampled.clear()
        stacks: defaultdict[_StackKey, list[_Block]] = defaultdict(list)
        for group in self.param_groups:
            hyper = _Hyper(group["lr"], group["momentum"], group["weight_decay"], group["update_rms"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=momentum_dtype(parameter))
                for key, block in self._blocks(parameter, group["row_splits"], hyper):
                    stacks[key].append(block)
        for key, blocks in stacks.items():
            capacity = self._capacity(key)
            stack: list[_Block] = []
            for block in blocks:
                if stack and sum(map(len, stack)) + len(block) > capacity:
                    self._update(stack, key)
                    stack = []
                stack.append(block)
            self._update(stack, key)

    def orthogonalize(self, matrices: Tensor) -> Tensor:
        """`[b, n, m]` to its semi-orthogonal factors; the one verb that a variant overrides."""
        return newton_schulz(matrices)

    def update_rms(self, *parameters: Tensor) -> Tensor | None:
        """RMS of O (before the learning rate) over `parameters` in the last step, a 0-dim tensor on their device.

        0 if that step was skipped by `found_inf`, None if none of the parameters had a gradient.
        """
        found = self.square_sum(*parameters)
        return None if found is None else (found[0] / found[1]).sqrt()

    def square_sum(self, *parameters: Tensor) -> tuple[Tensor, int] | None:
        """Of what `update_rms` is the root of the mean of: its sum, and the number of elements."""
        moved = [parameter for parameter in parameters if parameter in self._square_sums]
        if not moved:
            return None
        square_sum = torch.cat([square_sum for p in moved for square_sum in self._square_sums[p]]).sum()
        return square_sum, sum(p.numel() for p in moved)

    def residual_sum(self, *parameters: Tensor) -> tuple[Tensor, int] | None:
        """How far the matrices of `parameters` were from semi-orthogonal in the last step: the sum over them of
        `residual`, and their number. 0 if that step was skipped, None if none had a gradient."""
        shapes: defaultdict[tuple[int, torch.Size], list[Tensor]] = defaultdict(list)
        for n, rows in (block for parameter in parameters for block in self._sampled.get(parameter, ())):
            shapes[n, rows.shape[1:]].append(rows)
        if not shapes:
            return None
        found = torch.cat([residual(torch.cat(blocks), n) for (n, _), blocks in shapes.items()])
        if self.found_inf is not None:
            found = torch.where(self.found_inf.to(found.device) != 0, torch.zeros_like(found), found)
        return found.sum(), len(found)

    def _capacity(self, key: _StackKey) -> int:
        """How many matrices one stack holds."""
        elements = key.shape[0] * key.shape[1]
        capacity = self.max_elements // elements
        if key.device.type == "cpu":
            capacity = min(capacity, torch.get_num_threads() * max(1, CPU_ELEMENTS_PER_THREAD // elements))
        return max(1, capacity)

    def _blocks(
        self, parameter: Tensor, row_splits: tuple[int, ...], hyper: _Hyper
    ) -> Iterator[tuple[_StackKey, _Block]]:
        """Cut a parameter into blocks of equally shaped matrices, none of more than one stack's capacity."""
        *leading, rows, m = parameter.shape
        count, start = math.prod(leading), 0
        for n in row_splits or (rows,):
            key = _StackKey((min(n, m), max(n, m)), parameter.device, momentum_dtype(parameter), hyper)
            capacity = self._capacity(key)
            for first in range(0, count, capacity):
                yield key, _Block(parameter, slice(first, min(first + capacity, count)), slice(start, start + n))
            start += n

    def _update(self, stack: list[_Block], key: _StackKey) -> None:
        """One step of the matrices in `stack`; only the input of `orthogonalize` is gathered into one batch."""
        lr, mu, decay, gamma = key.hyper
        scale = math.sqrt(key.shape[1]) * gamma
        sizes = [len(block) for block in stack]
        weights = [block.of(block.parameter) for block in stack]
        momenta = [block.of(self.state[block.parameter]["momentum"]) for block in stack]
        gradients = [block.of(_gradient(block.parameter)) for block in stack]

        new_m = torch._foreach_add(gradients, momenta, alpha=mu)
        ahead = torch._foreach_add(gradients, new_m, alpha=mu)
        o = self.orthogonalize(ahead[0] if len(ahead) == 1 else torch.cat(ahead))  # [b, n, m], still without the scale
        new_w = torch._foreach_mul([weight.to(key.dtype) for weight in weights], 1 - lr * decay)
        torch._foreach_add_(new_w, torch.split(o, sizes), alpha=-lr * scale)
        square_sums = (torch.linalg.matrix_norm(o) * scale).square()  # [b]
        rows = sample_rows(o)
        if self.found_inf is None:
            torch._foreach_copy_(momenta, new_m)
            torch._foreach_copy_(weights, new_w)
        else:
            skip = self.found_inf.to(key.device, non_blocking=True) != 0
            for old, new in zip(momenta + weights, [*new_m, *new_w], strict=True):
                torch.where(skip, old, new.to(old.dtype), out=old)
            square_sums = torch.where(skip, torch.zeros_like(square_sums), square_sums)
        parts = zip(stack, torch.split(square_sums, sizes), torch.split(rows, sizes), strict=True)
        for block, square_sum, sampled in parts:
            self._square_sums.setdefault(block.parameter, []).append(square_sum)
            self._sampled.setdefault(block.parameter, []).append((key.shape[0], sampled))


def momentum_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of the parameter's momentum: float32, or wider if the parameter is."""
    return torch.promote_types(parameter.dtype, torch.float32)


def sample_rows(matrices: Tensor) -> Tensor:
    """A copy of up to `SAMPLED_ROWS` rows, at equal distances, of each of `[b, n, m]`."""
    return matrices[:, :: max(1, matrices.shape[1] // SAMPLED_ROWS)][:, :SAMPLED_ROWS].clone()


def residual(rows: Tensor, n: int) -> Tensor:
    """An estimate, `[b]`, of |O O^T - I|^2 / n, the mean of (s^2 - 1)^2 over the singular values s of matrices O with
    n rows: 0 where all are 1, 1 for a matrix of zeros.

    `rows` `[b, k, m]` are some of each: their lengths should be 1, and products of two of them 0. Exact for k = n.
    """
    k = rows.shape[1]
    products = torch.bmm(rows, rows.mT)
    lengths = products.diagonal(dim1=1, dim2=2)
    others = (products.square().sum((1, 2)) - lengths.square().sum(1)).clamp_min(0) / max(1, k * (k - 1)) * (n - 1)
    return (lengths - 1).square().mean(1) + others


class _Hyper(NamedTuple):
    lr: float
    momentum: float
    weight_decay: float
    update_rms: float


class _StackKey(NamedTuple):
    """What matrices must share to be updated as one batch; a tall matrix shares the shape of its transpose."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    hyper: _Hyper


@dataclass(frozen=True, eq=False)
class _Block:
    """Some of the logical matrices of a parameter `[..., rows, m]`: a range of the leading index, a range of rows."""

    parameter: Tensor
    leading: slice
    rows: slice

    def __len__(self) -> int:
        return int(self.leading.stop - self.leading.start)

    def of(self, tensor: Tensor) -> Tensor:
        """The block's view `[b, n, m]`, n <= m, of a tensor shaped like the parameter."""
        view = tensor.view(-1, *tensor.shape[-2:])[self.leading, self.rows]
        return view.mT if view.shape[-2] > view.shape[-1] else view


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.contiguous()
