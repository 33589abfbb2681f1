"""FP8 products of a model's matrices, FP4 among them: what is rounded, when, and how often that loses something.

A module whose products are FP8 holds a ``RoundedWeight``; ``train/precision.py`` puts it there. Source: recipe 8.
"""

from typing import Protocol

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
        """The rates since ``start``, as metrics, 0-dim float32.

        precision/<kind>_saturation: share of elements on the largest code. A scale puts the largest of a group within a
        factor of two of it, so the share is small but never 0. precision/<kind>_underflow: share that was not zero and
        is. precision/scale_violations: blocks of 128 x 128 where FP8 cannot hold FP4's values.
        """
        counts, violations, self.active = self._counts, self._violations, False
        rates: dict[str, Tensor] = {}
        for kind, (saturated, vanished, elements) in counts.items():
            rates[f"precision/{kind}_saturation"] = saturated / elements.clamp(min=1)
            rates[f"precision/{kind}_underflow"] = vanished / elements.clamp(min=1)
        if violations:
            rates["precision/scale_violations"] = torch.stack(violations).sum().float()
        return rates


class Products(Protocol):
    """What carries out the products with one weight in place of plain ones."""

    def linear(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``x [..., I]`` times ``weight [O, I]``, ``[..., O]``; with groups, ``[..., G, I]`` to ``[..., G, O / G]``."""


class RoundedWeight:
    """A weight's FP8 values: ``[O, I]`` in blocks of 128 x 128, or each of a stack of them ``[E, O, I]``.

    They are made once for all micro-batches of a step: anew only when the parameter was written to.

    Args:
        fp4: round to FP4 in groups of 32 first; FP8 then holds the same values (recipe 8.2).
    """

    def __init__(self, gauge: Gauge, fp4: bool = False) -> None:
        self.gauge, self.fp4 = gauge, fp4
        self._made_of: tuple[object, ...] = ()
        self._values: Tensor | None = None
        self._violations: Tensor | None = None

    def values(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` rounded, dequantised to ``dtype``, which holds it exactly."""
        made_of = (weight.data_ptr(), weight._version, weight.device, dtype)
        if self._values is None or made_of != self._made_of:
            with torch.no_grad():
                if self.fp4:
                    self._values, self._violations = fp4_weight(weight, dtype)
                else:
                    self._values = round_weight(weight, dtype)
            self._made_of = made_of
        if self.gauge.active:
            sample = _sample(weight)
            self.gauge.add("fp8_weight", fp8_weight_counts(sample))
            if self.fp4 and self._violations is not None:
                self.gauge.add("fp4_weight", fp4_counts(sample))
                self.gauge.add_violations(self._violations)
        return self._values

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
