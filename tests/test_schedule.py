"""The schedule: stages, ramps, learning rate shapes, and that a cap on the steps changes nothing but the end."""

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from openv4.optim.schedule import Plan, Schedule, Stage

MAX_BATCH = 75_497_472
TRILLION = 10**12


def stage(**changes: Any) -> Stage:
    values: dict[str, Any] = {"name": "s", "tokens": 1000, "sequence_length": 10, "batch_tokens": 100, "lr": 1.0}
    return Stage(**(values | changes))


def walk(schedule: Schedule) -> list[Plan]:
    plans, tokens = [], 0
    while (plan := schedule.plan(len(plans), tokens)) is not None:
        plans.append(plan)
        tokens += plan.tokens
    assert len(plans) == schedule.total_steps
    assert tokens == schedule.total_tokens
    return plans


def flash_stages() -> list[Stage]:
    """Published numbers of DeepSeek-V4-Flash; ramp and stage boundaries are unpublished, these are plausible."""
    first = Stage(
        "4k",
        tokens=TRILLION // 2,
        sequence_length=4096,
        batch_tokens=MAX_BATCH,
        batch_tokens_start=3072 * 4096,
        batch_ramp_tokens=469 * 10**9,
        lr=2.7e-4,
        warmup_steps=2000,
        attention="dense",
    )
    plain = replace(first, batch_tokens_start=None, batch_ramp_tokens=0, warmup_steps=0)
    return [
        first,
        replace(plain, name="16k", sequence_length=16384),
        replace(plain, name="64k", sequence_length=65536, tokens=25 * TRILLION, attention="sparse"),
        replace(
            plain,
            name="1m",
            sequence_length=2**20,
            tokens=6 * TRILLION,
            attention="sparse",
            lr_shape="cosine",
            lr_end=2.7e-5,
            mtp_weight=0.1,
        ),
    ]


def test_constant_stage() -> None:
    plans = walk(Schedule([stage(mtp_weight=0.2, balance_weight=0.5, bias_speed=0.25, attention="dense")]))
    assert plans == [Plan(0, "s", 10, 10, 1.0, "dense", 0.2, 0.5, 0.25, 0.0)] * 10


WEIGHTS = {"mtp_weight": 0.2, "balance_weight": 0.5, "bias_speed": 0.25, "indexer_weight": 0.125}


@pytest.mark.parametrize(
    ("attention", "wanted"),
    [
        ("dense", WEIGHTS | {"indexer_weight": 0.0}),
        ("indexer_warmup", dict.fromkeys(WEIGHTS, 0.0) | {"indexer_weight": 1.0}),
        ("sparse", WEIGHTS),
    ],
)
def test_weights_go_with_the_attention(attention: str, wanted: dict[str, float]) -> None:
    (plan, *_) = plans = walk(Schedule([stage(attention=attention, **WEIGHTS)]))
    assert plans == [plan] * 10
    assert plan.attention == attention
    assert {key: getattr(plan, key) for key in WEIGHTS} == wanted


def test_the_indexer_s_weight_by_default_and_off() -> None:
    assert walk(Schedule([stage()]))[0].indexer_weight == 0.01
    assert walk(Schedule([stage(indexer_weight=0)]))[0].indexer_weight == 0.0


def test_an_indexer_warmup_is_a_stage_like_others() -> None:
    """It may ramp, warm up and decay; before, between and after others; and, as the last, go on beyond the end."""
    warmup = stage(
        name="w",
        attention="indexer_warmup",
        lr=2.0,
        lr_shape="cosine",
        lr_end=0.5,
        warmup_steps=3,
        batch_tokens_start=20,
        batch_ramp_tokens=400,
    )
    plans = walk(Schedule([warmup, stage(attention="dense"), warmup, stage(name="t"), warmup], steps=100))
    assert list(dict.fromkeys((plan.stage, plan.attention) for plan in plans)) == [
        (0, "indexer_warmup"),
        (1, "dense"),
        (2, "indexer_warmup"),
        (3, "sparse"),
        (4, "indexer_warmup"),
    ]
    assert {plan.lr for plan in plans if plan.name == "t"} == {1.0}, "the learning rate goes on as if nothing had been"
    assert (plans[-1].indexer_weight, plans[-1].lr, plans[-1].rows) == (1.0, 0.5, 10)


