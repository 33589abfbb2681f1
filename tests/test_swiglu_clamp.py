"""Training with SwiGLU's clamp and without (docs/figures/swiglu_clamp.py): the script's parts, and its results."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from openv4.data.shards import PreparedData

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "figures" / "swiglu_clamp.py"))


def test_a_copy_goes_on_alike_and_outliers_meet_the_clamp(script: dict[str, Any], small_data: Path) -> None:
    """Bit for bit, on the same data; the clamp bounds what the outliers make by its limit squared."""
    data = PreparedData(small_data)
    peaks = {}
    for arm, limit in script["ARMS"].items():
        run = script["Run"](script["config_of"](arm, 6e-3, 0), data)
        first = run.go(2)
        twin, spoiled, burst = run.copy(), run.copy(), run.copy()
        before = {name: tensor.clone() for name, tensor in spoiled.model.state_dict().items()}
        spoiled.put_outliers()
        changed = {name for name, t in spoiled.model.state_dict().items() if not torch.equal(t, before[name])}
        kinds = ("experts.w1", "experts.w3", "shared_experts.w1.weight", "shared_experts.w3.weight")
        assert changed == {f"layers.1.ffn.{kind}" for kind in kinds}
        undisturbed = run.go(2)
        assert twin.go(2) == undisturbed
        assert burst.go(2, burst=1) != undisturbed
        peaks[arm] = [max(row[2] for row in rows) for rows in (first + undisturbed, spoiled.go(1))]
        assert peaks[arm][1] <= limit**2
    assert peaks["clamp"][0] == peaks["none"][0] < 1
    assert peaks["none"][1] > 100 * peaks["none"][0]


def test_steps_to_recover(script: dict[str, Any]) -> None:
    steps = script["steps_to_recover"]
    assert steps([0.0] * 10, 0.05) == 0
    assert steps([1.0] * 3 + [0.0] * 10, 0.05) == 3
    assert steps([0.0, 0.0] + [1.0] * 3 + [0.0] * 10, 0.05) == 5  # the excess may begin later
    assert steps([1.0] * 3 + [0.0] * 10 + [1.0], 0.05) is None
    assert steps([float("nan")] * 8, 0.05) is None


def test_the_published_table_is_that_of_the_published_numbers(script: dict[str, Any]) -> None:
    published = json.loads((ROOT / "docs" / "results" / "swiglu_clamp.json").read_text())
    assert (ROOT / "docs" / "results" / "swiglu_clamp.md").read_text() == script["table"](published)
