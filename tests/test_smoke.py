"""The shipped recipes learn: each one whole, in its own process."""

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


@pytest.mark.slow
def test_long_context_trains_its_indexer(tmp_path: Path) -> None:
    """Rows of 32,768 tokens through dense -> warm-up -> sparse, in less than 4 GB; the indexer beats a uniform one."""
    run = tmp_path / "long"
    openv4 = Path(sys.executable).with_name("openv4")
    # A process of its own reports its own peak: RUSAGE_CHILDREN would be that of the largest child so far.
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [openv4, "train", "run=long_context_smoke", f"output={run}", "logging.wandb=disabled"]
    result = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    assert int(result.stdout) / 2**20 < 4
    rows = list(read_metrics(run / "metrics.jsonl"))
    stages = {stage: [row for row in rows if row["train/stage"] == stage] for stage in range(4)}
    assert all(row["train/sequence_length"] == 32768 for stage in (1, 2, 3) for row in stages[stage])
    assert all("attn/indexer_kl" not in row for stage in (0, 1) for row in stages[stage])
    warmup, sparse = stages[2], stages[3]
    assert warmup[-1]["attn/indexer_kl"] < 0.95 * warmup[-1]["attn/indexer_kl_uniform"]
    assert warmup[-1]["attn/indexer_kl"] < warmup[0]["attn/indexer_kl"]
    assert warmup[-1]["attn/indexer_recall"] > warmup[0]["attn/indexer_recall"] + 0.1
    assert all(row["attn/indexer_kl"] < row["attn/indexer_kl_uniform"] for row in sparse)
    assert sparse[-1]["attn/indexer_recall"] > warmup[0]["attn/indexer_recall"] + 0.1
    assert stages[3][-1]["train/loss"] < 0.75 * rows[0]["train/loss"]
