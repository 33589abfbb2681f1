"""Muon: the iteration itself, and the batched optimizer against a float64 loop over single matrices."""

import math
from copy import deepcopy

import pytest
import torch
from newton_schulz_cases import hard_spectra, random, with_spectrum
from torch import Tensor
from torch.nn import Parameter

from openv4.optim.muon import (
    NEWTON_SCHULZ_COEFFICIENTS,
    Muon,
    newton_schulz,
    newton_schulz_reference,
    residual,
    sample_rows,
)


def reference_newton_schulz(matrix: Tensor) -> Tensor:
    x = matrix / matrix.norm()
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def reference_step(w: Tensor, m: Tensor, g: Tensor, lr: float, mu: float, decay: float, gamma: float) -> None:
    """Algorithm 1 on one float64 matrix, in place."""
    m.mul_(mu).add_(g)
    o = reference_newton_schulz(mu * m + g) * math.sqrt(max(w.shape)) * gamma
    w.mul_(1 - lr * decay).sub_(lr * o)


def steps(muon: Muon, parameters: list[Parameter], count: int, seed: int = 100) -> None:
    """`count` steps on gradients that depend on nothing but the seed."""
    for step in range(count):
        for index, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=seed + 10 * step + index, dtype=parameter.dtype)
        muon.step()


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48), (3, 128, 256), (2, 3, 40, 24), (2, 1, 50), (24, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_become_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u, _, vh = torch.linalg.svd(random(*shape, dtype=torch.float64), full_matrices=False)
    spectrum = torch.logspace(0, -2, u.shape[-1], dtype=torch.float64)
    result = newton_schulz(((u * spectrum) @ vh).to(dtype) * 1e-3)
    assert result.dtype == dtype
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.99
    assert values.max() < 1.01
    torch.testing.assert_close(result.double(), u @ vh, rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 7), (16, 24), (2, 3, 10, 63), (128, 256), (256, 24)])
def test_gram_form_is_the_plain_iteration(shape: tuple[int, ...]) -> None:
    """To the rounding of float64, 1e-16, times the growth of 11.9^4 = 2e4 that `RESTART` explains: 2e-12."""
    matrix = with_spectrum(torch.logspace(0, -4, min(shape[-2:]), dtype=torch.float64), *shape)
    torch.testing.assert_close(newton_schulz(matrix), newton_schulz_reference(matrix), rtol=0, atol=1e-11)
    strided = random(*shape[:-2], shape[-1], 2 * shape[-2], dtype=torch.float64).mT[..., ::2, :]
    torch.testing.assert_close(newton_schulz(strided), newton_schulz(strided.contiguous()), rtol=0, atol=1e-11)


HARD_SPECTRA = hard_spectra(48)


@pytest.mark.parametrize("scale", [1e-30, 1.0])
@pytest.mark.parametrize("shape", [(48, 48), (48, 96), (1024, 48), (3, 48, 300)])
@pytest.mark.parametrize("spectrum", HARD_SPECTRA)
def test_float32_error(spectrum: str, shape: tuple[int, ...], scale: float) -> None:
    """Frobenius error of each matrix against the same iterations in float64; BF16 errs by 0.5 at condition 1e4.

    Rounding gives each eigenvalue of X X^T an error of 6e-8, which becomes 6e-8 * 3.4445^8 = 1.2e-3 in four iterations
    of a small eigenvalue and is multiplied by |b| / a = 1.4 where the fifth uses it: 1.7e-3 of the direction's result.
    Where singular values are below rounding, X itself holds noise instead: three roundings (the cast, the scaling, the
    first product), each at most 6e-8 of its norm, grow by 3.4445^8 * 2^2 = 7.9e4, in the plain form as well: 1.4e-2.
    """
    values = HARD_SPECTRA[spectrum]
    noise = 0.0 if values.min() >= 1e-4 * (1 - 1e-9) else 1.4e-2
    matrix = with_spectrum(values, *shape)
    expected = newton_schulz_reference(matrix)
    result = newton_schulz((matrix * scale).float()).double()
    assert result.isfinite().all()
    assert torch.linalg.matrix_norm(result, 2).max() < 1.01
    error = torch.linalg.matrix_norm(result - expected)
    assert (error < 1.7e-3 * torch.linalg.matrix_norm(expected) + noise).all()


