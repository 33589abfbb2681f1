"""Spikes: found within a step, never in clean runs; the way back, killed anywhere on it; what comes after."""

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import QUICK
from run_cases import contents, rows, summary, tiny_config
from stability_cases import (
    EVERY,
    LENGTH,
    SPIKE,
    Rows,
    burst,
    poisoned,
    reading,
    spiking_config,
    train_together,
)

import openv4.train.loop as loop
from openv4.train.config import ConfigError, DivergedError, StabilityConfig, load_config
from openv4.train.loop import train
from openv4.train.metrics import read_lines
from openv4.train.stability import FILE, Guard, Rollback, Spike, decisions, deviation, drop_spiked

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stability")]


# The detector, on series.


def watch(guard: Guard, series: Iterable[tuple[float, float]], first: int = 1, stage: int = 0) -> list[Spike]:
    found = (
        guard.observe(step, stage, torch.tensor(loss), torch.tensor(norm))
        for step, (loss, norm) in enumerate(series, first)
    )
    return [spike for spike in found if spike]


def falling(steps: int, seed: int, noise: float = 0.03, tail: float = 0.0) -> list[tuple[float, float]]:
    """A loss that falls ever more slowly, with noise, and a gradient norm with noise of its own; ``tail`` is the chance
    of a step with three times the noise."""
    draw = random.Random(seed)

    def jitter(scale: float) -> float:
        return draw.gauss(0, scale * (3 if draw.random() < tail else 1))

    return [(2 + 6 / (1 + step / 40) + jitter(noise), math.exp(jitter(0.3))) for step in range(steps)]


def guard_of(folder: Path, **values: Any) -> Guard:
    return Guard(StabilityConfig(**values), folder)


@pytest.mark.parametrize("seed", range(5))
def test_deviation_by_another_way(seed: int) -> None:
    """Level and spread by plain loops, of windows that four does not divide too: the first quarters have one more."""
    draw = random.Random(seed)
    history = [draw.gauss((-0.1, 0.1)[seed % 2] * i, 1) for i in range(9 + seed)]
    quarters, rest = [], list(history)
    for left in (4, 3, 2, 1):
        size = math.ceil(len(rest) / left)
        quarters.append(statistics.median(rest[:size]))
        rest = rest[size:]
    moves = [abs(b - a) for a, b in itertools.pairwise(history)]
    spread = 1.4826 * statistics.median(moves) / 2**0.5
    wanted = (5.0 - min(quarters)) / spread
    assert deviation(5.0, history, 0.01) == pytest.approx(wanted)
    assert deviation(5.0, history, 2 * spread) == pytest.approx(wanted / 2)


@pytest.mark.parametrize("seed", range(5))
def test_clean_series_give_no_alarm(seed: int, tmp_path: Path) -> None:
    """A thousand steps each, one in fifty of them noisy."""
    assert watch(guard_of(tmp_path), falling(1000, seed, tail=0.02)) == []


@pytest.mark.parametrize(("at", "jump"), [(64, 1.8), (65, 1.8), (200, 0.6), (999, 0.5)])
def test_a_jump_is_found_in_its_step(at: int, jump: float, tmp_path: Path) -> None:
    series = falling(1000, at)
    series[at] = (series[at][0] + jump, series[at][1])
    (spike,) = watch(guard_of(tmp_path), series)
    assert (spike.step, spike.onset) == (at + 1, at + 1)
    assert f"loss {series[at][0]:.4f}" in spike.reason


def test_nothing_is_said_before_the_level_is_known(tmp_path: Path) -> None:
    series = falling(64, 0)
    series[63] = (50.0, 1.0)
    assert watch(guard_of(tmp_path), series) == []


def test_a_new_stage_has_a_level_of_its_own(tmp_path: Path) -> None:
    guard, higher = guard_of(tmp_path), [(loss + 3, norm) for loss, norm in falling(70, 1)]
    assert watch(guard, falling(200, 0)) == []
    assert watch(guard, higher, 201, stage=1) == []
    assert len(watch(guard, [(20.0, 1.0)], 271, stage=1)) == 1


