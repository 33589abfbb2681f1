"""What a run tells: its rows, its plot, its folder."""

import json
import math
import random
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import STEPS, contents, refuse_constant, tiny_config

import openv4.train.environment as environment
import openv4.train.loop as loop
from openv4.train.checkpoint import TrainState
from openv4.train.config import TrainConfig, from_yaml
from openv4.train.environment import write_environment
from openv4.train.loop import train, training_step
from openv4.train.metrics import (
    GROUPS,
    EventLog,
    ExpertLoadFile,
    MetricsFile,
    Row,
    Terminal,
    duration,
    finite,
    plot_loss,
    read_lines,
    read_metrics,
    summarize_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

REQUIRED = {"step", "tokens", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"}
PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, loss: float = 2.0) -> Row:
    speed = {"train/tokens_per_second": 5.0}
    return {"step": step, "tokens": 10 * step, "train/loss": loss, "train/lr": 0.1, "train/grad_norm": 1.0} | speed


def strict(path: Path) -> list[dict[str, float | int | None]]:
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


# The file.


def test_rows_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(1, 6):
        first.write(row(step))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    with path.open("a") as file:
        file.write(json.dumps(row(6))[:-9])
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    again = MetricsFile(path, 4)
    assert strict(path) == [row(step) for step in range(1, 5)]
    again.write(row(5, 7.0))
    assert [r["train/loss"] for r in read_metrics(path)] == [2.0] * 4 + [7.0]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_a_line_torn_anywhere(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row(step)) for step in (1, 2)]
    path.write_text(lines[0] + "\n" + lines[1][:cut])
    assert MetricsFile(path, 9) and strict(path) == [row(1)]


def test_a_whole_last_line_without_its_newline_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)))
    MetricsFile(path, 1).write(row(2))
    assert strict(path) == [row(1), row(2)]


def test_numbers_that_json_lacks_become_null_and_come_back_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step, loss in enumerate((math.nan, math.inf, -math.inf, 1.5), 1):
        file.write(row(step, loss))
    assert [r["train/loss"] for r in strict(path)] == [None, None, None, 1.5]
    assert [math.isnan(r["train/loss"]) for r in read_metrics(path)] == [True, True, True, False]
    before = path.read_text()
    MetricsFile(path, 4)
    assert path.read_text() == before
    assert finite({"a": None, "b": 3, "c": math.nan}) == {"a": None, "b": 3, "c": None}


def load_rows(path: Path) -> list[int]:
    return [row["step"] for row in strict(path)]  # type: ignore[misc]


@pytest.mark.parametrize("every", [1, 7, 100])
@pytest.mark.parametrize("blocks", [1, 43])
def test_the_file_of_expert_loads_stays_small(every: int, blocks: int, tmp_path: Path) -> None:
    """Evenly spread over the run, from its first step, whatever its length and the model's size."""
    path = tmp_path / "load.jsonl"
    file = ExpertLoadFile(path, 0)
    load = {f"layers.{block}": [block + 1 / 3] * 256 for block in range(blocks)}
    most = 60 if blocks == 43 else 200  # 4 MB / (43 * 256 * 6 bytes)
    for step in [1, *range(every, 1200 * every, every)]:
        file.write(step, load)
    steps = load_rows(path)
    assert steps[0] == 1 and most / 2 - 1 <= len(steps) <= most + 1
    gaps = [after - before for before, after in pairwise(steps[1:])]
    assert max(gaps) - min(gaps) <= every
    assert path.stat().st_size < 4_500_000
    assert strict(path)[-1]["load"]["layers.0"] == [0.33] * 256  # type: ignore[index, call-overload]


@pytest.mark.parametrize("seed", range(20))
def test_interruptions_leave_no_trace_in_the_expert_loads(seed: int, tmp_path: Path) -> None:
    """Stopped anywhere, gone on from any earlier step, again and again."""
    rng = random.Random(seed)
    end, every = rng.randint(300, 3000), rng.choice([1, 3, 10])
    logged = sorted({1, *range(every, end + 1, every), *range(25, end + 1, 25)})
    load = {"layers.0": [1.0] * 8}
    straight, broken = tmp_path / "straight.jsonl", tmp_path / "broken.jsonl"
    file = ExpertLoadFile(straight, 0)
    for step in logged:
        file.write(step, load)
    at = 0
    while at < end:
        file, stop = ExpertLoadFile(broken, at), rng.randint(at, end + 50)
        for step in [step for step in logged if at < step <= stop]:
            file.write(step, load)
        at = end if stop >= end else rng.randint(at, stop)
    assert broken.read_bytes() == straight.read_bytes()


