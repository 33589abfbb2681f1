"""Newton-Schulz in Triton kernels: against the same ten iterations in float64, and product by product, bit for bit."""

import pytest
import torch
from newton_schulz_cases import hard_spectra, random, split_gram_form, with_spectrum
from torch import Tensor
from triton_cases import DEVICE, poisoned

from openv4.kernels import newton_schulz as module
from openv4.kernels.dispatch import using
from openv4.kernels.newton_schulz import (
    NEWTON_SCHULZ_COEFFICIENTS,
    SCALE,
    X_SCALE,
    newton_schulz,
    newton_schulz_reference,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def on_triton(matrices: Tensor) -> Tensor:
    with using("triton"), poisoned():
        return newton_schulz(matrices.to(DEVICE)).cpu()


def hard(n: int, m: int, *names: str) -> Tensor:
    """A matrix of each spectrum, or of those named, float32."""
    spectra = hard_spectra(n)
    return torch.stack([with_spectrum(spectra[name], n, m) for name in names or spectra]).float()


def check(found: Tensor, matrices: Tensor, share: float, noise: float = 0.0) -> None:
    """Frobenius error of each matrix against float64, relative and absolute."""
    expected = newton_schulz_reference(matrices.double())
    assert found.isfinite().all()
    error, norm = torch.linalg.matrix_norm(found.double() - expected), torch.linalg.matrix_norm(expected)
    assert (error <= share * norm + noise).all(), error / norm


# Of matrices of less than 128 rows all 22 bits are multiplied: as accurate as float32, whose bounds test_muon.py
# derives, where they are not smaller still.
NARROW_SHARE, NARROW_NOISE = 1.7e-3, 1.4e-2


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 1, 5, 3), (33, 70), (1, 4, 1100)])
def test_narrow_matrices(shape: tuple[int, ...]) -> None:
    """Odd sizes, tall and wide, and a product that is summed in parts."""
    spectrum = torch.logspace(0, -4, min(shape[-2:]), dtype=torch.float64)
    matrices = with_spectrum(spectrum, *shape).float()
    found = on_triton(matrices)
    assert found.shape == shape and found.dtype == torch.float32
    check(found, matrices, NARROW_SHARE)


def test_narrow_matrices_of_any_condition() -> None:
    matrices = hard(24, 40, "condition 1e6", "rank one")
    check(on_triton(matrices), matrices, NARROW_SHARE, NARROW_NOISE)


# Otherwise factors are rounded to float16, by at most 2^-11, 2e-4 on average. Three iterations make Q X = q X + K X
# with q = 41, and K = -40 where Q is 1; there K and X err by 40 * 2e-4 each: together 1.1e-2 of the direction. The
# other segments, with q of 12 and 14, add 4e-3 at most, independently.
# Where singular values are zero, rounding leaves products of two errors in G, which grow by 11.9 per iteration; of 128
# rows they become 3e-2 in all, of more rows less.
SHARE, NOISE = 1.2e-2, 6e-2


@pytest.mark.parametrize("shape", [(128, 128), (128, 1024), (256, 512)])
def test_bound_of_wide_matrices(shape: tuple[int, int]) -> None:
    """In torch, with the kernels' roundings; the next test shows that they are the kernels'."""
    matrices = hard(*shape)
    check(split_gram_form(matrices), matrices, SHARE, NOISE)


def test_wide_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 rows, as if they were many: errors average out less. What sums in another order change, is rounded again: the
    kernels differ from the torch form by as much as both from float64."""
    monkeypatch.setattr(module, "NARROW", 40)
    matrices = hard(48, 80, "condition 1e6", "half of the rank")
    found = on_triton(matrices)
    check(found, matrices, 2 * SHARE, 2 * NOISE)
    norm = torch.linalg.matrix_norm(found)
    assert (torch.linalg.matrix_norm(found - split_gram_form(matrices)) <= 2 * SHARE * norm + 2 * NOISE).all()


def test_ragged_wide_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of rows, of which the second has two."""
    monkeypatch.setattr(module, "SEGMENTS", (1,) * 10)
    matrices = with_spectrum(torch.logspace(0, -6, 130, dtype=torch.float64), 130, 140).float()
    check(on_triton(matrices), matrices, SHARE, NOISE)


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-31, 32, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def held(x: Tensor) -> module._Pair:
    return module._Pair(x.half(), (x - x.half().float()).half())


