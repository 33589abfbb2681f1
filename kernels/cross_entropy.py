"""Cross-entropy of an output head, computed from hidden states."""

import torch.nn.functional as F
from torch import Tensor

from .norm import at_least_fp32

IGNORED = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden W^T)[target] per token, ``[...]`` float32; 0 where the target is ``IGNORED``.

    Args:
        hidden: ``[..., D]``; weight: ``[V, D]``; targets: ``[...]`` int64. Logits are formed in float32 (recipe 4).
    """
    logits = F.linear(at_least_fp32(hidden), at_least_fp32(weight))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(
        targets
    )