def test_a_loss_that_creeps_up_is_found_and_so_is_its_beginning(tmp_path: Path) -> None:
    """By a third of its noise a step: no single step stands out."""
    series, draw = falling(300, 3), random.Random(1)
    series += [(series[-1][0] + 0.01 * step + draw.gauss(0, 0.03), 1.0) for step in range(1, 100)]
    spike = watch(guard_of(tmp_path), series)[0]
    assert 310 <= spike.step <= 350
    assert 300 <= spike.onset < spike.step


def test_a_gradient_alone_is_no_spike_with_the_loss_it_is(tmp_path: Path) -> None:
    series = falling(200, 4)
    level = series[-1][0]
    alone = [*series, (level, 1e4)]
    assert watch(guard_of(tmp_path), alone) == []
    raised = next(d for d in range(1, 100) if deviation(level + d / 100, [s[0] for s in series[-64:]], 0.02) > 6)
    assert watch(guard_of(tmp_path), [*series, (level + raised / 100, 1.0)]) == []
    assert len(watch(guard_of(tmp_path), [*series, (level + raised / 100, 1e4)])) == 1


def test_a_spike_is_told_once(tmp_path: Path) -> None:
    """Where nothing is done about it, steps that stay high are one spike; when it is over, there may be another."""
    series = falling(100, 5)
    high = [(loss + 2, 1.0) for loss, _ in falling(10, 6, noise=0.0)]
    found = watch(guard_of(tmp_path, on_spike="warn"), [*series, *high, *series[-40:], (50.0, 1.0)])
    assert [spike.step for spike in found] == [101, 151]


def test_steps_without_a_finite_gradient_are_a_spike_when_there_are_many(tmp_path: Path) -> None:
    nothing = [(math.nan, math.nan)]
    guard = guard_of(tmp_path, max_skipped=3)
    assert watch(guard, [*falling(5, 0), *nothing * 2, *falling(5, 0), *nothing * 2]) == []
    (spike,) = watch(guard, [(1.0, math.inf)], 15)
    assert (spike.step, spike.onset) == (15, 13)
    assert "3 steps in a row" in spike.reason
    with pytest.raises(DivergedError, match="step 3: 3 steps in a row had no finite gradient"):
        watch(guard_of(tmp_path, max_skipped=3, on_spike="warn"), nothing * 3)


def test_a_loss_that_is_finite_is_judged_though_its_gradient_is_not(tmp_path: Path) -> None:
    (spike,) = watch(guard_of(tmp_path), [*falling(100, 7), (900.0, math.inf)])
    assert (spike.step, spike.onset) == (101, 101)


def test_ignored(tmp_path: Path) -> None:
    series = [*falling(100, 8), (900.0, 1.0), *[(math.nan, math.nan)] * 50]
    assert watch(guard_of(tmp_path, on_spike="ignore"), series) == []


@pytest.mark.parametrize("cut", [1, 40, 64, 100, 129, 130])
def test_a_guard_that_is_taken_up_again_decides_as_the_one_that_went_on(cut: int, tmp_path: Path) -> None:
    series = [*falling(128, 9), (3.9, 3.0), (math.nan, 1.0), (8.0, 1.0)]
    whole, first = guard_of(tmp_path), guard_of(tmp_path)
    wanted = watch(whole, series)
    found = watch(first, series[:cut])
    second = guard_of(tmp_path)
    second.load(json.loads(json.dumps(first.state_dict())), [])
    assert found + watch(second, series[cut:], cut + 1) == wanted
    assert second.state_dict() == whole.state_dict()
    assert wanted


# Where to go back to.


def published(run: Path, *steps: int, rollbacks: int = 0) -> None:
    for step in steps:
        folder = run / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps({"step": step, "stability": {"rollbacks": rollbacks}}))


@pytest.mark.parametrize(("onset", "to"), [(21, None), (22, 20), (31, 20), (32, 30), (40, 30), (400, 40)])
def test_back_to_the_newest_checkpoint_before_the_cause(onset: int, to: int | None, tmp_path: Path) -> None:
    """The loss of step 22, counted from 1, is that of the weights after 21; the update before, or its own batch, may
    be the cause. 20 steps are clean then."""
    published(tmp_path, 20, 30, 40)
    rollback = guard_of(tmp_path).decide(Spike(500, onset, "why"), {"at": 7})
    if to is None:
        assert rollback is None
    else:
        assert rollback == Rollback(500, onset, "why", to, (onset - 2, {"at": 7}), (to, to + 200))


