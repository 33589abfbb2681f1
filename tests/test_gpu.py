"""What only a CUDA device can show: `make gpu`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import bench_gpu_attention as attention
import bench_gpu_kernels as kernels
import pytest
import torch
from gpu_protocol import Case, Place
from model_cases import random_config, random_model, relative_rms
from torch import Tensor

from openv4.kernels.dispatch import Choice, using
from openv4.model.loss import Counts, training_losses
from openv4.model.recompute import Route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; `make gpu` runs it there"),
]

# Odd lengths, and blocks that no tile divides.
SMALL: dict[str, Callable[[Place], Case]] = {
    "mhc forward": partial(kernels.mhc_post_pre, tokens=1001, backward=False, hidden=1024),
    "mhc backward": partial(kernels.mhc_post_pre, tokens=1001, backward=True, hidden=1024),
    "norm and FP8": partial(kernels.rms_norm_fp8, tokens=1001, hidden=1024),
    "SwiGLU and FP8": partial(kernels.swiglu_fp8, rows=1001),
    "FP4 weights": partial(kernels.fp4_weight, matrices=3, rows=256, columns=512),
    "selection": partial(attention.select_entries, tokens=4001, dtype=torch.bfloat16, k=256),
    "CSA": partial(attention.attention, tokens=2001, ratio=4, k=256, backward=True, heads=16),
    "HCA": partial(attention.attention, tokens=2001, ratio=128, k=None, backward=True, heads=16),
    "experts": partial(kernels.experts, tokens=1001, zipf=True, backward=True, count=16, hidden=512, inner=256),
    "router": partial(kernels.router, tokens=1001, hidden=512, count=64),
    "Newton-Schulz": partial(kernels.newton_schulz, matrices=3, rows=256, columns=1024),
    "cross-entropy": partial(kernels.cross_entropy, tokens=1001, weight=torch.float32, vocabulary=5003, hidden=512),
}


@pytest.mark.parametrize("name", SMALL)
def test_kernels_agree_with_torch_and_never_wait(name: str) -> None:
    """Each operation on its own; a second call must leave the host running ahead."""
    case = SMALL[name](Place(torch.device("cuda")))
    case.check()
    assert case.ours is not None
    case.ours()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# float32 as such, where only the order of sums differs; Triton's mHC projection rounds to TF32, by 5e-4.
@pytest.mark.parametrize(("choice", "off", "slope_off"), [("torch", 1e-5, 1e-4), ("triton", 1e-4, 5e-3)])
@pytest.mark.parametrize("seed", range(4))
def test_gpu_equals_cpu(
    seed: int, choice: Choice, off: float, slope_off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and the whole gradient. The device takes the experts and entries that the CPU chose: some are close."""
    config = random_config(seed)
    model = random_model(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 61), generator=torch.Generator().manual_seed(seed))
    segments = (torch.arange(61) // 23).expand(2, -1)
    chosen: list[Tensor] = []
    replayed = 0

    def recall(self: Route, name: str, choose: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal replayed
        if arguments[0].device.type == "cpu":
            chosen.append(choose(*arguments))
            return chosen[-1]
        replayed += 1
        return chosen[replayed - 1].to(arguments[0].device)

    monkeypatch.setattr(Route, "recall", recall)
    gradients, losses = [], []
    for device in ("cpu", "cuda"):
        model.to(device)
        model.zero_grad()
        batch = tokens.to(device), segments.to(device)
        with using("torch" if device == "cpu" else choice):
            result = training_losses(model, *batch)
            total = result.total(Counts.of([batch[1]]), 0.3, 1e-4)
            total.backward()
        losses.append(total.detach().cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert replayed == len(chosen) > 0
    assert relative_rms(losses[1], losses[0]) < off
    assert relative_rms(gradients[1], gradients[0]) < slope_off
