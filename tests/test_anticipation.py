"""Anticipatory routing: experts chosen by older parameters, weighed by the present ones; runs resumed within it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import random_model
from run_cases import STEPS, contents, rows, tiny_config
from test_recompute import MODES, assert_bit_equal, packed_case
from torch import Tensor

import openv4.model.moe as moe_module
import openv4.train.loop as loop
from openv4.data.loader import Batch
from openv4.model import Transformer
from openv4.model.config import AttentionMode, Recompute
from openv4.model.loss import Counts, Losses, training_losses
from openv4.train.anticipation import Feed
from openv4.train.config import TrainConfig
from openv4.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

DELAY = 3


def step(
    model: Transformer, batch: Batch, experts: Tensor | None, attention: AttentionMode = "sparse", indexer: bool = True
) -> tuple[Losses, dict[str, Tensor]]:
    losses = training_losses(
        model, batch.tokens, batch.segments, attention, indexer=indexer, statistics=True, experts=experts
    )
    losses.total(Counts.of([batch.segments]), 0.3, 0.1, 0.7).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses, found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("seed", range(4))
def test_following_ones_own_choice_changes_no_bit(seed: int, attention: AttentionMode, mode: Recompute) -> None:
    """The pass without gradients chooses as the one with gradients, which then gives the same bits."""
    model, batch = packed_case(seed)
    model.recompute = mode
    wanted, gradients = step(model, batch, None, attention)
    found, ours = step(model, batch, model.choose_experts(*batch[:2], attention), attention)
    assert_bit_equal(ours, gradients)
    for name in ("main", "mtp", "balance"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert all(torch.equal(found.load[name], load) for name, load in wanted.load.items())
    learned = model.learned_gates()
    assert found.statistics.get("moe/stale_experts", 0.0) == 0
    assert ("moe/stale_experts" in found.statistics) == bool(learned)


@pytest.mark.parametrize("seed", range(4))
def test_others_choices_are_followed_and_weighed_by_the_present(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the routers chose the same by themselves, which a patch makes them do; all else is theirs."""
    model, batch = packed_case(seed, n_routed_experts=7, num_experts_per_tok=3, num_hash_layers=seed % 2)
    older = random_model(model.config, seed + 50)
    experts = older.choose_experts(*batch[:2])
    assert experts.dtype == torch.int16
    assert experts.shape == (2, len(model.learned_gates()), 60, 3)
    losses, gradients = step(model, batch, experts)

    queue = [experts[:, gate].flatten(0, 1).long() for gate in range(experts.shape[1])]
    choose, calls = moe_module.top_experts, 0

    def told(scores: Tensor, k: int) -> Tensor:
        """Each router asks twice: with its bias for what to do, without for the balance loss."""
        nonlocal calls
        calls += 1
        return queue[calls // 2] if calls % 2 else choose(scores, k)

    monkeypatch.setattr(moe_module, "top_experts", told)
    wanted, theirs = step(model, batch, None)
    monkeypatch.undo()
    assert calls == 2 * len(queue)
    assert torch.equal(losses.main, wanted.main) and torch.equal(losses.balance, wanted.balance)
    assert_bit_equal(gradients, theirs)
    # Loads are of the ids followed; stale is the share of them that these parameters would not choose.
    valid = (batch.segments >= 0).flatten()
    ends = torch.nn.functional.pad(batch.segments[:, 1:] == batch.segments[:, :-1], (0, 1)).flatten() & valid
    shares = []
    for gate, name in enumerate(model.learned_gates()):
        counted = ends if name == "mtp.0" else valid
        load = torch.bincount(queue[gate][counted].flatten(), minlength=7)
        assert torch.equal(losses.load[name], load)
    now = following_ones(model, batch, experts)
    for gate, name in enumerate(model.learned_gates()):
        counted = ends if name == "mtp.0" else valid
        kept = [
            len(set(mine) & set(given)) / 3
            for mine, given, one in zip(now[name].tolist(), queue[gate].tolist(), counted.tolist(), strict=True)
            if one
        ]
        shares.append(1 - sum(kept) / len(kept))
    assert 0 < losses.statistics["moe/stale_experts"] < 1
    assert losses.statistics["moe/stale_experts"].item() == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def following_ones(model: Transformer, batch: Batch, experts: Tensor) -> dict[str, Tensor]:
    """What each router of a model that follows ``experts`` would choose itself, by sorting its scores."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(gate: Any, arguments: Any, output: Any) -> None:
            found[name] = (output[2] + gate.bias).argsort(1, descending=True)[:, : gate.top_k]

        return hook

    hooks = [
        model.get_submodule(f"{name}.ffn.gate").register_forward_hook(keep(name)) for name in model.learned_gates()
    ]
    with torch.no_grad():
        model.run(*batch[:2], experts=experts)
    for hook in hooks:
        hook.remove()
    return found


# Runs.


@pytest.fixture(scope="module")
def config(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two stages with growing batches, dense attention and then sparse, several micro-batches a step."""
    config = tiny_config(small_data, tmp_path_factory.mktemp("ahead") / "run", "checkpoint.every=1")
    config = replace(config, checkpoint=replace(config.checkpoint, keep=STEPS))
    return replace(config, stability=replace(config.stability, anticipatory="always", delay=DELAY))


@pytest.fixture(scope="module")
def seen(config: TrainConfig, one_thread: None) -> dict[str, list[Any]]:
    """A run with anticipatory routing: the micro-batches of every step, and all state at its beginning."""
    found: dict[str, list[Any]] = {"batches": [], "states": []}

    def look(model: Transformer, optimizers: Any, batches: Any, plan: Any, *rest: Any) -> Any:
        found["batches"].append((batches, plan))
        found["states"].append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        found["model"] = [model]
        return training_step(model, optimizers, batches, plan, *rest)

    training_step = loop.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", look)
        train(config)
    return found


def test_experts_are_those_of_older_parameters(seen: dict[str, list[Any]]) -> None:
    """Those of so many steps ago, router biases included; at the beginning those of the first step."""
    (model,) = seen["model"]
    assert len(seen["batches"]) == STEPS
    changed = 0
    for number, (batches, plan) in enumerate(seen["batches"]):
        for state, wanted in ((max(0, number - DELAY), True), (number, False)):
            model.load_state_dict(seen["states"][state])
            for batch in batches:
                ids = model.choose_experts(*batch[:2], plan.attention, plan.mtp_weight > 0)
                assert not wanted or torch.equal(batch.experts, ids), number
                changed += not torch.equal(batch.experts, ids)
    assert changed > STEPS  # present parameters would have chosen otherwise


def test_rows_tell_how_stale_the_experts_are(config: TrainConfig, seen: dict[str, list[Any]]) -> None:
    stale = [row["moe/stale_experts"] for row in rows(Path(config.output))]
    assert stale[0] == 0 and all(0 < share < 1 for share in stale[1:])


@pytest.mark.usefixtures("no_plot")
def test_stopped_after_every_step(config: TrainConfig, seen: dict[str, list[Any]], tmp_path: Path) -> None:
    """Every checkpoint has the experts chosen ahead, and is that of the run that was never stopped."""
    run, straight = tmp_path / "run", Path(config.output)
    for number in range(1, STEPS + 1):
        train(replace(config, output=str(run), steps=number))
    assert rows(run) == rows(straight)
    assert contents(run / "checkpoints") == contents(straight / "checkpoints")


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("calls", range(1, STEPS))
def test_killed_after_any_step_and_resumed(
    calls: int, config: TrainConfig, seen: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, straight = tmp_path / "run", Path(config.output)
    done, training_step = 0, loop.training_step

    def killed(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return training_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, output=str(run)))
    train(replace(config, output=str(run)))
    assert rows(run) == rows(straight)
    assert contents(run / "checkpoints") == contents(straight / "checkpoints")


@pytest.fixture(scope="module")
def plain(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The same run with its routers' own choices."""
    output = tmp_path_factory.mktemp("plain") / "run"
    return train(replace(config, output=str(output), stability=replace(config.stability, anticipatory="never")))


def without_staleness(run: Path) -> list[dict[str, Any]]:
    told = ("moe/stale_experts", "stability/anticipated")
    return [{key: value for key, value in row.items() if key not in told} for row in rows(run)]


@pytest.mark.usefixtures("no_plot")
def test_no_delay_is_training_as_usual(config: TrainConfig, plain: Path, tmp_path: Path) -> None:
    """Bit for bit, though every batch is routed twice."""
    run = train(replace(config, output=str(tmp_path / "run"), stability=replace(config.stability, delay=0)))
    assert without_staleness(run) == without_staleness(plain)
    assert contents(run / "checkpoints") == contents(plain / "checkpoints")
    assert all(row["moe/stale_experts"] == 0 for row in rows(run))


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("delay", [1, DELAY, 100])
def test_frozen_weights_are_training_as_usual(
    delay: int, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters that never change choose the same at any time."""
    monkeypatch.setattr(loop, "update_router_biases", lambda *_: None)
    monkeypatch.setattr("openv4.optim.groups.Optimizers.step", lambda *_: None)
    found = {}
    for mode in ("never", "always"):
        stability = replace(config.stability, anticipatory=mode, delay=delay)
        run = train(replace(config, output=str(tmp_path / mode), stability=stability))
        found[mode] = without_staleness(run)
    assert found["always"] == found["never"]


@pytest.mark.usefixtures("no_plot")
def test_a_window_ends_and_leaves_nothing(
    config: TrainConfig, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps outside of it are routed by present parameters; no batch is fetched, and none kept, beyond its end."""
    window, given, waiting = range(2, 5), [], []
    take = Feed.take

    def look(self: Feed, *arguments: Any) -> Batch:
        batch = take(self, *arguments)
        given.append(batch.experts is not None)
        waiting.append(len(self.tensors()))
        return batch

    monkeypatch.setattr(Feed, "take", look)
    monkeypatch.setattr("openv4.train.stability.Guard.anticipated", window)
    run = train(replace(config, output=str(tmp_path / "run")))
    assert [number for number, one in enumerate(given) if one] == list(window)
    assert waiting == [0, 0, 2, 1, 0, 0, 0, 0]
    assert rows(run)[:2] == rows(plain)[:2]
    assert [row["tokens"] for row in rows(run)] == [row["tokens"] for row in rows(plain)]
