"""Chunked attention against its plain reference: output and every gradient, over odd shapes and packings."""

from typing import Any

import pytest
import torch
from attention_cases import KINDS, PACKINGS, draw
from attention_cases import pack as pack
from model_cases import relative_rms
from torch import Tensor

from openv4.kernels import attention
from openv4.kernels.attention import hybrid_attention, hybrid_attention_reference
from openv4.kernels.documents import find_documents

pytestmark = pytest.mark.usefixtures("one_thread")

# Ours and the reference differ in the order of sums alone. A sum of n terms in working precision is off by about
# sqrt(n) roundings: n is some thousand here, a rounding 6e-8 in float32 and 1e-16 in float64, and a result passes
# through two or three such sums. That is 1e-5 and 2e-14; the latter is rounded up.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def run(function: Any, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Both results and the gradient of every floating input, for one random gradient of the output."""
    arguments = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = value.detach().to(dtype).requires_grad_()
    inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    out, lse = function(**arguments)
    assert not lse.requires_grad
    generator = torch.Generator().manual_seed(1)
    upper = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(out, list(inputs.values()), upper)
    return {"out": out, "lse": lse, **dict(zip(inputs, gradients, strict=True))}


def check(arguments: dict[str, Any], *dtypes: torch.dtype) -> None:
    for dtype in dtypes or TOLERANCE:
        ours, theirs = (run(f, arguments, dtype) for f in (hybrid_attention, hybrid_attention_reference))
        for name, value in ours.items():
            assert value.shape == theirs[name].shape, name
            assert value.dtype == theirs[name].dtype, name
            assert relative_rms(value, theirs[name]) < TOLERANCE[dtype], (name, dtype)


@pytest.mark.parametrize("length", [1, 3, 4, 33, 127, 128, 129])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, packing: str, length: int) -> None:
    check(draw(kind, packing, length, window=32, seed=length))


