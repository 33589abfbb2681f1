"""FP8 and FP4 as training uses them, against roundings by the book: one number at a time, in exact float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from quantize_cases import E2M1, E4M3, SHAPES, by_hand, nearest, scale_of, spread
from torch import Tensor
from triton_cases import DEVICE, relative_error

from openv4.kernels.dispatch import using
from openv4.kernels.fp4 import fake_quantize_fp4, fp4_counts, fp4_weight, index_operand, rotate
from openv4.kernels.fp8 import (
    fake_quantize_kv,
    fp8_counts,
    fp8_linear,
    fp8_weight_counts,
    quantize_rows,
    round_columns,
    round_rows,
    round_weight,
    swiglu_fp8,
)
from openv4.kernels.quantize import dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8

FP8_FLOOR, FP4_FLOOR = 1e-4, 6 * 2.0**-126
IMPLEMENTATIONS = ("torch", "triton")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def _implementation(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with using(request.param):
        yield


# FP8.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_columns_and_blocks_by_the_book(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = spread(shape, 0, dtype)
    for found, block in (
        (round_rows(x.to(DEVICE)), (1, 128)),
        (round_rows(x.to(DEVICE), 16), (1, 16)),
        (round_columns(x.to(DEVICE), 2), (2, 1)),
        (round_weight(x.to(DEVICE), dtype), (128, 128)),
    ):
        assert found.dtype == dtype
        assert torch.equal(found.double().cpu(), by_hand(x.float(), block, E4M3, FP8_FLOOR)), block


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_those_of_the_released_format(shape: tuple[int, int]) -> None:
    weight = spread(shape, 1)
    wanted = dequantize(*quantize_fp8(weight), torch.float32)
    assert torch.equal(round_weight(weight.to(DEVICE), torch.float32).cpu(), wanted)
    stack = torch.stack((weight, -weight * 3)).to(DEVICE)
    assert torch.equal(round_weight(stack, torch.bfloat16)[0].float().cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 130)])
def test_codes_and_scales_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = spread(shape, 15, dtype)
    codes, scales = quantize_rows(x.to(DEVICE))
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape
    assert scales.dtype == torch.float8_e8m0fnu and scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    wide = scales.cpu().double().repeat_interleave(128, -1)[..., : shape[-1]]
    assert torch.equal(codes.cpu().double() * wide, round_rows(x.to(DEVICE)).cpu().double())
    groups = x.float().flatten(0, -2).split(128, -1)
    wanted = [[scale_of(row, 448.0, FP8_FLOOR) for row in group.tolist()] for group in groups]
    assert scales.double().flatten(0, -2).T.tolist() == wanted


@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_swiglu_and_its_codes(limit: float) -> None:
    gate, up = (spread((7, 130), seed, wide=2) for seed in (16, 17))
    hidden, codes, scales = swiglu_fp8(gate.to(DEVICE), up.to(DEVICE), limit)
    a, b = gate.double(), up.double()
    if limit:
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    assert relative_error(hidden.cpu(), a / (1 + torch.exp(-a)) * b) < 1e-6
    for found, wanted in zip((codes, scales), quantize_rows(hidden), strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_rounding_is_idempotent_and_odd() -> None:
    x = spread((40, 300), 2).to(DEVICE)
    for function in (round_rows, round_columns, lambda t: round_weight(t, torch.float32)):
        once = function(x)
        assert torch.equal(function(once), once)
        assert torch.equal(function(-x), -once)


def test_groups_keep_to_themselves_and_empty_is_empty() -> None:
    x = spread((3, 256), 3).to(DEVICE)
    changed = x.clone()
    changed[:, :128] *= 1e4
    assert torch.equal(round_rows(changed)[:, 128:], round_rows(x)[:, 128:])
    for shape in ((0, 5), (4, 0)):
        empty = torch.zeros(shape, device=DEVICE)
        assert round_rows(empty).shape == round_columns(empty).shape == round_weight(empty, torch.float32).shape
    assert torch.equal(round_rows(torch.zeros(2, 130, device=DEVICE)).cpu(), torch.zeros(2, 130))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(poison: float) -> None:
    x = spread((6, 260), 4)
    x[2, 150] = poison
    x = x.to(DEVICE)
    assert round_rows(x)[2, 128:256].isnan().all() and round_rows(x)[3].isfinite().all()
    assert round_columns(x)[:, 150].isnan().all()
    assert round_weight(x, torch.float32)[2, 150].isnan()
    assert fp4_weight(x, torch.float32)[0][2, 150].isnan()
    assert fake_quantize_fp4(x)[2, 128:160].isnan().all() and fake_quantize_fp4(x)[2, 160:].isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_its_gradients_by_the_book(groups: int, dtype: torch.dtype) -> None:
    """Three products in float64 of operands rounded by the book; the difference is that of float32 sums, or of bfloat16
    results (2^-9 relative)."""
    generator = torch.Generator().manual_seed(5)
    tokens, into, out = (2, 67), 133, 5 * groups
    x = spread((*tokens, groups, into), 6, dtype)
    weight = torch.randn(out, into, generator=generator)
    upper = spread((*tokens, groups, out // groups), 7, dtype)
    leaf, master = (t.to(DEVICE).requires_grad_() for t in (x, weight))
    rounded = round_weight(master, dtype)
    given = leaf if groups > 1 else leaf.squeeze(2)
    y = fp8_linear(given, master, rounded, groups)
    y.backward((upper if groups > 1 else upper.squeeze(2)).to(DEVICE))

    matrices = by_hand(weight, (128, 128), E4M3, FP8_FLOOR).view(groups, -1, into)
    flat, above = (t.float().flatten(0, 1) for t in (x, upper))  # [M, G, ...]
    wanted_y, wanted_x, wanted_weight = [], [], []
    for g in range(groups):
        rows = by_hand(flat[:, g], (1, 128), E4M3, FP8_FLOOR)
        slope = by_hand(above[:, g], (1, 128), E4M3, FP8_FLOOR)
        wanted_y.append(rows @ matrices[g].T)
        wanted_x.append(slope @ matrices[g])
        columns = [by_hand(t[:, g], (128, 1), E4M3, FP8_FLOOR) for t in (above, flat)]
        wanted_weight.append(columns[0].T @ columns[1])
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative_error(y.cpu().reshape(-1, groups, out // groups), torch.stack(wanted_y, 1)) < tolerance
    assert relative_error(leaf.grad.cpu().flatten(0, 1), torch.stack(wanted_x, 1)) < tolerance
    assert master.grad.dtype == torch.float32
    assert relative_error(master.grad.cpu(), torch.cat(wanted_weight)) < 1e-6


def test_keys_and_values_as_a_cache_holds_them() -> None:
    x = spread((2, 5, 30), 8).to(DEVICE).requires_grad_()
    y = fake_quantize_kv(x, rotary=6, group=16)
    assert torch.equal(y[..., 24:], x[..., 24:])
    expected = by_hand(x.detach().cpu().flatten(0, 1)[:, :24], (1, 16), E4M3, FP8_FLOOR)
    assert torch.equal(y[..., :24].double().cpu().flatten(0, 1), expected)
    upper = torch.randn(2, 5, 30).to(DEVICE)
    y.backward(upper)
    assert torch.equal(x.grad, upper)


# FP4.


def test_every_code_at_every_scale() -> None:
    """16 codes x 254 scales: each number of the format, at the head of a group that asks for that scale, stays."""
    codes = torch.tensor([*E2M1, *(-c for c in E2M1)])
    for low, high in ((-126, -60), (-60, 60), (60, 126)):
        exponents = torch.arange(low, high, dtype=torch.float64)
        groups = torch.zeros(len(exponents) * 16, 32, dtype=torch.float64)
        scale = torch.exp2(exponents).repeat_interleave(16)
        groups[:, 0], groups[:, 1] = codes.double().repeat(len(exponents)) * scale, 6 * scale
        x = groups.float()
        assert torch.equal(x.double(), groups)
        assert torch.equal(fake_quantize_fp4(x.to(DEVICE)).cpu(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_by_the_book(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = spread(shape, 9, dtype)
    expected = by_hand(x.float(), (1, 32), E2M1, FP4_FLOOR)
    leaf = x.to(DEVICE).requires_grad_()
    found = fake_quantize_fp4(leaf)
    assert found.dtype == dtype and torch.equal(found.double().cpu(), expected)
    found.sum().backward()
    assert torch.equal(leaf.grad.cpu(), torch.ones_like(x))


def test_ties_go_to_even_codes() -> None:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    assert [nearest(t, E2M1) for t in ties] == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    group = torch.tensor([*ties, *(-t for t in ties), 6.0]).expand(3, -1)
    found = fake_quantize_fp4(group.to(DEVICE)).cpu()
    assert found[0].tolist() == [*(nearest(t, E2M1) for t in ties), *(nearest(-t, E2M1) for t in ties), 6.0]


@pytest.mark.parametrize(("function", "grid"), [(fake_quantize_fp4, E2M1), (round_rows, E4M3)])
def test_of_all_ties_half_go_up(function: Callable[[Tensor], Tensor], grid: tuple[float, ...]) -> None:
    ties = torch.tensor([[(a + b) / 2, grid[-1]] for a, b in itertools.pairwise(grid)])
    found = function(ties.to(DEVICE)).cpu()[:, 0]
    assert found.tolist() == [nearest(tie, grid) for tie in ties[:, 0].tolist()]
    assert abs(int((found > ties[:, 0]).sum()) - int((found < ties[:, 0]).sum())) <= 1


def test_rounding_is_unbiased() -> None:
    """Of uniform numbers it errs up as often and as far as down: mean error within 4 standard errors of 0."""
    generator = torch.Generator().manual_seed(10)
    x = torch.rand(2000, 32, generator=generator) * 10 - 5
    x[:, 0] = 6.0
    for function, step in ((fake_quantize_fp4, 2.0), (round_rows, 32.0)):
        error = (function(x.to(DEVICE)).cpu() - x)[:, 1:].double()
        assert error.std() > 1e-3 * step
        assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_through_fp4_to_fp8_are_those_of_the_released_format(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Equal to pack, unpack and re-scale of ``kernels.quantize``, including which blocks lose something."""
    for wide in (2, 12):  # scales within FP8's reach, and far beyond it
        weight = spread(shape, 11, wide=wide)
        padded = torch.nn.functional.pad(weight, (0, -shape[1] % 32))
        codes, scale, kept = fp4_to_fp8(*quantize_fp4(padded))
        wanted = dequantize(codes, scale, dtype)[:, : shape[1]]
        found, inexact = fp4_weight(weight.to(DEVICE), dtype)
        assert torch.equal(found.cpu(), wanted) and found.dtype == dtype
        assert int(inexact) == int((~kept).sum())