def test_settings_of_a_decision(tmp_path: Path) -> None:
    published(tmp_path, 20)
    spike = Spike(30, 30, "why")
    kept = guard_of(tmp_path, batch="keep", anticipatory="never").decide(spike, {})
    assert kept is not None and kept.skip is None and kept.anticipate is None
    assert str(kept) == "to step 20, from step 30"
    always = guard_of(tmp_path, anticipatory="always")
    assert 0 in always.anticipated and 10**12 in always.anticipated
    decided = always.decide(spike, {})
    assert decided is not None and decided.anticipate is None
    with pytest.raises(DivergedError, match=r"step 30: why; the run has gone back 0 times .*max_rollbacks=0"):
        guard_of(tmp_path, max_rollbacks=0).decide(spike, {})


def test_decisions_are_taken_up_once_and_in_order(tmp_path: Path) -> None:
    """Jumps of the data that were not reached stay; those behind a later spike are replaced by its own."""
    guard = guard_of(tmp_path)
    first = Rollback(50, 50, "a", 40, (48, {"at": 1}), (40, 60))
    second = Rollback(45, 44, "b", 30, (42, {"at": 2}), (30, 50))
    guard.record(first)
    guard.load({}, decisions(tmp_path))
    assert (guard.rollbacks, guard.skips, guard.anticipated) == (1, [(48, {"at": 1})], range(40, 60))
    known = json.loads(json.dumps(guard.state_dict()))
    guard.record(second)
    for state in ({}, known):
        again = guard_of(tmp_path)
        again.load(state, decisions(tmp_path))
        assert again.rollbacks == 2
        assert again.skips == [(48, {"at": 1}), (42, {"at": 2})]
        assert again.anticipated == range(30, 50)
    again.load(json.loads(json.dumps(again.state_dict())), decisions(tmp_path))
    assert again.rollbacks == 2
    guard.record(Rollback(60, 60, "c", 40, (58, {"at": 3}), None))
    again.load(known, decisions(tmp_path))
    assert again.skips == [(58, {"at": 3})]
    assert again.anticipated == range(30, 50)  # the mode was changed to never


def test_a_decision_that_was_cut_off_is_none(tmp_path: Path) -> None:
    """A kill in the middle of the line; the next one has a line of its own."""
    (tmp_path / FILE).write_text('{"step": 50, "ons')
    assert decisions(tmp_path) == []
    guard_of(tmp_path).record(Rollback(50, 50, "a", 40, None, None))
    assert [row["step"] for row in decisions(tmp_path)] == [50]


