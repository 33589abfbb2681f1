"""Training on several processes equals training on one."""

import pytest
import torch
from parallel_cases import Case, alone, launch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

# All streams are equal before the first block, so that their mixing there has no gradient but rounding, which Muon
# makes as large as any other.
NOISE = "model.layers.0.hc_attn_"

CASES = {
    2: [
        Case("plain"),
        Case("experts", expert=2, seed=1),
        Case("starved", expert=2, seed=2, starved=True),
        Case("clipped", expert=2, seed=3, clip=0.1),
        Case("accumulated", expert=2, seed=4, rows=6),
    ]
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    return {
        f"{world}-{name}": ranks
        for world, cases in CASES.items()
        for name, ranks in launch(cases, world, tmp_path_factory.mktemp("world") / "it").items()
    }


@pytest.mark.parametrize(
    ("world", "case"), [(w, c) for w, cases in CASES.items() for c in cases], ids=lambda v: getattr(v, "name", v)
)
def test_equals_one_process(world: int, case: Case, found: dict[str, list[dict[str, Tensor]]]) -> None:
    wanted, ranks = alone(case, world), found[f"{world}-{case.name}"]
    whole = float(wanted["norms"][0])
    wrong = {}
    for name, tensor in wanted.items():
        have = [rank[name] for rank in ranks if name in rank]
        assert have, name
        assert all(torch.equal(other, have[0]) for other in have[1:]), name
        error = float((have[0].double() - tensor.double()).norm())
        size = float(tensor.double().norm())
        if name.startswith("gradient."):
            assert len(have) == 1, name  # one owner
            error = max(0.0, error - 1e-7 * whole)
        limit = 1e-4 if (name.startswith("model.") and case.matrices == "muon") or name == "update_rms" else 1e-5
        if error > limit * size and not name.startswith(NOISE):
            wrong[name] = error / size
    assert not wrong, dict(list(wrong.items())[:6])
    assert set().union(*ranks) == set(wanted)
