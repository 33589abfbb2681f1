"""The Triton kernels of the indexer's loss against its plain reference: sums, every gradient, and their bits twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import PACKINGS
from indexer_cases import Case, after_a_cache, draw
from torch import Tensor
from triton_cases import DEVICE, assert_close, assert_same_bits, relative_error, run_as

from openv4.kernels import indexer_loss as module
from openv4.kernels.dispatch import using
from openv4.kernels.indexer_loss import Attended, indexer_loss, indexer_loss_reference, selection_recall

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The interpreter computes what kernels then mask, and numpy warns of it.
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),
]

# The reference computes in float64 on the same inputs. In float32, probabilities are off by some roundings of 6e-8, and
# a gradient is made of differences of two of them. In bfloat16, the slopes are rounded before their products, by up to
# 2^-9 each, each token's share of a key's gradient is, and the result; they are independent.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-9}


def move(value: Any) -> Any:
    """Tensors, and those in a named tuple, on the device of the tests."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return type(value)(*map(move, value)) if isinstance(value, tuple) else value


def loss(lse: Tensor, attended: tuple[Tensor, Tensor], **inputs: Any) -> tuple[Tensor, ...]:
    """Sums of the loss; only queries, keys and weights are leaves that may get a gradient."""
    return tuple(indexer_loss(**inputs, attention=Attended(*attended, lse)))


def make(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    q, entries, lse = case.attention
    return {
        "queries": move(case.queries.to(dtype)),
        "keys": move(case.keys.to(dtype)),
        "weights": move(case.weights.to(dtype)),
        "attended": (move(q.to(dtype)), move(entries.to(dtype))),
        "lse": move(lse.float()),
        "blocks": move(case.blocks),
        "valid": move(case.valid),
        "selected": move(case.selected),
    }


def check(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Runs the kernels, which must agree with the reference in float64, and returns what they found."""
    found = run_as("triton", loss, arguments)
    exact = {n: v.double() if n in ("queries", "keys", "weights", "lse") else v for n, v in arguments.items()}
    exact["attended"] = tuple(x.double() for x in arguments["attended"])
    wanted = run_as("reference", loss, exact)
    for name, value in wanted.items():
        if value.is_floating_point():
            leaf = name.removeprefix("gradient of ")
            assert found[name].dtype == (arguments[leaf].dtype if leaf in arguments else torch.float32), name
            wanted[name] = value.float()
    floats = {n: v.float() if v.is_floating_point() else v for n, v in found.items()}
    assert_close(floats, wanted, TOLERANCE[arguments["keys"].dtype])
    return found


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("k", [None, 3])
def test_equals_the_reference(k: int | None, packing: str) -> None:
    """Packed documents, tokens that see nothing, rows of padding."""
    case = draw(15, packing, 2, k, heads=3, dim=12, seed=1, attention=(3, 20))
    check(make(case, torch.bfloat16 if packing in ("padded", "random") else torch.float32))


def long_lists(tokens: int, entries: int, k: int | None, heads: int, dim: int, attention: tuple[int, int]) -> Case:
    """Few tokens that see many entries; attention also looked elsewhere, at what its denominator says."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    blocks, (wide, deep) = after_a_cache(tokens, entries, batch=2), attention
    q, compressed = normal(2, tokens, wide, deep), normal(2, entries, deep)
    lse = torch.einsum("bthc,bnc->bthn", q, compressed).mul(deep**-0.5).logsumexp(-1) + 1
    selected = None
    if k is not None:
        selected = torch.stack([torch.randperm(entries - tokens, generator=generator)[:k] for _ in range(2 * tokens)])
        selected = selected.sort(-1).values.view(2, tokens, k)
    scoring = normal(2, tokens, heads, dim), normal(2, entries, dim), normal(2, tokens, heads) * dim**-0.5
    valid = torch.ones(2, tokens, dtype=torch.bool)
    return Case(*scoring, Attended(q, compressed, lse), blocks, valid, selected, lse)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [None, 70])
def test_lists_of_several_tiles(k: int | None, dtype: torch.dtype) -> None:
    check(make(long_lists(3, 140, k, 4, 16, (2, 16)), dtype))


@pytest.mark.parametrize(
    ("tokens", "entries", "k", "heads", "dim", "attention"),
    [
        (1, 1, None, 1, 1, (1, 1)),
        (3, 20, 9, 64, 128, (70, 40)),
        (2, 65, None, 17, 80, (17, 512)),
        (3, 5, 1, 5, 48, (2, 3)),
    ],
)
def test_odd_shapes(tokens: int, entries: int, k: int | None, heads: int, dim: int, attention: tuple[int, int]) -> None:
    """One token and one entry, heads of several groups, channels that are no power of two, and the real dims."""
    case = long_lists(tokens, entries, k, heads, dim, attention)
    found = check(make(case, torch.bfloat16))
    if entries == 1:
        assert found["out 0"].abs() < 1e-6 and not any(g.abs().max() > 1e-6 for n, g in found.items() if "gra" in n)


def test_groups_of_heads() -> None:
    """In float32, a tile holds 16 of attention's heads."""
    check(make(long_lists(2, 33, None, 2, 16, (20, 16)), torch.float32))
    check(make(long_lists(2, 33, 6, 2, 16, (20, 16)), torch.float32))


def test_holes_in_a_selection() -> None:
    """-1 anywhere among the chosen entries, in any order, and for all of a token's."""
    case = long_lists(5, 40, 9, 3, 16, (2, 16))
    assert case.selected is not None
    generator = torch.Generator().manual_seed(3)
    chosen = case.selected[..., torch.randperm(9, generator=generator)]
    chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, -1)
    chosen[:, 2] = -1
    found = check(make(case._replace(selected=chosen), torch.float32))
    assert found["out 2"] == 8
    assert not found["gradient of queries"][:, 2].any()