def test_checkpoints_of_the_way_that_was_left_are_removed(tmp_path: Path) -> None:
    """Not those before it, not those after; one that is damaged is for the loader to find."""
    published(tmp_path, 20, 30, 40, 50)
    drop_spiked(tmp_path)
    guard_of(tmp_path).record(Rollback(45, 44, "b", 30, None, None))
    published(tmp_path, 60, rollbacks=1)
    (tmp_path / "checkpoints" / "step_50" / "state.json").write_text("{")
    drop_spiked(tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_20", "step_30", "step_50", "step_60"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stability.z=0.5", r"stability.z=0.5 must be at least 1"),
        ("stability.window=4", r"stability.window=4 must be at least 8"),
        ("stability.delay=-1", r"stability.delay=-1 must not be negative"),
        ("stability.on_spike=panic", r"stability.on_spike"),
        ("stability.anticipatory=sometimes", r"stability.anticipatory"),
    ],
)
def test_settings_that_are_refused(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config([override])


# Runs.


@pytest.fixture(scope="module")
def read(small_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[int, list[Rows]]:
    """What every step of the undisturbed run reads, which goes to ``clean``."""
    with reading() as found:
        found[-1] = [[str(train(spiking_config(small_data, tmp_path_factory.mktemp("clean") / "run")))]]  # type: ignore[list-item]
    return found


@pytest.fixture(scope="module")
def clean(read: dict[int, list[Rows]]) -> Path:
    return Path(str(read[-1][0][0]))


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["kind"] in kinds]


def test_an_undisturbed_run_is_left_alone(clean: Path) -> None:
    assert events(clean, "spike", "rollback") == []
    assert not (clean / "rollbacks.jsonl").exists()


@pytest.fixture(scope="module")
def poisoned_run(
    small_data: Path, read: dict[int, list[Rows]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, list[Rows]]]:
    output = tmp_path_factory.mktemp("poisoned") / "run"
    with poisoned(read[SPIKE][0]), reading() as found:
        train(spiking_config(small_data, output))
    return output, found


def test_a_poisoned_batch(
    poisoned_run: tuple[Path, dict[int, list[Rows]]], clean: Path, read: dict[int, list[Rows]]
) -> None:
    """F18. Found in its step; back to the newest checkpoint before it; the data go on behind it; experts are chosen
    early for six steps; the run ends within the noise of the undisturbed one."""
    run, found = poisoned_run
    (spike,), (rollback,) = events(run, "spike"), events(run, "rollback")
    to = SPIKE // EVERY * EVERY - EVERY  # 15: the update before the spike is not trusted either
    assert (spike["step"], rollback["step"]) == (SPIKE + 1, to)
    assert (run / "rollbacks.jsonl").read_text().count("\n") == 1
    # Rows: those of the way that was left lie beside.
    assert [row["step"] for row in rows(run)] == list(range(1, LENGTH + 1))
    left = read_lines(run / "rolled_back.jsonl")
    assert [row["step"] for row in left] == list(range(to + 1, SPIKE + 2))
    assert left[-1]["train/loss"] > left[-2]["train/loss"] + 1
    assert max(row["train/loss"] for row in rows(run)[to:]) < left[0]["train/loss"] + 0.1
    # Anticipatory routing from there, for a period.
    assert [row["step"] for row in rows(run) if "moe/stale_experts" in row] == list(range(to + 1, to + 7))
    # Data: before the cause the same again, then those behind the spike; the batch itself never again.
    assert [found[step] for step in range(to)] == [read[step] for step in range(to)]
    for step in range(to, SPIKE - 1):
        assert found[step] == [read[step][0]] * 2
    for step in range(SPIKE - 1, LENGTH - 2):
        assert found[step][-1] == read[step + 2][0]
    assert sum(read[SPIKE][0] in tries for tries in found.values()) == 1
    # The end: steps differ by what they read, so compare means; the undisturbed run falls by 0.1 a step.
    ours, theirs = ([row["train/loss"] for row in rows(folder)[-6:]] for folder in (run, clean))
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) < 0.1
    assert rows(run)[:to] == rows(clean)[:to]


@pytest.mark.usefixtures("no_plot")
def test_a_burst_of_the_learning_rate(small_data: Path, clean: Path, tmp_path: Path) -> None:
    """F18. Its step still has the loss of the weights before; the next one tells. Without the guard the run is lost."""
    run, lost = tmp_path / "run", tmp_path / "lost"
    for output, mode in ((run, "rollback"), (lost, "warn")):
        with burst(output, 1e3):
            train(spiking_config(small_data, output, f"stability.on_spike={mode}", "stability.batch=keep"))
        (spike,) = events(output, "spike")
        assert spike["step"] == SPIKE + 2
    assert [event["step"] for event in events(run, "rollback")] == [SPIKE]
    assert events(lost, "rollback") == []
    last = {folder: statistics.mean(row["train/loss"] for row in rows(folder)[-6:]) for folder in (run, lost, clean)}
    assert abs(last[run] - last[clean]) < 0.1 < last[lost] - last[clean]


