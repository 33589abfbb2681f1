"""The router and its balance loss in Triton: values and gradients in float64, choices bit for bit; and no waits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from balance_cases import documents
from model_cases import random_config
from router_cases import draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, assert_close, assert_same_bits, run_as

from openv4.kernels.balance import balance_loss
from openv4.kernels.dispatch import using
from openv4.kernels.router import expert_load, expert_weights, router_scores, top_experts
from openv4.model.moe import MoE
from openv4.model.recompute import Route

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 1, 1), (5, 13, 40), (40, 256, 64), (70, 6, 33), (33, 384, 7), (3, 500, 16)]


def compare(operation: Callable[..., Any], inputs: dict[str, Any], tolerance: float) -> None:
    """Against torch in float64, and twice, the same bits."""
    inputs = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = run_as("triton", operation, inputs)
    assert_same_bits(run_as("triton", operation, inputs), found)
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    exact = run_as("torch", operation, wide)
    assert_close(found, {name: value.to(found[name].dtype) for name, value in exact.items()}, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "hidden"), SIZES)
def test_scores(tokens: int, experts: int, hidden: int, dtype: torch.dtype) -> None:
    """Sums of up to 64 terms of float32; of bfloat16 only the gradient of x is rounded, once, by up to 2^-9."""
    compare(router_scores, draw(tokens, experts, hidden, dtype), 2e-6 if dtype == torch.float32 else 2**-9)


def test_scores_where_softplus_is_tiny_or_the_logit_itself() -> None:
    """Element by element, relative: the seams at -20, at e^-7 and at s^2 = 0.1 do not show."""
    logits = torch.cat((torch.linspace(-60, 60, 400), torch.tensor([-20.001, -19.999, -2.25, -6.9, -6.92, 6.9, 6.92])))
    inputs = {"x": logits.unsqueeze(1), "weight": torch.ones(1, 1)}
    found = {}
    for implementation, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        x, weight = (t.to(DEVICE, dtype).requires_grad_() for t in (t.clone() for t in inputs.values()))
        with using(implementation):  # type: ignore[arg-type]
            scores = router_scores(x, weight)
            (slope,) = torch.autograd.grad(scores.sum(), x)
        found[implementation] = scores.detach().squeeze(1).double(), slope.squeeze(1).double()
    for ours, exact in zip(found["triton"], found["torch"], strict=True):
        assert ((ours - exact).abs() <= 4e-6 * exact.abs()).all()  # exp of -30 is off by 30 roundings of its argument


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 5), (13, 3), (256, 6), (500, 8)])
def test_the_choice_is_that_of_a_stable_sort(experts: int, k: int, seed: int) -> None:
    """With ties everywhere, zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (65, experts), generator=generator).float() / 2
    scores[scores == 0.5] = -0.0
    for value in (torch.nan, torch.inf, -torch.inf):
        scores[torch.rand(scores.shape, generator=generator) < 0.05] = value
    scores[7], scores[8] = -torch.inf, torch.nan
    with using("triton"):
        found = top_experts(scores.to(DEVICE), k)
    with using("torch"):
        assert torch.equal(found.cpu(), top_experts(scores, k))


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 5), (13, 3), (256, 6)])
def test_weights(experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(50, experts, generator=generator) + 0.01
    scores[3] *= 1e-6
    inputs: dict[str, Any] = {
        "scores": scores,
        "ids": torch.rand(50, experts, generator=generator).argsort(1)[:, :k],
        "scale": 1.5,
    }
    if k > 1:
        compare(expert_weights, inputs, 2e-6)
        return
    with using("triton"):  # the one weight is constant, its slope nothing but rounding
        leaf = scores.to(DEVICE).requires_grad_()
        weights = expert_weights(leaf, inputs["ids"].to(DEVICE), 1.5)
        (slope,) = torch.autograd.grad(weights.sum(), leaf)
    torch.testing.assert_close(weights.detach().cpu(), torch.full((50, 1), 1.5))
    assert slope.mul(leaf.detach()).abs().max() < 1e-6


PACKED = [
    ([[1]], [0]),
    ([[5, 3, 1], [9]], [0, 0]),
    ([[300, 1, 2], [100, 128, 50]], [4, 29]),  # documents over several chunks, and one that fills a chunk's rest
    ([[128, 128], [129, 127]], [0, 0]),
    ([[], [7]], [7, 0]),
    ([[]], [3]),
]


@pytest.mark.parametrize(("rows", "padding"), PACKED)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (7, 3), (256, 6)])
def test_balance_loss(rows: Sequence[Sequence[int]], padding: Sequence[int], experts: int, k: int) -> None:
    """Sums of up to 300 terms in float32; the slope is a difference of sums."""
    first, valid = documents(rows, padding)
    scores = torch.rand(*first.shape, experts, generator=torch.Generator().manual_seed(0)) + 0.01
    best = scores.argsort(-1, descending=True)[..., :k]
    if experts == 1:  # the loss is constant
        with using("triton"):
            leaf = scores.to(DEVICE).requires_grad_()
            loss = balance_loss(leaf, best.to(DEVICE), first.to(DEVICE), valid.to(DEVICE))
            (slope,) = torch.autograd.grad(loss, leaf)
        assert float(loss) == pytest.approx(float(valid.sum()))
        assert slope.abs().max() < 1e-4
        return
    compare(balance_loss, {"scores": scores, "best": best, "first": first, "valid": valid}, 3e-6)


def test_holes_in_a_document_count_for_nothing() -> None:
    first, valid = documents([[200, 90]], [10])
    valid[0, [0, 60, 128, 129, 210]] = False
    scores = torch.rand(1, 300, 5, generator=torch.Generator().manual_seed(0)) + 0.01
    best = scores.argsort(-1, descending=True)[..., :2]
    compare(balance_loss, {"scores": scores, "best": best, "first": first, "valid": valid}, 3e-6)


def test_load() -> None:
    ids = torch.tensor([[0, 2], [2, 3], [2, 1], [0, 1]])
    assert expert_load(ids, 5).tolist() == [2, 2, 3, 1, 0]
    assert expert_load(ids, 5, torch.tensor([True, False, True, False])).tolist() == [1, 1, 2, 0, 0]
    assert expert_load(ids[:0], 3).tolist() == [0, 0, 0]


class _NoWaits(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU: to read a number, or to learn the size of a result."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        indices = args[1] if name.startswith(("index.", "index_put")) else ()
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        assert not masks and not name.startswith(self.WAITING), f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hash_routed", [False, True])
def test_a_layer_never_waits_for_the_device(hash_routed: bool) -> None:
    """Forward and backward, with padding; the same layer in torch reads sizes, which shows that the guard works."""
    config = random_config(0)
    layer = MoE(config, hash_routed).to(DEVICE)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            tensor.random_(config.n_routed_experts) if "tid2eid" in name else tensor.normal_(0, 0.1)
    first, valid = (t.to(DEVICE) for t in documents([[20, 9]], [3]))
    tokens = torch.zeros(1, 32, dtype=torch.long, device=DEVICE)
    x = torch.randn(1, 32, config.hidden_size, device=DEVICE, requires_grad=True)

    def step() -> None:
        output, routing = layer(x, tokens, first, valid, Route())
        (output.sum() + routing.balance).backward()

    with using("triton"), _NoWaits():
        step()
    assert x.grad is not None and x.grad.isfinite().all()
    with using("torch"), _NoWaits(), pytest.raises(AssertionError, match="makes the host wait"):
        step()