def test_coarse_products_take_the_plain_form() -> None:
    """Under TF32 or BF16 the Gram form ends in NaN; the plain form stays finite."""
    matrix = with_spectrum(HARD_SPECTRA["condition 1e6"], 2, 48, 96).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = newton_schulz(matrix)
        assert torch.equal(result, newton_schulz_reference(matrix))
    assert result.isfinite().all()
    before = torch.backends.mkldnn.matmul.fp32_precision  # no plain attribute: monkeypatch cannot put it back
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert torch.equal(newton_schulz(matrix), newton_schulz_reference(matrix))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_bfloat16_input_works_in_float32() -> None:
    matrix = random(16, 32).bfloat16()
    assert torch.equal(newton_schulz(matrix), newton_schulz(matrix.float()))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (100, 1), (32, 64)])
def test_scale_does_not_matter(shape: tuple[int, int], scale: float) -> None:
    matrix = random(*shape)
    torch.testing.assert_close(newton_schulz(matrix * scale), newton_schulz(matrix), rtol=1e-3, atol=1e-4)


def test_difficult_matrices_stay_finite() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 8, 5)), torch.zeros(3, 8, 5))
    assert newton_schulz(torch.zeros(0, 8, 5)).shape == (0, 8, 5)
    rank_one = newton_schulz(torch.outer(random(64), random(32, seed=1)))
    assert torch.linalg.matrix_norm(rank_one, 2) == pytest.approx(1.0, abs=0.01)
    u, _, vh = torch.linalg.svd(random(64, 64), full_matrices=False)
    ill = newton_schulz((u * torch.logspace(0, -6, 64)) @ vh)
    assert ill.isfinite().all()
    assert torch.linalg.matrix_norm(ill, 2) < 1.01
    # One bad matrix of a stack must not reach its neighbours.
    stack = random(3, 16, 32)
    expected = newton_schulz(stack)
    stack[1] = 0
    torch.testing.assert_close(newton_schulz(stack)[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (4, 32, 96), (1, 64), (24, 256)])
def test_update_rms_is_gamma(shape: tuple[int, ...]) -> None:
    parameter = Parameter(random(*shape))
    before = parameter.detach().clone()
    muon = Muon([parameter], lr=1.0, weight_decay=0.0)
    steps(muon, [parameter], 1)
    rms = muon.update_rms(parameter)
    assert rms is not None
    assert rms.item() == pytest.approx(0.18, rel=0.02)
    assert (parameter.detach() - before).square().mean().sqrt().item() == pytest.approx(rms.item(), rel=1e-5)


