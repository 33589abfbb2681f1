"""What a model's matrices multiply as: in the dtype of the streams, or rounded to FP8, FP4 among them; what is rounded,
when, and how often that loses something.

A module whose products are FP8 holds a ``RoundedWeight``; ``train/precision.py`` puts it there. Source: recipe 8.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.fp4 import fp4_counts, fp4_weight, index_operand, rotate
from ..kernels.fp8 import fp8_counts, fp8_linear, fp8_weight_counts, round_weight

# Of a tensor at most so many rows are counted: a share of some million elements is known to a thousandth.
SAMPLED_ROWS = 256


class Gauge:
    """Counts of what rounding lost, by kind of number, in a forward pass that is measured; else it counts nothing."""

    def __init__(self) -> None:
        self.active = False
        self._counts: dict[str, Tensor] = {}
        self._violations: list[Tensor] = []

    def start(self) -> None:
        """Counts from now on, until ``take``; replays of a backward pass come later and are not counted."""
        self.active, self._counts, self._violations = True, {}, []

    def add(self, kind: str, counts: Tensor) -> None:
        """``counts [3]``: saturated, vanished and all elements."""
        self._counts[kind] = self._counts[kind] + counts if kind in self._counts else counts

    def add_violations(self, count: Tensor) -> None:
        """Blocks whose FP4 scales lie too far apart for FP8 to hold the values, 0-dim."""
        self._violations.append(count)

    def take(self) -> dict[str, Tensor]:
        """The rates since ``start``, as metrics, 0-dim float32; NaN of no elements.

        precision/<kind>_saturation: share of elements on the largest code. A scale puts the largest of a group within a
        factor of two of it, so the share is small but never 0. precision/<kind>_underflow: share that was not zero and
        is. precision/scale_violations: blocks of 128 x 128 where FP8 cannot hold FP4's values.
        """
        counts, violations, self.active = self._counts, self._violations, False
        rates: dict[str, Tensor] = {}
        for kind, (saturated, vanished, elements) in counts.items():
            rates[f"precision/{kind}_saturation"] = saturated / elements
            rates[f"precision/{kind}_underflow"] = vanished / elements
        if violations:
            rates["precision/scale_violations"] = torch.stack(violations).sum().float()
        return rates


class Products(Protocol):
    """What carries out the products with one weight in place of plain ones."""

    def linear(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``x [..., I]`` times ``weight [O, I]``, ``[..., O]``; with groups, ``[..., G, I]`` to ``[..., G, O / G]``."""


class CastWeight:
    """A weight in the dtype of its products.

    Attributes:
        held: what ``make`` has made of it, where a process of many holds nothing else: the parameter is then a shape
            without numbers, and its owners have those in float32 (``optim/exchange.py``).
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def make(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """What products need of ``master``, float32."""
        return master.to(dtype)

    def hold(self, values: Tensor | None, master: Tensor | None = None) -> None:
        """Takes ``values [...]`` for those of the whole weight; what this process owns of it is ``master``."""
        self.held = values

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, through which gradients pass."""
        if self.held is None:
            return weight.to(dtype)
        values: Tensor = _Values.apply(weight, self.held)  # type: ignore[no-untyped-call]
        return values


class _Values(torch.autograd.Function):
    """Values that were made of a weight, in its place: as if it had been cast to their dtype here."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class RoundedWeight:
    """A weight's FP8 values: ``[O, I]`` in blocks of 128 x 128, or each of a stack of them ``[E, O, I]``.

    They are made once for all micro-batches of a step: anew only when the parameter was written to. Where they are
    held, as in ``CastWeight``, its owners make them, and count what is lost of what they own.

    Args:
        fp4: round to FP4 in groups of 32 first; FP8 then holds the same values (recipe 8.2).
    """

    def __init__(self, gauge: Gauge, fp4: bool = False) -> None:
        self.gauge, self.fp4 = gauge, fp4
        self.held: Tensor | None = None
        self._master: Tensor | None = None
        self._made_of: tuple[object, ...] = ()
        self._values: Tensor | None = None
        self._violations: Tensor | None = None

    @torch.no_grad()
    def make(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """``master [..., O, I]`` rounded, dequantised to ``dtype``, which holds it exactly."""
        if not self.fp4:
            return round_weight(master, dtype)
        values, self._violations = fp4_weight(master, dtype)
        return values

    def hold(self, values: Tensor | None, master: Tensor | None = None) -> None:
        """As ``CastWeight.hold``."""
        self.held, self._master, self._values = values, master, None

    def values(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` rounded, dequantised to ``dtype``."""
        made_of = (weight.data_ptr(), weight._version, weight.device, dtype)
        if self.held is None and (self._values is None or made_of != self._made_of):
            self._values, self._made_of = self.make(weight, dtype), made_of
        values = self._values if self.held is None else self.held
        assert values is not None
        if self.gauge.active:
            self._count(weight if self.held is None else self._master, values.device)
        return values

    def _count(self, weight: Tensor | None, device: torch.device) -> None:
        """What rounding loses of ``weight``; of None, nothing out of nothing."""
        counts: dict[str, Callable[[Tensor], Tensor]] = {"fp8_weight": fp8_weight_counts}
        if self.fp4:
            counts["fp4_weight"] = fp4_counts
            lost = self._violations if weight is not None else None
            self.gauge.add_violations(torch.zeros((), dtype=torch.long, device=device) if lost is None else lost)
        for kind, count in counts.items():
            self.gauge.add(kind, torch.zeros(3, device=device) if weight is None else count(_sample(weight)))

    def linear(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``kernels.fp8.fp8_linear`` with this weight."""
        self.count_activations(x)
        return fp8_linear(x, weight, self.values(weight, x.dtype), groups)

    def count_activations(self, x: Tensor) -> None:
        if self.gauge.active:
            self.gauge.add("fp8_activation", fp8_counts(x.detach().reshape(-1, x.shape[-1])[:SAMPLED_ROWS]))


class IndexRounding:
    """What the indexer's queries and keys ``[..., J]`` become in FP4: rotated by a Hadamard matrix, then rounded
    (recipe 2.3); the gradient passes the rounding unchanged."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge

    def __call__(self, x: Tensor) -> Tensor:
        if self.gauge.active:
            self.gauge.add("fp4_index", fp4_counts(rotate(x.detach().reshape(-1, x.shape[-1])[:SAMPLED_ROWS])))
        return index_operand(x)


def _sample(weight: Tensor) -> Tensor:
    """Some rows of the first matrix, whole blocks of them."""
    return weight.detach().reshape(-1, *weight.shape[-2:])[0, :SAMPLED_ROWS]
