"""Owners alone hold float32 weights of what is multiplied in bfloat16 or FP8: nothing is computed differently."""

import re
from dataclasses import replace

import pytest
import torch
from parallel_cases import Case, launch
from torch import Tensor

from openv4.model.shapes import tensor_shapes

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("held_weights")]

# Several blocks of 128 x 128 in a matrix, some of them not full; groups of 32 numbers that are not full.
WIDE = {
    "hidden_size": 144, "q_lora_rank": 40, "moe_intermediate_size": 136, "index_head_dim": 8, "qk_rope_head_dim": 4,
    "num_hidden_layers": 1, "layer_types": (), "compress_ratios": (4, 0),
}  # fmt: skip
LOW = {"streams": "bf16", "length": 40, "model": WIDE}

CASES = {
    2: [
        Case("bf16", seed=40, compute="bf16", streams="bf16", steps=3, rows=6, clip=0.5),
        Case("bf16 experts", seed=41, expert=2, compute="bf16", streams="bf16", recompute="full", gradients="bf16"),
        Case("bf16 adamw", seed=42, compute="bf16", streams="bf16", matrices="adamw", recompute="selective"),
        Case("bf16 context", seed=43, context=2, compute="bf16", streams="bf16", length=40),
        Case("fp8", seed=44, compute="fp8", **LOW),  # type: ignore[arg-type]
        Case("fp4", seed=45, compute="fp4_qat", recompute="full", **LOW),  # type: ignore[arg-type]
        Case("warmup", seed=46, compute="bf16", streams="bf16", attention="indexer_warmup"),
        Case("fp32 after bf16", seed=47, compute="bf16", streams="bf16", then="fp32", steps=3),
        Case("fp4 after bf16", seed=48, expert=2, compute="bf16", then="fp4_qat", **LOW),  # type: ignore[arg-type]
        Case("poisoned", seed=49, expert=2, compute="bf16", streams="bf16", poisoned=True),
    ],
    4: [
        Case("fp4 pairs", seed=50, expert=2, compute="fp4_qat", **LOW),  # type: ignore[arg-type]
        Case("fp8 fours", seed=51, expert=4, rows=8, compute="fp8", **LOW),  # type: ignore[arg-type]
        Case("bf16 after fp8", seed=52, expert=2, compute="fp8", then="bf16", **LOW),  # type: ignore[arg-type]
    ],
}
EACH = [(world, case) for world, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Tensor]]]:
    both = {world: [replace(c, held=held) for c in cases for held in (False, True)] for world, cases in CASES.items()}
    named = {world: [replace(c, name=f"{c.name}-{c.held}") for c in cases] for world, cases in both.items()}
    return {f"{world}-{name}": ranks for world, cases in named.items() for name, ranks in launch(cases, world).items()}


@pytest.mark.parametrize(("world", "case"), EACH, ids=lambda value: getattr(value, "name", value))
def test_nothing_is_computed_differently(world: int, case: Case, found: dict[str, list[dict[str, Tensor]]]) -> None:
    """Losses, norms, gradients, weights and what a checkpoint gets have the same bits."""
    for held, plain in zip(found[f"{world}-{case.name}-True"], found[f"{world}-{case.name}-False"], strict=True):
        assert set(held) == set(plain) and any(name.startswith("saved.") for name in held)
        for name in set(held) - {"bytes", "rates", "sent.weights"}:
            assert torch.equal(held[name].nan_to_num(7.0), plain[name].nan_to_num(7.0)), name


@pytest.mark.parametrize(("world", "case"), EACH, ids=lambda value: getattr(value, "name", value))
def test_what_a_process_holds_and_sends(world: int, case: Case, found: dict[str, list[dict[str, Tensor]]]) -> None:
    """Two bytes for each number of such matrices, and four for those that it owns; two travel."""
    shapes = [shape for shape in tensor_shapes(case.config) if shape.trained]
    now = case.then or case.compute
    matrices = {s.name for s in shapes if s.stored in ("fp8", "fp4")} if now != "fp32" else set()
    for rank in found[f"{world}-{case.name}-True"]:
        owned = {name.removeprefix("saved."): t.nbytes for name, t in rank.items() if name.startswith("saved.")}
        size = sum(each for n, each in owned.items() if generic(n) in matrices)
        for shape in shapes:
            here = shape.numel // (case.expert if shape.copies > 1 else 1)
            size += here * (2 if shape.name in matrices else 4)
        assert int(rank["bytes"]) == size
    if not case.then:  # else float32 weights have travelled on the way
        ranks = found[f"{world}-{case.name}-True"]
        trained = {n.removeprefix("gradient."): t for rank in ranks for n, t in rank.items() if "gradient." in n}
        holders = {name: world // case.expert if ".experts." in name else world for name in trained}
        sizes = {n: t.numel() * (2 if generic(n) in matrices else 4) * (holders[n] - 1) for n, t in trained.items()}
        assert sum(int(rank["sent.weights"]) for rank in ranks) == case.steps * sum(sizes.values())


@pytest.mark.parametrize(("world", "case"), EACH, ids=lambda value: getattr(value, "name", value))
def test_what_rounding_loses_is_counted_at_the_owners(
    world: int, case: Case, found: dict[str, list[dict[str, Tensor]]]
) -> None:
    """The rates are those of float32 weights, if not of the same ones."""
    for rank, plain in zip(found[f"{world}-{case.name}-True"], found[f"{world}-{case.name}-False"], strict=True):
        assert len(rank["rates"]) == len(plain["rates"]) and rank["rates"].isfinite().all()
        assert torch.allclose(rank["rates"], plain["rates"], rtol=0.5, atol=0.01)


def generic(name: str) -> str:
    """As the shapes name it: one for all experts."""
    return re.sub(r"(?<=\.experts\.)\d+", "*", name)
