"""Cross-entropy in Triton kernels: loss, terms and both gradients against float64."""

from functools import partial

import pytest
import torch
from cross_entropy_cases import head
from torch import Tensor
from triton_cases import DEVICE, assert_close, assert_same_bits, poisoned, relative_error, run_as

from openv4.kernels import cross_entropy
from openv4.kernels.cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_cross_entropy,
)
from openv4.kernels.dispatch import using

pytestmark = pytest.mark.usefixtures("one_thread")

Inputs = dict[str, Tensor]


def on_triton(inputs: Inputs) -> Inputs:
    found = run_as("triton", linear_cross_entropy, {name: x.to(DEVICE) for name, x in inputs.items()})
    return {name: x.cpu() for name, x in found.items()}


def exact(inputs: Inputs) -> Inputs:
    """float64, of the same hidden states and the weight rounded to bfloat16."""
    rounded = inputs | {"weight": inputs["weight"].bfloat16().double(), "hidden": inputs["hidden"].double()}
    return run_as("torch", linear_cross_entropy, rounded)


def check(inputs: Inputs, chunks: int = 1) -> None:
    """The loss is float32 throughout: its roundings, of 6e-8 of a logit, average out. A slope is rounded to bfloat16,
    by at most 2^-8, and so is the gradient of hidden states, and of a bfloat16 weight once a chunk."""
    found, wanted = on_triton(inputs), exact(inputs)
    assert found.keys() == wanted.keys()
    wide = inputs["weight"].dtype == torch.float32
    bounds = {"out 0": 2e-7, "gradient of hidden": 2**-7, "gradient of weight": 2**-8 * (1 if wide else 1 + chunks)}
    for name, bound in bounds.items():
        assert found[name].shape == wanted[name].shape
        error = relative_error(found[name], wanted[name])
        assert error <= bound, f"{name}: relative error {error:.2e}"
    assert [found[f"gradient of {name}"].dtype for name in ("hidden", "weight")] == [
        torch.bfloat16,
        inputs["weight"].dtype,
    ]


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(1, 2, 1), (63, 129, 33), (130, 300, 70)])
def test_equals_float64(tokens: int, vocabulary: int, width: int, weight: torch.dtype) -> None:
    check(head(tokens, vocabulary, width, weight))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_chunks(weight: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last of them short."""
    monkeypatch.setattr(cross_entropy, "TRITON_ELEMENTS", 40 * 130)
    check(head(260, 40, 20, weight), chunks=3)


def test_terms() -> None:
    inputs = head(70, 300, 40)
    inputs["hidden"], inputs["targets"] = inputs["hidden"].view(7, 10, 40), inputs["targets"].view(7, 10)
    with using("triton"), poisoned():
        terms = token_cross_entropy(*(x.to(DEVICE) for x in inputs.values())).cpu()
    rounded = inputs["weight"].bfloat16().double()
    expected = linear_cross_entropy_reference(inputs["hidden"].double(), rounded, inputs["targets"])
    assert terms.shape == (7, 10) and terms.dtype == torch.float32
    assert not terms[inputs["targets"] == IGNORED].any()
    assert relative_error(terms, expected) < 2e-7
    assert torch.equal(terms.sum(), on_triton(inputs)["out 0"])


def test_confident_predictions() -> None:
    """Where the target has almost all probability, its small slope keeps its digits: what is stored in 16 bits is the
    distance from the largest logit. A logit of 20 in float16 would be off by half of these slopes."""
    inputs = head(40, 300, 64, ignored=0)
    boost = inputs["weight"][inputs["targets"]]
    inputs["hidden"] = (inputs["hidden"] + 5 * boost.bfloat16()).bfloat16()
    wanted = exact(inputs)
    assert wanted["out 0"] / 40 < 0.05
    found = on_triton(inputs)
    for name in ("gradient of hidden", "gradient of weight"):  # weight, slope, result, its product with the loss's
        assert relative_error(found[name], wanted[name]) < 4 * 2**-9
    assert relative_error(found["out 0"], wanted["out 0"]) < 2e-4  # of a loss of 0.01 by logits of 20, rounded by 6e-8


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    inputs = head(30, 300, 20)
    inputs["hidden"] = inputs["hidden"] * scale
    found, wanted = on_triton(inputs), exact(inputs)
    for name, x in found.items():
        assert x.isfinite().all()
        assert relative_error(x, wanted[name]) < max(2**-8, 1e-6 * scale), name


def test_ignored_tokens_cannot_spoil_the_loss() -> None:
    inputs = head(30, 140, 20, ignored=0.4)
    wild = inputs | {"hidden": torch.where((inputs["targets"] == IGNORED).unsqueeze(1), 3e4, inputs["hidden"])}
    assert_same_bits(on_triton(wild), on_triton(inputs))


@pytest.mark.parametrize("tokens", [0, 20])
def test_nothing_counts(tokens: int) -> None:
    found = on_triton(head(tokens, 140, 20, ignored=1.1))
    assert found["out 0"] == 0
    assert found["gradient of hidden"].shape == (tokens, 20) and found["gradient of weight"].shape == (140, 20)
    assert not any(x.any() for x in found.values())


def test_strided_hidden_states_and_leading_dimensions() -> None:
    inputs = head(24, 50, 10)
    expected = on_triton(inputs)
    stacked = inputs | {"targets": inputs["targets"].view(2, 3, 4)}
    turned = inputs["hidden"].view(2, 3, 4, 10).movedim(0, 2).contiguous().movedim(2, 0)
    found = on_triton(stacked | {"hidden": turned})
    found["gradient of hidden"] = found["gradient of hidden"].reshape(24, 10)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str) -> None:
    inputs = head(20, 50, 10)
    expected = on_triton(inputs)
    leaves = {name: x.to(DEVICE) for name, x in inputs.items()}
    for name in ("hidden", "weight"):
        leaves[name].requires_grad_(frozen not in (name, "both"))
    with using("triton"), poisoned():
        loss = linear_cross_entropy(**leaves)
    assert torch.equal(loss.cpu(), expected["out 0"])
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        other = "hidden" if frozen == "weight" else "weight"
        (gradient,) = torch.autograd.grad(loss, leaves[other])
        upstream = torch.randn((), generator=torch.Generator().manual_seed(0)).bfloat16().float()  # of run_as
        torch.testing.assert_close((gradient.cpu() * upstream), expected[f"gradient of {other}"], rtol=2**-8, atol=0)


def test_a_second_backward_raises() -> None:
    leaves = {name: x.to(DEVICE) for name, x in head(20, 50, 10).items()}
    leaves["hidden"].requires_grad_()
    with using("triton"):
        loss = linear_cross_entropy(**leaves)
    torch.autograd.grad(loss, leaves["hidden"], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves["hidden"])


def test_two_runs_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "TRITON_ELEMENTS", 300 * 130)
    assert_same_bits(on_triton(head(150, 300, 24)), on_triton(head(150, 300, 24)))


def test_float32_hidden_states_are_multiplied_exactly() -> None:
    """They take the torch path, whose products are of float32, whatever dispatch says."""
    inputs = {name: x.to(DEVICE) for name, x in head(20, 50, 10).items()}
    inputs["hidden"] = inputs["hidden"].float()
    assert_same_bits(run_as("triton", linear_cross_entropy, inputs), run_as("torch", linear_cross_entropy, inputs))
    terms = partial(token_cross_entropy, *inputs.values())
    with using("triton"):
        found = terms()
    with using("torch"):
        assert torch.equal(found, terms())


def test_reference_is_an_implementation() -> None:
    inputs = head(20, 50, 10)
    assert_close(run_as("reference", linear_cross_entropy, inputs), run_as("torch", linear_cross_entropy, inputs), 1e-6)
