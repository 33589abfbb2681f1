"""The RMS norm's Triton kernels: outputs and gradients against the formula, FP8 codes bit for bit."""

from collections.abc import Mapping

import pytest
import torch
from norm_cases import SHAPES, draw
from torch import Tensor
from triton_cases import DEVICE, assert_same_bits, relative_error, run_as

from openv4.kernels import norm
from openv4.kernels.dispatch import using
from openv4.kernels.norm import rms_norm, rms_norm_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

# Against the formula in float64 under the same numbers. In float32, sums of a thousand terms and a dozen roundings of
# 6e-8. In bfloat16 results are rounded once, by at most 2^-9 of themselves, and so are the gradients that come in.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2 * 2**-9}


def normed(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return rms_norm(x, weight, 1e-5)


def normed_too(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return rms_norm_fp8(x, weight, 1e-5)[0]


def check(operation: object, inputs: Mapping[str, Tensor], plain: object = None) -> None:
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    found = run_as("triton", operation, inputs)  # type: ignore[arg-type]
    wanted = run_as("reference", plain or operation, {name: value.double() for name, value in inputs.items()})
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        source = inputs[name.removeprefix("gradient of ")] if "of" in name else inputs["x"]
        assert found[name].dtype == source.dtype and found[name].shape == value.shape
        if value.numel():
            error = relative_error(found[name], value)
            assert error <= TOLERANCE[inputs["x"].dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", [normed, normed_too])
def test_norm_equals_the_formula(operation: object, shape: tuple[int, ...], weighted: bool, dtype: torch.dtype) -> None:
    inputs = draw(shape, weighted, dtype)
    if shape[-1] == 1:  # y = x / |x|: all of its gradient is what eps leaves of it
        inputs["x"] = inputs["x"] * 1e-3
    check(operation, inputs, normed)


def test_norm_of_strided_rows_and_a_bfloat16_weight() -> None:
    inputs = draw((40, 6), True, torch.bfloat16)
    inputs["x"], inputs["weight"] = inputs["x"].T.contiguous(), inputs["weight"].bfloat16()
    check(lambda x, weight: normed(x.T, weight), inputs)


def test_a_weights_gradient_is_summed_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs with several tiles of rows each, whatever runs first."""
    inputs = {name: value.to(DEVICE) for name, value in draw((150, 200), True, torch.float32).items()}
    monkeypatch.setattr(norm, "HELD", 2 * 8 * 256)
    check(normed, inputs)
    assert_same_bits(run_as("triton", normed, inputs), run_as("triton", normed, inputs))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [1, 128, 300])
def test_codes_are_those_of_the_result(columns: int, dtype: torch.dtype) -> None:
    """Weights spread the groups over all scales, the smallest included."""
    inputs = draw((9, columns), True, dtype)
    weight = inputs["weight"] * torch.exp2(torch.arange(columns) // 32 * 4 - 24.0)
    with using("triton"):
        result, codes, scales = rms_norm_fp8(inputs["x"].to(DEVICE), weight.to(DEVICE))
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float8_e8m0fnu
    wanted = norm._quantize(result)
    assert torch.equal(bits(codes), bits(wanted[0])) and torch.equal(bits(scales), bits(wanted[1]))


def test_codes_of_what_is_not_finite_are_nan() -> None:
    x = torch.randn(3, 130, device=DEVICE)
    x[1, 7] = torch.inf
    for implementation in ("triton", "torch"):
        with using(implementation):  # type: ignore[arg-type]
            result, codes, _ = rms_norm_fp8(x)
        assert torch.equal(codes.float().isnan(), result.isnan())
        assert result[1].isnan().any() and result[[0, 2]].isfinite().all()
