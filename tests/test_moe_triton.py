"""Routed experts in Triton: against a loop over experts in float64, in FP8 against torch; order, waits and memory."""

import pytest
import torch
from model_cases import relative_rms
from moe_cases import NAMES, WIDTHS, draw, run
from torch import Tensor
from triton_cases import DEVICE, poisoned

from openv4.kernels import moe_triton
from openv4.kernels.dispatch import using
from openv4.kernels.fp8 import round_weight
from openv4.kernels.moe import routed_experts

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 as in test_moe.py. bfloat16: a result sees fewer than eight roundings of up to 2^-9, which rarely add up.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8 * 2**-9}


def on_device(arguments: list[Tensor]) -> list[Tensor]:
    return [t.to(DEVICE) for t in arguments]


def check(arguments: list[Tensor], limit: float, *dtypes: torch.dtype) -> None:
    with using("triton"), poisoned():
        found = run(on_device(arguments), limit, *dtypes)
        again = run(on_device(arguments), limit, *dtypes)
    wanted = run(on_device(arguments), limit, torch.float64, reference=True)
    for name, value in wanted.items():
        assert torch.equal(found[name], again[name]), name
        assert found[name].shape == value.shape, name
        assert found[name].dtype == (dtypes[0] if name == "x" else torch.float32), name
        assert relative_rms(found[name], value) < TOLERANCE[dtypes[0]], name
    assert torch.equal(found["clamped"], again["clamped"])


@pytest.mark.parametrize("tokens", [1, 4, 129])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 2), (6, 6), (40, 3)])
def test_equals_the_reference(tokens: int, widths: str, experts: int, k: int) -> None:
    """Tiles of 16 to 128 rows; experts without a token."""
    check(draw(tokens, experts, k, widths), 1.0, torch.float32)


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_several_tiles_of_rows_and_of_columns(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the counting sort, whose chunks hold 512 copies of 32 experts."""
    monkeypatch.setattr(moe_triton, "NEIGHBOURS", 2)
    monkeypatch.setitem(WIDTHS, "wide", (70, 300))
    check(draw(700, 32, 2, "wide"), limit, torch.float32)


@pytest.mark.parametrize("widths", WIDTHS)
def test_matrices_that_were_cast_before(widths: str) -> None:
    """The same bits; gradients are not rounded."""
    arguments = on_device(draw(90, widths=widths))
    with using("triton"), poisoned():
        wanted, found = (run(arguments, 1.0, torch.bfloat16, torch.float32, cast=cast) for cast in (False, True))
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    assert not torch.equal(found["w1"], found["w1"].bfloat16().float())


@pytest.mark.parametrize("widths", WIDTHS)
def test_bfloat16(widths: str) -> None:
    """Nothing is clamped: a rounding across the kink would switch a slope on or off."""
    arguments = [t if t.dtype == torch.long else t.bfloat16().double() for t in draw(90, widths=widths)]
    check(arguments, 100.0, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("crowded", [0, 2])
def test_one_expert_has_all_tokens(crowded: int) -> None:
    x, _, weights, *others = draw(150, 3, 1)
    check([x, torch.full((150, 1), crowded), weights, *others], 1.0, torch.float32)


@pytest.mark.parametrize("tokens", [1, 17, 100])
@pytest.mark.parametrize("limit", [0.0, 0.2, 0.7, 100.0])
def test_clamped_share_is_that_of_torch(tokens: int, limit: float) -> None:
    arguments = on_device([t if t.dtype == torch.long else t.float() for t in draw(tokens)])
    shares = []
    for implementation in ("triton", "torch"):
        with using(implementation), poisoned():  # type: ignore[arg-type]
            shares.append(float(routed_experts(*arguments, limit)[1]))  # type: ignore[arg-type]
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)
    assert (shares[0] > 0) == (0 < limit < 100)


@pytest.mark.parametrize("widths", WIDTHS)
def test_a_token_does_not_depend_on_the_choices_of_others(widths: str) -> None:
    """Bit for bit on a GPU. The interpreter's products are numpy's, which sums a row by its place: to rounding."""
    x, ids, *others = draw(130, widths=widths)
    results = []
    for seed in range(3):
        changed = draw(130, seed=seed)[1]
        changed[: seed * 65] = ids[65]
        changed[65] = ids[65]
        with using("triton"):
            results.append(run(on_device([x, changed, *others]), 1.0, torch.float32))
    for result in results[1:]:
        for name in ("output", "x", "weights"):
            margin = 0.0 if DEVICE.type == "cuda" else 1e-6
            assert relative_rms(result[name][65], results[0][name][65]) <= margin, name


def test_strides_do_not_matter() -> None:
    x, ids, weights, w1, w3, w2 = draw(40)
    strided = [x.T.contiguous().T, ids.T.contiguous().T, weights.T.contiguous().T]
    with using("triton"):
        whole = run(on_device([x, ids, weights, w1, w3, w2]), 1.0, torch.float32)
        other = run(on_device([*strided, *(w.mT.contiguous().mT for w in (w1, w3, w2))]), 1.0, torch.float32)
    for name, value in whole.items():
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("learning", NAMES)
def test_gradients_one_at_a_time(learning: str) -> None:
    """What is frozen costs nothing and changes no other gradient."""
    arguments = on_device(draw(40))
    with using("triton"), poisoned():
        whole = run(arguments, 1.0, torch.float32)
        x, ids, *others = (t if t.dtype == torch.long else t.float() for t in arguments)
        leaves = dict(zip(NAMES, (x, *others), strict=True))
        leaves[learning].requires_grad_()
        output, _ = routed_experts(leaves["x"], ids, *(leaves[name] for name in NAMES[1:]), 1.0)  # type: ignore[misc]
        upper = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output)
        (gradient,) = torch.autograd.grad(output, leaves[learning], upper)
    assert torch.equal(gradient, whole[learning])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize(("hidden", "inner"), [(40, 24), (130, 150), (7, 13)])
def test_fp8_equals_torch(
    tokens: int, hidden: int, inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same roundings of the same groups. A sum in another order may cross a border between two codes, one of up to
    2^-4: few do in float32; in bfloat16 every intermediate result may differ by a rounding."""
    monkeypatch.setitem(WIDTHS, "case", (hidden, inner))
    arguments = on_device([t if t.dtype == torch.long else t.bfloat16().double() for t in draw(tokens, widths="case")])
    results = {}
    for implementation in ("triton", "torch"):
        x, ids, weights, *matrices = (t if t.dtype == torch.long else t.float() for t in arguments)
        leaves = [x.to(dtype).requires_grad_(), *(t.requires_grad_() for t in (weights, *matrices))]
        rounded = tuple(round_weight(w.detach(), dtype) for w in matrices)
        with using(implementation):  # type: ignore[arg-type]
            output, _ = routed_experts(leaves[0], ids, *leaves[1:], 100.0, None, rounded)  # type: ignore[arg-type]
            upper = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output)
            gradients = torch.autograd.grad(output, leaves, upper)
        results[implementation] = [output, *gradients]
    margin = 4e-3 if dtype == torch.float32 else 2e-2
    for name, ours, theirs in zip(["output", *NAMES], results["triton"], results["torch"], strict=True):
        assert ours.dtype == theirs.dtype and relative_rms(ours, theirs) < margin, name
