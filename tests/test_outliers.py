"""Largest activations and residual streams, and how they are told by block, by process, by name."""

import re
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from model_cases import random_config, random_model
from run_cases import packed_batch, rows, tiny_config
from torch import Tensor

from openv4.data.loader import Batch
from openv4.model import Transformer
from openv4.model.config import Recompute
from openv4.model.loss import Counts, training_losses
from openv4.model.moe import MoE
from openv4.model.transformer import Block
from openv4.train.loop import train
from openv4.train.meter import load_metrics, over_processes
from openv4.train.metrics import GROUPS
from openv4.train.parallel import Alone

pytestmark = pytest.mark.usefixtures("one_thread")

DETAILS = ("moe/activation_max/", "moe/dead_experts/", "stability/stream_max/")


def case(seed: int = 0, **changes: Any) -> tuple[Transformer, Batch]:
    """A model and packed rows, whose padding, a token of its own, is far larger than all else."""
    config = random_config(seed, num_hidden_layers=3, compress_ratios=(4, 8, 0, 0), layer_types=(), **changes)
    model, batch = random_model(config, seed), packed_batch(config.vocab_size - 1, seed=seed)
    with torch.no_grad():
        model.embed.weight[-1] = 1e6
    batch.tokens[batch.segments < 0] = config.vocab_size - 1
    return model, batch