@pytest.mark.parametrize("max_elements", [2**26, 1500, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_a_loop_over_matrices(max_elements: int, dtype: torch.dtype, tolerance: float) -> None:
    """All kinds of parameters together. Float32: 4 steps of about 30 dependent roundings, each relative 6e-8, amplified
    by the iteration's slope of at most 3.4 per step on singular values that are small; 2e-5 of weights of order 1."""
    shapes_and_splits = [
        ((32, 48), ()),
        ((48, 32), ()),
        ((6, 16, 24), ()),
        ((6, 24, 16), ()),
        ((24, 64), (4, 4, 16)),
        ((32, 24), (16, 16)),
        ((48, 16), (12, 12, 12, 12)),
        ((2, 3, 10, 12), (6, 4)),
    ]
    lr, mu, decay, gamma = 0.02, 0.9, 0.2, 0.18
    parameters = [Parameter(random(*shape, seed=i, dtype=dtype)) for i, (shape, _) in enumerate(shapes_and_splits)]
    groups = [{"params": [p], "row_splits": split} for p, (_, split) in zip(parameters, shapes_and_splits, strict=True)]
    muon = Muon(groups, lr=lr, momentum=mu, weight_decay=decay, update_rms=gamma, max_elements=max_elements)
    weights = [p.detach().double().clone() for p in parameters]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        for i, p in enumerate(parameters):
            p.grad = random(*p.shape, seed=50 + 10 * step + i, dtype=dtype)
            split = shapes_and_splits[i][1] or (p.shape[-2],)
            tensors = [t.flatten(0, -3) if t.ndim > 2 else t[None] for t in (weights[i], momenta[i], p.grad.double())]
            for w, m, g in zip(*tensors, strict=True):
                for wi, mi, gi in zip(w.split(split), m.split(split), g.split(split), strict=True):
                    reference_step(wi, mi, gi, lr, mu, decay, gamma)
        muon.step()
    for p, w, m in zip(parameters, weights, momenta, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=tolerance)
        torch.testing.assert_close(muon.state[p]["momentum"].double(), m, rtol=0, atol=tolerance)


def test_split_parameter_equals_its_parts() -> None:
    whole = Parameter(random(24, 64))
    parts = [Parameter(part.clone()) for part in whole.detach().split((4, 4, 16))]
    together, apart = Muon([whole], lr=0.1, row_splits=(4, 4, 16)), Muon(parts, lr=0.1)
    for step in range(3):
        whole.grad = random(24, 64, seed=step)
        for part, grad in zip(parts, whole.grad.split((4, 4, 16)), strict=True):
            part.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.equal(whole, torch.cat([part.detach() for part in parts]))


def test_stacking_does_not_matter() -> None:
    """The result of a matrix depends on its neighbours and on the stack's bound by no more than rounding."""
    runs = []
    for max_elements in (2**26, 5000, 1):
        parameters = [
            Parameter(random(5, 16, 32)),
            Parameter(random(32, 16, seed=1)),
            Parameter(random(16, 32, seed=2)),
        ]
        steps(Muon(parameters, lr=0.1, max_elements=max_elements), parameters, 3)
        runs.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(runs[2], runs[0], rtol=0, atol=2e-6)


def test_expert_without_tokens_only_decays() -> None:
    experts = Parameter(random(4, 16, 32))
    before = experts.detach().clone()
    muon = Muon([experts], lr=0.1, weight_decay=0.5)
    experts.grad = random(4, 16, 32, seed=1)
    experts.grad[2] = 0
    muon.step()
    assert torch.equal(experts[2], before[2] * (1 - 0.1 * 0.5))
    assert not muon.state[experts]["momentum"][2].any()
    assert (experts[0] - before[0]).abs().max() > 0.01


def test_parameter_without_gradient_is_left_alone() -> None:
    used, unused = Parameter(random(8, 16)), Parameter(random(8, 16, seed=1))
    before = unused.detach().clone()
    muon = Muon([used, unused], lr=0.1)
    steps(muon, [used], 2)
    assert torch.equal(unused, before)
    assert unused not in muon.state
    assert muon.update_rms(unused) is None
    assert muon.update_rms(used, unused) == muon.update_rms(used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_changes_nothing(dtype: torch.dtype) -> None:
    parameters = [Parameter(random(24, 32).to(dtype)), Parameter(random(3, 8, 16).to(dtype))]
    parameters[0].data[0, 0] = -0.0
    muon = Muon([{"params": parameters[:1], "row_splits": (4, 4, 16)}, {"params": parameters[1:]}], lr=0.1)
    steps(muon, parameters, 2)
    before = [t.clone() for p in parameters for t in (p.detach(), muon.state[p]["momentum"])]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    muon.found_inf = torch.ones(())
    muon.step()
    after = [t for p in parameters for t in (p.detach(), muon.state[p]["momentum"])]
    assert all(torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(after, before, strict=True))
    assert muon.update_rms(*parameters) == 0
    muon.found_inf = torch.zeros(())
    steps(muon, parameters, 1)
    assert all(p.isfinite().all() for p in parameters)
    assert muon.state[parameters[0]]["momentum"].dtype == torch.float32


def test_torch_state_dict_continues_bitwise() -> None:
    parameters = [Parameter(random(8, 16)), Parameter(random(2, 8, 16, seed=1))]
    muon = Muon(parameters, lr=0.1)
    steps(muon, parameters, 2)
    copies = [Parameter(p.detach().clone()) for p in parameters]
    restored = Muon(copies)
    restored.load_state_dict(deepcopy(muon.state_dict()))  # torch would share the momentum otherwise
    steps(muon, parameters, 2, seed=7)
    steps(restored, copies, 2, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm has shape \(8,\).*AdamW"):
        Muon([("norm", Parameter(torch.ones(8)))])
    with pytest.raises(ValueError, match=r"fn has shape \(24, 8\), but row_splits \(4, 4\) must add up to 24"):
        Muon([("fn", Parameter(torch.ones(24, 8)))], row_splits=(4, 4))
    with pytest.raises(ValueError, match="row_splits"):
        Muon([Parameter(torch.ones(24, 8))], row_splits=(0, 24))


@pytest.mark.parametrize("shape", [(5, 8, 16), (3, 8, 8), (2, 1, 7)])
def test_residual_of_few_rows_is_exact(shape: tuple[int, ...]) -> None:
    o = random(*shape).double() / 4
    distance = o @ o.mT - torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(residual(sample_rows(o), shape[1]), distance.square().sum((1, 2)) / shape[1])


@pytest.mark.parametrize(("n", "values"), [(17, (0.0, 0.5, 1.0, 1.3)), (40, (0.0, 1.0)), (64, (0.9, 1.1))])
def test_residual_estimates_the_distance_from_orthogonal(n: int, values: tuple[float, ...]) -> None:
    """On average over 500 matrices of one spectrum; the estimate of one is off by a fifth or so."""
    spectrum = torch.tensor(values, dtype=torch.float64).repeat(n)[:n]
    left, right = (torch.linalg.qr(random(500, size, n, seed=size).double())[0] for size in (n, n + 3))
    wanted = float((spectrum.square() - 1).square().mean())
    found = residual(sample_rows(left * spectrum @ right.mT), n)
    assert float(found.mean()) == pytest.approx(wanted, rel=0.03)
    assert float(found.std()) < 0.4 * wanted
    assert float(residual(sample_rows(left @ right.mT), n).max()) < 1e-20
    assert residual(torch.zeros(2, 8, n), n).tolist() == [1.0, 1.0]


def test_residuals_of_a_step() -> None:
    """Of tall and wide matrices, some with a gradient of 0; none for what has not moved, 0 for a skipped step."""
    experts, tall, unused = Parameter(random(4, 16, 32)), Parameter(random(32, 16)), Parameter(random(8, 16))
    muon = Muon([experts, tall, unused], lr=0.1)
    experts.grad, tall.grad = random(4, 16, 32, seed=1), random(32, 16, seed=2)
    experts.grad[1:3] = 0
    muon.step()
    assert muon.residual_sum(unused) is None
    total, count = muon.residual_sum(experts, tall, unused) or (0, 0)
    # Newton-Schulz leaves singular values within 0.0021 of 1: a square is within 0.0043, and that squared again.
    assert count == 5 and float(total) == pytest.approx(2, abs=3 * 0.0043**2)
    muon.found_inf = torch.ones(())
    muon.step()
    total, count = muon.residual_sum(experts, tall) or (1, 0)
    assert (float(total), count) == (0, 5)
