"""New weights come from their owners while the forward pass that needs them has begun."""

import pytest
from parallel_cases import Arrivals, Case
from process_cases import run_processes

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("held_weights")]

DEEP = {"num_hidden_layers": 4, "layer_types": (), "compress_ratios": (0, 4, 8, 4, 0)}
CASES = [
    Case("fp32", seed=60, model=DEEP),
    Case("fp32 experts", seed=61, expert=2, recompute="full", gradients="bf16", model=DEEP),
    Case("bf16", seed=62, compute="bf16", streams="bf16", recompute="selective", model=DEEP),
    Case("fp4", seed=63, expert=2, compute="fp4_qat", streams="bf16", model=DEEP),
]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[Arrivals, Arrivals]]]:
    return run_processes("parallel_cases:all_arrivals", 2, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_layer_waits_for_its_own_weights(case: Case, ranks: list[dict[str, tuple[Arrivals, Arrivals]]]) -> None:
    for found, plain in (rank[case.name] for rank in ranks):
        assert found.losses == plain.losses  # to the bit
        assert found.after_step and all(name.startswith(("layers.", "mtp.")) for name in found.after_step)
        assert not any(found.at_call.values())
        first, *between, last, mtp = found.begun
        assert first + sum(between) > 0 and last == mtp == 0  # on the way while layers compute
        assert not plain.after_step and not any(plain.begun)