def stop_in(target: str, after: bool = False, calls: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """Kills a run in the so-manieth call of a function, before or after it does its work."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        module, _, name = target.rpartition(".")
        owner = {"loop": loop, "Guard": Guard}[module]
        function, done = getattr(owner, name), 0

        def stopping(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == calls and not after:
                raise KeyboardInterrupt
            result = function(*arguments, **options)
            if done == calls:
                raise KeyboardInterrupt
            return result

        patch.setattr(owner, name, stopping)

    return apply


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize(
    "stop",
    [
        stop_in("Guard.record"),
        stop_in("Guard.record", after=True),
        stop_in("loop.drop_spiked", after=True, calls=2),
        stop_in("loop.restore", after=True, calls=2),
        stop_in("loop.training_step", calls=SPIKE + 2),
        stop_in("loop.training_step", calls=SPIKE + 9),
    ],
    ids=["before deciding", "decided", "removed", "loaded", "first step", "eighth"],
)
def test_killed_on_the_way_back(
    stop: Callable[[pytest.MonkeyPatch], None],
    small_data: Path,
    read: dict[int, list[Rows]],
    poisoned_run: tuple[Path, dict[int, list[Rows]]],
    tmp_path: Path,
) -> None:
    """F4, F18. The same command arrives where the run would have: every row, every bit of its checkpoints."""
    wanted, run = poisoned_run[0], tmp_path / "run"
    config = spiking_config(small_data, run)
    with poisoned(read[SPIKE][0]):
        with pytest.MonkeyPatch.context() as patch:
            stop(patch)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        train(config)
    assert rows(run) == rows(wanted)
    assert contents(run / "checkpoints") == contents(wanted / "checkpoints")
    assert len(read_lines(run / "rollbacks.jsonl")) == 1
    assert summary(run) == summary(wanted)


@pytest.mark.usefixtures("no_plot")
def test_a_batch_that_is_kept_spikes_until_the_run_stops(
    small_data: Path, read: dict[int, list[Rows]], tmp_path: Path
) -> None:
    """After so many ways back there is one clear end, and again when it is started again; then a setting lets it on."""
    keep = ["stability.batch=keep", "stability.max_rollbacks=2"]
    with poisoned(read[SPIKE][0]):
        for _ in range(2):
            with pytest.raises(DivergedError, match=rf"step {SPIKE + 1}: loss .* gone back 2 times"):
                train(spiking_config(small_data, tmp_path / "run", *keep))
        assert len(events(tmp_path / "run", "rollback")) == 2
        train(spiking_config(small_data, tmp_path / "run", "stability.max_rollbacks=3"))
    assert len(events(tmp_path / "run", "rollback")) == 3
    assert len(rows(tmp_path / "run")) == LENGTH


@pytest.mark.usefixtures("no_plot")
def test_nothing_to_go_back_to(small_data: Path, read: dict[int, list[Rows]], tmp_path: Path) -> None:
    """The run goes on, with anticipatory routing."""
    config = spiking_config(small_data, tmp_path / "run", "checkpoint.every=0")
    with poisoned(read[SPIKE][0]):
        train(config)
    told = [event["text"] for event in events(tmp_path / "run", "spike")]
    assert len(told) == 2 and told[1].startswith(f"there is no checkpoint from before step {SPIKE + 1}")
    ahead = [row["step"] for row in rows(tmp_path / "run") if "moe/stale_experts" in row]
    assert ahead == list(range(SPIKE + 2, SPIKE + 8))


@pytest.mark.usefixtures("no_plot")
def test_gradients_that_stay_infinite(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some skipped steps are skipped; where they do not end, the run goes back, and at last stops."""
    losses_of, run = loop.losses_of, tmp_path / "run"

    def broken(model: Any, batch: Any, counts: Any, plan: Any, statistics: bool) -> Any:
        loss, losses = losses_of(model, batch, counts, plan, statistics)
        done = sum(1 for _ in (run / "metrics.jsonl").open())
        return (loss * math.inf if done >= SPIKE else loss), losses

    monkeypatch.setattr(loop, "losses_of", broken)
    with pytest.raises(DivergedError, match="3 steps in a row had no finite gradient"):
        train(spiking_config(small_data, run, "stability.max_skipped=3", "stability.max_rollbacks=1"))
    assert [event["step"] for event in events(run, "rollback")] == [15]
    assert read_lines(run / "rolled_back.jsonl")[-1]["stability/skipped_steps"] == 3


def test_on_two_processes(
    small_data: Path,
    read: dict[int, list[Rows]],
    poisoned_run: tuple[Path, dict[int, list[Rows]]],
    tmp_path: Path,
) -> None:
    """All processes decide alike and go back together; rows up to the order of sums."""
    run = tmp_path / "run"
    # Sums in another order give AdamW's smallest gradients another size (test_parallel).
    train_together(small_data, run, read[SPIKE][0], 2, "optim.adamw.eps=1e-6", "parallel.expert=2")
    wanted = events(poisoned_run[0], "rollback")[0]
    (rollback,) = events(run, "rollback")
    assert (rollback["step"], rollback["text"]) == (wanted["step"], wanted["text"])
    assert len(events(run, "spike")) == 1
    ours, theirs = rows(run), rows(poisoned_run[0])
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], abs=0.02)
    assert_restored(run)


