"""FP8 products by Transformer Engine's block scaling, on Hopper: its kernels under our weights.

Activations and gradients in groups of 1 x 128, weights in blocks of 128 x 128, power-of-two scales: what
``kernels.fp8`` emulates. Weights come rounded from ``RoundedWeight``, which Transformer Engine's own rounding leaves as
they are, and it adds their gradients to the masters' in float32 (``main_grad``); so FP4 needs nothing more, and results
differ from the emulation by the order of sums alone, and where a group's largest value is below 1e-4, for which the
emulation has a floor (recipe 8.1).

The package is the extra ``te``; without it, or elsewhere, the emulation runs.
"""

import functools
import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.swiglu import clamp_hits, clamped_swiglu
from ..model.precision import RoundedWeight

# Rows of a product, and features of a weight, must be multiples of this.
UNIT = 16


def why_not(device: torch.device, streams: str) -> str | None:
    """Why Transformer Engine cannot multiply on this device, for the user; None if it can."""
    if device.type != "cuda":
        return "no CUDA device"
    if streams != "bf16":
        return f"streams are {streams}, Transformer Engine needs bf16"
    return _unavailable()


@functools.cache
def _unavailable() -> str | None:
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError:
        return "transformer-engine is not installed; pip install 'openv4[te]'"
    except (ImportError, OSError, RuntimeError) as error:  # CUDA libraries that it was not built for
        return f"transformer-engine cannot be imported: {str(error).splitlines()[0]}"
    available, reason = engine.is_fp8_block_scaling_available(return_reason=True)
    return None if available else str(reason)


class BlockScaling:
    """The products of one weight ``[O, I]``, or of several of one shape, each with its own rows.

    Args:
        rounded: makes the FP8 values.
        shape: (matrices, O, I).
    """

    def __init__(self, rounded: RoundedWeight, shape: tuple[int, int, int]) -> None:
        engine = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
        count, out, into = shape
        options = {"bias": False, "params_dtype": torch.bfloat16, "device": "meta", "fuse_wgrad_accumulation": True}
        self.rounded, self.count = rounded, count
        self._autocast = functools.partial(engine.autocast, enabled=True, recipe=recipe)
        self._module = (
            engine.Linear(into, out, **options) if count == 1 else engine.GroupedLinear(count, into, out, **options)
        )
        self._names = ["weight"] if count == 1 else [f"weight{i}" for i in range(count)]
        self._values: Tensor | None = None

    def linear(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """As ``RoundedWeight.linear``."""
        self.rounded.count_activations(x)
        if groups == 1:
            return self.product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        rows = x.reshape(-1, groups, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, 0, 0, -len(rows) % UNIT))
        out = self.product(padded.transpose(0, 1).flatten(0, 1), weight, [len(padded)] * groups)
        return out.view(groups, len(padded), -1).transpose(0, 1)[: len(rows)].reshape(*x.shape[:-1], -1)

    def product(self, rows: Tensor, weight: Tensor, splits: Sequence[int] | None = None) -> Tensor:
        """``rows [R, I]`` to ``[R, O]``; ``splits``: how many of them, in multiples of UNIT, each matrix has."""
        fresh = self._use(weight, rows.dtype)
        with self._autocast():
            if splits is not None:
                result: Tensor = self._module(rows, list(splits), is_first_microbatch=fresh)
                return result
            padded = F.pad(rows, (0, 0, 0, -len(rows) % UNIT))
            out: Tensor = self._module(padded, is_first_microbatch=fresh)
            return out[: len(rows)]

    def _use(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Gives the module the weight's present values, and the place of its gradient; are the values new?"""
        values = self.rounded.values(weight, dtype)
        fresh = values is not self._values
        learns = weight.requires_grad and torch.is_grad_enabled()
        if learns and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if fresh:
            self._values = values
            for name, matrix in zip(self._names, values.view(self.count, -1, values.shape[-1]), strict=True):
                setattr(self._module, name, nn.Parameter(matrix, requires_grad=weight.requires_grad))
        if learns and weight.grad is not None:
            for name, gradient in zip(self._names, weight.grad.view(self.count, -1, weight.shape[-1]), strict=True):
                getattr(self._module, name).main_grad = gradient
        return fresh


def block_scaling(weight: Tensor, rounded: RoundedWeight, groups: int = 1) -> "RoundedWeight | BlockScaling":
    """Transformer Engine's products of a weight ``[O, I]`` or ``[E, O, I]``; the emulation's where its shape is odd."""
    count = weight.shape[0] if weight.dim() == 3 else groups
    shape = (count, weight.numel() // count // weight.shape[-1], weight.shape[-1])
    return rounded if any(size % UNIT for size in shape[1:]) else BlockScaling(rounded, shape)


class BlockScaledExperts:
    """The routed experts' products; as ``kernels.moe.routed_experts`` with ``rounded`` weights.

    Transformer Engine wants the rows of each expert as numbers of the host, which therefore waits once a layer.
    """

    def __init__(self, matrices: Sequence[Tensor], rounded: Sequence[RoundedWeight], limit: float) -> None:
        shapes = [(w.shape[0], w.shape[1], w.shape[2]) for w in matrices]
        self.products = [BlockScaling(r, shape) for r, shape in zip(rounded, shapes, strict=True)]
        self.limit = limit

    def __call__(
        self, x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output ``[M, D]`` float32 and share of clamped elements, of x ``[M, D]``, ids and weights ``[M, K]``."""
        self.products[0].rounded.count_activations(x)
        order, splits, place = _grouped(ids, w1.shape[0])
        rows = F.pad(x, (0, 0, 0, 1)).index_select(0, order // ids.shape[1])  # padding reads a row of zeros
        scale = F.pad(weights.flatten(), (0, 1)).index_select(0, order.clamp(max=ids.numel())).unsqueeze(1)
        first, third, second = self.products
        gate, up = first.product(rows, w1, splits), third.product(rows, w3, splits)
        hidden = (clamped_swiglu(gate, up, self.limit) * scale).to(x.dtype)
        down = second.product(hidden, w2, splits)
        output = down.float().index_select(0, place.flatten()).view(*ids.shape, -1).sum(1)
        real = place.flatten()
        return output, clamp_hits(gate.detach()[real], up.detach()[real], self.limit)


def _grouped(ids: Tensor, experts: int) -> tuple[Tensor, list[int], Tensor]:
    """Copies of tokens by expert, each expert's padded to whole units.

    Returns:
        the copy in each row, M K for padding (as a token: M); rows of each expert; row of each copy ``[M, K]``.
    """
    flat = ids.flatten()
    sizes = torch.bincount(flat, minlength=experts)
    padded = (sizes + UNIT - 1) // UNIT * UNIT
    splits: list[int] = padded.tolist()
    by_expert = flat.argsort(stable=True)
    start, before = padded.cumsum(0) - padded, sizes.cumsum(0) - sizes
    row = start[flat[by_expert]] + torch.arange(len(flat), device=ids.device) - before[flat[by_expert]]
    order = torch.full((sum(splits),), len(flat), dtype=torch.long, device=ids.device)
    order[row] = by_expert
    place = torch.empty_like(flat)
    place[by_expert] = row
    return order, splits, place.view_as(ids)
