"""The core attention's Triton kernels against its plain reference: outputs and every gradient, and their bits twice."""

from typing import Any

import pytest
import torch
from attention_cases import KINDS, draw
from torch import Tensor
from triton_cases import DEVICE, assert_close, assert_same_bits, relative_error, run_as

from openv4.kernels import attention
from openv4.kernels.attention import hybrid_attention, hybrid_attention_reference
from openv4.kernels.decode import continue_blocks, continue_documents
from openv4.kernels.dispatch import using
from openv4.kernels.indexer import select_top_k

pytestmark = pytest.mark.usefixtures("one_thread")

# The reference computes in float64 on the same inputs. In float32, sums of some hundred terms are off by about the
# square root of that many roundings of 6e-8. In bfloat16, independent errors of at most 2^-9 each come from rounding
# probabilities and slopes before their products, the output, whose product with its gradient enters every slope, each
# token's share of a gradient, and the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5 * 2**-9}
FLOATS = {"q", "kv", "sink", "entries"}


def move(value: Any) -> Any:
    """Tensors, and those in a named tuple, on the device of the tests."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return type(value)(*map(move, value)) if isinstance(value, tuple) else value


def make(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {name: move(value) for name, value in draw(*arguments, **options).items()}


def check(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Runs the kernels, which must agree with the reference in float64, and returns what they found."""
    found = run_as("triton", hybrid_attention, arguments)
    exact = {name: value.double() if name in FLOATS else value for name, value in arguments.items()}
    wanted = run_as("reference", hybrid_attention, exact)
    for name, value in wanted.items():
        dtype = arguments[name.removeprefix("gradient of ")].dtype if "of" in name else found[name].dtype
        wanted[name] = value.to(torch.float32)
        assert found[name].dtype == dtype, name
    assert found["out 0"].dtype == arguments["q"].dtype and found["out 1"].dtype == torch.float32
    assert_close({n: v.float() for n, v in found.items()}, wanted, TOLERANCE[arguments["q"].dtype])
    return found


