"""The two smallest layers: a linear map and a normalisation that follow the dtype of their input.

Parameters are the float32 masters that the optimizer updates; a bfloat16 input makes them compute in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.norm import rms_norm
from ..kernels.quantize import quantized_product
from .precision import CastWeight, Products


class Linear(nn.Linear):
    """``x W^T`` without bias, in the dtype of ``x``; weight ``[out, in]``.

    With ``rounded`` the product is one of FP8 numbers (``train.precision`` sets it). A frozen weight may be held as it
    was released: ``weight`` then has FP8 codes and ``scale`` their scales. ``lora``, where ``model.lora.add_lora`` puts
    one, adds a low-rank product of the same input.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale: Tensor | None
        self.register_buffer("scale", None)
        self.lora: nn.Module | None = None
        self.cast = CastWeight()
        self.rounded: Products | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        return out if self.lora is None else out + self.lora(x)

    def product(self, x: Tensor) -> Tensor:
        """The product with the weight alone."""
        if self.rounded is not None:
            return self.rounded.linear(x, self.weight)
        if self.scale is None:
            return F.linear(x, self.cast(self.weight, x.dtype))
        return quantized_product(x.unsqueeze(-2), self.weight, self.scale).squeeze(-2)

    def hold_quantized(self, codes: Tensor, scale: Tensor) -> None:
        """Replaces the parameter by buffers: codes and scales as in ``kernels.quantize``."""
        del self.weight
        self.register_buffer("weight", codes)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Left to ``init_weights``, which knows the distribution."""


class GroupedLinear(Linear):
    """One product per group, ``[B, T, G, in]`` to ``[B, T, G, out / G]``; weight ``[out, in]``, rows group by group."""

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__(in_features, out_features)
        self.groups = groups

    def product(self, x: Tensor) -> Tensor:
        if self.rounded is not None:
            return self.rounded.linear(x, self.weight, self.groups)
        if self.scale is None:
            return torch.einsum("btgi,gri->btgr", x, self.cast(self.weight, x.dtype).unflatten(0, (self.groups, -1)))
        return quantized_product(x, self.weight, self.scale, self.groups)


class RMSNorm(nn.Module):
    """Weighted RMS normalisation over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
