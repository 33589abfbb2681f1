"""What a run tells: its rows, its plot, its folder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import STEPS, contents, refuse_constant, tiny_config

import openv4.train.metrics as metrics
from openv4.train.config import TrainConfig, from_yaml
from openv4.train.loop import train
from openv4.train.metrics import MetricsFile, Row, Terminal, finite, plot_loss, read_metrics, write_environment

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
    expected = [".lock", "checkpoints", "config.yaml", "env.json", "metrics.jsonl", "plots", "summary.json", *tokenizer]
    assert sorted(path.name for path in run.iterdir()) == expected
    assert from_yaml(TrainConfig, (run / "config.yaml").read_text()) == config
    assert (run / "checkpoints" / "latest").read_text() == f"step_{STEPS}\n"
    assert list(contents(run / "plots")) == ["loss.png"]
    assert contents(run / "plots")["loss.png"].startswith(PNG)
    environment = json.loads((run / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert {"git", "python", "platform", "cpus", "threads", "gpus"} <= environment.keys()
    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse_constant)
    assert (summary["step"], summary["tokens"], summary["skipped"]) == (STEPS, 1664, 0)
    assert summary["validation/bits_per_byte"] < summary["validation/untrained_bits_per_byte"]


def test_the_environment_is_told_outside_a_repository_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "a" / "b" / "metrics.py"))
    write_environment(tmp_path / "env.json")
    assert json.loads((tmp_path / "env.json").read_text())["git"] is None
