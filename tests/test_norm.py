"""Root-mean-square norm and rotary embedding against plain formulas: outputs and gradients."""

import math

import pytest
import torch
from model_cases import relative_rms
from quantize_cases import E4M3, by_hand, scale_of, spread
from torch import Tensor

from openv4.kernels.dispatch import using
from openv4.kernels.norm import at_least_fp32, rms_norm, rms_norm_fp8
from openv4.kernels.rope import apply_rope, norm_rope, rope_frequencies, rope_table

pytestmark = pytest.mark.usefixtures("one_thread")

# A row's mean of D squares and a weight's sum over all rows are off by about sqrt(n) roundings, of 6e-8 or 1e-16; n is
# ten thousand at most.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def plain_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 1), (0, 4), (4, 127), (2, 3, 128), (2, 129, 2, 5), (4097, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_norm_equals_the_plain_formula(shape: tuple[int, ...], weighted: bool) -> None:
    for dtype, tolerance in TOLERANCE.items():
        x, upper = (normal(*shape, seed=seed).to(dtype) for seed in (0, 1))
        weight = normal(shape[-1], seed=2).to(dtype).requires_grad_() if weighted else None
        inputs = [t for t in (x.requires_grad_(), weight) if t is not None]
        results = []
        for implementation, function in (("torch", rms_norm), ("reference", rms_norm), ("torch", plain_norm)):
            with using(implementation):  # type: ignore[arg-type]
                y = function(x, weight)
            results.append((y, *torch.autograd.grad(y, inputs, upper)))
        for ours, plain in [*zip(results[0], results[2], strict=True), *zip(results[1], results[2], strict=True)]:
            assert ours.shape == plain.shape
            assert ours.dtype == plain.dtype
            # A row of one number has next to no gradient: y = x / |x|. What cancels there is of the size of ``upper``.
            assert (ours - plain).norm() <= tolerance * max(plain.norm(), upper.norm() / shape[-1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_gradcheck(weighted: bool, eps: float) -> None:
    x = normal(2, 3, 4).requires_grad_()
    weight = [normal(4, seed=1).requires_grad_()] if weighted else []
    assert torch.autograd.gradcheck(lambda x, *w: rms_norm(x, w[0] if w else None, eps), [x, *weight])


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_norm_of_tiny_and_huge_rows(scale: float) -> None:
    """Beside eps nothing remains of the first two; the third has length one whatever its size."""
    x = (normal(3, 8) * scale).float().requires_grad_()
    y = rms_norm(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(plain_norm(wide := x.detach().double().requires_grad_()).sum(), wide)
    assert relative_rms(y, plain_norm(x.detach().double())) < 1e-6
    # Of a huge row's gradient, the part along the row cancels: errors are relative to what was there before.
    factor = float((x.detach().double().square().mean(-1) + 1e-6).rsqrt().max())
    assert (gradient - expected).abs().max() < 1e-5 * factor


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_norm_in_bfloat16(weight_dtype: torch.dtype) -> None:
    """All arithmetic is float32: one rounding of each result, by up to 2^-9 of itself."""
    x, upper = (normal(50, 32, seed=seed).bfloat16() for seed in (0, 1))
    weight = normal(32, seed=2).bfloat16()
    results = []
    for dtype, other in ((torch.bfloat16, weight_dtype), (torch.float32, torch.float32)):
        inputs = (x.to(dtype).requires_grad_(), weight.to(other).requires_grad_())
        y = rms_norm(inputs[0], inputs[1])
        results.append((y, *torch.autograd.grad(y, inputs, upper.to(dtype))))
    for ours, exact, dtype in zip(*results, (torch.bfloat16, torch.bfloat16, weight_dtype), strict=True):
        assert ours.dtype == dtype
        assert relative_rms(ours, exact) < 2**-9


def test_norm_of_strided_rows() -> None:
    x = normal(6, 5).T.requires_grad_()
    (ours,) = torch.autograd.grad(rms_norm(x).sum(), x)
    (plain,) = torch.autograd.grad(plain_norm(x).sum(), x)
    assert relative_rms(rms_norm(x), plain_norm(x)) < 1e-14
    assert relative_rms(ours, plain) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 300), (1, 3, 128), (5, 7), (0, 129)])