@pytest.mark.parametrize("k", [None, 4])
def test_tokens_without_a_target_do_not_count(k: int | None) -> None:
    """Padding, and tokens whose attention gave the entries a mass that float32 cannot hold: no loss, no gradient."""
    case = long_lists(4, 20, k, 3, 16, (2, 16))
    q, entries, lse = case.attention
    valid, lse = case.valid.clone(), lse.clone()
    valid[0, 1] = False
    lse[1, 2] = 500
    case = case._replace(valid=valid, attention=Attended(q, entries, lse))
    arguments = make(case, torch.float32)
    found = run_as("triton", loss, arguments)
    assert found["out 2"] == 6
    for name in ("queries", "weights"):
        gradient = found[f"gradient of {name}"]
        assert not gradient[0, 1].any() and not gradient[1, 2].any()
        assert gradient[0, 0].any() and gradient.isfinite().all()
    wanted = run_as("torch", loss, arguments)
    assert_close(found, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("k", [None, 3])
def test_chunks_and_shares_do_not_show(k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few tokens, that end within rows or hold several, and programs that share an entry's tokens, change the
    order of sums alone, and only of keys."""
    arguments = make(draw(7, "random", 1, k, heads=2, dim=16, batch=3, attention=(2, 16)), torch.float32)
    whole = run_as("triton", loss, arguments)
    slots = arguments["keys"].shape[1] if k is None else k
    each = 4 * slots + (0 if k is None else slots * 16 * 4)
    for tokens, programs in ((4, 1), (9, 12), (21, 24)):
        monkeypatch.setattr(module, "SCRATCH", tokens * each)
        monkeypatch.setattr(module, "PROGRAMS", programs)
        monkeypatch.setattr(module, "TOKENS", 4)
        parts = run_as("triton", loss, arguments)
        for name, value in whole.items():
            if name == "gradient of keys":
                assert relative_error(parts[name], value) < 3e-7, name
            else:
                assert torch.equal(parts[name], value), name


@pytest.mark.parametrize("k", [None, 3])
def test_two_runs_have_the_same_bits(k: int | None) -> None:
    arguments = make(draw(8, "random", 1, k, heads=2, dim=16, attention=(2, 16)), torch.bfloat16)
    once, twice = (run_as("triton", loss, arguments) for _ in range(2))
    assert_same_bits(once, twice)


@pytest.mark.parametrize("k", [None, 3])
def test_the_loss_alone_is_the_same(k: int | None) -> None:
    """Where nothing learns, as in a forward pass that will be repeated."""
    arguments = make(draw(8, "random", 1, k, heads=2, dim=16, attention=(2, 16)), torch.bfloat16)
    learning = run_as("triton", loss, arguments)
    with using("triton"):
        alone = loss(**arguments)
    assert not alone[0].requires_grad
    assert all(torch.equal(a, learning[f"out {i}"]) for i, a in enumerate(alone))


def test_strides_do_not_matter() -> None:
    arguments = make(draw(6, "random", 1, 3, heads=2, dim=16, attention=(2, 16)), torch.float32)
    q, entries = arguments["attended"]
    strided = {name: arguments[name].mT.contiguous().mT for name in ("queries", "keys", "weights", "lse", "selected")}
    strided["attended"] = (q.transpose(0, 2).contiguous().transpose(0, 2), entries.mT.contiguous().mT)
    strided["valid"] = arguments["valid"].mT.contiguous().mT
    with using("triton"):
        plain, views = loss(**arguments), loss(**(arguments | strided))
    assert all(torch.equal(a, b) for a, b in zip(plain, views, strict=True))


@pytest.mark.parametrize("k", [None, 2])
def test_nothing(k: int | None) -> None:
    """No entries, tokens or rows, and none chosen."""
    empty = make(draw(3, "one document", 4, k, dim=16, attention=(2, 16)), torch.float32)
    assert empty["keys"].shape[1] == 0
    full = make(long_lists(2, 10, k, 3, 16, (2, 16)), torch.float32)
    cases = [empty]
    for cut in (slice(0), slice(None)), (slice(None), slice(0)):
        row = cut[0]
        blocks = full["blocks"]._replace(first=full["blocks"].first[cut], end=full["blocks"].end[cut])
        case = full | {n: full[n][cut] for n in ("queries", "weights", "lse", "valid")} | {"blocks": blocks}
        case |= {"attended": (full["attended"][0][cut], full["attended"][1][row]), "keys": full["keys"][row]}
        cases.append(case | {"selected": None if k is None else full["selected"][cut]})
    if k is not None:
        cases.append(full | {"selected": full["selected"][..., :0]})
    for case in cases:
        found = run_as("triton", loss, case)
        assert [found[f"out {i}"].item() for i in range(3)] == [0, 0, 0]
        for name in ("queries", "keys", "weights"):
            gradient = found[f"gradient of {name}"]
            assert gradient.shape == case[name].shape and not gradient.any()


def test_the_reference_can_be_chosen() -> None:
    arguments = make(draw(9, k=2), torch.float32)
    found = run_as("reference", loss, arguments)

    def reference(lse: Tensor, attended: tuple[Tensor, Tensor], **inputs: Any) -> tuple[Tensor, ...]:
        return tuple(indexer_loss_reference(**inputs, attention=Attended(*attended, lse)))

    assert_same_bits(found, run_as("torch", reference, arguments))


@pytest.mark.parametrize("sparse", [False, True])
def test_recall(sparse: bool) -> None:
    """What it composes: scores and choice come from kernels here."""
    case = draw(30, "one document", 1, 3 if sparse else None, heads=2, dim=16, attention=(2, 16))
    case = Case(*(move(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x) for x in case))
    case = case._replace(attention=Attended(*(move(x.float()) for x in case.attention)))
    results: list[tuple[Tensor, Tensor]] = []
    recall: Callable[..., Any] = selection_recall
    for name in ("triton", "torch"):
        with using(name):  # type: ignore[arg-type]
            results.append(recall(*case[:6], 3, case.selected, samples=6))
    assert results[0][1] == results[1][1] > 0
    assert relative_error(results[0][0], results[1][0]) < 1e-5
