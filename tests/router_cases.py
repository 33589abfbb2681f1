"""Arguments of the router, for its tests and for compiling its kernels."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openv4.kernels.router import expert_weights, router_scores, top_experts


def draw(tokens: int, experts: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Tokens of ``dtype`` and a float32 weight whose logits spread from about -40 to 40."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, hidden, generator=generator) * hidden**-0.5
    weight *= torch.logspace(-1, 1.2, experts).unsqueeze(1)
    return {"x": torch.randn(tokens, hidden, generator=generator).to(dtype), "weight": weight}


def flash_calls() -> dict[str, Callable[[], None]]:
    """V4-Flash's 256 experts of 4096, top 6; Pro's 384 of 7168; and sizes that fill no tile."""

    def call(experts: int, hidden: int, k: int, dtype: torch.dtype) -> None:
        x = torch.zeros(64, hidden, dtype=dtype, requires_grad=True)
        weight = torch.zeros(experts, hidden, requires_grad=True)
        scores = router_scores(x, weight)
        top_experts(scores, k)
        expert_weights(scores, torch.zeros(64, k, dtype=torch.long), 1.5).sum().backward()

    sizes = ((256, 4096, 6), (384, 7168, 6), (13, 40, 3), (1, 1, 1), (512, 256, 8))
    return {
        f"{experts} experts of {hidden}, top {k}, {dtype}": partial(call, experts, hidden, k, dtype)
        for experts, hidden, k in sizes
        for dtype in (torch.bfloat16, torch.float32)
    }
