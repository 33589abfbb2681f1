"""A model trained by Triton kernels, by torch and by the plain references: the same losses, to rounding."""

from functools import cache

import pytest
import torch
from model_cases import random_config, random_model, relative_rms
from torch import Tensor
from triton_cases import DEVICE

from openv4.data.loader import Batch
from openv4.kernels.dispatch import Implementation, using
from openv4.model.config import AttentionMode
from openv4.optim.config import AdamWConfig, OptimConfig
from openv4.optim.groups import build_optimizers
from openv4.optim.schedule import Plan
from openv4.train.config import PrecisionConfig
from openv4.train.loop import training_step
from openv4.train.precision import apply_precision

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2
TOKENS = 23


@cache  # interpreted, a run takes half a minute
def train(
    implementation: Implementation, precision: PrecisionConfig, attention: AttentionMode
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses ``[steps, 3]`` (main, MTP, balance), gradient norms, and the weights at the end."""
    config = random_config(
        21, hidden_size=32, num_hidden_layers=3, layer_types=(), compress_ratios=(0, 4, 16, 0), num_hash_layers=1,
        index_head_dim=16, qk_rope_head_dim=4, head_dim=16, index_topk=4, sliding_window=5, hc_mult=4,
        n_routed_experts=5, num_experts_per_tok=2, swiglu_limit=1.5,
    )  # fmt: skip
    model = random_model(config, 0).to(DEVICE)
    apply_precision(model, precision)
    # An eps below most gradients (1e-3 after clipping) and above their rounding (1e-9): with the recipe's 1e-20, AdamW
    # moves a weight whose gradient is rounding alone as far as any other, in a direction that no two sums agree on.
    optim = OptimConfig(matrices="adamw", adamw=AdamWConfig(eps=1e-6))
    optimizers = build_optimizers(model.named_parameters(), model.row_splits(), optim)
    plan = Plan(0, "", TOKENS, 1, 1e-2, attention, 0.3, 0.1, 0.01, 0.5)
    generator = torch.Generator().manual_seed(0)
    losses, norms = [], []
    with using(implementation):
        for _ in range(STEPS):
            tokens = torch.randint(0, config.vocab_size, (1, TOKENS), generator=generator).to(DEVICE)
            segments = (torch.arange(TOKENS) // 17).expand(1, -1).to(DEVICE)
            report = training_step(model, optimizers, [Batch(tokens, segments, ())], plan, 1.0)
            losses.append(torch.stack((report.main, report.mtp, report.balance)).cpu())
            norms.append(report.grad_norm.cpu())
    weights = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    return torch.stack(losses), torch.stack(norms), weights


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_float32(attention: AttentionMode) -> None:
    """Sums in another order differ by 1e-7, which an update makes more of where a gradient is not far above eps.
    (Muon's products are tested by themselves: interpreted, a step of it takes minutes.)"""
    precision = PrecisionConfig("fp32")
    wanted = train("torch", precision, attention)
    for implementation in ("reference", "triton"):
        found = train(implementation, precision, attention)  # type: ignore[arg-type]
        for ours, theirs, tolerance in zip(found[:2], wanted[:2], (1e-5, 1e-4), strict=True):
            assert relative_rms(ours, theirs) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["bf16", "fp4_qat"])
def test_low_precision(compute: str) -> None:
    """Where values are rounded to 8 bits of mantissa or fewer, a last bit of float32 now and then decides a rounding:
    the kernels' losses differ from torch's by less than from float32's."""
    exact = train("torch", PrecisionConfig("fp32"), "sparse")[0]
    precision = PrecisionConfig(compute)  # type: ignore[arg-type]
    by_torch, by_kernels = (train(name, precision, "sparse")[0] for name in ("torch", "triton"))  # type: ignore[arg-type]
    assert relative_rms(by_kernels, by_torch) < max(2 * relative_rms(by_torch, exact), 1e-2)


@pytest.mark.slow
def test_two_runs_are_equal_to_the_bit() -> None:
    first, second = (run("triton", PrecisionConfig("bf16"), "sparse") for run in (train, train.__wrapped__))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
