"""Hyper-connections against plain formulas: what a site reads, what it writes, and Sinkhorn's normalisation."""

import pytest
import torch
from hyper_connection_cases import SHAPES, TOLERANCE, Sites, draw, run
from model_cases import relative_rms
from torch import Tensor

from openv4.kernels.hyper_connection import Mixing, mhc_head, mhc_post, mhc_pre, mixing_coefficients, sinkhorn

pytestmark = pytest.mark.usefixtures("one_thread")

ITERATIONS, EPS, NORM_EPS = 20, 1e-6, 1e-5


def plain_sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def plain_pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's input, and the weights of its output and of the streams: one stream after the other."""
    count = streams.shape[2]
    flat = streams.flatten(2)
    normed = flat / (flat.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
    projected = normed @ fn.mT
    pre = torch.sigmoid(projected[..., :count] * scale[0] + base[:count]) + EPS
    post = 2 * torch.sigmoid(projected[..., count : 2 * count] * scale[1] + base[count : 2 * count])
    residual = (projected[..., 2 * count :] * scale[2] + base[2 * count :]).unflatten(-1, (count, count))
    x = torch.stack([pre[..., s, None] * streams[:, :, s] for s in range(count)]).sum(0)
    return x, post, plain_sinkhorn(residual, ITERATIONS, EPS)


def plain_post(streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
    count = streams.shape[2]
    new = []
    for k in range(count):
        mixed = torch.stack([residual[..., j, k, None] * streams[:, :, j] for j in range(count)]).sum(0)
        new.append(mixed + post[..., k, None] * output)
    return torch.stack(new, 2)


def plain_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    flat = streams.flatten(2)
    projected = (flat / (flat.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()) @ fn.mT
    return ((torch.sigmoid(projected * scale + base) + EPS).unsqueeze(-1) * streams).sum(2)


def our_pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, mixing = mhc_pre(streams, fn, base, scale, ITERATIONS, EPS, NORM_EPS)
    return x, *mixing


def our_post(streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
    return mhc_post(streams, output, Mixing(post, residual))


def our_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    return mhc_head(streams, fn, base, scale, EPS, NORM_EPS)


PAIRS: dict[str, tuple[Sites, Sites]] = {
    "pre": (our_pre, plain_pre),
    "post": (our_post, plain_post),
    "head": (our_head, plain_head),
}


def check(site: str, arguments: list[Tensor], *dtypes: torch.dtype) -> None:
    ours, plain = PAIRS[site]
    for dtype in dtypes or TOLERANCE:
        for index, (a, b) in enumerate(zip(run(ours, arguments, dtype), run(plain, arguments, dtype), strict=True)):
            assert a.shape == b.shape, index
            assert a.dtype == b.dtype, index
            assert relative_rms(a, b) < TOLERANCE[dtype], (site, index, dtype)


@pytest.mark.parametrize(("batch", "length"), SHAPES)
@pytest.mark.parametrize("site", PAIRS)
def test_equals_the_plain_formula(site: str, batch: int, length: int) -> None:
    check(site, draw(site, batch, length, seed=length))


@pytest.mark.parametrize(("streams", "hidden"), [(1, 8), (2, 1), (3, 7), (5, 33), (4, 129)])
@pytest.mark.parametrize("site", PAIRS)
def test_equals_the_plain_formula_for_every_width(site: str, streams: int, hidden: int) -> None:
    check(site, draw(site, 2, 9, streams, hidden))


def test_coefficients_equal_the_plain_formula() -> None:
    streams, fn, base, scale = draw("pre", 2, 30)
    pre, mixing = mixing_coefficients(streams, fn, base, scale, ITERATIONS, EPS, NORM_EPS)
    x, post, residual = plain_pre(streams, fn, base, scale)
    assert relative_rms((pre.unsqueeze(-1) * streams).sum(2), x) < 1e-13
    assert relative_rms(mixing.post, post) < 1e-13
    assert relative_rms(mixing.residual, residual) < 1e-13


@pytest.mark.parametrize("site", PAIRS)
def test_gradcheck(site: str) -> None:
    """Two iterations of Sinkhorn's, whose gradient is not small; also where some outputs get no gradient at all."""
    arguments = [x.requires_grad_() for x in draw(site, 2, 2, streams=2, hidden=3)]

    def few_iterations(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        x, mixing = mhc_pre(streams, fn, base, scale, 2, 1e-2, NORM_EPS)
        return x, *mixing

    assert torch.autograd.gradcheck(few_iterations if site == "pre" else PAIRS[site][0], arguments)


def test_gradients_of_one_output_alone() -> None:
    arguments = [x.requires_grad_() for x in draw("pre", 2, 11)]
    for index in range(3):
        ours, plain = (f(*arguments)[index].square().sum() for f in (our_pre, plain_pre))
        for a, b in zip(torch.autograd.grad(ours, arguments), torch.autograd.grad(plain, arguments), strict=True):
            assert relative_rms(a, b) < 1e-12


@pytest.mark.parametrize("site", PAIRS)
def test_strides_do_not_matter(site: str) -> None:
    """Streams whose last dimension is not the contiguous one; and the gradient of a sum, which has stride zero."""
    arguments = draw(site, 2, 5)
    whole = run(PAIRS[site][0], arguments, torch.float64)
    strided = run(PAIRS[site][0], [arguments[0].mT.contiguous().mT, *arguments[1:]], torch.float64)
    for a, b in zip(whole, strided, strict=True):
        assert relative_rms(a, b) < 1e-14
    inputs = [x.requires_grad_() for x in arguments]
    ours, plain = (f(*inputs) for f in PAIRS[site])
    ours, plain = (x if isinstance(x, Tensor) else x[0] for x in (ours, plain))
    for a, b in zip(
        torch.autograd.grad(ours.sum(), inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(plain.sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert relative_rms(a, b) < 1e-12


@pytest.mark.parametrize("site", PAIRS)
def test_bfloat16_streams(site: str) -> None:
    """The streams and the layer's output are bfloat16, all else float32, and so is all arithmetic: each result is
    rounded once, by up to 2^-9 of itself."""
    arguments = [x.float().double() for x in draw(site, 2, 40, hidden=24)]
    narrow = [torch.bfloat16] * (2 if site == "post" else 1) + [torch.float32]
    for index in range(len(narrow) - 1):
        arguments[index] = arguments[index].bfloat16().double()
    ours, exact = run(PAIRS[site][0], arguments, *narrow), run(PAIRS[site][0], arguments, torch.float32)
    outputs = len(ours) - len(arguments)
    dtypes = [torch.bfloat16, *[torch.float32] * (outputs - 1), *narrow]
    dtypes += [torch.float32] * (len(ours) - len(dtypes))
    for index, (a, b, dtype) in enumerate(zip(ours, exact, dtypes, strict=True)):
        assert a.dtype == dtype, index
        assert relative_rms(a, b) < 2**-9, index


def test_a_token_does_not_depend_on_the_others() -> None:
    """Bit for bit in float32, forward: a row is mixed by itself."""
    arguments = [x.float() for x in draw("post", 1, 50)]
    whole = our_post(*arguments)
    for token in (0, 17, 49):
        assert isinstance(whole, Tensor)
        part = our_post(*(x[:, token : token + 1] for x in arguments))
        assert torch.equal(part, whole[:, token : token + 1])


@pytest.mark.parametrize("shape", [(2, 2), (1, 3, 3), (7, 4, 4), (2, 5, 4, 4), (2, 1, 3, 5, 5), (1000, 4, 4)])
@pytest.mark.parametrize(("iterations", "eps"), [(1, 1e-6), (3, 1e-2), (20, 1e-6)])
def test_sinkhorn_equals_the_plain_iteration(shape: tuple[int, ...], iterations: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    values = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    upper = torch.randn(shape, generator=generator, dtype=torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        logits = values.to(dtype).requires_grad_()
        ours, plain = (f(logits, iterations, eps) for f in (sinkhorn, plain_sinkhorn))
        assert relative_rms(ours, plain) < tolerance
        gradients = [torch.autograd.grad(x, logits, upper.to(dtype, copy=True))[0] for x in (ours, plain)]
        # What is left of a gradient after twenty normalisations is a difference of terms of the size of ``upper``.
        assert (gradients[0] - gradients[1]).norm() < tolerance * upper.norm()


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_sinkhorn_gradcheck(iterations: int) -> None:
    logits = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iterations, 1e-3), logits)


def test_sinkhorn_makes_doubly_stochastic() -> None:
    matrix = sinkhorn(torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0)), 20, 1e-6)
    assert (matrix > 0).all()
    torch.testing.assert_close(matrix.sum(-2), torch.ones(50, 4), atol=1e-5, rtol=0)  # the last step: only eps is off
    torch.testing.assert_close(matrix.sum(-1), torch.ones(50, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("tokens", [1, 2])
def test_sinkhorn_leaves_the_incoming_gradient_alone(tokens: int) -> None:
    """Autograd owns it, and may hand the same tensor to others. One token is the case where no copy is needed."""
    logits = torch.randn(tokens, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upper = torch.randn(tokens, 4, 4, generator=torch.Generator().manual_seed(1))
    before = upper.clone()
    torch.autograd.grad(sinkhorn(logits, 3, 1e-6), logits, upper)
    assert torch.equal(upper, before)


def test_the_mixing_of_one_token_may_have_several_users() -> None:
    """A second consumer of a site's residual gets its own gradient, whatever the first one's backward pass does."""
    arguments = [x.requires_grad_() for x in draw("pre", 1, 1)]
    upper = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for f in (our_pre, plain_pre):
        total = f(*arguments)[2] + other
        results.append(torch.autograd.grad(total, [other, *arguments[:1]], upper.clone()))
    for ours, plain in zip(*results, strict=True):
        assert relative_rms(ours, plain) < 1e-12