def test_norm_in_fp8_beside_the_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Groups of 128 of each row, the last one cut, rounded by the book; weights spread them over all scales."""
    x = normal(*shape).to(dtype).requires_grad_()
    weight = spread((shape[-1],), 3, wide=18).requires_grad_()
    y, codes, scales = rms_norm_fp8(x, weight)
    expected = rms_norm(x, weight)
    assert torch.equal(y, expected)
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float8_e8m0fnu
    assert codes.shape == shape and scales.shape == (*shape[:-1], math.ceil(shape[-1] / 128))
    rows, flat = y.detach().flatten(0, -2), scales.float().flatten(0, -2)
    values = codes.double() * scales.double().repeat_interleave(128, -1)[..., : shape[-1]]
    assert torch.equal(values.flatten(0, -2), by_hand(rows, (1, 128), E4M3, 1e-4))
    for row, scale in zip(rows, flat, strict=True):
        assert scale.tolist() == [scale_of(group.tolist(), 448.0, 1e-4) for group in row.split(128)]
    upper = normal(*shape, seed=1).to(dtype)
    ours = torch.autograd.grad(y, (x, weight), upper)
    for gradient, plain in zip(ours, torch.autograd.grad(expected, (x, weight), upper), strict=True):
        assert torch.equal(gradient, plain)
    assert not codes.requires_grad and not scales.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_fp32(dtype: torch.dtype) -> None:
    x = torch.ones(2, dtype=dtype)
    assert at_least_fp32(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (at_least_fp32(x) is x) == (dtype in TOLERANCE)


def plain_rope(x: Tensor, angle: Tensor, inverse: bool) -> Tensor:
    """Pair by pair: (a, b) becomes (a cos - b sin, a sin + b cos)."""
    result = x.clone()
    pairs = angle.shape[-1]
    start = x.shape[-1] - 2 * pairs
    for pair in range(pairs):
        turn = angle[..., pair].view(*angle.shape[:2], *(1,) * (x.dim() - 3))
        turn = -turn if inverse else turn
        a, b = x[..., start + 2 * pair], x[..., start + 2 * pair + 1]
        result[..., start + 2 * pair] = a * turn.cos() - b * turn.sin()
        result[..., start + 2 * pair + 1] = a * turn.sin() + b * turn.cos()
    return result


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 9), (2, 127, 6), (2, 129, 3, 6), (1, 5, 2, 2, 7), (1, 4097, 8)])
def test_rope_equals_the_plain_rotation(shape: tuple[int, ...], inverse: bool) -> None:
    """The table is float32 always, so float64 rotations differ by its rounding as well: 6e-8, within 1e-6."""
    dim = min(6, shape[-1] // 2 * 2)
    frequencies = rope_frequencies(dim, 100.0)
    positions = torch.arange(shape[1]).expand(shape[0], -1) * 3
    angle = positions.double().unsqueeze(-1) * frequencies
    for dtype in TOLERANCE:
        x, upper = normal(*shape).to(dtype).requires_grad_(), normal(*shape, seed=1).to(dtype)
        ours = apply_rope(x, rope_table(positions, frequencies), inverse)
        wide = x.detach().double().requires_grad_()
        plain = plain_rope(wide, angle, inverse)
        assert ours.dtype == dtype
        assert relative_rms(ours, plain) < 1e-6
        (gradient,), (expected,) = torch.autograd.grad(ours, x, upper), torch.autograd.grad(plain, wide, upper.double())
        assert relative_rms(gradient, expected) < 1e-6
        assert torch.equal(ours[..., : shape[-1] - dim], x[..., : shape[-1] - dim])
        with using("reference"):
            assert relative_rms(apply_rope(x, rope_table(positions, frequencies), inverse), plain) < 1e-6


def test_rope_gradcheck() -> None:
    table = rope_table(torch.arange(3).expand(2, -1), rope_frequencies(4, 50.0))
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, table), normal(2, 3, 2, 5).requires_grad_())


@pytest.mark.parametrize("weighted", [False, True])
def test_norm_rope_is_one_after_the_other(weighted: bool) -> None:
    table = rope_table(torch.arange(5).expand(2, -1), rope_frequencies(4, 50.0))
    x, weight = normal(2, 5, 3, 7).bfloat16().requires_grad_(), normal(7, seed=1).requires_grad_() if weighted else None
    for implementation in ("torch", "reference"):
        with using(implementation):  # type: ignore[arg-type]
            both, one = norm_rope(x, weight, 0.5, table), apply_rope(rms_norm(x, weight, 0.5), table)
        assert both.dtype == x.dtype
        assert torch.equal(both, one)


def test_rope_turns_back() -> None:
    """Cosine and sine in float32 leave their squares' sum off one by 1e-7."""
    table = rope_table(torch.randint(0, 2**20, (2, 30)), rope_frequencies(8, 10000.0))
    x = normal(2, 30, 3, 10)
    assert relative_rms(apply_rope(apply_rope(x, table), table, inverse=True), x) < 1e-6


def test_rope_in_bfloat16() -> None:
    """One rounding at the end, of up to 2^-9; the channels that do not turn are not touched."""
    table = rope_table(torch.arange(40).expand(2, -1), rope_frequencies(4, 100.0))
    x = normal(2, 40, 3, 7).bfloat16()
    turned = apply_rope(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[..., :3], x[..., :3])
    assert relative_rms(turned, apply_rope(x.float(), table)) < 2**-9


def test_rope_table_at_a_million_tokens() -> None:
    frequencies = rope_frequencies(6, 10000.0)
    cos, sin = rope_table(torch.tensor([[2**20 - 1]]), frequencies)
    for pair in range(3):
        angle = (2**20 - 1) * 10000.0 ** (-2 * pair / 6)
        assert abs(float(cos[0, 0, pair]) - math.cos(angle)) < 1e-6
        assert abs(float(sin[0, 0, pair]) - math.sin(angle)) < 1e-6


def test_yarn_frequencies() -> None:
    """Fast pairs keep theirs, slow ones are divided by the factor, and those between descend without a jump."""
    dim, theta, factor, original = 64, 10000.0, 16.0, 4096
    plain, scaled = rope_frequencies(dim, theta), rope_frequencies(dim, theta, factor, original)
    for pair in range(dim // 2):
        assert abs(float(plain[pair]) - theta ** (-2 * pair / dim)) < 1e-15
        turns = original * float(plain[pair]) / (2 * math.pi)
        ratio = float(plain[pair] / scaled[pair])
        if turns > 32 * theta ** (2 / dim):  # the borders are rounded to whole pairs, outwards
            assert ratio == 1
        elif turns < theta ** (-2 / dim):
            assert abs(ratio - factor) < 1e-12
        assert 1 <= ratio <= factor + 1e-12
    assert (scaled.diff() < 0).all()
    assert torch.equal(rope_frequencies(dim, theta, 1.0, original), plain)
