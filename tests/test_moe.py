"""Routed experts against a loop over experts, and what else decides the route."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import relative_rms
from moe_cases import NAMES, WIDTHS, draw, run
from torch import Tensor

from openv4.kernels.moe import (
    ExpertAdapters,
    LowRank,
    routed_experts,
    routed_experts_reference,
)
from openv4.kernels.router import expert_weights, router_scores, top_experts
from openv4.kernels.swiglu import clamp_hits, clamped_swiglu

pytestmark = pytest.mark.usefixtures("one_thread")

# A product sums over a width, a weight's gradient over an expert's tokens: some hundred terms, each sum off by about
# the square root of that many roundings, of 6e-8 or 1e-16, and three of them in a row.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check(arguments: list[Tensor], limit: float = 1.0) -> None:
    for dtype, tolerance in TOLERANCE.items():
        ours, theirs = run(arguments, limit, dtype), run(arguments, limit, dtype, reference=True)
        for name, value in theirs.items():
            assert ours[name].shape == value.shape, name
            assert ours[name].dtype == value.dtype, name
            assert relative_rms(ours[name], value) < tolerance, (name, dtype)


@pytest.mark.parametrize("tokens", [1, 3, 4, 127, 128, 129, 1000])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 2), (6, 6), (40, 3)])
def test_equals_the_reference(tokens: int, widths: str, experts: int, k: int) -> None:
    """With forty experts and few tokens most are empty; with six of six all are full."""
    check(draw(tokens, experts, k, widths))


def test_equals_the_reference_on_four_thousand_tokens() -> None:
    check(draw(4097, 7, 3))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_that_were_cast_before(widths: str, dtype: torch.dtype) -> None:
    """The same bits as if they had been cast here."""
    wanted, found = (run(draw(90, widths=widths), 1.0, dtype, torch.float32, cast=cast) for cast in (False, True))
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)


@pytest.mark.parametrize("limit", [0.0, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("widths", WIDTHS)
def test_equals_the_reference_for_every_clamp(limit: float, widths: str) -> None:
    check(draw(60, widths=widths), limit)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("chosen", [[0, 1], [4, 2], [1, 4]])
def test_experts_without_tokens(chosen: list[int], widths: str) -> None:
    """All tokens choose the same two: the first, the last or the middle experts stay empty, with zero gradients."""
    x, ids, *others = draw(33, widths=widths)
    arguments = [x, torch.tensor(chosen).expand_as(ids).contiguous(), *others]
    check(arguments)
    gradients = run(arguments, 1.0, torch.float32)
    for name in ("w1", "w3", "w2"):
        assert sorted(chosen) == gradients[name].flatten(1).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("widths", WIDTHS)
def test_no_tokens(widths: str) -> None:
    result = run(draw(0, widths=widths), 1.0, torch.float32)
    assert result["output"].shape == (0, WIDTHS[widths][0])
    assert result["clamped"] == 0
    assert not any(result[name].any() for name in NAMES)


@pytest.mark.parametrize("limit", [0.0, 0.8])
def test_gradcheck(limit: float) -> None:
    """The clamp is active: some gates and ups lie beyond the limit, none within 1e-3 of it, where the kink is."""
    x, ids, weights, w1, w3, w2 = draw(5, 3, 2, "mixed", seed=1)
    inner = torch.cat([F.linear(x, w1[e]) for e in range(3)] + [F.linear(x, w3[e]).abs() for e in range(3)])
    assert (inner > 0.8).any()
    assert ((inner - 0.8).abs() > 1e-3).all()

    def output(*inputs: Tensor) -> Tensor:
        x, weights, w1, w3, w2 = inputs
        return routed_experts(x, ids, weights, w1, w3, w2, limit)[0]

    assert torch.autograd.gradcheck(output, [t.requires_grad_() for t in (x, weights, w1, w3, w2)])


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("tokens", [2, 40, 130])
def test_a_token_does_not_depend_on_the_choices_of_others(tokens: int, widths: str) -> None:
    """Bit for bit, output and gradient of x: the token's experts are the same and stand in another crowd each time."""
    x, ids, *others = draw(tokens, widths=widths)
    results = []
    for seed in range(4):
        changed = draw(tokens, seed=seed)[1]
        changed[tokens // 2] = ids[tokens // 2]
        changed[: seed * tokens // 4] = ids[tokens // 2]  # the more of them choose the same two experts
        results.append(run([x, changed, *others], 1.0, torch.float32))
    alone = [x[tokens // 2 :][:1], ids[tokens // 2 :][:1], others[0][tokens // 2 :][:1], *others[1:]]
    x, ids, weights, w1, w3, w2 = (t if t.dtype == torch.long else t.float() for t in alone)
    for result in results:
        assert torch.equal(result["output"][tokens // 2], results[0]["output"][tokens // 2])
        assert torch.equal(result["x"][tokens // 2], results[0]["x"][tokens // 2])
        assert torch.equal(result["weights"][tokens // 2], results[0]["weights"][tokens // 2])
        assert torch.equal(result["output"][tokens // 2], routed_experts(x, ids, weights, w1, w3, w2, 1.0)[0][0])


@pytest.mark.parametrize("widths", WIDTHS)
def test_the_order_of_tokens_does_not_matter(widths: str) -> None:
    x, ids, weights, *others = draw(50, widths=widths)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    straight = run([x, ids, weights, *others], 1.0, torch.float32)
    shuffled = run([x[order], ids[order], weights[order], *others], 1.0, torch.float32)
    assert torch.equal(straight["output"][order], shuffled["output"])
    assert torch.equal(straight["clamped"], shuffled["clamped"])


@pytest.mark.parametrize("tokens", [1, 17, 100])
@pytest.mark.parametrize("limit", [0.2, 0.7, 100.0])
def test_clamped_share_counts_every_copy_of_a_token_once(tokens: int, limit: float) -> None:
    """Exactly: rows that fill up a tile repeat token 0, which is made large here, and would be seen."""
    x, ids, weights, w1, w3, w2 = (t if t.dtype == torch.long else t.float() for t in draw(tokens))
    x[0] *= 100
    hits = 0
    for token in range(tokens):
        for expert in ids[token].tolist():
            gate, up = w1[expert] @ x[token], w3[expert] @ x[token]
            hits += int((gate > limit).sum() + (up.abs() > limit).sum())
    _, share = routed_experts(x, ids, weights, w1, w3, w2, limit)
    assert share.dtype == torch.float32
    assert round(float(share) * 2 * ids.numel() * w1.shape[1], 3) == hits
    assert hits > 0


def test_no_clamp_no_hits() -> None:
    x, ids, weights, w1, w3, w2 = draw(20)
    assert routed_experts(x * 1e6, ids, weights, w1, w3, w2, 0.0)[1] == 0
    assert clamp_hits(x, x, 0.0) == 0


def test_bfloat16() -> None:
    """Tokens are bfloat16, parameters float32, as in training. Every rounding is by up to 2^-9, and a result sees fewer
    than eight: gate or up, hidden, product, their gradients and the result; they rarely add up. Nothing is clamped: a
    rounding across the kink would switch a slope on or off."""
    arguments = [t if t.dtype == torch.long else t.bfloat16().double() for t in draw(90)]
    ours, exact = run(arguments, 100.0, torch.bfloat16, torch.float32), run(arguments, 100.0, torch.float32)
    assert ours["output"].dtype == torch.float32
    for name in ("output", *NAMES):
        assert ours[name].dtype == (torch.bfloat16 if name == "x" else torch.float32), name
        assert relative_rms(ours[name], exact[name]) < 8 * 2**-9, name


def test_strides_do_not_matter() -> None:
    x, ids, weights, w1, w3, w2 = draw(40)
    whole = run([x, ids, weights, w1, w3, w2], 1.0, torch.float32)
    strided = [x.T.contiguous().T, ids.T.contiguous().T, weights.T.contiguous().T]
    other = run([*strided, *(w.mT.contiguous().mT for w in (w1, w3, w2))], 1.0, torch.float32)
    for name, value in whole.items():
        assert relative_rms(other[name], value) < TOLERANCE[torch.float32], name


def test_clamped_swiglu_and_its_hits() -> None:
    gate, up = torch.tensor([-5.0, 0.5, 2.0, 3.0]), torch.tensor([-5.0, 0.5, -2.0, 1.0])
    expected = torch.tensor([-5 / (1 + torch.tensor(5.0).exp()) * -1.5, 0.25 * torch.sigmoid(torch.tensor(0.5)), 0, 0])
    silu = 1.5 * torch.sigmoid(torch.tensor(1.5))
    expected[2:] = torch.stack((silu * -1.5, silu * 1.0))
    torch.testing.assert_close(clamped_swiglu(gate, up, 1.5), expected)
    assert clamp_hits(gate, up, 1.5) == 0.5
    torch.testing.assert_close(clamped_swiglu(gate, up, 0.0), F.silu(gate) * up)


def test_router_scores() -> None:
    """Also where softplus underflows: values and gradients stay finite, and the seam at -20 does not show."""
    logits = torch.tensor([-200.0, -60.0, -20.001, -19.999, -1.0, 0.0, 3.0, 50.0], dtype=torch.float64).requires_grad_()
    scores = router_scores(logits.unsqueeze(1), torch.ones(1, 1, dtype=torch.float64)).squeeze(1)
    wide = torch.where(logits < -30, (logits / 2).exp(), (logits.exp().log1p()).sqrt())
    torch.testing.assert_close(scores, wide, rtol=2e-9, atol=0)
    (gradient,) = torch.autograd.grad(scores.sum(), logits)
    torch.testing.assert_close(gradient, (logits.sigmoid() / (2 * wide)).detach(), rtol=2e-9, atol=0)
    single = router_scores(logits.detach().float().unsqueeze(1), torch.ones(1, 1))
    assert relative_rms(single.squeeze(1), scores) < 1e-6


def test_top_experts_and_their_weights() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 4.0, 3.0]])
    ids = top_experts(scores, 2)
    assert ids.tolist() == [[0, 1], [0, 1], [2, 3]]  # ties go to the lowest
    weights = expert_weights(scores, ids, 2.5)
    torch.testing.assert_close(weights[0], torch.tensor([1.25, 1.25]))
    torch.testing.assert_close(weights[2], torch.tensor([4 / 7, 3 / 7]) * 2.5)
    assert weights[1].tolist() == [0, 0]


FACTORS = ["gate_up a", "gate_up b", "down a", "down b"]


def draw_factors(arguments: list[Tensor], ranks: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """A and B for gate and up, and for down, of adapters as strong as the matrices; float64."""
    experts, inner, hidden = arguments[3].shape
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = ((ranks[0], hidden), (2 * inner, ranks[0]), (ranks[1], inner), (hidden, ranks[1]))
    return [
        torch.randn(experts, *shape, generator=generator, dtype=torch.float64) * shape[1] ** -0.5 for shape in shapes
    ]


def run_adapted(
    arguments: list[Tensor],
    factors: list[Tensor],
    *dtypes: torch.dtype,
    frozen: bool = False,
    reference: bool = False,
) -> dict[str, Tensor]:
    """As ``run``, with adapters of scales 0.7 and 1.6; ``dtypes``: of x and of the rest."""
    x = arguments[0].detach().to(dtypes[0]).requires_grad_()
    weights, w1, w3, w2 = (t.detach().to(dtypes[-1]).requires_grad_(not frozen) for t in arguments[2:])
    a1, b1, a2, b2 = (t.detach().to(dtypes[-1]).requires_grad_() for t in factors)
    adapters = ExpertAdapters(LowRank(a1, b1, 0.7), LowRank(a2, b2, 1.6))
    routed = (x, arguments[1], weights, w1, w3, w2, 1.0, adapters)
    output = routed_experts_reference(*routed) if reference else routed_experts(*routed)[0]
    upper = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = dict(zip([*NAMES, *FACTORS], (x, weights, w1, w3, w2, a1, b1, a2, b2), strict=True))
    learning = {name: t for name, t in inputs.items() if t.requires_grad}
    gradients = torch.autograd.grad(output, list(learning.values()), upper.to(output.dtype))
    return {"output": output} | dict(zip(learning, gradients, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 17, 130])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 16), (17, 3)])
def test_adapters_equal_the_reference(tokens: int, widths: str, ranks: tuple[int, int]) -> None:
    arguments = draw(tokens, widths=widths)
    factors = draw_factors(arguments, ranks)
    for dtype, tolerance in TOLERANCE.items():
        ours = run_adapted(arguments, factors, dtype)
        theirs = run_adapted(arguments, factors, dtype, reference=True)
        for name, value in theirs.items():
            assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
            assert relative_rms(ours[name], value) < tolerance, (name, dtype)


def test_adapters_gradcheck() -> None:
    x, ids, weights, w1, w3, w2 = draw(5, 3, 2, "mixed", seed=1)
    factors = draw_factors([x, ids, weights, w1, w3, w2], (2, 3))

    def output(*inputs: Tensor) -> Tensor:
        x, weights, a1, b1, a2, b2 = inputs
        adapters = ExpertAdapters(LowRank(a1, b1, 0.7), LowRank(a2, b2, 1.6))
        return routed_experts(x, ids, weights, w1, w3, w2, 0.0, adapters)[0]

    assert torch.autograd.gradcheck(output, [t.requires_grad_() for t in (x, weights, *factors)])


@pytest.mark.parametrize("widths", WIDTHS)
def test_frozen_experts_change_no_other_gradient(widths: str) -> None:
    """Their own gradients, three outer products, are not formed."""
    arguments = draw(40, widths=widths)
    factors = draw_factors(arguments, (4, 5))
    learning = run_adapted(arguments, factors, torch.float32)
    frozen = run_adapted(arguments, factors, torch.float32, frozen=True)
    assert list(frozen) == ["output", "x", *FACTORS]
    for name, value in frozen.items():
        assert torch.equal(value, learning[name]), name


@pytest.mark.parametrize("widths", WIDTHS)
def test_adapters_that_are_zero_change_no_bit(widths: str) -> None:
    arguments = draw(40, widths=widths)
    a1, b1, a2, b2 = draw_factors(arguments, (4, 5))
    adapted = run_adapted(arguments, [a1, b1 * 0, a2, b2 * 0], torch.float32)
    for name, value in run(arguments, 1.0, torch.float32).items():
        assert name == "clamped" or torch.equal(value, adapted[name]), name


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("ranks", [(1, 1), (8, 20)])
def test_an_adapted_token_does_not_depend_on_the_choices_of_others(ranks: tuple[int, int], widths: str) -> None:
    """Bit for bit, output and gradient of x, as without adapters."""
    arguments = draw(130, widths=widths)
    factors = draw_factors(arguments, ranks)
    results = []
    for seed in range(4):
        changed = draw(130, seed=seed)[1]
        changed[65] = arguments[1][65]
        changed[: seed * 130 // 4] = arguments[1][65]
        results.append(run_adapted([arguments[0], changed, *arguments[2:]], factors, torch.float32))
    for result in results[1:]:
        assert torch.equal(result["output"][65], results[0]["output"][65])
        assert torch.equal(result["x"][65], results[0]["x"][65])


def test_adapters_in_bfloat16() -> None:
    """Factors are float32 masters of bfloat16 products; each result sees some ten roundings of up to 2^-9."""
    arguments = [t if t.dtype == torch.long else t.bfloat16().double() for t in draw(90)]
    arguments[0] = arguments[0] * 0.2  # few inputs near the clamp, whose slope a rounding switches
    factors = [t.bfloat16().double() for t in draw_factors(arguments, (4, 6))]
    ours = run_adapted(arguments, factors, torch.bfloat16, torch.float32)
    exact = run_adapted(arguments, factors, torch.float64)
    for name in ("output", "x", *FACTORS):
        assert ours[name].dtype == (torch.bfloat16 if name == "x" else torch.float32), name
        assert relative_rms(ours[name], exact[name]) < 10 * 2**-9, name


def test_delta() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0], [-1.0]])
    assert LowRank(a.bfloat16(), b.bfloat16(), 0.5).delta().tolist() == [[1.0, 2.0, 3.0], [-0.5, -1.0, -1.5]]
    stacked = LowRank(torch.randn(4, 2, 5), torch.randn(4, 3, 2), 2.0)
    assert torch.allclose(stacked.delta()[3], 2 * stacked.b[3] @ stacked.a[3])
