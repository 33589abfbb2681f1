"""Recomputation changes memory and time, and no bit of a result: losses, gradients, routes, runs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from model_cases import random_config, random_model
from run_cases import packed_batch, rows, summary, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import openv4.model.attention as attention_module
import openv4.model.moe as moe_module
import openv4.model.recompute as recompute_module
import openv4.model.transformer as transformer_module
import openv4.train.loop as loop
from openv4.data.loader import Batch
from openv4.kernels.indexer import select_entries
from openv4.kernels.router import top_experts
from openv4.model import Transformer
from openv4.model.config import AttentionMode, Recompute
from openv4.model.loss import Counts, Losses, token_losses, training_losses
from openv4.model.recompute import Route, recomputed
from openv4.train.config import ConfigError, TrainConfig, from_yaml, load_config
from openv4.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

MODES: tuple[Recompute, ...] = get_args(Recompute)
RECOMPUTING = MODES[1:]


def packed_case(seed: int, **fixed: object) -> tuple[Transformer, Batch]:
    """Two rows: documents of 1 to 40 tokens with padding behind them, and one document."""
    config = random_config(seed + 400, **{"index_topk": 3, **fixed})
    tokens = torch.randint(0, config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(seed))
    segments = torch.zeros(2, 60, dtype=torch.long)
    segments[0] = torch.tensor([0, 1, 2, -1]).repeat_interleave(torch.tensor([40, 1, 14, 5]))
    return random_model(config, seed), Batch(tokens, segments, ())


def run(
    model: Transformer,
    batch: Batch,
    recompute: Recompute,
    attention: AttentionMode = "sparse",
    indexer: bool = True,
    between: Callable[[], None] = lambda: None,
) -> tuple[Losses, dict[str, Tensor]]:
    """Losses and gradients of a forward and a backward pass; ``between`` is called between them."""
    model.recompute = recompute
    losses = training_losses(model, batch.tokens, batch.segments, attention, indexer=indexer, statistics=True)
    between()
    losses.total(Counts.of([batch.segments]), 0.3, 0.1, 0.7).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses, found


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Bits.


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize("indexer", [False, True])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_are_those_without(
    seed: int, attention: AttentionMode, indexer: bool, mode: Recompute
) -> None:
    """Bit for bit in float32: packed documents with padding, MTP, balance loss, statistics."""
    model, batch = packed_case(seed)
    plain, expected = run(model, batch, "none", attention, indexer)
    assert len(expected) >= len(list(model.parameters())) - 6 * (not indexer) * len(model.layers)
    losses, gradients = run(model, batch, mode, attention, indexer)
    assert_bit_equal(gradients, expected)
    for name in ("main", "mtp", "balance"):
        assert torch.equal(getattr(losses, name), getattr(plain, name)), name
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(losses.indexer, plain.indexer, strict=True))
    assert_bit_equal(losses.load, plain.load)
    assert_bit_equal(losses.statistics, plain.statistics)


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize(
    "fixed",
    [
        # An MTP block with an indexer of its own, behind layers of all kinds.
        {"num_hidden_layers": 3, "compress_ratios": (0, 4, 8, 4), "layer_types": (), "num_hash_layers": 1},
        # Nothing but hash routing and window attention in the layers.
        {"num_hidden_layers": 2, "compress_ratios": (0, 0, 0), "layer_types": (), "num_hash_layers": 2},
        # Rows too short for an entry of one of the layers.
        {"num_hidden_layers": 2, "compress_ratios": (4, 128, 0), "layer_types": (), "num_hash_layers": 0},
    ],
)
def test_unusual_layers(fixed: dict[str, object], mode: Recompute) -> None:
    model, batch = packed_case(0, **fixed)
    plain, expected = run(model, batch, "none")
    losses, gradients = run(model, batch, mode)
    assert_bit_equal(gradients, expected)
    assert torch.equal(losses.main, plain.main) and torch.equal(losses.mtp, plain.mtp)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_bfloat16_streams(mode: Recompute) -> None:
    model, batch = packed_case(2)
    model.compute_dtype = torch.bfloat16
    plain, expected = run(model, batch, "none")
    losses, gradients = run(model, batch, mode)
    assert_bit_equal(gradients, expected)
    assert torch.equal(losses.main, plain.main)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_gradients_add_up_over_micro_batches(mode: Recompute) -> None:
    """Two forward passes before the first backward, so that two replays of a block are open at once."""
    model, batch = packed_case(1)
    other = packed_batch(model.config.vocab_size, rows=1, width=31, seed=9)
    counts = Counts.of([batch.segments, other.segments])
    found = []
    for recompute in ("none", mode):
        model.recompute = recompute
        passes = [training_losses(model, b.tokens, b.segments, indexer=True) for b in (batch, other)]
        for losses in passes:
            losses.total(counts, 0.3, 0.1, 0.7).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_bit_equal(found[1], found[0])


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_an_indexer_warmup_is_the_same(mode: Recompute) -> None:
    model, batch = packed_case(3)
    plain, expected = run(model, batch, "none", "indexer_warmup")
    losses, gradients = run(model, batch, mode, "indexer_warmup")
    assert expected and all(".indexer." in name for name in expected)
    assert_bit_equal(gradients, expected)
    assert torch.equal(losses.indexer.kl, plain.indexer.kl)


# What is kept and what is done again.


class Operations(TorchDispatchMode):
    """Counts calls by name; what a cache answers is no call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_what_each_mode_does_again() -> None:
    """No projection and no expert twice under `selective`, but all else; under `full`, all of a block."""
    model, batch = packed_case(0, num_hash_layers=0)
    done = {}
    for mode in MODES:
        with Operations() as operations:
            run(model, batch, mode)
        done[mode] = operations.count
    heavy = ("mm", "addmm", "_grouped_mm")
    assert sum(done["none"][name] for name in heavy) > 0
    for name in heavy:
        assert done["selective"][name] == done["none"][name], name
    assert sum(done["full"][name] for name in heavy) > sum(done["none"][name] for name in heavy)
    for name in ("bmm", "softplus", "sigmoid"):  # attention, router, mixing
        assert done["none"][name] < done["selective"][name] == done["full"][name], name


