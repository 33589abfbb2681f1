"""What only a CUDA device can show: `make gpu`."""

import pytest
import torch
from model_cases import random_config, random_model, relative_rms

from openv4.model.loss import Counts, training_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; `make gpu` runs it there"),
]


@pytest.mark.parametrize("seed", range(4))
def test_gpu_equals_cpu(seed: int) -> None:
    """Losses and the whole gradient in float32 (without TF32), where only the order of sums differs."""
    config = random_config(seed)
    model = random_model(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 61), generator=torch.Generator().manual_seed(seed))
    segments = (torch.arange(61) // 23).expand(2, -1)
    gradients, losses = [], []
    for device in ("cpu", "cuda"):
        model.to(device)
        model.zero_grad()
        batch = tokens.to(device), segments.to(device)
        result = training_losses(model, *batch)
        total = result.total(Counts.of([batch[1]]), 0.3, 1e-4)
        total.backward()
        losses.append(total.detach().cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert relative_rms(losses[1], losses[0]) < 1e-5
    assert relative_rms(gradients[1], gradients[0]) < 1e-4
