"""`openv4 report`: what it reads, and the page it writes, looked at in a real browser."""

import base64
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from run_cases import tiny_config
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import openv4.train.loop as loop
from openv4.launch import plan
from openv4.launch.charts import MAX_POINTS, charts, thin
from openv4.launch.page import contents, page
from openv4.launch.report import ReportConfig, Server, run, watch
from openv4.train.config import ConfigError, load, to_yaml
from openv4.train.loop import train, training_step
from openv4.train.record import Record, RunReader, differences, open_runs

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' %DATA% <img src=x onerror=alert(2)>"
WIDE, NARROW = (1400, 900), (390, 844)


# Folders.


def row(step: int, loss: float | None, **more: float | None) -> dict[str, Any]:
    health = {"moe/load_max": 1.5, "moe/load_max/layers.0": 1.5, "attn/sink_mass": 0.1, "mhc/forward_gain": 1.0}
    usual = {"train/lr": 1e-3, "train/grad_norm": 1.0, "train/tokens_per_second": 100.0, "train/stage": 0}
    return {"step": step, "tokens": 64 * step, "train/loss": loss} | usual | health | more


def write_rows(folder: Path, rows: list[dict[str, Any]], mode: str = "w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open(mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curve(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [row(step, 8 * step**-0.1 + rng.gauss(0, 0.1)) for step in range(1, steps + 1)]


@pytest.fixture(scope="module")
def real(small_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run of two stages that was interrupted in the fifth step and resumed."""
    config = tiny_config(
        small_data, tmp_path_factory.mktemp("report") / "real", "validation.every=2", "checkpoint.every=3"
    )
    with pytest.MonkeyPatch.context() as patch:
        calls = 0

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            return training_step(*arguments, **options)

        patch.setattr(loop, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        return train(config)


def report(*runs: Path, output: Path) -> str:
    run(ReportConfig(tuple(map(str, runs)), str(output)))
    return output.as_uri()


# The browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.fail(f"{' and '.join(missing)} not found; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"] or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    yield driver
    driver.quit()


def look(browser: webdriver.Chrome, url: str, size: tuple[int, int] = WIDE) -> None:
    """Opens a page; fails if anything is complained of in the console, or asked of another machine."""
    show(browser, url, size)
    wait_for(lambda: ask(browser, "document.querySelectorAll('#charts figure').length === state.charts.length"))
    wait_for(lambda: ask(browser, "[...document.querySelectorAll('.js-plotly-plot')].every(p => p._fullLayout)"))
    complains_of_nothing(browser, url)


def show(browser: webdriver.Chrome, url: str, size: tuple[int, int]) -> None:
    phone = size[0] < 600
    screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    browser.get_log("browser")
    browser.get(url)


def complains_of_nothing(browser: webdriver.Chrome, url: str) -> None:
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    asked = ask(browser, "performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in asked if not name.startswith(("data:", "blob:", url))] == []


def ask(browser: webdriver.Chrome, expression: str) -> Any:
    return browser.execute_script(f"return ({expression})")


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


def drawn(browser: webdriver.Chrome) -> dict[str, dict[str, Any]]:
    """By chart: its size, how many curves and heat maps have ink, and the text on it."""
    found: dict[str, dict[str, Any]] = browser.execute_script("""
        const result = {};
        for (const plot of document.querySelectorAll("[data-chart]")) {
          const svg = plot.querySelector(".main-svg"), box = svg.getBoundingClientRect();
          const ink = (selector, test) => [...plot.querySelectorAll(selector)].filter(test).length;
          result[plot.dataset.chart] = {
            width: box.width, height: box.height, left: box.left, right: box.right,
            curves: ink(".scatterlayer .trace",
              (t) => t.querySelector("path") && t.getBBox().width + t.getBBox().height > 0),
            maps: ink(".heatmaplayer image", (i) => i.getBBox().width > 0),
            text: plot.textContent};
        }
        return result;""")
    return found


def picture(browser: webdriver.Chrome, chart: str) -> np.ndarray[Any, Any]:
    """The pixels of a chart, [height, width, 3] of 0 to 1."""
    element = f"document.querySelector('[data-chart=\"{chart}\"]')"
    browser.execute_script(f"{element}.scrollIntoView()")
    box = ask(browser, f"(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])({element}.getBoundingClientRect())")
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return np.asarray(matplotlib.image.imread(io.BytesIO(base64.b64decode(shot["data"])), format="png"))[..., :3]


OVERVIEW = ("Loss", "Validation, bits per byte", "Learning rate", "Gradient norm", "Throughput")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_real_run_in_a_real_browser(
    size: tuple[int, int], real: Path, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    look(browser, report(real, output=tmp_path / "page.html"), size)
    found = drawn(browser)
    assert set(found) >= {*OVERVIEW, "Expert load", "load-real", "load-history-real", "Attention sinks", "Indexer loss"}
    assert set(found) >= {"Stream mixing, gain through the depth", "Update RMS by parameter group", "Peak memory"}
    for name, chart in found.items():
        assert chart["curves"] + chart["maps"] > 0, name
        assert chart["width"] > 0.4 * min(size[0], 700) and chart["height"] > 150, name
        assert chart["left"] >= 0 and chart["right"] <= size[0], name
    assert ask(browser, "document.scrollingElement.scrollWidth <= innerWidth")
    assert ask(browser, "innerWidth") == size[0]
    for name in ("Loss", "load-real"):
        pixels = picture(browser, name)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        inked = np.abs(pixels - background).max(-1) > 0.15
        assert inked.mean() > 0.002 and len(np.unique(pixels.reshape(-1, 3).round(2), axis=0)) > 10, name
        assert inked.any(0).mean() > 0.5, f"{name}: ink over most of its width"
    font = ask(
        browser,
        "[...document.querySelectorAll('p, td, dd, dt, text')].map(e => parseFloat(getComputedStyle(e).fontSize))",
    )
    assert min(font) >= 12


def test_what_the_page_says_of_a_run(real: Path, browser: webdriver.Chrome, tmp_path: Path) -> None:
    look(browser, report(real, output=tmp_path / "page.html"))
    facts = dict(
        ask(browser, "[...document.querySelectorAll('dl div')].map(d => [...d.children].map(c => c.textContent))")
    )
    summary = json.loads((real / "summary.json").read_text())
    assert facts["state"] == "complete 8 steps" and facts["steps"] == "8" and facts["tokens"] == "1,664"
    assert facts["best validation, in training"] == f"{summary['validation/best_loss']:.4f}"
    assert facts["stages"] == "short, long"
    events = ask(browser, "[...document.querySelectorAll('#events tbody tr')].map(r => r.children[2].textContent)")
    assert events == ["start", "interrupted", "resume", "stage", "checkpoint", "end"]
    loss = drawn(browser)["Loss"]
    assert "short" in loss["text"] and "long" in loss["text"] and "training" in loss["text"]
    assert loss["curves"] == 3, "training, validation, and the marks of interruption and resume"
    assert "hidden_size: 32" in ask(browser, "document.querySelector('#config-0 pre').textContent")


def test_the_switches(browser: webdriver.Chrome, tmp_path: Path) -> None:
    look(browser, report(write_rows(tmp_path / "run", curve(100)), output=tmp_path / "page.html"))
    loss = "document.querySelector('[data-chart=Loss]')"
    state = f"[{loss}._fullLayout.yaxis.type, {loss}._fullData.map(t => t.visible)]"
    assert ask(browser, state) == ["linear", [True, True]]
    browser.execute_script("document.getElementById('smooth').click(); document.getElementById('log').click()")
    wait_for(lambda: ask(browser, state) == ["log", [True, False]])
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_three_runs_of_unequal_length(browser: webdriver.Chrome, tmp_path: Path) -> None:
    runs = [write_rows(tmp_path / place / "same", curve(steps, steps)) for place, steps in (("a", 10), ("b", 70))]
    runs.append(write_rows(tmp_path / "third", curve(300)))
    for number, folder in enumerate(runs):
        (folder / "config.yaml").write_text(f"name: run\noutput: {folder}\noptim: {{lr: {number}}}\nseed: 0\n")
    for size in (WIDE, NARROW):
        look(browser, report(*runs, output=tmp_path / "page.html"), size)
        found = drawn(browser)
        assert found["Learning rate"]["curves"] == 3 and found["Loss"]["curves"] == 5  # two of them with an average
        assert ask(browser, "document.scrollingElement.scrollWidth <= innerWidth")
    heads = ask(browser, "[...document.querySelectorAll('#head th[scope=col]')].map(h => h.textContent)")
    assert heads == ["", str(runs[0]), str(runs[1]), "third"]
    cells = "[...document.querySelectorAll('#differences tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    assert ask(browser, cells) == [["optim.lr", "0", "1", "2"]]


def test_hostile_names(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """In the folder's name, the config, the stages, the events, the names of metrics and experts: text stays text."""
    folder = write_rows(
        tmp_path / HOSTILE.replace("/", "\u2044"), [row(s, 2.0, **{f"odd/{HOSTILE}": s}) for s in (1, 2)]
    )
    other = write_rows(tmp_path / "other", curve(3))
    (folder / "config.yaml").write_text(json.dumps({"name": HOSTILE, "stages": [{"name": HOSTILE}]}))
    (folder / "events.jsonl").write_text(
        json.dumps({"time": HOSTILE, "step": 1, "kind": HOSTILE, "text": HOSTILE}) + "\n"
    )
    (folder / "expert_load.jsonl").write_text(json.dumps({"step": 1, "load": {HOSTILE: [0.5, 1.5]}}) + "\n")
    (folder / "env.json").write_text(json.dumps({"git": HOSTILE, "gpus": [HOSTILE], "cpus": HOSTILE}))
    for runs in ([folder], [folder, other]):
        look(browser, report(*runs, output=tmp_path / "page.html"))
        assert ask(browser, "document.querySelectorAll('script').length") == 3
        assert ask(browser, "document.querySelectorAll('img').length") == 0
        assert folder.name in ask(browser, "document.title")
        assert HOSTILE in ask(browser, "document.querySelector('#events').textContent")
    assert folder.name in drawn(browser)["Learning rate"]["text"]


def test_a_run_with_losses_that_are_not_finite(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Gaps in the curve, in a run that had nothing else too."""
    broken = [row(step, None if 20 < step < 40 else 3.0) for step in range(1, 61)]
    runs = [write_rows(tmp_path / "gap", broken), write_rows(tmp_path / "all", [row(s, None) for s in range(1, 9)])]
    look(browser, report(runs[0], output=tmp_path / "page.html"))
    lines = "[data-chart=Loss] .scatterlayer .trace:first-child path.js-line"
    strokes = ask(browser, f"document.querySelectorAll('{lines}').length")
    assert strokes == 2, "one before the gap and one after it"
    look(browser, report(runs[1], output=tmp_path / "page.html"))
    found = drawn(browser)
    assert "Loss" not in found and found["Learning rate"]["curves"] == 1


def test_a_run_without_rows_yet(browser: webdriver.Chrome, tmp_path: Path) -> None:
    look(browser, report(write_rows(tmp_path / "run", []), output=tmp_path / "page.html"))
    assert drawn(browser) == {}
    assert "running" in ask(browser, "document.getElementById('head').textContent")


@pytest.mark.slow
def test_a_hundred_thousand_rows(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Read, thinned and drawn in seconds; a spike of one step is still on the page, and so is a hole of one."""
    rows = curve(100_000)
    rows[54_321]["train/loss"], rows[65_432]["train/loss"] = 99.0, None
    folder = write_rows(tmp_path / "run", rows)
    start = time.monotonic()
    url = report(folder, output=tmp_path / "page.html")
    look(browser, url)
    assert time.monotonic() - start < 25
    assert (tmp_path / "page.html").stat().st_size < 7e6  # of which plotly.js is 4.9
    y = ask(
        browser, "Array.from(document.querySelector('[data-chart=Loss]')._fullData[0].y).map(v => isNaN(v) ? null : v)"
    )
    assert len(y) <= MAX_POINTS and max(v for v in y if v is not None) == 99.0 and None in y


def test_colours_of_the_dark(browser: webdriver.Chrome, tmp_path: Path) -> None:
    url = report(write_rows(tmp_path / "run", curve(9)), output=tmp_path / "page.html")
    brightness = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        look(browser, url)
        brightness.append(float(np.median(picture(browser, "Loss"))))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert brightness[0] > 0.9 and brightness[1] < 0.2


# Live.


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers: list[Server] = []

    def start(*folders: Path) -> str:
        server = Server(open_runs(tuple(map(str, folders))), 0, 0.2)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_live_page_follows_its_run(serve: Callable[..., str], browser: webdriver.Chrome, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "run", curve(5))
    look(browser, serve(folder))
    points = "document.querySelector('[data-chart=Loss]')._fullData[0].x.length"
    assert ask(browser, points) == 5
    browser.execute_script("window.mark = 'the same page'; document.querySelector('#smooth').click()")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(6, 2.0)) + "\n" + json.dumps(row(7, 1.0, **{"new/metric": 3.0}))[:-9])
        file.flush()
        wait_for(lambda: ask(browser, points) == 6)
        assert "new/metric" not in drawn(browser), "half a line is no row"
        file.write(json.dumps(row(7, 1.0, **{"new/metric": 3.0}))[-9:] + "\n")
    wait_for(lambda: "new/metric" in drawn(browser))
    assert ask(browser, points) == 7
    write_rows(folder, curve(3))  # resumed from an earlier step
    wait_for(lambda: ask(browser, points) == 3)
    assert "new/metric" not in drawn(browser)
    assert ask(browser, "window.mark") == "the same page" and not ask(
        browser, "document.querySelector('#smooth').checked"
    )
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    browser.get("about:blank")


def fetch(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with closing(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_what_the_server_answers(serve: Callable[..., str], tmp_path: Path) -> None:
    """Charts only if they are new, nothing but the two addresses, nobody who calls it by another name."""
    folder = write_rows(tmp_path / "run", curve(5))
    url = serve(folder)
    values = json.loads(fetch(f"{url}data.json?have=")[1])
    assert {chart["title"] for chart in values["charts"]} >= {"Loss", "Learning rate"}
    again = json.loads(fetch(f"{url}data.json?have={values['version']}")[1])
    assert "charts" not in again and again["version"] == values["version"]
    write_rows(folder, [row(6, 1.0)], "a")
    assert "charts" in json.loads(fetch(f"{url}data.json?have={values['version']}")[1])
    assert fetch(f"{url}../metrics.jsonl")[0] == fetch(f"{url}metrics.jsonl")[0] == 404
    assert fetch(url, Host="evil.example:80")[0] == 403
    assert fetch(url, Host="localhost:1")[0] == 200


def test_watch_ends_in_peace_and_tells_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    folder = write_rows(tmp_path / "run", curve(2))
    run(ReportConfig((str(folder),), watch=True, port=0))
    first, second, last = capsys.readouterr().out.splitlines()
    port = int(first.split("127.0.0.1:")[1].split("/")[0])
    assert f"ssh -L {port}:127.0.0.1:{port} " in second and last == "report: ended"
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_port_that_is_taken(serve: Callable[..., str], tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "run", curve(2))
    port = int(serve(folder).rsplit(":", 1)[1].strip("/"))
    with pytest.raises(ConfigError, match=f"port={port}: Address already in use; give another"):
        watch(open_runs((str(folder),)), port, 1.0)


# The command.


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_rows(tmp_path / name, curve(4)) for name in ("one", "two"))
    monkeypatch.chdir(tmp_path)
    run(load("report", ReportConfig, ["runs=[one]"]))
    assert (one / "report.html").exists() and not (tmp_path / "report.html").exists()
    run(load("report", ReportConfig, ["runs=[one,two]"]))
    assert capsys.readouterr().out == "report: one/report.html\nreport: report.html\n"
    assert sorted(path.name for path in two.iterdir()) == ["metrics.jsonl"]
    run(load("report", ReportConfig, ["runs=[one]", "output=other.html"]))
    assert (tmp_path / "other.html").read_text().startswith("<!doctype html>")


def test_a_report_needs_no_torch() -> None:
    program = "import sys, openv4.launch.report; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ("[missing]", [], "missing: no such folder; name the folder of a run"),
        ("[.]", [], "holds no metrics.jsonl; name the folder of a run"),
        ("[]", [], "runs is empty"),
        ("[run]", ["output=run"], "output=run is a folder"),
        ("[run]", ["port=70000"], "port=70000 must be"),
        ("[run]", ["interval=0"], "interval=0.0 must be positive"),
    ],
)
def test_what_is_refused(
    runs: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "run", curve(2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        run(load("report", ReportConfig, [f"runs={runs}", *options]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_secret_of_the_environment_is_on_the_page(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"sesame-{name}")
    report(real, output=tmp_path / "page.html")
    assert "sesame" not in (tmp_path / "page.html").read_text()


# What is read.


def record(folder: Path) -> Record:
    return RunReader(folder).read()


@pytest.mark.parametrize("seed", range(10))
def test_a_file_that_grows_reads_as_the_whole(seed: int, tmp_path: Path) -> None:
    """In portions that end anywhere, with keys that come and go."""
    rng = random.Random(seed)
    rows = []
    for step in range(1, 60):
        values = {key: rng.choice([None, rng.random(), step]) for key in "abcde" if rng.random() < 0.3}
        rows.append({"step": step, "tokens": 10 * step} | values)
    text = "".join(json.dumps(values) + "\n" for values in rows)
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    reader = RunReader(tmp_path)
    for end in sorted({rng.randint(0, len(text)) for _ in range(8)} | {len(text)}):
        path.open("a").write(text[path.stat().st_size : end])
        found = reader.read()
        whole = [json.loads(line) for line in text[:end].splitlines(keepends=True) if line.endswith("\n")]
        assert set(found.columns) == {key for values in whole for key in values}
        for key, column in found.columns.items():
            wanted = [math.nan if values.get(key) is None else values[key] for values in whole]
            assert np.array_equal(column, np.array(wanted, float), equal_nan=True)


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    lines = [json.dumps(row(1, 2.0)), "not json", "[1, 2]", '{"tokens": 3}', json.dumps(row(2, 1.0) | {"a": "text"})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = record(tmp_path)
    assert found.steps.tolist() == [1, 2] and np.isnan(found.column("a")).all()


@pytest.mark.parametrize("points", [0, 1, 7, MAX_POINTS, MAX_POINTS + 1, 12_345])
def test_thinning_keeps_what_matters(points: int) -> None:
    rng = np.random.default_rng(points)
    y = rng.normal(size=points)
    y[rng.random(points) < 0.01] = np.nan
    chosen = thin(y)
    assert len(chosen) <= MAX_POINTS and (np.diff(chosen) > 0).all()
    if points:
        assert chosen[0] == 0 and chosen[-1] == points - 1
        assert np.nanmax(y[chosen]) == np.nanmax(y) if np.isfinite(y).any() else True
    if points <= MAX_POINTS:
        assert len(chosen) == points
    elif points:
        for stretch in np.array_split(np.arange(points), (MAX_POINTS - 1) // 4):
            kept = y[chosen[np.isin(chosen, stretch)]]
            assert np.nanmin(kept) == np.nanmin(y[stretch]) and np.nanmax(kept) == np.nanmax(y[stretch])
            assert np.isnan(kept).any() == np.isnan(y[stretch]).any()


def test_stages_and_places_of_steps(tmp_path: Path) -> None:
    """Batches grow, rows are rare; a stage begins where the one before it had its last row."""
    tokens = list(accumulate([10, 20, 40, 40]))
    rows = [
        {"step": step, "tokens": t, "train/stage": stage}
        for step, t, stage in zip((1, 2, 4, 6), tokens, (0, 0, 1, 2), strict=True)
    ]
    write_rows(tmp_path, rows)
    (tmp_path / "config.yaml").write_text("stages: [{name: a}, {name: b}]")
    found = record(tmp_path)
    assert found.stages == [("a", 0, 30), ("b", 30, 70), ("", 70, 110)]
    assert found.tokens_at(np.array([0.0, 1, 3, 5, 9])).tolist() == [0, 10, 50, 90, 110]


STATES: list[tuple[list[str], int | None, float, str]] = [
    ([], None, 5, "running"),
    ([], None, 5000, "silent"),
    ([], 4, 5000, "complete"),
    ([], 3, 5, "running"),
    (["start", "checkpoint", "end"], 4, 9, "complete"),
    (["start", "end", "resume"], 4, 9, "running"),
    (["start", "interrupted"], None, 9, "interrupted"),
    (["start", "interrupted", "resume"], None, 9, "running"),
    (["start", "failed"], None, 9, "failed"),
]


@pytest.mark.parametrize(("kinds", "done", "age", "state"), STATES)
def test_states(kinds: list[str], done: int | None, age: float, state: str, tmp_path: Path) -> None:
    write_rows(tmp_path, curve(4))
    events = [{"time": "t", "step": 4, "kind": kind, "text": "x"} for kind in kinds]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if done is not None:
        (tmp_path / "summary.json").write_text(json.dumps({"step": done}))
    now = time.time()
    os.utime(tmp_path / "metrics.jsonl", (now - age, now - age))
    assert record(tmp_path).state(now)[0] == state


def test_differences_of_configs(small_data: Path, tmp_path: Path) -> None:
    """Of lists and of what one has and the other has not; names and places do not count."""
    configs = [
        tiny_config(small_data, tmp_path / "a", "seed=1"),
        tiny_config(small_data, tmp_path / "b", "stages.1.lr=0.5"),
    ]
    for name, config in zip("ab", configs, strict=True):
        write_rows(tmp_path / name, curve(2))
        (tmp_path / name / "config.yaml").write_text(to_yaml(config))
    found = differences([record(tmp_path / "a"), record(tmp_path / "b")])
    assert found == [("stages.1.lr", [0.006, 0.5]), ("seed", [1, 0])]


def test_a_folder_of_another_version(tmp_path: Path) -> None:
    """A config with keys that we do not know, files that are broken: the curves are shown all the same."""
    write_rows(tmp_path, curve(3))
    (tmp_path / "config.yaml").write_text("name: old\nunknown: 1\n")
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "events.jsonl").write_text("1\n{\n")
    found = record(tmp_path)
    assert found.model is None and found.parameters is None and found.summary == {} and found.events == []
    (tmp_path / "config.yaml").write_text("a: [")
    assert record(tmp_path).config == {}
    assert "Loss" in page(contents([record(tmp_path)]))


def test_metrics_to_come_get_a_chart(tmp_path: Path) -> None:
    """Of their own, in the section of their group."""
    write_rows(
        tmp_path, [row(step, 1.0, **{"stability/spikes": step, "moe/load_max/layers.1": 2.0}) for step in (1, 2)]
    )
    found = {chart["title"]: chart["section"] for chart in charts([record(tmp_path)])}
    assert found["stability/spikes"] == "stability" and "moe/load_max/layers.1" not in found


def named(records: list[Record], title: str) -> dict[str, tuple[list[float], list[float]]]:
    """By name, the points of each curve of a chart."""
    (chart,) = (chart for chart in charts(records) if chart["title"] == title)
    return {trace["name"]: (numbers(trace["x"]), numbers(trace["y"])) for trace in chart["data"]}


def numbers(values: dict[str, str]) -> list[float]:
    kind = {"f4": np.float32, "f8": np.float64}[values["dtype"]]
    return np.frombuffer(base64.b64decode(values["bdata"]), kind).astype(float).tolist()  # type: ignore[no-any-return]


def test_rare_metrics_are_joined_and_families_are_named(tmp_path: Path) -> None:
    """A validation every fifth step is one curve, from the untrained model on; times of checkpoints start nowhere."""
    for name in "ab":
        rows = curve(10)
        rows[0] |= {"validation/untrained_loss": 9.0, "optim/update_rms/x": 0.5, "optim/update_rms/y": 0.25}
        rows[4] |= {"validation/loss": 5.0, "system/validation_seconds": 0.5}
        rows[9] |= {"validation/loss": None, "system/validation_seconds": 1.5}
        write_rows(tmp_path / name, rows)
    a, b = record(tmp_path / "a"), record(tmp_path / "b")
    assert named([a], "Loss")["validation"] == ([0, 320], [9, 5])
    assert named([a], "Checkpoints and validation") == {"validation": ([320, 640], [0.5, 1.5])}
    assert set(named([a, b], "Update RMS by parameter group")) == {"a, x", "a, y", "b, x", "b, y"}
    assert set(named([a, b], "Learning rate")) == {"a", "b"}


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_page_of_a_plan(browser: webdriver.Chrome, size: tuple[int, int], tmp_path: Path) -> None:
    """`openv4 plan html=`: three charts with their bars, nothing asked of another machine, no sideways scrolling."""
    page = tmp_path / "plan.html"
    plan.run(load("plan", plan.PlanConfig, ["run=smoke", "gpus=2", f"html={page}"]))
    show(browser, page.as_uri(), size)
    plots = "[...document.querySelectorAll('.js-plotly-plot')]"
    wait_for(lambda: ask(browser, f"{plots}.filter(p => p._fullLayout).length === 3"))
    bars = ask(browser, f"{plots}.map(p => p.querySelectorAll('.point path').length)")
    assert all(count >= 2 for count in bars)
    assert ask(browser, "document.scrollingElement.scrollWidth <= innerWidth")
    complains_of_nothing(browser, page.as_uri())
