"""The two smallest layers: a linear map and a normalisation that follow the dtype of their input.

Parameters are the float32 masters that the optimizer updates; a bfloat16 input makes them compute in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.norm import rms_norm


class Linear(nn.Linear):
    """``x W^T`` without bias, in the dtype of ``x``; weight ``[out, in]``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def reset_parameters(self) -> None:
        """Left to ``init_weights``, which knows the distribution."""


class RMSNorm(nn.Module):
    """Weighted RMS normalisation over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
