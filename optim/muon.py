"""Muon, the optimizer of every weight matrix: hybrid Newton-Schulz and the step around it.

`newton_schulz` is the mathematics and stands alone. `Muon` decides which rows of which parameters are logically
independent matrices, stacks all matrices of one shape, and runs each stack as one batch.

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

NEWTON_SCHULZ_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def newton_schulz(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T of each matrix U S V^T, by ten Newton-Schulz iterations.

    Algorithm 1 of the DeepSeek-V4 paper: X <- a X + b (X X^T) X + c (X X^T)^2 X on the Frobenius-normalised input,
    eight steps that lift small singular values quickly, then two whose derivative at 1 is zero and that settle there.
    Singular values of at least 1e-4 of the Frobenius norm end in [1.000, 1.0021] but for rounding; those below 2e-5
    stay short of 1.

    Args:
        matrices: `[..., n, m]`, any floating dtype; works in float32, or float64 if given.

    Returns:
        `[..., n, m]` in the working dtype; zero where the input matrix is all zero.
    """
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32)).reshape(-1, *matrices.shape[-2:])
    x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x
    # The largest element goes first: the square of an element below 1e-19 would vanish from a float32 norm.
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(tiny)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


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
        max_elements: bound on the elements of one stack (up to eight times as many are alive at once). Results do not
            depend on it beyond rounding. A single matrix is never cut.

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
            capacity = self._capacity(key.shape)
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
        moved = [parameter for parameter in parameters if parameter in self._square_sums]
        if not moved:
            return None
        square_sum = torch.cat([square_sum for p in moved for square_sum in self._square_sums[p]]).sum()
        return (square_sum / sum(p.numel() for p in moved)).sqrt()

    def _capacity(self, shape: tuple[int, int]) -> int:
        return max(1, self.max_elements // (shape[0] * shape[1]))

    def _blocks(
        self, parameter: Tensor, row_splits: tuple[int, ...], hyper: _Hyper
    ) -> Iterator[tuple[_StackKey, _Block]]:
        """Cut a parameter into blocks of equally shaped matrices, none of more than one stack's capacity."""
        *leading, rows, m = parameter.shape
        count, start = math.prod(leading), 0
        for n in row_splits or (rows,):
            key = _StackKey((min(n, m), max(n, m)), parameter.device, momentum_dtype(parameter), hyper)
            capacity = self._capacity(key.shape)
            for first in range(0, count, capacity):
                yield key, _Block(parameter, slice(first, min(first + capacity, count)), slice(start, start + n))
            start += n

    def _update(self, stack: list[_Block], key: _StackKey) -> None:
        """One step of the matrices in `stack`, gathered into one batch `[b, n, m]` and scattered back."""
        lr, mu, decay, gamma = key.hyper
        sizes = [len(block) for block in stack]
        weights = [block.of(block.parameter) for block in stack]
        momenta = [block.of(self.state[block.parameter]["momentum"]) for block in stack]

        w, m = _gather(weights, key.dtype), _gather(momenta, key.dtype)
        g = _gather([block.of(_gradient(block.parameter)) for block in stack], key.dtype)
        new_m = torch.add(g, m, alpha=mu)
        o = self.orthogonalize(torch.add(g, new_m, alpha=mu)) * (math.sqrt(key.shape[1]) * gamma)
        new_w = torch.add(w * (1 - lr * decay), o, alpha=-lr)
        square_sums = o.square().sum(dim=(-2, -1))  # [b]
        if self.found_inf is not None:
            skip = self.found_inf.to(key.device, non_blocking=True) != 0
            new_m, new_w = torch.where(skip, m, new_m), torch.where(skip, w, new_w)
            square_sums = torch.where(skip, torch.zeros_like(square_sums), square_sums)

        torch._foreach_copy_(momenta, torch.split(new_m, sizes))
        torch._foreach_copy_(weights, torch.split(new_w, sizes))
        for block, square_sum in zip(stack, torch.split(square_sums, sizes), strict=True):
            self._square_sums.setdefault(block.parameter, []).append(square_sum)


def momentum_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of the parameter's momentum: float32, or wider if the parameter is."""
    return torch.promote_types(parameter.dtype, torch.float32)


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


def _gather(views: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (views[0] if len(views) == 1 else torch.cat(views)).to(dtype)
