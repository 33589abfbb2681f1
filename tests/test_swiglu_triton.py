"""The clamped SwiGLU in Triton: values, gradients and hits."""

import pytest
import torch
from triton_cases import DEVICE, assert_close, assert_same_bits, run_as

from openv4.kernels.dispatch import using
from openv4.kernels.swiglu import clamp_hits, clamped_swiglu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("limit", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [False, True])
def test_swiglu(shape: tuple[int, ...], limit: float, dtype: torch.dtype, narrow: bool) -> None:
    """float32: a dozen roundings of 6e-8; bfloat16: one of up to 2^-9, of results and of gradients."""
    generator = torch.Generator().manual_seed(len(shape))
    gate, up = (torch.randn(*shape, generator=generator).mul(2).to(DEVICE, dtype) for _ in range(2))
    gate.view(-1)[0] = 1.5  # on the limit the gradient passes, as that of torch's clamp
    inputs = {"gate": gate, "up": up, "limit": limit, "dtype": dtype if narrow else None}
    found = run_as("triton", clamped_swiglu, inputs)
    assert found["out 0"].dtype == (dtype if narrow else torch.float32)
    wide = inputs | {"gate": gate.double(), "up": up.double(), "dtype": None}
    exact = {name: value.to(found[name].dtype) for name, value in run_as("torch", clamped_swiglu, wide).items()}
    assert_close(found, exact, 1e-6 if dtype == torch.float32 else 2**-9)
    assert_same_bits(run_as("triton", clamped_swiglu, inputs), found)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 700)])
def test_hits(shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(*shape, generator=torch.Generator().manual_seed(s)).to(DEVICE) for s in range(2))
    gate.view(-1)[0] = up.view(-1)[0] = 0.75  # on the limit nothing is clamped
    with using("triton"):
        found, none = clamp_hits(gate, up, 0.75), clamp_hits(gate, up, 0.0)
    hits = int((gate > 0.75).sum() + (up.abs() > 0.75).sum())
    assert float(found) == pytest.approx(hits / (2 * gate.numel()), rel=1e-6)
    assert none == 0


def test_what_is_not_finite_stays_so() -> None:
    gate = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf], device=DEVICE)
    up = torch.tensor([1.0, torch.nan, 1.0, 1.0], device=DEVICE)
    with using("triton"):
        found = clamped_swiglu(gate, up, 2.0)
    with using("torch"):
        wanted = clamped_swiglu(gate, up, 2.0)
    torch.testing.assert_close(found, wanted, equal_nan=True)
