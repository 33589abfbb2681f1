"""Training runs of a second or two, and what the tests of the training loop look at."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from model_cases import random_config, random_model

from openv4.data.loader import Batch
from openv4.data.prepare import KING_JAMES, PrepareConfig, prepare
from openv4.model import Transformer
from openv4.model.loss import Counts, training_losses
from openv4.optim.config import OptimConfig
from openv4.optim.groups import Optimizers, build_optimizers
from openv4.optim.schedule import Plan
from openv4.train.checkpoint import TrainState
from openv4.train.config import TrainConfig, load_config
from openv4.train.metrics import varies

# Eight steps: five of short rows with warm-up and a growing batch (2, 2, 3, 3, 4 rows of 64), three of longer rows with
# sparse attention and the cosine (2 rows of 128). Up to two micro-batches a step, three epochs of `small_data`.
OVERRIDES = [
    "run=smoke",
    "model=nano",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.compress_ratios=[4,16,0]",  # with the MTP block one of each kind
    "model.n_routed_experts=4",
    "model.hc_sinkhorn_iters=3",
    "stages.0.tokens=768",
    "stages.0.batch_tokens=256",
    "stages.0.batch_tokens_start=128",
    "stages.0.batch_ramp_tokens=512",
    "stages.0.sequence_length=64",
    "stages.0.warmup_steps=3",
    "stages.1.tokens=768",
    "stages.1.batch_tokens=256",
    "stages.1.sequence_length=128",
    "micro_batch_tokens=128",
    "threads=1",  # two OpenMP threads on a busy machine of two cores are fifty times slower
    "data.workers=0",
    "validation.every=0",
    "validation.byte_model_order=null",
    "logging.wandb=disabled",
    "logging.peak_tflops=1",
    "logging.sample_prompt=null",
]
STEPS = 8


def prepare_small_data(folder: Path) -> Path:
    """Two dozen sentences of the shipped text, some 600 tokens of a vocabulary of 512: for runs of a second."""
    with gzip.open(KING_JAMES, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:65] for line in file][::50]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(input=str(folder / "text.jsonl"), output=str(folder / "prepared"), vocab_size=512)
    prepare(config)
    return folder / "prepared"


def tiny_config(data: Path, output: Path, *overrides: str) -> TrainConfig:
    return load_config([*OVERRIDES, f"data={data}", f"output={output}", *overrides])


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` but for times and memory; anything that strict JSON does not know fails."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line, parse_constant=refuse_constant)
        found.append({key: value for key, value in row.items() if not varies(key)})
    return found


def summary(run: Path) -> dict[str, Any]:
    """``summary.json`` but for times and memory."""
    text = (run / "summary.json").read_text()
    values: dict[str, Any] = json.loads(text, parse_constant=refuse_constant)
    return {key: value for key, value in values.items() if not varies(key)}


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def optimizers_of(model: Transformer) -> Optimizers:
    return build_optimizers(model.named_parameters(), model.row_splits(), OptimConfig())


def trained(seed: int, step: int = 1) -> tuple[Transformer, Optimizers, TrainState]:
    """A small random model after one update, so that every parameter has optimizer state."""
    config = random_config(seed, num_hash_layers=1, num_hidden_layers=2, compress_ratios=(4, 8, 0), layer_types=())
    model = random_model(config, seed)
    optimizers = optimizers_of(model)
    tokens = torch.arange(24).remainder(config.vocab_size)[None]
    segments = torch.zeros_like(tokens)
    training_losses(model, tokens, segments).total(Counts.of([segments]), 0.3, 0.1).backward()
    optimizers.step(1e-2, torch.zeros(()))
    optimizers.zero_grad()
    return model, optimizers, TrainState(step, 24 * step, 0, {"position": step}, "fingerprint")


def plan(lr: float = 1e-2, **changes: Any) -> Plan:
    values: Mapping[str, Any] = {
        "stage": 0,
        "name": "test",
        "sequence_length": 24,
        "rows": 4,
        "lr": lr,
        "attention": "sparse",
        "mtp_weight": 0.3,
        "balance_weight": 0.1,
        "bias_speed": 0.01,
        "indexer_weight": 0.01,
    }
    return Plan(**(values | changes))


def packed_batch(vocab: int, rows: int = 4, width: int = 24, seed: int = 0) -> Batch:
    """Rows of documents of random lengths, with padding in every second one; some end in a document of one token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, width), generator=generator)
    cuts = torch.rand(rows, width, generator=generator) < 0.15
    segments = cuts.cumsum(1).int()
    segments[::2, -5:] = -1
    return Batch(tokens, segments, ((),) * rows)
