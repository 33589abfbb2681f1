"""Speed of forward and backward beside transformers' DeepseekV4 on the same weights: `make bench`.

Correctness comes first (same loss, same gradient), then the two take turns, so that a busy machine slows both; ratios
and medians are what counts. Results go to docs/results/step_vs_transformers.json.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openv4.model import Transformer, save_pretrained
from openv4.model.init import init_weights
from openv4.train.config import load_config

RESULTS = Path(__file__).parents[1] / "docs" / "results"
ROUNDS = 7


@pytest.fixture(autouse=True)
def _only_with_bench(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--bench"):
        pytest.skip("a benchmark; run it with --bench")


def timed_step(module: torch.nn.Module, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[float, ...]:
    """Seconds of one forward and backward pass, its loss, and the norm of the gradient outside the MTP block."""
    module.zero_grad()
    start = time.perf_counter()
    loss = F.cross_entropy(forward(tokens)[0, :-1], tokens[0, 1:])
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = [p.grad for name, p in module.named_parameters() if not name.startswith("mtp.") and p.grad is not None]
    return seconds, float(loss.detach()), float(torch.stack([g.double().norm() for g in gradients]).norm())


def test_step_vs_transformers(tmp_path: Path) -> None:
    """The `tiny` preset, float32, batch 1, two threads; forward and backward, no update."""
    import transformers

    model = Transformer(load_config(["model=tiny"]).model)
    init_weights(model)
    save_pretrained(model, tmp_path / "tiny", "fp32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "tiny", attn_implementation="eager", dtype=torch.float32
    )
    arms = {
        "openv4": partial(timed_step, model, model),
        "transformers": partial(timed_step, peer, lambda tokens: peer(tokens, use_cache=False).logits),
    }
    results = []
    for length in (512, 1024):
        tokens = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(length))
        (_, loss, norm), (_, peer_loss, peer_norm) = (arm(tokens) for arm in arms.values())
        assert abs(loss / peer_loss - 1) < 1e-6
        assert abs(norm / peer_norm - 1) < 1e-5
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                seconds[name].append(arm(tokens)[0])
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        row: dict[str, Any] = {"tokens": length, "loss": loss, "loss_transformers": peer_loss, "rounds": ROUNDS}
        for name, times in seconds.items():
            first, _, third = statistics.quantiles(times, n=4)
            row[name] = {"median_s": medians[name], "min_s": min(times), "iqr_s": third - first}
            row[name]["tokens_per_s"] = length / medians[name]
        row["speedup"] = medians["transformers"] / medians["openv4"]
        results.append(row)
        speed = row["openv4"]["tokens_per_s"]
        print(f"\n{length} tokens: openv4 {speed:.0f} tokens/s, {row['speedup']:.2f}x transformers")
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "load": os.getloadavg(), "threads": 2}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"command": "make bench", "machine": machine, "versions": versions, "results": results}
    (RESULTS / "step_vs_transformers.json").write_text(json.dumps(record, indent=2) + "\n")