@pytest.mark.parametrize("mode", MODES)
def test_blocks_run_twice_if_recomputed(mode: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = packed_case(0)
    calls: Counter[str] = Counter()
    forward = transformer_module.Block.forward

    def count(self: Any, *arguments: Any) -> Any:
        calls["block"] += 1
        return forward(self, *arguments)

    monkeypatch.setattr(transformer_module.Block, "forward", count)
    blocks = len(model.layers) + len(model.mtp)
    run(model, batch, mode, between=lambda: calls.update({"first": calls["block"]}))
    assert calls == {"first": blocks, "block": blocks * (1 if mode == "none" else 2)}


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_nothing_is_recomputed_without_a_gradient(mode: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, in an evaluation, and in the frozen part of an indexer warm-up."""
    model, batch = packed_case(0)
    model.recompute = mode

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("checkpointed")

    monkeypatch.setattr(recompute_module, "checkpoint", refuse)
    with torch.no_grad():
        model(batch.tokens, batch.segments)
        token_losses(model, batch.tokens, batch.segments, "sparse")
        assert not training_losses(model, batch.tokens, batch.segments).main.requires_grad
    run(model, batch, mode, "indexer_warmup")
    with pytest.raises(AssertionError, match="checkpointed"):
        run(model, batch, mode)


# Routes.


def count_choices(
    model: Transformer, batch: Batch, mode: Recompute, indexer: bool, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """Calls of the two choosing kernels, in the forward pass and in all."""
    calls: Counter[str] = Counter()

    def experts(*arguments: Any) -> Any:
        calls["experts"] += 1
        return top_experts(*arguments)

    def entries(*arguments: Any) -> Any:
        calls["entries"] += 1
        return select_entries(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(moe_module, "top_experts", experts)
        patch.setattr(attention_module, "select_entries", entries)
        first: dict[str, int] = {}
        run(model, batch, mode, indexer=indexer, between=lambda: first.update(calls))
    return Counter({f"first {name}": times for name, times in first.items()}) + calls


@pytest.mark.parametrize("indexer", [False, True])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_route_is_chosen_once(mode: Recompute, indexer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of tokens, the best ones for the balance loss, selected entries: once a layer, in the forward pass."""
    model, batch = packed_case(0, num_hash_layers=1)
    kinds = model.config.kinds
    learned = len(kinds) - 1
    for recompute in ("none", mode):
        calls = count_choices(model, batch, recompute, indexer, monkeypatch)
        assert calls["experts"] == calls["first experts"] == 2 * learned
        assert calls["entries"] == calls["first entries"] == kinds.count("csa") > 0


def overwrite(model: Transformer, part: str) -> Callable[[], None]:
    """Fills the tensors of that name with noise."""

    @torch.no_grad()
    def change() -> None:
        generator = torch.Generator().manual_seed(77)
        found = [tensor for name, tensor in model.state_dict().items() if part in name]
        assert found
        for tensor in found:
            tensor.copy_(3 * torch.randn(tensor.shape, generator=generator))

    return change


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["gate.bias", ".indexer."])
def test_a_replay_takes_the_old_route(part: str, mode: Recompute) -> None:
    """What decides the route alone is changed between forward and backward: the gradient is as if it had not been.

    The indexer decides the route alone where its own loss is not computed.
    """
    model, batch = packed_case(0, num_hash_layers=0)
    before, expected = run(model, batch, "none", indexer=False)
    losses, gradients = run(model, batch, mode, indexer=False, between=overwrite(model, part))
    assert torch.equal(losses.main, before.main)
    assert_bit_equal(gradients, expected)
    after, changed = run(model, batch, "none", indexer=False)  # the route did depend on it
    assert not torch.equal(after.main, before.main)
    assert any(not torch.equal(changed[name], expected[name]) for name in expected)


def test_a_route_remembers_by_name() -> None:
    route = Route()
    first = route.recall("entries", torch.zeros, 3)
    assert route.recall("entries", torch.ones, 4) is first
    assert torch.equal(route.recall("experts", torch.ones, 2), torch.ones(2))
    assert torch.equal(Route().recall("entries", torch.ones, 4), torch.ones(4))


# The setting.


@pytest.mark.parametrize("grad", [False, True])
def test_an_unknown_mode_is_refused_by_name(grad: bool) -> None:
    model, batch = packed_case(0)
    model.recompute = "partial"  # type: ignore[assignment]
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=r"^recompute='partial': choose one of none, selective, full$"),
    ):
        model(batch.tokens)
    with pytest.raises(ValueError, match="recompute='': choose one of none, selective, full"):
        recomputed("", torch.add)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_the_setting_reaches_the_model(
    mode: Recompute, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config().recompute == "none"
    config: TrainConfig = tiny_config(small_data, tmp_path / "run", f"recompute={mode}", "steps=1")
    assert config.recompute == mode
    assert load_config([f"recompute={mode}"]).recompute == mode
    seen = []
    step = loop.training_step

    def watch(model: Transformer, *arguments: Any, **options: Any) -> Any:
        seen.append(model.recompute)
        return step(model, *arguments, **options)

    monkeypatch.setattr(loop, "training_step", watch)
    monkeypatch.setattr(loop, "plot_loss", lambda run: run / "plots" / "loss.png")
    folder = train(config)
    assert seen == [mode]
    assert from_yaml(TrainConfig, (folder / "config.yaml").read_text()).recompute == mode


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recompute=ful", "recompute='ful'; did you mean full?"),
        ("recompute=always", "recompute='always'; choose from none, selective, full"),
        ("recompute=null", "recompute=None; did you mean none?"),
        ("recompute=true", "recompute=True; choose from none, selective, full"),
    ],
)
def test_a_bad_setting_is_refused_in_a_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([override])
    assert str(error.value) == message


@pytest.fixture(scope="module")
def plain_run(small_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The folder of a run that recomputes nothing: five dense steps, three sparse ones."""
    return train(tiny_config(small_data, tmp_path_factory.mktemp("none") / "run", "recompute=none"))


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_run_is_the_same_for_any_setting(mode: Recompute, plain_run: Path, small_data: Path, tmp_path: Path) -> None:
    """Metrics but for the speeds, weights, optimizer, loader and summary; and the setting may change at a resume."""
    other = tmp_path / "run"
    train(tiny_config(small_data, other, "recompute=none", "steps=2"))
    train(tiny_config(small_data, other, f"recompute={mode}"))
    assert rows(other) == rows(plain_run)
    assert len(rows(other)) == 8 and "attn/indexer_kl" in rows(other)[-1]
    name = "checkpoints/step_8"
    kept = ("model.safetensors", "optimizer.safetensors", "state.json")
    assert [f for f in kept if (other / name / f).read_bytes() != (plain_run / name / f).read_bytes()] == []
    summaries = [summary(folder) for folder in (other, plain_run)]
    assert summaries[0] == summaries[1]