@pytest.mark.parametrize(
    ("packing", "dtype"),
    [("short documents", torch.float32), ("single tokens", torch.bfloat16), ("padded", torch.bfloat16)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, packing: str, dtype: torch.dtype) -> None:
    """Windows that documents cut, tokens that see no entry, rows of padding."""
    check(make(kind, packing, 12, window=4, ratio=2, k=3, dim=24, seed=1, dtype=dtype))


def after_a_cache(
    kind: str, past: int, length: int, window: int, ratio: int, k: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Rows that go on with documents of ``past`` tokens: long lists of keys for few tokens. The last 60 are left."""
    arguments = draw("window", "one document", length, window, batch=1, dim=16, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    rows = len(arguments["q"])
    documents = continue_documents(torch.zeros(rows, length, dtype=torch.long), past)
    arguments["kv"] = torch.randn(rows, min(past, window - 1, 60) + length, 16, generator=generator).to(dtype)
    arguments["first"] = documents.first
    if kind != "window":
        blocks = continue_blocks(documents, past, ratio)
        count = (past + length) // ratio
        arguments |= {"blocks": blocks, "entries": torch.randn(rows, count, 16, generator=generator).to(dtype)}
        if kind == "sparse":
            scores = torch.rand(rows, length, count, generator=generator)
            arguments["selected"] = select_top_k(scores, blocks.first, blocks.end, k)
    return {name: move(value) for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("past", "window", "dtype"), [(100, 70, torch.bfloat16), (62, 65, torch.float32), (30, 128, torch.float32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_several_tiles(kind: str, past: int, window: int, dtype: torch.dtype) -> None:
    """Window, entries and list end anywhere in a tile, and the largest score grows from tile to tile."""
    arguments = after_a_cache(kind, past, 3, window, 1, 80, dtype)
    check(arguments | {"q": arguments["q"] * 3})


@pytest.mark.parametrize(("length", "window", "heads", "dim"), [(1, 128, 1, 64), (3, 5000, 16, 80), (2, 2, 70, 512)])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_odd_shapes(kind: str, length: int, window: int, heads: int, dim: int) -> None:
    """One token, windows beyond the row, heads of two tiles, channels that are no power of two, and 512."""
    check(make(kind, "one document", length, window, 1, batch=1, heads=heads, dim=dim, dtype=torch.bfloat16))


def test_nothing() -> None:
    """No tokens, no rows, no entries."""
    arguments = make("dense", "one document", 3, window=2, dim=16, dtype=torch.float32)
    assert arguments["entries"].shape[1] == 0
    found, alone = (run_as("triton", hybrid_attention, a) for a in (arguments, arguments | {"blocks": None}))
    assert_same_bits(found, alone)
    assert found["gradient of entries"].shape == (2, 0, 16)
    for empty in (
        arguments | {n: arguments[n][:, :0] for n in ("q", "kv", "first")},
        arguments | {n: arguments[n][:0] for n in ("q", "kv", "first", "entries")},
    ):
        found = run_as("triton", hybrid_attention, empty | {"blocks": None})
        assert found["out 0"].shape == empty["q"].shape and found["gradient of kv"].shape == empty["kv"].shape
        assert not found["gradient of sink"].any()


def test_holes_in_a_selection() -> None:
    """-1 anywhere among the chosen entries, in any order, and for all of a token's."""
    arguments = make("sparse", "one document", 9, window=4, ratio=1, k=6, dim=16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    chosen = arguments["selected"]
    chosen = chosen[..., torch.randperm(chosen.shape[2], generator=generator).to(DEVICE)]
    hole = torch.rand(chosen.shape, generator=generator).to(DEVICE) < 0.3
    chosen = chosen.masked_fill(hole, -1)
    chosen[:, 5:7] = -1
    check(arguments | {"selected": chosen})
    nothing = check(arguments | {"selected": torch.full_like(chosen, -1)})
    alone = run_as("triton", hybrid_attention, arguments | {"selected": chosen[..., :0]})
    assert_same_bits(nothing, alone)
    assert not nothing["gradient of entries"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few tokens, that end within rows or hold several, change the order of sums alone, and only of keys."""
    arguments = make(kind, "one document", 4, window=3, ratio=1, k=2, batch=3, dim=16, dtype=torch.float32)
    whole = run_as("triton", hybrid_attention, arguments)
    for tokens in (1, 5):
        monkeypatch.setattr(attention, "_chunk", lambda *_, tokens=tokens: tokens)
        parts = run_as("triton", hybrid_attention, arguments)
        for name, value in whole.items():
            if name in ("gradient of kv", "gradient of entries"):
                assert relative_error(parts[name], value) < 3e-7, name
            else:
                assert torch.equal(parts[name], value), name


def test_chunks_fit_into_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(2, 100, 1, 1)
    monkeypatch.setattr(attention, "SCRATCH", 1000)
    assert [attention._chunk(q, size) for size in (1, 5, 10, 600, 2000)] == [200, 200, 100, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_have_the_same_bits(kind: str) -> None:
    arguments = make(kind, "random", 6, window=5, ratio=1, dim=16, dtype=torch.bfloat16)
    once, twice = (run_as("triton", hybrid_attention, arguments) for _ in range(2))
    assert_same_bits(once, twice)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_strides_do_not_matter(kind: str) -> None:
    """Views of other tensors, with any stride of channels too, and the gradient of a plain sum, of stride zero."""
    arguments = make(kind, "one document", 6, window=4, ratio=2, dim=16, dtype=torch.float32)
    results = []
    for strided in (False, True):
        leaves = {n: v.detach().clone().requires_grad_() for n, v in arguments.items() if n in FLOATS}
        views = dict(leaves)
        if strided:
            views["q"] = leaves["q"].transpose(0, 2).contiguous().transpose(0, 2)
            views |= {n: leaves[n].mT.contiguous().mT for n in ("kv", "entries")}
        with using("triton"):
            out, _ = hybrid_attention(**(arguments | views))
        one = torch.ones((), device=DEVICE).expand_as(out)
        gradients = torch.autograd.grad(out, list(leaves.values()), one if strided else one.contiguous())
        results.append(dict(zip(["out", *leaves], (out.detach(), *gradients), strict=True)))
    assert_same_bits(*results)
    views["q"] = leaves["q"].mT.contiguous().mT
    with using("triton"):
        assert torch.equal(hybrid_attention(**(arguments | views))[0], out)


@pytest.mark.parametrize("sink", [-1e4, 89.0, 1e4])
def test_extreme_logits_stay_finite(sink: float) -> None:
    """Logits of thousands, and sinks far above and below all of them; a logit of size x is off by 6e-8 x."""
    arguments = make("dense", "one document", 6, window=4, ratio=2, dim=16, dtype=torch.float32)
    arguments |= {"q": arguments["q"] * 300, "sink": torch.full_like(arguments["sink"], sink)}
    found, wanted = (run_as(name, hybrid_attention, arguments) for name in ("triton", "reference"))
    for name, value in wanted.items():
        assert found[name].isfinite().all(), name
        assert (found[name] - value).norm() <= 3e-3 * value.norm() + 1e-30, name


def test_the_reference_can_be_chosen() -> None:
    arguments = make("sparse", "random", 9, window=4)
    with using("reference"):
        chosen = hybrid_attention(**arguments)
    for ours, theirs in zip(chosen, hybrid_attention_reference(**arguments), strict=True):
        assert torch.equal(ours, theirs)
