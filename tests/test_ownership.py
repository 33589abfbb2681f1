"""Who owns what: everything once, evenly, for models that no test can build; gradients rounded on their way."""

import random

import pytest
import torch

from openv4.model.shapes import logical_rows, tensor_shapes
from openv4.optim.exchange import stochastic_bf16
from openv4.optim.ownership import Item, Ownership, assign
from openv4.train.config import load_config


def items_of(recipe: str, expert: int) -> list[Item]:
    config = load_config([f"run={recipe}", "data.path=x"]).model
    return [
        Item(
            s.parameter,
            (s.copies // expert, *s.shape) if s.copies > 1 else s.shape,
            tuple(logical_rows(s, config)) if s.matrix else (),
        )
        for s in tensor_shapes(config)
        if s.trained
    ]


def assert_whole(found: Ownership, items: list[Item], world: int, expert: int) -> None:
    """Every expert has one owner, every dense parameter as well, and the shares add up."""
    for item in items:
        pieces = found.pieces[item.name]
        if item.expert:
            assert [piece.first for piece in pieces] == [0, *(piece.last for piece in pieces[:-1])]
            assert pieces[-1].last == item.shape[0] and all(piece.owner < world // expert for piece in pieces)
        else:
            assert len(pieces) == 1 and pieces[0].owner < world and pieces[0].last == 0
    held = [expert if item.expert else 1 for item in items]
    assert sum(found.work) == pytest.approx(sum(item.work * n for item, n in zip(items, held, strict=True)))
    assert sum(found.bytes) == pytest.approx(sum(item.bytes * n for item, n in zip(items, held, strict=True)), abs=1e4)


@pytest.mark.parametrize(
    ("recipe", "world", "expert", "work", "memory", "gigabytes"),
    [
        ("pretrain_flash", 64, 8, 1.001, 1.16, 42.2),
        ("pretrain_flash", 1024, 64, 1.23, 3.8, 8.6),
        ("pretrain_pro", 256, 64, 1.04, 1.22, 60.7),
        ("pretrain_pro", 1024, 64, 1.16, 1.88, 23.5),
    ],
)
def test_balance_of_the_released_models(
    recipe: str, world: int, expert: int, work: float, memory: float, gigabytes: float
) -> None:
    """Bounds are what the largest matrix and, in memory, the embedding leave possible: they are not cut."""
    items = items_of(recipe, expert)
    found = assign(items, world, expert)
    assert_whole(found, items, world, expert)
    assert max(found.work) / (sum(found.work) / world) < work
    assert max(found.bytes) / (sum(found.bytes) / world) < memory
    assert max(found.bytes) / 1e9 < gigabytes
    assert f"work {max(found.work) * world / sum(found.work):.3f}" in found.balance()


@pytest.mark.parametrize("seed", range(20))
def test_any_parameters(seed: int) -> None:
    rng = random.Random(seed)
    expert, holders = rng.choice([1, 2, 4]), rng.randint(1, 6)
    items = [Item(f"dense.{i}", (rng.randint(1, 9), rng.randint(1, 9)), ()) for i in range(rng.randint(0, 9))]
    items += [Item(f"matrix.{i}", (6, rng.randint(1, 9)), rng.choice([(6,), (2, 4)])) for i in range(rng.randint(0, 9))]
    for layer in range(rng.randint(0, 3)):
        count = rng.randint(1, 5)
        items += [Item(f"layers.{layer}.ffn.experts.{name}", (count, 4, 3), (4,)) for name in ("w1", "w2", "w3")]
    found = assign(items, expert * holders, expert)
    assert_whole(found, items, expert * holders, expert)
    counts = [0] * holders
    for item in items:
        for piece in found.pieces[item.name] if item.expert else ():
            counts[piece.owner] += piece.last - piece.first
    assert max(counts) - min(counts) <= 1
    assert assign(items, expert * holders, expert) == found


def test_stochastic_rounding_has_no_bias() -> None:
    """Between two neighbours in the proportion of the distances; 40,000 draws know a share to 0.0025 (one sigma)."""
    generator = torch.Generator().manual_seed(0)
    step = 2.0**-7  # of bfloat16 between 1 and 2
    for share in (0.1, 0.5, 0.8):
        for sign in (1.0, -1.0):
            x = torch.full((40_000,), sign * (1 + share * step))
            rounded = stochastic_bf16(x, generator).float()
            assert set(rounded.abs().tolist()) == {1.0, 1 + step}
            assert float((rounded.abs() > 1).float().mean()) == pytest.approx(share, abs=0.0125)


def test_stochastic_rounding_keeps_what_bfloat16_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = stochastic_bf16(codes.float(), generator)
    numbers = ~codes.isnan()
    assert torch.equal(rounded[numbers].view(torch.int16), codes[numbers].view(torch.int16))
    assert rounded[~numbers].isnan().all()
    biggest = torch.tensor([torch.finfo(torch.float32).max])
    assert stochastic_bf16(biggest, generator).isinf() or float(stochastic_bf16(biggest, generator)) > 3e38
