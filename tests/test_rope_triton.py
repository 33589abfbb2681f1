"""The rotary embedding's Triton kernels, alone and after the RMS norm, against their formulas."""

from typing import Any

import pytest
import torch
from rope_cases import CASES, table_of
from torch import Tensor
from triton_cases import DEVICE, assert_same_bits, relative_error, run_as

from openv4.kernels import norm
from openv4.kernels.dispatch import using
from openv4.kernels.rope import apply_rope, norm_rope

pytestmark = pytest.mark.usefixtures("one_thread")

# Against the formula in float64 on the same numbers, with the same table. In float32, sums of some hundred terms and a
# dozen roundings of 6e-8. In bfloat16 results are rounded once, by at most 2^-9 of themselves, and so are the gradients
# that come in.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2 * 2**-9}


def check(operation: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = run_as("triton", operation, inputs)
    wanted = run_as("reference", operation, {name: value.double() for name, value in inputs.items()})
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        source = inputs[name.removeprefix("gradient of ")] if "of" in name else inputs["x"]
        assert found[name].dtype == source.dtype and found[name].shape == value.shape
        if value.numel():
            error = relative_error(found[name], value)
            assert error <= TOLERANCE[inputs["x"].dtype], f"{name}: {error:.2e}"
    return found


def normal(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def device_table(shape: tuple[int, ...], pairs: int) -> tuple[Tensor, Tensor]:
    cos, sin = table_of(shape, pairs)
    return cos.to(DEVICE), sin.to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "pairs"), CASES)
def test_rope_equals_the_rotation(shape: tuple[int, ...], pairs: int, dtype: torch.dtype) -> None:
    """Channels before those that turn keep every bit, NaN and infinity too."""
    table, x = device_table(shape, pairs), normal(shape).to(dtype)
    still = shape[-1] - 2 * pairs
    for inverse in (False, True):
        found = check(lambda x, inverse=inverse: apply_rope(x, table, inverse), {"x": x})
        assert torch.equal(found["out 0"][..., :still], x[..., :still])
    if still and x.numel():
        x[..., 0], x[..., still - 1] = torch.nan, torch.inf
        with using("triton"):
            turned = apply_rope(x, table)
        assert torch.equal(turned[..., :still].isfinite(), x[..., :still].isfinite())
        assert turned[..., still:].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "pairs"), CASES)
def test_norm_rope_equals_norm_and_rotation(
    shape: tuple[int, ...], pairs: int, weighted: bool, dtype: torch.dtype
) -> None:
    table, inputs = device_table(shape, pairs), {"x": normal(shape).to(dtype)}
    if weighted:
        inputs["weight"] = normal(shape[-1:], seed=2)
    check(lambda x, weight=None: norm_rope(x, weight, 1e-5, table), inputs)


def test_a_table_for_all_rows_and_strided_heads() -> None:
    """Heads that come in another order in memory, one table for the whole batch."""
    table = device_table((1, 5), 2)
    check(lambda x: apply_rope(x.transpose(1, 2), table), {"x": normal((3, 2, 5, 6))})
    check(lambda x: norm_rope(x.transpose(1, 2), None, 1e-6, table), {"x": normal((3, 2, 5, 6))})


def test_a_weights_gradient_is_summed_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs with several tiles of rows each, whatever runs first."""
    monkeypatch.setattr(norm, "HELD", 2 * 8 * 256)
    table = device_table((2, 20), 8)
    inputs = {"x": normal((2, 20, 3, 200)), "weight": normal((200,), seed=2)}

    def operation(x: Tensor, weight: Tensor) -> Tensor:
        return norm_rope(x, weight, 1e-6, table)

    assert_same_bits(check(operation, inputs), run_as("triton", operation, inputs))