def test_warmup_counts_the_steps_of_its_stage() -> None:
    schedule = Schedule([stage(warmup_steps=4), stage(name="t", lr=2.0, warmup_steps=2)])
    lrs = [plan.lr for plan in walk(schedule)]
    assert lrs[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lrs[10:14] == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_begins_after_the_warmup_and_ends_at_lr_end(shape: str) -> None:
    schedule = Schedule([stage(lr_shape=shape, lr_end=0.1, warmup_steps=3)], steps=12)
    lrs = [plan.lr for plan in walk(schedule)]
    assert lrs[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    for step in range(2, 10):
        done = (step - 2) / 8
        done = done if shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        assert lrs[step] == pytest.approx(1 - 0.9 * done)
    assert lrs[10:] == [0.1, 0.1]


def test_batch_ramp_is_linear_in_tokens() -> None:
    schedule = Schedule([stage(tokens=5000, batch_tokens_start=20, batch_ramp_tokens=2000)])
    tokens = 0
    for plan in walk(schedule):
        wanted = min(20 + 80 * tokens / 2000, 100)
        assert plan.rows == math.floor(wanted / 10)
        tokens += plan.tokens
    assert plan.rows == 10


def test_stages_end_at_nominal_sums() -> None:
    schedule = Schedule([stage(tokens=250), stage(name="t", tokens=250, sequence_length=20, batch_tokens=40)])
    plans = walk(schedule)
    assert [plan.stage for plan in plans] == [0] * 3 + [1] * 5
    assert [plan.rows for plan in plans] == [10] * 3 + [2] * 5
    assert schedule.total_tokens == 500
    # A batch that passes over a whole stage leaves it without a step.
    plans = walk(Schedule([stage(tokens=210), stage(name="t", tokens=50), stage(name="u", tokens=240)]))
    assert [plan.name for plan in plans] == ["s"] * 3 + ["u"] * 2


@pytest.mark.parametrize("tokens", [210, 990, 1000])
def test_cap_and_extension_change_only_the_end(tokens: int) -> None:
    stages = [
        stage(warmup_steps=2, batch_tokens_start=20, batch_ramp_tokens=400),
        stage(name="t", tokens=tokens, lr_shape="cosine", lr_end=0.1),
    ]
    whole = walk(Schedule(stages))
    long = walk(Schedule(stages, steps=60))
    assert long[: len(whole)] == whole
    assert [plan.lr for plan in long[len(whole) :]] == [0.1] * (60 - len(whole))
    assert {(plan.name, plan.rows) for plan in long[len(whole) :]} == {("t", 10)}
    for steps in (0, 1, 5, len(whole), 30):
        assert walk(Schedule(stages, steps=steps)) == long[:steps]


def test_extension_keeps_the_full_batch_when_the_ramp_ends_with_the_stage() -> None:
    plans = walk(Schedule([stage(batch_tokens_start=20, batch_ramp_tokens=1000)], steps=50))
    assert plans[-1].rows == 10


def test_plan_is_pure() -> None:
    schedule = Schedule(flash_stages())
    first = [schedule.plan(step, step * MAX_BATCH) for step in range(0, 400_000, 40_000)]
    again = [schedule.plan(step, step * MAX_BATCH) for step in reversed(range(0, 400_000, 40_000))]
    assert first == again[::-1]


def test_flash() -> None:
    began = time.perf_counter()
    schedule = Schedule(flash_stages())
    assert time.perf_counter() - began < 1.0
    assert math.ceil(32 * TRILLION / MAX_BATCH) == 423_856
    assert 423_856 < schedule.total_steps < 440_000
    assert 0 <= schedule.total_tokens - 32 * TRILLION < MAX_BATCH
    first = schedule.plan(0, 0)
    assert first is not None
    assert (first.rows, first.attention, first.lr) == (3072, "dense", pytest.approx(2.7e-4 / 2000))
    rows = []
    for tokens in (6 * TRILLION // 10, 3 * TRILLION, 30 * TRILLION):
        plan = schedule.plan(200_000, tokens)
        assert plan is not None
        rows.append(plan.rows)
    assert rows == [4608, 1152, 72]
    last = schedule.plan(schedule.total_steps - 1, 32 * TRILLION - 1)
    assert last is not None
    assert (last.lr, last.mtp_weight) == (pytest.approx(2.7e-5), 0.1)
    assert schedule.plan(schedule.total_steps, 32 * TRILLION) is None
    constant = Schedule([replace(flash_stages()[2], tokens=32 * TRILLION)])
    assert constant.total_steps == 423_856


def test_the_walk_at_construction_equals_the_steps() -> None:
    """Thousands of different batch sizes, stepped one by one: `walk` compares steps and tokens."""
    first = replace(flash_stages()[0], tokens=3 * 10**10, batch_ramp_tokens=2 * 10**10, warmup_steps=200)
    plans = walk(Schedule([first, replace(flash_stages()[3], tokens=10**10)]))
    assert len({plan.rows for plan in plans}) > 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"batch_tokens": 95}, "batch_tokens = 95: make it a multiple of sequence_length = 10, e.g. 100"),
        ({"batch_tokens_start": 25, "batch_ramp_tokens": 10}, "batch_tokens_start = 25: make it a multiple"),
        ({"batch_tokens_start": 20}, "batch_ramp_tokens = 0"),
        ({"batch_ramp_tokens": 20}, "batch_ramp_tokens = 20"),
        ({"batch_tokens_start": 200, "batch_ramp_tokens": 20}, "can only grow"),
        ({"batch_tokens_start": 20, "batch_ramp_tokens": 2000}, "at most tokens = 1000"),
        ({"lr_shape": "cosin", "lr_end": 0.1}, "lr_shape = 'cosin': choose one of constant, linear, cosine"),
        ({"attention": "full"}, "attention = 'full': choose one of dense, indexer_warmup, sparse"),
        ({"lr_end": 0.1}, "lr_end = 0.1: drop it"),
        ({"lr_shape": "linear"}, "lr_end = None"),
        ({"mtp_weight": -0.1}, "mtp_weight = -0.1"),
        ({"indexer_weight": -0.01}, "indexer_weight = -0.01: give 0 or more"),
        ({"indexer_weight": math.nan}, "indexer_weight = nan"),
        ({"indexer_weight": math.inf, "attention": "dense"}, "indexer_weight = inf"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
    ],
)
def test_bad_stages_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="stage 's'") as error:
        stage(**changes)
    assert message in str(error.value)


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="stages is empty"):
        Schedule([])
    with pytest.raises(ValueError, match="steps = -1"):
        Schedule([stage()], steps=-1)
    with pytest.raises(ValueError, match="warmup_steps = 11: the stage holds 10 steps"):
        Schedule([stage(warmup_steps=11)])
