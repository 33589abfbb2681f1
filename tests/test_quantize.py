"""FP8, FP4 and their scales: every code and scale, every tie, against numpy arithmetic that shares nothing with it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import release_fixture as oracle
import torch
from release_fixture import Codes, Values
from torch import Tensor

from openv4.kernels.quantize import dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

EXPONENTS = np.arange(-127, 128)  # all that E8M0 can say
SCALE_DTYPES = {"e8m0": torch.float8_e8m0fnu, "f32": torch.float32}


def fp8(codes: Codes) -> Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def fp4(codes: Codes) -> Tensor:
    return torch.from_numpy(oracle.pack(codes)).view(torch.int8)


def scale(exponents: npt.ArrayLike, dtype: torch.dtype = torch.float8_e8m0fnu) -> Tensor:
    exponents = np.asarray(exponents)
    if dtype == torch.float32:
        return torch.from_numpy(np.ldexp(1.0, exponents).astype(np.float32))
    return torch.from_numpy((exponents + 127).astype(np.uint8)).view(dtype)


def bits(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.contiguous().view(torch.uint8).numpy()


def exponents_of(scales: Tensor) -> npt.NDArray[np.int64]:
    """Of E8M0 or float32 scales, after checking that they are powers of two."""
    mantissa, exponent = np.frexp(scales.double().numpy())
    assert (mantissa == 0.5).all()
    shifted: npt.NDArray[np.int64] = exponent - 1
    return shifted


def assert_same(ours: Tensor, expected: Values, where: npt.ArrayLike = True) -> None:
    """Equal in value and in the sign of zeros."""
    found, where = ours.double().numpy(), np.broadcast_to(where, expected.shape)
    np.testing.assert_array_equal(found[where], expected[where])
    np.testing.assert_array_equal(np.signbit(found[where]), np.signbit(expected[where]))


def assert_fp8(weight: Tensor, **kept: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of each matrix of ``weight`` are the oracle's, bit for bit."""
    codes, scales = quantize_fp8(weight, **kept)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    for index in np.ndindex(weight.shape[:-2]):
        expected, powers = oracle.quantise_fp8(weight[index].double().numpy())
        np.testing.assert_array_equal(bits(codes[index]), expected)
        np.testing.assert_array_equal(scales[index].double().numpy(), powers)
    return codes, scales