def test_events_are_added_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write(0, "start", 'a "name"\nof two lines')
    with path.open("a") as file:
        file.write('{"time": "2026-01-01T00:0')  # killed while it wrote
    EventLog(path).write(3, "resume", "from step_3")
    found = read_lines(path)
    assert [(event["step"], event["kind"]) for event in found] == [(0, "start"), (3, "resume")]
    assert found[0]["text"] == 'a "name"\nof two lines'
    assert all(datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0) for event in found)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (RuntimeError("out of\nmemory"), "failed", "RuntimeError: out of memory"),
    ],
)
def test_what_ends_a_run_is_an_event(error: BaseException, kind: str, text: str, tmp_path: Path) -> None:
    log, state = EventLog(tmp_path / "events.jsonl"), TrainState(step=4)

    def work() -> None:
        state.step = 7
        raise error

    with pytest.raises(type(error)), log.closing(state):
        work()
    (event,) = read_lines(log.path)
    assert (event["step"], event["kind"], event["text"]) == (7, kind, text)


def test_a_run_in_a_few_numbers() -> None:
    """Rows of unequal distances: time is what tokens took, speeds are medians."""
    keys = ("step", "tokens", "train/loss", "train/tokens_per_second", "train/mfu", "system/peak_memory_gb")
    values = [(1, 10, 2.0, 5.0, 0.1, 1.0), (2, 40, 1.0, 10.0, 0.2, 3.0), (5, 100, -2.0, 60.0, 0.9, 2.0)]
    rows: list[Row] = [dict(zip(keys, row, strict=True)) for row in values]
    expected = {"train/loss": -2.0, "train/tokens_per_second": 10.0, "train/mfu": 0.2, "system/peak_memory_gb": 3.0}
    assert summarize_rows(rows) == expected | {"system/train_seconds": 2.0 + 3.0 + 1.0}
    assert summarize_rows([]) == {}
    assert [duration(s) for s in (0, 61, 3600 * 24 * 2 + 3723)] == ["00:00:00", "00:01:01", "2d 01:02:03"]


# The plot and the terminal.