@pytest.mark.parametrize("ratio", [0, 5, 11, 14, 15, 20, 60])
def test_fp8_holds_fp4_within_the_bound_and_tells_beyond_it(ratio: int) -> None:
    """Two groups of all codes, their scales 2^ratio apart: exact to 2^14, by E4M3's subnormals; counted beyond."""
    codes = torch.tensor([*E2M1, *(-c for c in E2M1)] * 2)
    weight = torch.stack((codes, codes * 2.0**-ratio)).to(DEVICE)
    found, inexact = fp4_weight(weight, torch.float32)
    assert int(inexact) == (ratio > 14)
    assert torch.equal(found, fake_quantize_fp4(weight)) == (ratio <= 14)
    if ratio <= 14:
        assert torch.equal(round_weight(found, torch.float32), found)  # FP8 products use these very values
    stack = torch.stack((weight, codes.expand(2, -1).to(DEVICE)))
    assert int(fp4_weight(stack, torch.float32)[1]) == (ratio > 14)


@pytest.mark.parametrize("poison", [1.0, torch.nan, torch.inf])
def test_beyond_the_bound_only_what_was_lost_counts(poison: float) -> None:
    """Scales 2^15 apart, but the small group holds no odd code; something that is not finite is no loss of FP8's."""
    weight = torch.zeros(3, 32)
    weight[0, 0], weight[1, 0], weight[2, 0] = 6.0, 4 * 2.0**-15, poison
    found, inexact = fp4_weight(weight.to(DEVICE), torch.float32)
    assert int(inexact) == 0 and torch.equal(found[:2].cpu(), weight[:2])
    weight[1, 1] = 0.5 * 2.0**-15
    assert int(fp4_weight(weight.to(DEVICE), torch.float32)[1]) == 1