def assert_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = quantize_fp4(weight)
    assert codes.dtype == torch.int8 and codes.shape == (*weight.shape[:-1], weight.shape[-1] // 2)
    for index in np.ndindex(weight.shape[:-2]):
        expected, powers = oracle.quantise_fp4(weight[index].double().numpy())
        np.testing.assert_array_equal(oracle.unpack(bits(codes[index])), expected)
        np.testing.assert_array_equal(scales[index].double().numpy(), powers)
    return codes, scales


# Reading.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SCALE_DTYPES)
def test_every_fp8_code_at_every_scale(kind: str, dtype: torch.dtype) -> None:
    """Exact wherever the dtype has the product at all: bfloat16 ends at 2^-133 and both end at 2^128."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 256).repeat(len(EXPONENTS), 0)
    exponents = EXPONENTS[:, None, None].repeat(2, -1)
    expected = oracle.e4m3(codes) * np.ldexp(1.0, EXPONENTS)[:, None, None]
    found = dequantize(fp8(codes), scale(exponents, SCALE_DTYPES[kind]), dtype)
    assert found.dtype == dtype and found.shape == codes.shape
    assert found[:, 0, [127, 255]].isnan().all(), "the two codes that are no number"
    numbers = ~np.isnan(expected)
    fits = oracle.fits_bf16(expected) if dtype == torch.bfloat16 else numbers & (np.abs(expected) < 2.0**128)
    assert (numbers & fits).sum() > 0.95 * numbers.sum()
    assert_same(found, expected, numbers & fits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SCALE_DTYPES)
def test_every_fp4_byte_at_every_scale(kind: str, dtype: torch.dtype) -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(len(EXPONENTS), 0)
    exponents = EXPONENTS[:, None, None].repeat(16, 1)
    expected = oracle.E2M1[oracle.unpack(packed)] * np.ldexp(1.0, EXPONENTS)[:, None, None]
    codes = torch.from_numpy(packed).view(torch.int8)
    found = dequantize(codes, scale(exponents, SCALE_DTYPES[kind]), dtype)
    assert found.dtype == dtype and found.shape == (len(EXPONENTS), 16, 32)
    assert_same(found, expected, np.abs(expected) < 2.0**128)


def test_the_low_half_of_a_byte_comes_first() -> None:
    codes = torch.tensor([[0x72, -0x70]], dtype=torch.int8)  # bytes 0x72, 0x90
    assert dequantize(codes, scale([[0]]), torch.float32).tolist() == [[1.0, 6.0, 0.0, -0.5]]


@pytest.mark.parametrize("shape", [(1, 1), (63, 129), (129, 63), (431, 257), (128, 256), (2, 3, 130, 131)])
def test_fp8_blocks_of_odd_matrices(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    exponents = rng.integers(-20, 20, (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)))
    found = dequantize(fp8(codes), scale(exponents), torch.float32)
    for index in np.ndindex(shape[:-2]):
        scales = oracle.spread(np.ldexp(1.0, exponents[index]), shape[-2:], (128, 128))
        assert_same(found[index], oracle.e4m3(codes[index]) * scales)


@pytest.mark.parametrize("shape", [(1, 2), (63, 34), (129, 64), (431, 430), (2, 3, 5, 96)])
def test_fp4_groups_of_odd_matrices(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, shape, np.uint8)
    exponents = rng.integers(-20, 20, (*shape[:-1], -(-shape[-1] // 32)))
    found = dequantize(fp4(codes), scale(exponents), torch.float32)
    for index in np.ndindex(shape[:-2]):
        scales = oracle.spread(np.ldexp(1.0, exponents[index]), shape[-2:], (1, 32))
        assert_same(found[index], oracle.E2M1[codes[index]] * scales)


# Writing: the scale.


def test_fp8_scale_at_the_edge_of_every_power() -> None:
    """amax = 448 * 2^k still has scale 2^k, one bit more has twice that; below 1e-4 the scale no longer shrinks."""
    exact = np.ldexp(448.0, np.arange(-140, 120)).astype(np.float32)
    amax = np.concatenate(
        [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0)), [0, 1e-4]]
    )
    _, scales = assert_fp8(torch.from_numpy(amax.astype(np.float32)).view(-1, 1, 1))
    found = exponents_of(scales).ravel()
    np.testing.assert_array_equal(found[:260], np.maximum(np.arange(-140, 120), -22))
    np.testing.assert_array_equal(found[260:520], np.maximum(np.arange(-139, 121), -22))
    assert found[-2] == found[-1] == -22


def test_fp4_scale_at_the_edge_of_every_power() -> None:
    exact = np.ldexp(6.0, np.arange(-140, 126)).astype(np.float32)
    amax = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0)), [0]])
    _, scales = assert_fp4(torch.from_numpy(amax.astype(np.float32)).view(-1, 1, 1).repeat(1, 1, 2))
    found = exponents_of(scales).ravel()
    np.testing.assert_array_equal(found[:266], np.maximum(np.arange(-140, 126), -126))
    np.testing.assert_array_equal(found[266:532], np.maximum(np.arange(-139, 127), -126))
    assert found[-1] == -126


# Writing: the codes.


def edges(sizes: Values) -> npt.NDArray[np.float32]:
    """Every representable number, every tie between two, and the float32 neighbours of both; both signs."""
    points = np.concatenate([sizes, (sizes[1:] + sizes[:-1]) / 2]).astype(np.float32)
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    near = np.concatenate([points, up, down])
    near = near[np.abs(near) <= sizes[-1]]
    return np.concatenate([near, -near])


@pytest.mark.parametrize("exponent", [-22, -3, 0, 7, 119])
def test_every_tie_of_fp8(exponent: int) -> None:
    x = edges(oracle.E4M3_SIZES)
    x = np.concatenate([x, np.zeros(-len(x) % 127, np.float32)]).reshape(-1, 127)
    x = np.concatenate([np.full((len(x), 1), 448, np.float32), x], 1) * np.float32(2.0) ** exponent
    codes, scales = assert_fp8(torch.from_numpy(x).unsqueeze(1))
    assert (exponents_of(scales) == exponent).all()
    assert set(bits(codes).ravel()) == set(range(256)) - {127, 255}


@pytest.mark.parametrize("exponent", [-126, -22, 0, 125])
def test_every_tie_of_fp4(exponent: int) -> None:
    x = edges(oracle.E2M1[:8])
    x = np.concatenate([x, np.zeros(-len(x) % 31, np.float32)]).reshape(-1, 31)
    x = np.ldexp(np.concatenate([np.full((len(x), 1), 6, np.float32), x], 1), exponent)
    codes, scales = assert_fp4(torch.from_numpy(x).unsqueeze(1))
    assert (exponents_of(scales) == exponent).all()
    assert set(oracle.unpack(bits(codes)).ravel()) == set(range(16))


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Sizes over 2^-30 to 2^30 that change from block to block, so that scales differ and some values vanish."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randint(-15, 16, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.02)
    return (torch.randn(shape, generator=generator) * 2.0**rough).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 431), (431, 1), (63, 129), (129, 63), (300, 260), (2, 3, 130, 5)])
def test_random_fp8(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fp8(random_weight(shape, dtype, sum(shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2), (1, 430), (431, 2), (63, 130), (129, 62), (300, 260), (2, 3, 5, 96)])
def test_random_fp4(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fp4(random_weight(shape, dtype, sum(shape)))


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_fp4])
def test_rounding_errs_up_as_often_as_down(quantize: Any) -> None:
    """Uniform values: mean error zero and signs balanced, to four standard deviations."""
    x = torch.empty(512, 512).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    error = (dequantize(*quantize(x), torch.float32) - x).double().flatten()
    error = error[error != 0]
    count = len(error)
    assert abs((error > 0).double().mean() - 0.5) < 4 * 0.5 / count**0.5
    assert abs(error.mean()) < 4 * error.std() / count**0.5


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_fp4])
def test_an_argument_is_left_alone_and_need_not_be_contiguous(quantize: Any) -> None:
    x = random_weight((96, 160), torch.float32, 5)
    before = x.clone()
    codes, scales = quantize(x.T.contiguous().T)
    plain_codes, plain_scales = quantize(x)
    assert torch.equal(x, before)
    np.testing.assert_array_equal(bits(codes), bits(plain_codes))
    np.testing.assert_array_equal(bits(scales), bits(plain_scales))
    parameter = x.clone().requires_grad_()
    assert not quantize(parameter)[1].requires_grad


def test_fp4_needs_pairs() -> None:
    with pytest.raises(ValueError, match="431"):
        quantize_fp4(torch.zeros(3, 431))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (0, 4, 64), (2, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    for quantize in (quantize_fp8, quantize_fp4):
        codes, scales = quantize(x)
        assert dequantize(codes, scales, torch.float32).shape == shape
    assert fp4_to_fp8(*quantize_fp4(x))[0].shape == shape


# An earlier scale is kept where it still fits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SCALE_DTYPES)
def test_fp8_codes_survive_under_their_scale(kind: str, dtype: torch.dtype) -> None:
    """Whatever the scale was: subnormal codes, zeros of both signs, blocks of zeros, scales that no rule chooses."""
    codes, powers = oracle.random_fp8((431, 600), True, np.random.default_rng(2))
    scales = scale(np.frexp(powers)[1] - 1, SCALE_DTYPES[kind])
    again, kept = quantize_fp8(dequantize(fp8(codes), scales, dtype), scales)
    np.testing.assert_array_equal(bits(again), codes)
    np.testing.assert_array_equal(kept.double().numpy(), powers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SCALE_DTYPES)
def test_fp4_codes_survive_under_their_scale(kind: str, dtype: torch.dtype) -> None:
    codes, powers = oracle.random_fp4((431, 608), True, np.random.default_rng(3))
    scales = scale(np.frexp(powers)[1] - 1, SCALE_DTYPES[kind])
    again, kept = quantize_fp4(dequantize(fp4(codes), scales, dtype), scales)
    np.testing.assert_array_equal(oracle.unpack(bits(again)), codes)
    np.testing.assert_array_equal(kept.double().numpy(), powers)


def test_a_changed_block_follows_the_rule_and_its_neighbours_stay() -> None:
    codes, powers = oracle.random_fp8((300, 300), True, np.random.default_rng(4))
    scales = scale(np.frexp(powers)[1] - 1)
    weight = dequantize(fp8(codes), scales, torch.float32)
    weight[150, 200] = 0.3  # in block (1, 1); no E4M3 number times a power of two
    again, kept = quantize_fp8(weight, scales)
    fresh, rule = oracle.quantise_fp8(weight.double().numpy())
    expected_codes, expected_scales = codes.copy(), powers.copy()
    expected_codes[128:256, 128:256], expected_scales[1, 1] = fresh[128:256, 128:256], rule[1, 1]
    np.testing.assert_array_equal(bits(again), expected_codes)
    np.testing.assert_array_equal(kept.double().numpy(), expected_scales)


def test_a_changed_group_follows_the_rule_and_its_neighbours_stay() -> None:
    codes, powers = oracle.random_fp4((5, 96), True, np.random.default_rng(5))
    scales = scale(np.frexp(powers)[1] - 1)
    weight = dequantize(fp4(codes), scales, torch.float32)
    weight[2, 40] = 0.3
    again, kept = quantize_fp4(weight, scales)
    fresh, rule = oracle.quantise_fp4(weight.double().numpy())
    expected_codes, expected_scales = codes.copy(), powers.copy()
    expected_codes[2, 32:64], expected_scales[2, 1] = fresh[2, 32:64], rule[2, 1]
    np.testing.assert_array_equal(oracle.unpack(bits(again)), expected_codes)
    np.testing.assert_array_equal(kept.double().numpy(), expected_scales)


@pytest.mark.parametrize("factor", [2.0**-9, 2.0**-1, 2.0, 2.0**10])
def test_a_block_takes_the_better_of_its_earlier_scale_and_the_rules(factor: float) -> None:
    """By the sum of squared errors, block by block; scales far too small or too coarse are never kept."""
    weight = random_weight((200, 160), torch.float32, 7)
    exact = weight.double().numpy()
    for quantize, block in ((quantize_fp8, (128, 128)), (quantize_fp4, (1, 32))):
        codes, scales = quantize(weight)
        given = (scales.float() * factor).to(scales.dtype)
        again, kept = quantize(weight, given)
        error = {
            name: block_sum((dequantize(*pair, torch.float64).numpy() - exact) ** 2, block)
            for name, pair in (("rule", (codes, scales)), ("chosen", (again, kept)))
        }
        keeps = bits(kept) == bits(given)
        assert np.all(keeps | (bits(kept) == bits(scales)))
        assert np.all(error["chosen"] <= error["rule"])
        np.testing.assert_array_equal(error["chosen"][~keeps], error["rule"][~keeps])
        if not 0.25 < factor < 4:
            assert not keeps.any()


def test_one_number_that_grows_a_little_leaves_its_group_alone() -> None:
    """A group whose largest code is 6: the rule would double its scale and round 0.5 and 1.5 away."""
    before = torch.tensor([[6.0, 0.5, -1.5, 3.0] * 8])
    codes, scales = quantize_fp4(before)
    grown = before.clone()
    grown[0, 0] = 6.01
    again, kept = quantize_fp4(grown, scales)
    assert torch.equal(again, codes) and torch.equal(kept.float(), scales.float())
    assert not torch.equal(dequantize(*quantize_fp4(grown), torch.float32), before)


def block_sum(values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    sums = np.add.reduceat(values, np.arange(0, values.shape[0], block[0]), 0)
    return np.add.reduceat(sums, np.arange(0, values.shape[1], block[1]), 1)


# FP4 as FP8.


def test_fp4_survives_in_fp8_exactly_where_e4m3_can_hold_it() -> None:
    """All 16 codes at all ratios to the block's largest scale: the flag says what happened to each value."""
    ratios = np.arange(31)
    codes = np.zeros((31, 16, 1, 64), np.uint8)
    codes[..., 0], codes[..., 32] = 7, np.arange(16)[:, None]
    exponents = np.zeros((31, 16, 1, 2), int)
    exponents[..., 1] = -ratios[:, None, None]
    values = oracle.E2M1[codes] * np.repeat(np.ldexp(1.0, exponents), 32, -1)
    found, scales, lossless = fp4_to_fp8(fp4(codes), scale(exponents))
    assert found.dtype == torch.float8_e4m3fn and lossless.dtype == torch.bool
    assert scales.shape == lossless.shape == (31, 16, 1, 1)
    assert (exponents_of(scales) == -6).all(), "the largest FP4 scale over 2^6"
    np.testing.assert_array_equal(bits(found) & 127, oracle.nearest(values * 64, oracle.E4M3_SIZES))
    survived = (oracle.e4m3(bits(found)) / 64 == values).all(-1)
    np.testing.assert_array_equal(lossless[..., 0].numpy(), survived)
    assert lossless[:12].all(), "guaranteed"
    assert lossless[12:15].all(), "subnormals"
    assert not lossless[15, [1, 3, 9, 11]].any() and lossless[15, [0, 2, 4, 5, 6, 7, 8]].all()
    assert lossless[:, [0, 8]].all() and not lossless[18:, [1, 2, 3, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("base", [-127, -124, -110, 0, 125])
@pytest.mark.parametrize("shape", [(1, 2), (63, 130), (129, 62), (431, 430), (2, 3, 130, 96)])
def test_fp4_as_fp8_on_random_matrices(shape: tuple[int, ...], base: int) -> None:
    """Blocks of every spread of scales; what the flag calls lossless is, and every other block lost a value."""
    rng = np.random.default_rng(base + 127)
    codes = rng.integers(0, 16, shape, np.uint8)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    spreads = rng.choice([0, 5, 11, 14, 20], blocks).repeat(128, -2).repeat(4, -1)
    spreads = spreads[..., : shape[-2], : -(-shape[-1] // 32)]
    exponents = np.clip(base - rng.integers(0, 21, spreads.shape) % (spreads + 1), -127, 127)
    packed, scales = fp4(codes), scale(exponents)
    found, powers, lossless = fp4_to_fp8(packed, scales)
    assert found.shape == shape and powers.shape == lossless.shape == blocks
    values = oracle.E2M1[codes] * np.ldexp(1.0, exponents).repeat(32, -1)[..., : shape[-1]]
    for index in np.ndindex(shape[:-2]):
        largest = oracle.block_amax(np.ldexp(1.0, exponents[index]), (128, 4))
        expected = np.maximum(largest / 64, 2.0**-127)
        np.testing.assert_array_equal(powers[index].double().numpy(), expected)
        back = oracle.e4m3(bits(found[index])) * oracle.spread(expected, shape[-2:], (128, 128))
        changed = oracle.block_amax((back != values[index]).astype(float), (128, 128)) > 0
        np.testing.assert_array_equal(lossless[index].numpy(), ~changed)
        np.testing.assert_array_equal(np.signbit(back), np.signbit(values[index]))


def test_float32_scales_give_the_same_fp8() -> None:
    codes, powers = oracle.random_fp4((200, 160), False, np.random.default_rng(8))
    exponents = np.frexp(powers)[1] - 1
    plain, wide = (fp4_to_fp8(fp4(codes), scale(exponents, dtype)) for dtype in SCALE_DTYPES.values())
    np.testing.assert_array_equal(bits(plain[0]), bits(wide[0]))
    np.testing.assert_array_equal(plain[1].double().numpy(), wide[1].double().numpy())
    assert torch.equal(plain[2], wide[2])