@pytest.mark.parametrize(
    ("n", "k", "terms", "block"),
    [
        (5, 3, 1, "SMALL"),
        (40, 33, 3, "SMALL"),
        (70, 130, 1, "SMALL"),
        (130, 20, 1, "SMALL"),
        (130, 20, 3, "MEDIUM"),
        (300, 70, 1, "LARGE"),
    ],
)
def test_symmetric_products_bit_for_bit(
    n: int, k: int, terms: int, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of integers, whose sums are exact: what is on and below the diagonal, and its mirror image. Of so few tiles all
    are SMALL, or what takes its place here."""
    monkeypatch.setattr(module, "SMALL", getattr(module, block))
    a, b = integers(2, n, k, seed=0), integers(2, n, k, seed=1)
    c, d = (integers(2, n, n, seed=i) * 100 + 7 for i in (2, 3))
    with poisoned():
        out = module._symmetric(held(a), held(b), 0.5, terms, (2.0, held(c)), (-1.0, held(d)))
    lower = (0.5 * (a @ b.mT) + 2 * c - d).tril()
    expected = held(lower + lower.tril(-1).mT)
    assert torch.equal(out.high, expected.high)
    assert torch.equal(out.low if terms == 3 else out.low.tril(), expected.low if terms == 3 else expected.low.tril())


def test_a_product_in_parts_bit_for_bit() -> None:
    a = integers(1, 70, 2100, seed=0)
    with poisoned():
        out = module._symmetric(held(a), held(a), 2.0**-6, 3)
    expected = held(a @ a.mT * 2.0**-6)
    assert torch.equal(out.high, expected.high) and torch.equal(out.low, expected.low)


@pytest.mark.parametrize(
    ("n", "m", "by_columns"), [(40, 70, False), (40, 70, True), (140, 150, True), (130, 1030, False)]
)
def test_application_bit_for_bit(n: int, m: int, by_columns: bool) -> None:
    factor, x = integers(2, n, n, seed=0), integers(2, n, m, seed=1)
    stored = held(x.mT.contiguous().mT if by_columns else x)
    result = torch.full_like(stored.high, torch.nan, dtype=torch.float32)
    with poisoned():
        out = module._applied(held(factor), stored, 3.0, 1, None)
        module._applied(held(factor), stored, 3.0, 1, result)
    assert torch.equal(out.high.float() + out.low.float(), factor @ x / SCALE + 3 * x)
    assert torch.equal(result * X_SCALE, factor @ x / SCALE + 3 * x)


@pytest.fixture
def two_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough where every one is the same, and a fifth of the time."""
    monkeypatch.setattr(module, "NEWTON_SCHULZ_COEFFICIENTS", NEWTON_SCHULZ_COEFFICIENTS[:2])
    monkeypatch.setattr(module, "SEGMENTS", (1, 1))


@pytest.mark.usefixtures("two_iterations")
def test_layout_does_not_matter() -> None:
    """A transposed view, rows of a larger matrix, every other column: the same numbers in the same order."""
    x = random(2, 10, 30)
    expected = on_triton(x[:, 2:7])
    assert torch.equal(on_triton(x[:, 2:7].contiguous()), expected)
    assert torch.equal(on_triton(x[:, 2:7].mT), expected.mT)
    assert torch.equal(on_triton(x[:, 2:7].mT.contiguous()), expected.mT)
    assert torch.equal(on_triton(x.repeat_interleave(2, 2)[:, 2:7, ::2]), expected)


@pytest.mark.usefixtures("two_iterations")
def test_difficult_matrices() -> None:
    """Zero, empty, tiny, huge, bfloat16, one that is not finite beside others."""
    x = random(4, 6, 9)
    expected = on_triton(x)
    assert torch.equal(on_triton(torch.zeros(2, 6, 9)), torch.zeros(2, 6, 9))
    assert on_triton(torch.zeros(0, 6, 9)).shape == (0, 6, 9)
    scaled = x * torch.tensor([1e-30, 1e30, 1.0, 0.0]).view(4, 1, 1)
    scaled[2, 0, 0] = torch.nan
    found = on_triton(scaled)
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=1e-5)
    assert found[2].isnan().all() and not found[3].any()
    assert torch.equal(on_triton(x.bfloat16()), on_triton(x.bfloat16().float()))


@pytest.mark.usefixtures("two_iterations")
def test_two_runs_are_bit_equal() -> None:
    x = random(1, 20, 1300)
    assert torch.equal(on_triton(x), on_triton(x))


def test_float64_stays_exact() -> None:
    x = random(1, 6, 9, dtype=torch.float64)
    with using("torch"):
        expected = newton_schulz(x)
    assert torch.equal(on_triton(x), expected)
