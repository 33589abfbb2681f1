"""Training on several processes equals training on one."""

import pytest
import torch
from model_cases import random_model
from parallel_cases import Case, alone, launch
from torch import Tensor

from openv4.model.released import released_tensors

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("parallel")]

# All streams are equal before the first block, so that their mixing there has no gradient but rounding, which Muon
# makes as large as any other.
NOISE = "model.layers.0.hc_attn_"

# FP8 rounds in groups of 128 tokens of a row or of an expert, so rows are that long, and experts get the rows of all
# processes in the order in which one process has them. Sizes: groups of 32 and 128 numbers that are not full.
LOW = {"hidden_size": 40, "index_head_dim": 8, "qk_rope_head_dim": 4}
HASHED = {"num_hash_layers": 2, "num_hidden_layers": 2, "layer_types": (), "compress_ratios": (4, 8, 0)}

CASES = {
    2: [
        Case("plain"),
        Case("experts", expert=2, seed=1),
        Case("starved", expert=2, seed=2, starved=True),
        Case("clipped", expert=2, seed=3, clip=0.1),
        Case("accumulated", expert=2, seed=4, rows=6),
        Case("idle", expert=2, seed=23, rows=3),  # in the second micro-batch the second process has padding alone
        Case("rowless", seed=24, rows=1),
        Case("poisoned", expert=2, seed=25, poisoned=True),
        Case("dense", expert=2, seed=5, attention="dense"),
        Case("warmup", seed=6, attention="indexer_warmup"),
        Case("replayed", expert=2, seed=7, recompute="full"),
        Case("selective", expert=2, seed=8, recompute="selective"),
        Case("adamw", expert=2, seed=9, matrices="adamw"),
        Case("fp4", expert=2, seed=10, rows=2, length=128, compute="fp4_qat", model=LOW, after=5e-3),
        Case("hashed", expert=2, seed=11, model=HASHED),
        Case("shared", context=2, seed=21, length=40),
        Case("zero1", seed=18, matrices="adamw", zero=1, clip=0.5),
        Case("zero2", expert=2, seed=19, matrices="adamw", zero=2, rows=6, clip=0.5),
        Case("anticipated", expert=2, seed=26, rows=6, steps=3, anticipated=True),
        Case("bf16", expert=2, seed=17, gradients="bf16", first=2**-6, after=0.05),  # two roundings of up to 2^-7
    ],
    4: [
        Case("plain", seed=12),
        Case("pairs", expert=2, seed=13, clip=0.3),
        Case("fours", expert=4, seed=14, rows=8),
        Case("starved", expert=4, seed=15, starved=True),
        Case("adamw", expert=2, seed=16, matrices="adamw"),
        Case("shared", expert=2, context=2, seed=22, length=40, recompute="full"),
        Case("anticipated", expert=2, context=2, seed=27, length=40, steps=3, anticipated=True, recompute="full"),
        Case("zero1", expert=2, seed=20, matrices="adamw", zero=1, clip=0.5),
    ],
}
KINDS = ("tokens", "results", "gradients", "weights")
EACH = [(world, case) for world, cases in CASES.items() for case in cases if not case.poisoned]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Tensor]]]:
    return {f"{world}-{name}": ranks for world, cases in CASES.items() for name, ranks in launch(cases, world).items()}


@pytest.mark.parametrize(("world", "case"), EACH, ids=lambda value: getattr(value, "name", value))
def test_equals_one_process(world: int, case: Case, found: dict[str, list[dict[str, Tensor]]]) -> None:
    """Losses, loads and router biases, gradients of the first step where their owners have them, weights after two;
    the largest activations of the first step, and how orthogonal the last update was.

    Sums in another order differ by 1e-7 of their largest part. Weights differ by more: an update has one size however
    small a gradient is, so that what is rounding in small gradients shows in it (Muon's more than AdamW's).
    """
    wanted, ranks = alone(case, world), found[f"{world}-{case.name}"]
    whole = float(wanted["norms"][0])
    wrong = {}
    if case.zero:  # gradients are DeepSpeed's, in parts
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("gradient.")}
    for name, tensor in wanted.items():
        have = [rank[name] for rank in ranks if name in rank]
        assert have, name
        assert all(torch.equal(other, have[0]) for other in have[1:]), name
        error = float((have[0].double() - tensor.double()).norm())
        size = float(tensor.double().norm())
        limit = case.after
        if name.startswith("gradient."):
            assert len(have) == 1, name  # one owner
            error, limit = max(0.0, error - 1e-7 * whole), case.first
        elif name.startswith("model.") or name == "update_rms":
            limit *= 30 if case.matrices == "muon" else 3
        elif name == "residuals":  # below 1e-3 for matrices of full rank, 1 for zeros
            size, limit = 1.0, 3e-3
        if error > limit * size and not name.startswith(NOISE):
            wrong[name] = error / size
    assert not wrong, dict(list(wrong.items())[:6])
    assert {name for rank in ranks for name in rank if not name.startswith("sent.")} == set(wanted)


def test_what_is_not_finite_in_one_process_changes_nothing_in_any(found: dict[str, list[dict[str, Tensor]]]) -> None:
    case = next(case for case in CASES[2] if case.poisoned)
    untouched = dict(released_tensors(random_model(case.config, case.seed)))
    for rank in found["2-poisoned"]:
        assert rank["norms"].isnan().all()
        kept = {name.removeprefix("model."): value for name, value in rank.items() if name.startswith("model.")}
        assert kept and all(torch.equal(value, untouched[name]) for name, value in kept.items())


@pytest.mark.parametrize(("world", "case"), EACH, ids=lambda value: getattr(value, "name", value))
def test_bytes_are_those_of_the_formula(world: int, case: Case, found: dict[str, list[dict[str, Tensor]]]) -> None:
    """Of docs/cluster.md, for gradients and weights; for tokens where it is known which of them travel."""
    ranks = found[f"{world}-{case.name}"]
    sent = {kind: sum(int(rank[f"sent.{kind}"]) for rank in ranks) for kind in KINDS}
    if case.zero:  # DeepSpeed sends
        assert sent["gradients"] == sent["weights"] == 0
    else:
        trained = {
            n.removeprefix("gradient."): t.numel() for rank in ranks for n, t in rank.items() if "gradient." in n
        }
        holders = {name: world // case.expert if ".experts." in name else world for name in trained}
        numbers = case.steps * sum(size * (holders[name] - 1) for name, size in trained.items())
        assert sent["gradients"] == numbers * (2 if case.gradients == "bf16" else 4)
        assert sent["weights"] == numbers * 4
    if case.expert == 1:
        assert sent["tokens"] == sent["results"] == 0
    elif case.starved:
        config = case.config
        copies = case.steps * case.rows * case.length * config.num_experts_per_tok * (config.num_hidden_layers + 1)
        # The two chosen experts are in one process, or in one each; a copy travels unless it is there already.
        travel = copies * (case.expert - 1) // case.expert
        assert sent["tokens"] == travel * 2 * (config.hidden_size * 4 + 4)
        assert sent["results"] == travel * 2 * config.hidden_size * 4