def measured(model: Transformer, batch: Batch, statistics: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics, and the gradients of all that trains as one vector."""
    losses = training_losses(model, batch.tokens, batch.segments, statistics=statistics)
    losses.total(Counts.of([batch.segments]), 0.3, 0.1).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return losses.statistics, gradients


def by_hand(model: Transformer, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """From what blocks and experts return, token by token."""
    found: dict[str, float] = {"moe/activation_max": 0.0, "stability/stream_max": 0.0}
    places = {id(block): f"layers.{i}" for i, block in enumerate(model.layers)} | {id(model.mtp[0]): "mtp.0"}
    places |= {id(block.ffn): places[id(block)] for block in (*model.layers, *model.mtp)}
    for kind, metric in ((MoE, "moe/activation_max"), (Block, "stability/stream_max")):

        def forward(self: Any, *given: Any, right: Any = kind.forward, metric: str = metric) -> Any:
            outputs = right(self, *given)
            largest = 0.0
            for row, column in (batch.segments >= 0).nonzero().tolist():
                largest = max(largest, *(abs(x) for x in outputs[0][row, column].flatten().tolist()))
            found[f"{metric}/{places[id(self)]}"] = largest
            found[metric] = max(found[metric], largest)
            return outputs

        monkeypatch.setattr(kind, "forward", forward)
    training_losses(model, batch.tokens, batch.segments)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_maxima_are_those_of_all_tokens_but_padding(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = case(seed)
    wanted = by_hand(model, batch, monkeypatch)
    statistics, _ = measured(model, batch)
    found = {name: float(value) for name, value in statistics.items() if name in wanted}
    assert found == wanted and len(found) == 2 * 5
    assert 0 < found["moe/activation_max"] < 1e5


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_they_change_nothing(recompute: Literal["none", "selective", "full"]) -> None:
    """Neither results, nor are they others where blocks run again in the backward pass; no hook stays."""
    model, batch = case()
    plain, gradients = measured(model, batch)
    model.recompute = recompute
    none, without = measured(model, batch, statistics=False)
    statistics, with_them = measured(model, batch)
    assert none == {} and torch.equal(with_them, without) and torch.equal(with_them, gradients)
    assert statistics.keys() == plain.keys()
    assert all(torch.equal(statistics[name], value) for name, value in plain.items() if "max/" in name)
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_of_padding_have_no_outliers() -> None:
    model, batch = case()
    statistics, _ = measured(model, batch._replace(segments=torch.full_like(batch.segments, -1)))
    assert statistics["moe/activation_max"] == statistics["stability/stream_max"] == 0


def test_what_is_not_a_number_is_told() -> None:
    model, batch = case()
    with torch.no_grad():
        model.layers[1].ffn.shared_experts.w2.weight[0] = torch.nan  # type: ignore[union-attr]
    with torch.no_grad():
        statistics = training_losses(model, batch.tokens, batch.segments, statistics=True).statistics
    names = ("moe/activation_max", "moe/activation_max/layers.1", "stability/stream_max/layers.1")
    assert all(statistics[name].isnan() for name in names)
    assert statistics["moe/activation_max/layers.0"].isfinite()


class Other(Alone):
    """This process, and another one that has these numbers."""

    def __init__(self, theirs: dict[str, float]) -> None:
        self.theirs = torch.tensor(list(theirs.values()))

    def total(self, numbers: Tensor) -> Tensor:
        return numbers + torch.stack((self.theirs.nan_to_num(), (~self.theirs.isnan()).float()))

    def largest(self, numbers: Tensor) -> Tensor:
        return torch.maximum(numbers, self.theirs.where(~self.theirs.isnan(), -torch.inf))


def test_maxima_and_means_over_processes() -> None:
    names = ("moe/activation_max", "stability/stream_max/layers.0", "attn/sink_mass_max", "attn/sink_mass")
    mine, nan = dict(zip(names, (4.0, 1.0, 0.5, 0.5), strict=True)), float("nan")
    theirs = dict(zip(names, (3.0, 2.0, nan, nan), strict=True))  # its part of the rows is padding
    found = over_processes({name: torch.tensor(value) for name, value in mine.items()}, Other(theirs))
    assert list(found.values()) == [4.0, 2.0, 0.5, 0.5]
    found = over_processes({name: torch.tensor(value) for name, value in mine.items()}, Other(mine | {names[2]: 0.1}))
    assert list(found.values()) == [4.0, 1.0, pytest.approx(0.3), 0.5]


def test_experts_without_a_token_by_block() -> None:
    load = {"layers.0": torch.tensor([0, 3, 0, 1]), "mtp.0": torch.tensor([1, 1, 1, 1])}
    dead = {key: value for key, value in load_metrics(load, detail=True).items() if "dead" in key}
    assert dead == {"moe/dead_experts": 2, "moe/dead_experts/layers.0": 2, "moe/dead_experts/mtp.0": 0}
    assert "moe/dead_experts/layers.0" not in load_metrics(load)


@pytest.fixture(scope="module")
def detailed(small_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("detailed") / "run"
    return rows(train(tiny_config(small_data, output, "logging.detail=true", "steps=2")))


def test_detail_adds_the_numbers_of_every_block_and_changes_no_other(
    detailed: list[dict[str, Any]], small_data: Path, tmp_path: Path
) -> None:
    plain = rows(train(tiny_config(small_data, tmp_path / "run", "steps=2")))
    for row, other in zip(detailed, plain, strict=True):
        assert {key: value for key, value in row.items() if key in other} == other
        added = {f"{prefix}{block}" for prefix in DETAILS for block in ("layers.0", "layers.1", "mtp.0")}
        assert row.keys() - other.keys() == added
        for prefix in DETAILS[::2]:
            assert row[prefix[:-1]] == max(value for key, value in row.items() if key.startswith(prefix)) > 0


def test_every_metric_is_documented(detailed: list[dict[str, Any]]) -> None:
    """In the table of docs/monitoring.md, where <block> and the like stand for a part of the name."""
    text = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text().partition("## Metrics")[2]
    named = {
        name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z]+/\S+?)`", line)
    }
    patterns = [re.sub(r"<\w+>|\\\*", ".+", re.escape(name)) for name in named]
    unknown = [k for k in detailed[0] if k not in ("step", "tokens") and not any(re.fullmatch(p, k) for p in patterns)]
    assert unknown == []
    assert {name.split("/")[0] for name in named} == set(GROUPS)
