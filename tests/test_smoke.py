"""`make smoke` learns: the shipped recipe, whole, in its own process."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from openv4.train.metrics import read_metrics


@pytest.mark.slow
def test_smoke_beats_a_byte_model(tmp_path: Path, king_james: Path) -> None:
    """Validation bits per byte falls from the untrained model's to below an order-3 byte model on the same text."""
    run = tmp_path / "smoke"
    openv4 = Path(sys.executable).with_name("openv4")
    result = subprocess.run(
        [openv4, "train", "run=smoke", f"data={king_james}", f"output={run}", "logging.wandb=disabled"],
        capture_output=True,
        text=True,
        check=True,
    )
    summary = json.loads((run / "summary.json").read_text())
    trained, reference = summary["validation/bits_per_byte"], summary["validation/byte_model_order_3"]
    assert trained < reference < summary["validation/untrained_bits_per_byte"]
    losses = [row["train/loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    for printed in (
        f"{trained:.3f}",
        f"{reference:.3f}",
        "a sample:",
        "plots/loss.png",
        "openv4 generate",
        "try next:",
    ):
        assert printed in result.stdout
    # The largest child of this process so far; the promise is 4 GB, the smoke run needs 1.7.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20 < 4