# The indexer's operands.


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64, 128])
def test_rotation_is_the_hadamard_matrix(size: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(7, 3, size, generator=torch.Generator().manual_seed(12)).to(DEVICE)
    expected = x.double().cpu() @ matrix / size**0.5
    assert relative_error(rotate(x).cpu(), expected) < 1e-6
    assert relative_error(rotate(rotate(x)), x) < 1e-6
    leaf = x.clone().requires_grad_()
    upper = torch.randn(7, 3, size).to(DEVICE)
    operand = index_operand(leaf)
    operand.backward(upper)
    assert torch.equal(operand, fake_quantize_fp4(rotate(x)))
    assert torch.equal(leaf.grad, rotate(upper))


def test_rotation_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="needs a power of two, not 24"):
        index_operand(torch.zeros(2, 24, device=DEVICE))


# Counts.


def test_counts() -> None:
    x = spread((50, 300), 13)
    for counts, rounded, block, grid, floor in (
        (fp8_counts, round_rows, (1, 128), E4M3, FP8_FLOOR),
        (fp8_weight_counts, lambda t: round_weight(t, torch.float32), (128, 128), E4M3, FP8_FLOOR),
        (fp4_counts, fake_quantize_fp4, (1, 32), E2M1, FP4_FLOOR),
    ):
        values = rounded(x.to(DEVICE)).cpu()
        saturated = 0
        for top, left in itertools.product(range(0, 50, block[0]), range(0, 300, block[1])):
            part, of = (t[top : top + block[0], left : left + block[1]] for t in (values, x))
            scale = scale_of(of.flatten().tolist(), grid[-1], floor)
            saturated += int((part.abs() == grid[-1] * scale).sum())
        vanished = int(((values == 0) & (x != 0)).sum())
        assert counts(x.to(DEVICE)).tolist() == [saturated, vanished, 15000]


def test_straight_through_is_what_training_does() -> None:
    """The gradient of a loss of rounded weights lands on the masters as it is."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(14)).to(DEVICE).requires_grad_()
    x: Tensor = torch.eye(64, device=DEVICE)
    values, _ = fp4_weight(weight, torch.float32)
    fp8_linear(x, weight, values).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