def test_goes_back_where_owners_alone_have_weights(
    small_data: Path, read: dict[int, list[Rows]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_together(small_data, run, read[SPIKE][0], 2, "precision=bf16", "stages.0.attention=sparse")
    assert_restored(run)


@pytest.mark.slow
def test_zero_goes_back(small_data: Path, read: dict[int, list[Rows]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_together(
        small_data, run, read[SPIKE][0], 2, "optim.matrices=adamw", "parallel.zero=1", "stages.0.attention=sparse"
    )
    assert len(events(run, "rollback")) == 1
    assert_restored(run)


def assert_restored(run: Path) -> None:
    """The first step after the way back, routed by present parameters, has the bits that it had before."""
    (rollback,) = events(run, "rollback")
    again, before = rows(run)[rollback["step"]], read_lines(run / "rolled_back.jsonl")[0]
    for key in ("step", "train/loss", "train/mtp_loss", "train/balance_loss", "train/grad_norm"):
        assert again[key] == before[key], key


# The way back, by itself.


@contextmanager
def alarm(step: int) -> Iterator[None]:
    """The guard speaks after this step, once, though nothing is wrong."""
    observe = Guard.observe

    def cry(self: Guard, now: int, *arguments: Any) -> Spike | None:
        found = observe(self, now, *arguments)
        return Spike(now, now, "none") if now == step and not self.rollbacks else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "observe", cry)
        yield


BACK = ["stability.anticipatory=never", "stability.batch=keep", "checkpoint.every=2", "checkpoint.keep=4"]
KINDS = {
    "plain": [],
    "beside training": ["checkpoint.asynchronous=true"],
    "reading ahead": ["data.workers=2"],
    "fp4_qat": ["precision=fp4_qat", "model.index_head_dim=32"],
    "adamw": ["optim.matrices=adamw"],
}


def same_but_for_what_is_known_of_it(run: Path, straight: Path) -> None:
    """Rows and the last checkpoint, bit for bit; the state alone remembers the rollback."""
    told = "stability/rollbacks"
    ours, theirs = ([{k: v for k, v in row.items() if k != told} for row in rows(folder)] for folder in (run, straight))
    assert ours == theirs
    last = f"step_{len(theirs)}"
    ours, theirs = (contents(folder / "checkpoints" / last) for folder in (run, straight))
    for name in theirs:
        assert ours[name] == theirs[name] or name in ("state.json", "manifest.json"), name
    first, second = (
        json.loads((folder / "checkpoints" / last / "state.json").read_text()) for folder in (run, straight)
    )
    assert (first["stability"].pop("rollbacks"), second["stability"].pop("rollbacks")) == (1, 0)
    assert first == second


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_alone_changes_nothing(kind: str, small_data: Path, tmp_path: Path) -> None:
    """Weights, optimizer, router biases, data, random state and what is kept between steps: all of it goes back."""
    for name in ("run", "straight"):
        with alarm(6) if name == "run" else nullcontext():
            train(tiny_config(small_data, tmp_path / name, *BACK, *KINDS[kind]))
    assert [event["step"] for event in events(tmp_path / "run", "rollback")] == [4]
    same_but_for_what_is_known_of_it(tmp_path / "run", tmp_path / "straight")


@pytest.mark.usefixtures("no_plot")
def test_adapters_go_back(release: Path, chat: Path, tmp_path: Path) -> None:
    """The random numbers of their dropout as well."""
    command = [
        "run=lora",
        f"model.pretrained={release}",
        f"data.path={chat}",
        *QUICK,
        *BACK,
        "lora.dropout=0.1",
        "stability.on_spike=rollback",
        "lora.targets=[shared_experts]",
        "steps=6",
    ]
    for name in ("run", "straight"):
        with alarm(5) if name == "run" else nullcontext():
            train(load_config([*command, f"output={tmp_path / name}"]))
    assert [event["step"] for event in events(tmp_path / "run", "rollback")] == [2]
    same_but_for_what_is_known_of_it(tmp_path / "run", tmp_path / "straight")
