"""The two smallest layers: a linear map and a normalisation that follow the dtype of their input.

Parameters are the float32 masters that the optimizer updates; a bfloat16 input makes them compute in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.norm import rms_norm


class Linear(nn.Linear):
    """``x W^T`` without bias, in the dtype of ``x``; weight ``[out, in]``.

    ``lora``, where ``model.lora.add_lora`` puts one, adds a low-rank product of the same input.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(x.dtype))
        return out if self.lora is None else out + self.lora(x)

    def reset_parameters(self) -> None:
        """Left to ``init_weights``, which knows the distribution."""


class GroupedLinear(Linear):
    """One product per group, ``[B, T, G, in]`` to ``[B, T, G, out / G]``; weight ``[out, in]``, rows group by group."""

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__(in_features, out_features)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("btgi,gri->btgr", x, self.weight.to(x.dtype).unflatten(0, (self.groups, -1)))
        return out if self.lora is None else out + self.lora(x)


class RMSNorm(nn.Module):
    """Weighted RMS normalisation over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
