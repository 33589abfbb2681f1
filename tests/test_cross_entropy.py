"""Cross-entropy without all logits, against cross-entropy with them: sums, terms and gradients."""

import pytest
import torch
from model_cases import relative_rms
from torch import Tensor

from openv4.kernels import cross_entropy
from openv4.kernels.cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Sums over the vocabulary, the width and the tokens, some thousand terms each, in another order: off by about the
# square root of that many roundings, of 6e-8 or 1e-16.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(tokens: int, vocab: int = 37, hidden: int = 6, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight, float64, and targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return x, weight, targets.masked_fill(torch.rand(tokens, generator=generator) < ignored, IGNORED)


def run(
    x: Tensor, weight: Tensor, targets: Tensor, *dtypes: torch.dtype, factor: float = 1.0, reference: bool = False
) -> tuple[Tensor, ...]:
    """The loss and the gradients of both factors. ``dtypes``: of hidden states and of the weight."""
    x, weight = x.detach().to(dtypes[0]).requires_grad_(), weight.detach().to(dtypes[-1]).requires_grad_()
    loss = linear_cross_entropy_reference(x, weight, targets).sum() if reference else None
    if loss is None:
        loss = linear_cross_entropy(x, weight, targets)
    return loss, *torch.autograd.grad(factor * loss, (x, weight))


def check(x: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0) -> None:
    for dtype, tolerance in TOLERANCE.items():
        ours = run(x, weight, targets, dtype, factor=factor)
        theirs = run(x, weight, targets, dtype, factor=factor, reference=True)
        for name, a, b in zip(("loss", "hidden", "weight"), ours, theirs, strict=True):
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            assert relative_rms(a, b) < tolerance, (name, dtype)
        terms = token_cross_entropy(x.to(dtype), weight.to(dtype), targets)
        expected = linear_cross_entropy_reference(x.to(dtype), weight.to(dtype), targets)
        assert terms.shape == targets.shape
        assert not terms[targets == IGNORED].any()
        assert relative_rms(terms, expected) < tolerance


@pytest.mark.parametrize("elements", [1, 500, 2**23])
@pytest.mark.parametrize("tokens", [1, 3, 4, 127, 128, 129, 1000])
def test_equals_the_reference(tokens: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a chunk, thirteen, and all in one."""
    monkeypatch.setattr(cross_entropy, "CPU_ELEMENTS", elements)
    check(*draw(tokens))


def test_equals_the_reference_on_four_thousand_tokens() -> None:
    check(*draw(4097, vocab=1009, hidden=8))


@pytest.mark.parametrize("vocab", [2, 3, 127, 129, 1000])
@pytest.mark.parametrize("hidden", [1, 5, 33])
def test_equals_the_reference_for_every_width(vocab: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_ELEMENTS", 7 * vocab + 1)
    check(*draw(50, vocab, hidden))


def test_leading_dimensions() -> None:
    x, weight, targets = draw(60)
    check(x.view(3, 4, 5, -1), weight, targets.view(3, 4, 5))
    check(x.view(6, 10, -1).transpose(0, 1), weight, targets.view(6, 10).T)


@pytest.mark.parametrize("factor", [0.0, -3.0, 0.125])
def test_a_factor_on_the_loss(factor: float) -> None:
    check(*draw(40), factor=factor)


def test_losses_add_up() -> None:
    """Two batches through one head: their gradients accumulate."""
    x, weight, targets = draw(40)
    weight.requires_grad_()
    parts = linear_cross_entropy(x[:25], weight, targets[:25]) + 2 * linear_cross_entropy(x[25:], weight, targets[25:])
    terms = linear_cross_entropy_reference(x, weight, targets)
    ours = torch.autograd.grad(parts, weight)[0]
    assert relative_rms(ours, torch.autograd.grad(terms[:25].sum() + 2 * terms[25:].sum(), weight)[0]) < 1e-12


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_nothing_counts(tokens: int) -> None:
    """All targets ignored, or no token at all: the loss is zero and so is every gradient."""
    x, weight, targets = draw(tokens, ignored=1.1)
    assert (targets == IGNORED).all()
    loss, *gradients = run(x, weight, targets, torch.float32)
    assert loss.item() == 0
    assert [g.shape for g in gradients] == [x.shape, weight.shape]
    assert not any(g.any() for g in gradients)
    assert not token_cross_entropy(x, weight, targets).any()


def test_ignored_tokens_cannot_spoil_the_loss() -> None:
    """Whatever finite numbers an ignored token holds, its neighbours' loss and gradients stay bit for bit the same."""
    x, weight, targets = draw(30)
    wild = torch.where((targets == IGNORED).unsqueeze(1), x * 1e6, x)
    for a, b in zip(run(x, weight, targets, torch.float32), run(wild, weight, targets, torch.float32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    """A logit of size x carries an error of 6e-8 x, which is relative in the probabilities; x is a few times scale."""
    x, weight, targets = draw(30)
    ours = run(x * scale, weight, targets, torch.float32)
    theirs = run((x * scale).float().double(), weight.float().double(), targets, torch.float64, reference=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        assert relative_rms(a, b) < 1e-6 * scale


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str) -> None:
    x, weight, targets = draw(30)
    loss, *expected = run(x, weight, targets, torch.float64)
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    ours = linear_cross_entropy(x, weight, targets)
    assert torch.equal(ours, loss)
    assert ours.requires_grad == (frozen != "both")
    if frozen != "both":
        leaf, gradient = (x, expected[0]) if frozen == "weight" else (weight, expected[1])
        assert torch.equal(torch.autograd.grad(ours, leaf)[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "nothing"])
def test_a_second_backward_raises(frozen: str, dtype: torch.dtype) -> None:
    """The first one scales the gradients in place: a second must fail rather than scale them again."""
    x, weight, targets = draw(20)
    x, weight = x.to(dtype).requires_grad_(frozen != "hidden"), weight.to(dtype).requires_grad_(frozen != "weight")
    leaves = [t for t in (x, weight) if t.requires_grad]
    loss = linear_cross_entropy(x, weight, targets)
    torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    loss = linear_cross_entropy(x, weight, targets)
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16(weight_dtype: torch.dtype) -> None:
    """Logits are float32: only the gradients are rounded, once, by up to 2^-9."""
    x, weight, targets = draw(90)
    x, weight = x.bfloat16(), weight.bfloat16()
    ours = run(x, weight, targets, torch.bfloat16, weight_dtype)
    exact = run(x, weight, targets, torch.float32)
    for a, b, dtype in zip(ours, exact, (torch.float32, torch.bfloat16, weight_dtype), strict=True):
        assert a.dtype == dtype
        assert relative_rms(a, b) < (1e-6 if dtype == torch.float32 else 2**-9)
