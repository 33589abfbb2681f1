"""Weights & Biases: an offline run read back from its file, the same run on resume, and failures that stop nothing."""

import base64
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from run_cases import rows, tiny_config
from wandb.proto import wandb_internal_pb2

from openv4.train.config import TrainConfig
from openv4.train.loop import train
from openv4.train.metrics import GROUPS
from openv4.train.wandb_log import WandbLog

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form of a real one


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: 7 bytes of header, then LevelDB log blocks of 32 KiB that hold protocol buffers."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    at, payload = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        payload += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(payload)
            payload = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(file: Path) -> list[dict[str, Any]]:
    return [values(r.history.item) for r in records(file) if r.WhichOneof("record_type") == "history"]


def wandb_files(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def offline(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two parts: four steps, and the same again up to six. A key lies in the environment."""
    run = tmp_path_factory.mktemp("wandb") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        patch.delenv("WANDB_MODE", raising=False)
        for steps in (4, 6):
            train(tiny_config(small_data, run, "logging.wandb=offline", f"steps={steps}", "validation.every=3"))
    return run


def test_history_is_metrics_jsonl(offline: Path) -> None:
    """Every value of every row, as the same number."""
    logged = {row["_step"]: row for file in wandb_files(offline) for row in history(file) if "train/loss" in row}
    written = rows(offline)
    assert [row["step"] for row in written] == sorted(logged) == list(range(1, 7))
    for row in written:
        for key, value in row.items():
            if key != "step":
                assert logged[row["step"]][key] == value, (row["step"], key)
        assert logged[row["step"]]["train/tokens_per_second"] > 0


def test_the_plot_is_logged(offline: Path) -> None:
    for file in wandb_files(offline):
        (path,) = [row["plots/loss/path"] for row in history(file) if "plots/loss/path" in row]
        assert (file.parent / "files" / path).read_bytes().startswith(b"\x89PNG")


def test_groups_are_sections_over_tokens(offline: Path) -> None:
    metrics = [r.metric for r in records(wandb_files(offline)[0]) if r.WhichOneof("record_type") == "metric"]
    globs = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert globs == {f"{group}/*": "tokens" for group in GROUPS}
    logged = {key for file in wandb_files(offline) for row in history(file) for key in row}
    ours = {key for key in logged if not key.startswith(("_", "plots/", "summary"))} - {"tokens"}
    assert ours and all(key.split("/")[0] in GROUPS for key in ours)
    best = {metric.name for metric in metrics if metric.summary.min and metric.summary.last}
    assert best == {"train/loss", "validation/loss", "validation/bits_per_byte"}


def test_the_summary_is_a_table(offline: Path) -> None:
    for file, step in zip(wandb_files(offline), (4, 6), strict=True):
        (path,) = [row["summary/path"] for row in history(file) if "summary/path" in row]
        table = json.loads((file.parent / "files" / path).read_text())
        (row,) = (dict(zip(table["columns"], cells, strict=True)) for cells in table["data"])
        assert row["step"] == step and row["parameters"] > 1000 and row["validation/loss"] > 0
    assert row == json.loads((offline / "summary.json").read_text())


def test_config_file_and_environment_are_saved(offline: Path) -> None:
    """As files of the run, whole and not links, beside W&B's own config.yaml."""
    for file in wandb_files(offline):
        folder = file.parent / "files" / "openv4"
        assert {path.name for path in folder.iterdir()} == {"config.yaml", "env.json"}
        assert not any(path.is_symlink() for path in folder.iterdir())
        sent = [r.files.files for r in records(file) if r.WhichOneof("record_type") == "files"]
        assert {"openv4/config.yaml", "openv4/env.json"} <= {f.path for files in sent for f in files}
    assert (folder / "config.yaml").read_bytes() == (offline / "config.yaml").read_bytes()


def test_config_is_saved(offline: Path, small_data: Path) -> None:
    (run,) = (r.run for r in records(wandb_files(offline)[0]) if r.WhichOneof("record_type") == "run")
    config = values(run.config.update)
    assert config["model"]["hidden_size"] == 32 and config["model"]["compress_ratios"] == [4, 16, 0]
    assert config["stages"][0]["name"] == "short" and config["optim"]["muon"]["momentum"] == 0.95
    assert config["data"]["path"] == str(small_data)
    assert (run.project, run.display_name) == ("openv4", "smoke")
    told = json.loads((offline / "env.json").read_text())
    assert config["code"] == {"git": told["git"], "git_dirty": told["git_dirty"]}


def test_resume_continues_the_same_run(offline: Path) -> None:
    identity = (offline / "wandb_run_id").read_text()
    files = wandb_files(offline)
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{identity}"}
    ids = {r.run.run_id for file in files for r in records(file) if r.WhichOneof("record_type") == "run"}
    assert ids == {identity}
    steps = [[row["_step"] for row in history(file) if "train/loss" in row] for file in files]
    assert steps == [[1, 2, 3, 4], [5, 6]]


def test_no_key_in_any_file(offline: Path) -> None:
    spellings = [KEY.encode(), base64.b64encode(KEY.encode()), base64.b64encode(f"api:{KEY}".encode())]
    files = [path for path in offline.rglob("*") if path.is_file()]
    assert len(files) > 15
    for file in files:
        content = file.read_bytes()
        assert not any(spelling in content for spelling in spellings), file


def test_environment_is_not_recorded(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of other services stay out as well."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", "sesame-open-now")
    log = WandbLog("offline", "openv4", "name", tmp_path, {"a": 1})
    log.write({"step": 1, "train/loss": 2.0})
    log.finish()
    assert len(wandb_files(tmp_path)) == 1
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"sesame-open-now" not in file.read_bytes(), file


# Modes.


class FakeRun:
    """Stands for wandb's run; fails when told to."""

    def __init__(self, fail: str = "", dir: str = "") -> None:
        self.fail, self.dir, self.calls, self.summary = fail, dir, list[str](), dict[str, Any]()

    def define_metric(self, *_: object, **__: object) -> None:
        """Does not talk to anybody."""

    def save(self, *_: object, **__: object) -> None:
        self._call("save")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail == name:
            raise wandb.errors.CommError(f"{name} failed\nand said more")

    def log(self, *_: object, **__: object) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


def started(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str) -> dict[str, Any]:
    """The arguments that `wandb.init` gets, or none if it is not called."""
    seen: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        seen.update(arguments)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    WandbLog(mode, "p", "n", folder, {})
    return seen


def test_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert started(monkeypatch, tmp_path, "disabled") == {}
    assert not (tmp_path / "wandb_run_id").exists()
    assert started(monkeypatch, tmp_path, "auto")["mode"] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    online = started(monkeypatch, tmp_path, "auto")
    assert (online["mode"], online["resume"]) == ("online", "allow")
    assert started(monkeypatch, tmp_path, "offline")["mode"] == "offline", "a key alone sends nothing"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert started(monkeypatch, tmp_path, "auto")["mode"] == "offline", "W&B's own switch"
    assert started(monkeypatch, tmp_path, "online")["mode"] == "online", "but not against the config"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert started(monkeypatch, tmp_path, "auto") == {}
    ids = {started(monkeypatch, tmp_path, mode)["id"] for mode in ("offline", "online")}
    assert ids == {(tmp_path / "wandb_run_id").read_text()}


# Failures.


def small_run(data: Path, output: Path, mode: str) -> TrainConfig:
    return tiny_config(data, output, f"logging.wandb={mode}", "steps=3")


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small_run(small_data, tmp_path_factory.mktemp("undisturbed") / "run", "disabled"))


def complaints(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]


@pytest.mark.parametrize("place", ["init", "save", "log", "image"])
def test_a_failure_stops_nothing(
    place: str,
    small_data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = FakeRun(place, str(tmp_path))

    def init(**_: object) -> FakeRun:
        fake._call("init")
        return fake

    def image(_: str) -> None:
        fake._call("image")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "Image", image)
    run = train(small_run(small_data, tmp_path / "run", "online"))
    assert rows(run) == rows(undisturbed), "training went on as if nothing had happened"
    assert (run / "summary.json").exists()
    (line,) = complaints(capsys)
    assert line == f"W&B stopped (CommError: {place} failed and said more); training goes on without it"
    assert fake.calls[-1] == place, "and W&B was left alone from then on"


def test_an_end_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeRun("finish")
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    log = WandbLog("online", "p", "n", tmp_path, {})
    log.write({"step": 1, "train/loss": 1.0})
    log.finish()
    log.finish()
    assert fake.calls == ["log", "finish"] and len(complaints(capsys)) == 1


def test_wandb_is_not_installed(
    small_data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = train(small_run(small_data, tmp_path / "run", "offline"))
    assert rows(run) == rows(undisturbed)
    (line,) = complaints(capsys)
    assert "ModuleNotFoundError" in line and "training goes on without it" in line


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = WandbLog("offline", "p", "n", tmp_path / "missing", {})
    log.write({"step": 1, "train/loss": 1.0})
    log.image("plot", tmp_path / "none.png")
    log.finish()
    (line,) = complaints(capsys)
    assert "FileNotFoundError" in line


def test_an_interrupt_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is for W&B's errors; Ctrl-C in the middle of a log still ends the run."""

    def init(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(KeyboardInterrupt):
        WandbLog("offline", "p", "n", tmp_path, {})


def test_disabled_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = WandbLog("disabled", "p", "n", tmp_path, {})
    log.write({"step": 1})
    log.image("a", tmp_path)
    log.finish()
    assert list(tmp_path.iterdir()) == []