@pytest.mark.parametrize(
    "losses", [[], [2.0], [3.0, 2.0, 1.0], [3.0, math.nan, 1.0], [math.nan, math.nan], [math.inf, 1.0]], ids=str
)
def test_the_plot_copes_with_any_losses(losses: list[float], tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step, loss in enumerate(losses, 1):
        extra = {"validation/loss": loss} if step % 2 == 0 else {"validation/untrained_loss": loss}
        file.write(row(step, loss) | extra)
    path = plot_loss(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert path.read_bytes().startswith(PNG)


def test_the_terminal_copes_with_losses_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(2, 0) as terminal:
        terminal.show(row(1, math.nan) | {"validation/loss": math.nan, "validation/bits_per_byte": math.inf})
        terminal.show(row(2))
    output = capsys.readouterr().out
    assert "step 1/2  loss nan  5 tokens/s  validation inf bits per byte" in output
    assert "step 2/2  loss 2.0000" in output


# The folder.


@pytest.fixture(scope="module")
def finished(small_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[TrainConfig, Path]:
    config = tiny_config(small_data, tmp_path_factory.mktemp("metrics") / "run", "validation.every=3")
    return config, train(config)


def seldom(config: TrainConfig, output: Path, every: int) -> TrainConfig:
    logging, validation = replace(config.logging, every=every), replace(config.validation, every=0)
    return replace(config, output=str(output), logging=logging, validation=validation)


def test_every_step_has_a_row_with_the_promised_keys(finished: tuple[TrainConfig, Path]) -> None:
    found = strict(finished[1] / "metrics.jsonl")
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for r in found:
        assert r.keys() >= REQUIRED
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in r.values())
        assert r["train/tokens_per_second"] > 0  # type: ignore[operator]
        assert isinstance(r["step"], int) and isinstance(r["tokens"], int)
    assert [r["step"] for r in found if "validation/loss" in r] == [3, 6]
    assert [r["step"] for r in found if "validation/untrained_bits_per_byte" in r] == [1]


def test_rows_tell_the_health_of_every_part(finished: tuple[TrainConfig, Path]) -> None:
    for r in strict(finished[1] / "metrics.jsonl"):
        assert {"mhc/forward_gain", "attn/sink_mass", "stability/clamp_rate", "moe/dead_experts"} <= r.keys()
        groups = {key.removeprefix("optim/update_rms/") for key in r if key.startswith("optim/")}
        assert {"embedding_and_head", "attention", "router", "routed_experts", "mHC_projections"} <= groups
        assert [key for key in r if key.startswith("moe/load_max/")] == [
            f"moe/load_max/{name}" for name in ("layers.0", "layers.1", "mtp.0")
        ]


def test_every_metric_is_of_a_group(finished: tuple[TrainConfig, Path]) -> None:
    keys = {key for r in strict(finished[1] / "metrics.jsonl") for key in r} - {"step", "tokens"}
    assert {key.split("/")[0] for key in keys} == set(GROUPS) - {"precision"}  # of FP8 and FP4
    assert {"attn/indexer_kl", "attn/indexer_kl_uniform"} <= keys


def test_rows_tell_time_and_memory(finished: tuple[TrainConfig, Path]) -> None:
    found = strict(finished[1] / "metrics.jsonl")
    for r in found:
        assert 0.05 < r["system/peak_memory_gb"] < 100  # type: ignore[operator]
        assert 0 <= r["system/data_wait"] <= 1  # type: ignore[operator]
        speed = r["train/batch_tokens"] / r["system/step_seconds"]  # type: ignore[operator]
        assert speed == pytest.approx(r["train/tokens_per_second"])  # every step has a row here
    assert [r["step"] for r in found if "system/validation_seconds" in r] == [1, 4, 7]  # in the row after it
    assert [r["step"] for r in found if "system/checkpoint_seconds" in r] == []  # one, at the end


def test_expert_loads_are_those_of_the_rows(finished: tuple[TrainConfig, Path]) -> None:
    found = strict(finished[1] / "metrics.jsonl")
    loads = strict(finished[1] / "expert_load.jsonl")
    assert [r["step"] for r in loads] == [r["step"] for r in found]
    for r, written in zip(found, loads, strict=True):
        for name, load in written["load"].items():  # type: ignore[union-attr]
            assert max(load) == pytest.approx(r[f"moe/load_max/{name}"], abs=0.005)
            assert sum(load) == pytest.approx(4, abs=0.03)


def test_events_tell_the_way_of_a_run(finished: tuple[TrainConfig, Path]) -> None:
    found = [(event["step"], event["kind"]) for event in read_lines(finished[1] / "events.jsonl")]
    assert found == [(0, "start"), (5, "stage"), (STEPS, "checkpoint"), (STEPS, "end")]


def test_a_resume_tells_what_it_repeats(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(finished[0], output=str(tmp_path / "run"), checkpoint=replace(finished[0].checkpoint, every=2))
    done = 0

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done == 6:
            raise KeyboardInterrupt
        return training_step(*arguments, **options)

    monkeypatch.setattr(loop, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    train(config)
    found = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["kind"] != "checkpoint"]
    kinds = ["start", "stage", "interrupted", "resume", "stage", "end"]
    assert [event["kind"] for event in found] == kinds
    assert [event["step"] for event in found] == [0, 5, 5, 4, 5, STEPS]
    assert found[3]["text"] == "from step_4; 1 logged steps are done again"


def test_a_row_every_third_step(finished: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    """And of the first one, which also holds the validation before it; the values are those of every step's rows."""
    run = train(seldom(finished[0], tmp_path / "run", 3))
    found = strict(run / "metrics.jsonl")
    assert [r["step"] for r in found] == [1, 3, 6]
    every = {r["step"]: r for r in strict(finished[1] / "metrics.jsonl")}
    for r in found:
        for key in ("tokens", "train/loss", "train/grad_norm", "moe/load_max", "mhc/forward_gain"):
            assert r[key] == every[r["step"]][key]
        assert r.keys() >= REQUIRED


def test_a_run_shorter_than_its_logging_interval(finished: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    run = train(replace(seldom(finished[0], tmp_path / "run", 100), steps=2))
    assert [r["step"] for r in strict(run / "metrics.jsonl")] == [1]
    assert json.loads((run / "summary.json").read_text())["step"] == 2


def test_what_a_run_leaves(finished: tuple[TrainConfig, Path]) -> None:
    config, run = finished
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    written = ["config.yaml", "env.json", "events.jsonl", "expert_load.jsonl", "metrics.jsonl", "summary.json"]
    expected = [".lock", "checkpoints", "plots", *written, *tokenizer]
    assert sorted(path.name for path in run.iterdir()) == sorted(expected)
    assert from_yaml(TrainConfig, (run / "config.yaml").read_text()) == config
    assert (run / "checkpoints" / "latest").read_text() == f"step_{STEPS}\n"
    assert list(contents(run / "plots")) == ["loss.png"]
    assert contents(run / "plots")["loss.png"].startswith(PNG)
    told = json.loads((run / "env.json").read_text())
    assert told["packages"]["torch"] == torch.__version__
    assert {"git", "git_dirty", "python", "platform", "cpus", "threads", "gpus"} <= told.keys()
    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse_constant)
    assert (summary["step"], summary["tokens"], summary["skipped"]) == (STEPS, 1664, 0)
    assert summary["validation/bits_per_byte"] < summary["validation/untrained_bits_per_byte"]


def test_the_environment_is_told_outside_a_repository_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b" / "environment.py"))
    write_environment(tmp_path / "env.json")
    assert json.loads((tmp_path / "env.json").read_text())["git"] is None