@pytest.mark.parametrize("window", [1, 3, 50, 128, 5000])
@pytest.mark.parametrize(("ratio", "k"), [(1, 7), (2, 10000), (4, 1), (7, 64), (128, 2), (1000, 1)])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_equals_the_reference_for_every_window_and_ratio(kind: str, ratio: int, k: int, window: int) -> None:
    """Windows of one token and beyond the row, more selected entries than there are, ratios without any entry."""
    check(draw(kind, "random", 131, window, ratio, k, heads=2, dim=5, seed=window), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_on_a_thousand_tokens(kind: str) -> None:
    check(draw(kind, "padded", 1000, window=64, ratio=4, k=40, batch=2, heads=2))


@pytest.mark.parametrize(("kind", "ratio"), [("window", 4), ("dense", 128), ("sparse", 4)])
def test_equals_the_reference_on_four_thousand_tokens(kind: str, ratio: int) -> None:
    check(draw(kind, "random", 4097, 128, ratio, k=16, batch=1, heads=1, dim=4), torch.float32)


@pytest.mark.parametrize("elements", [1, 20000])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_borders_of_groups_do_not_show(kind: str, packing: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of one element makes every chunk a group of its own; the others end groups at odd places."""
    monkeypatch.setattr(attention, "CPU_ELEMENTS", elements)
    check(draw(kind, packing, 203, window=24, k=6, heads=2), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    arguments = draw(kind, "random", 9, window=3, ratio=2, k=2, batch=2, heads=2, dim=3)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]

    def out(*values: Tensor) -> Tensor:
        return hybrid_attention(**(arguments | dict(zip(names, values, strict=True))))[0]

    assert torch.autograd.gradcheck(out, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in ("q", "kv", "entries", "out") if (kind, name) != ("window", "entries")],
)
def test_strides_do_not_matter(kind: str, name: str) -> None:
    """An input that is a view of another tensor, or the gradient of a plain sum, which has stride zero."""
    arguments = draw(kind, "random", 45, window=7)
    results = []
    for strided in (False, True):
        leaf = arguments[name if name in arguments else "q"].detach().clone().requires_grad_()
        view = leaf.mT.contiguous().mT if strided and name != "out" else leaf
        out, _ = hybrid_attention(**(arguments | {name if name in arguments else "q": view}))
        one = torch.ones(()).double().expand_as(out)
        results.append((out, *torch.autograd.grad(out, leaf, one if strided else one.contiguous())))
    for ours, theirs in zip(*results, strict=True):
        assert relative_rms(ours, theirs) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for_gets_a_gradient(kind: str) -> None:
    """A frozen input changes nothing for the others."""
    arguments = draw(kind, "random", 40, window=9)
    whole = run(hybrid_attention, arguments, torch.float64)
    upper = torch.randn(whole["out"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in {"q", "kv", "sink", "entries"} & arguments.keys():
        leaf = arguments[name].detach().clone().requires_grad_()
        out, _ = hybrid_attention(**(arguments | {name: leaf}))
        assert torch.equal(torch.autograd.grad(out, leaf, upper)[0], whole[name])


@pytest.mark.parametrize("sink", [-1e4, 89.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_extreme_logits_stay_finite(sink: float, scale: float) -> None:
    """Logits of thousands, and sinks far above and below all of them, in float32: no overflow, the reference's result.

    A logit of size x carries an error of 6e-8 x, which is relative in every probability; x is up to some thousand.
    Beside a sink of 89, the first whose exponential overflows, probabilities are too small for a relative comparison.
    """
    arguments = draw("dense", "random", 60, window=16)
    arguments["q"] = arguments["q"] * scale
    arguments["sink"] = torch.full_like(arguments["sink"], sink)
    ours, theirs = (run(f, arguments, torch.float32) for f in (hybrid_attention, hybrid_attention_reference))
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert (value - theirs[name]).norm() < 1e-5 * scale * theirs[name].norm() + 1e-30, name


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str) -> None:
    """Against float32 on the same rounded inputs: bfloat16 rounds by up to 2^-9, a result sees fewer than ten roundings
    (scaled query, score, probability, product, difference to the mean, its product, result), and they rarely add up."""
    arguments = draw(kind, "random", 150, window=20, k=8)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = value.bfloat16()
    ours, exact = run(hybrid_attention, arguments, torch.bfloat16), run(hybrid_attention, arguments, torch.float32)
    for name, value in ours.items():
        assert value.dtype == (torch.float32 if name == "lse" else torch.bfloat16), name
        assert relative_rms(value, exact[name]) < 10 * 2**-9, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_sink_keeps_its_precision(kind: str) -> None:
    """In mixed precision the sink stays a float32 parameter, and so does its gradient."""
    arguments = draw(kind, "random", 50, window=9)
    arguments |= {n: v.bfloat16() for n, v in arguments.items() if n in {"q", "kv", "entries"}}
    arguments["sink"] = arguments["sink"].float().requires_grad_()
    out, lse = hybrid_attention(**arguments)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), arguments["sink"])
    assert (out.dtype, lse.dtype, gradient.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_without_a_selection_only_the_window_remains() -> None:
    arguments = draw("sparse", "random", 30, window=5)
    nothing = run(hybrid_attention, arguments | {"selected": torch.full_like(arguments["selected"], -1)}, torch.float64)
    empty = run(hybrid_attention, arguments | {"selected": arguments["selected"][..., :0]}, torch.float64)
    alone = {name: value for name, value in arguments.items() if name not in {"entries", "blocks", "selected"}}
    for name, value in run(hybrid_attention, alone, torch.float64).items():
        assert relative_rms(nothing[name], value) < 1e-12, name
        assert relative_rms(empty[name], value) < 1e-12, name
    assert not nothing["entries"].any()
    assert not empty["entries"].any()


def test_selecting_all_is_dense() -> None:
    arguments = draw("sparse", "padded", 77, window=5, k=1000)
    sparse = run(hybrid_attention, arguments, torch.float64)
    for name, value in run(hybrid_attention, arguments | {"selected": None}, torch.float64).items():
        assert relative_rms(sparse[name], value) < 1e-12, name


def test_probabilities_and_the_sinks_share_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv = torch.randn(1, 40, 2, 8, generator=generator), torch.ones(1, 40, 8)
    sink = torch.tensor([0.5, -1.0])
    documents = find_documents(torch.zeros(1, 40, dtype=torch.long))
    out, lse = hybrid_attention(q, kv, sink, documents.first, 7)
    torch.testing.assert_close(out[..., 0] + (sink - lse).exp(), torch.ones(1, 40, 2))
