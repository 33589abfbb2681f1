"""The page of a report: one HTML document that holds all it needs, still or live."""

import html
import json
import math
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from plotly.offline import get_plotlyjs

from ..train.metrics import duration
from ..train.record import Record, differences
from .charts import MAX_POINTS, charts


def contents(records: Sequence[Record]) -> dict[str, Any]:
    """What the page shows, as JSON: the tables as HTML, in which everything from files is escaped, and the charts."""
    return {
        "title": ", ".join(record.name for record in records),
        "head": _run_table(records),
        "tail": _events(records) + _differences(records) + _configs(records),
        "charts": charts(records),
    }


def page(values: dict[str, Any], interval: float | None = None) -> str:
    """The document; with an ``interval`` it asks for ``data.json`` every so many seconds and draws what is new."""
    settings = json.dumps(values | {"interval": interval}).replace("<", "\\u003c")  # no tag can end the script
    note = (
        f"A curve of more than {MAX_POINTS:,} points is drawn by the smallest and the largest value of each stretch: "
        "no spike gets lost. With a mouse, drag to zoom and double-click to go back."
    )
    parts = {
        "TITLE": html.escape(values["title"]),
        "NOTE": note,
        "STYLE": _STYLE,
        "SCRIPT": _SCRIPT,
        "PLOTLY": get_plotlyjs(),
        "DATA": settings,
    }
    return re.sub("%([A-Z]+)%", lambda found: parts[found[1]], _PAGE)  # in one go: names may look like our marks


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """A table of cells that are HTML already; the first cell of a row is its heading."""
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f"<div class=scroll><table class='{kind}'>{top}<tbody>{body}</tbody></table></div>"


def _run_table(records: Sequence[Record]) -> str:
    now = time.time()
    rows = [(label, *(_cell(record, label, now) for record in records)) for label in _ROWS]
    rows = [row for row in rows if any(row[1:])]
    if len(records) == 1:
        return f"<dl>{''.join(f'<div><dt>{label}</dt><dd>{cell}</dd></div>' for label, cell in rows)}</dl>"
    return _table(rows, ("", *(html.escape(record.name) for record in records)), "runs")


_ROWS = (
    "state",
    "model",
    "parameters",
    "tokens",
    "steps",
    "training loss",
    "best validation, in training",
    "final validation",
    "tokens/s",
    "MFU",
    "training time",
    "peak memory",
    "skipped steps",
    "stages",
    "hardware",
    "code",
)


def _cell(record: Record, label: str, now: float) -> str:
    match label:
        case "state":
            state, text = record.state(now)
            return f"<span class='state {state}'>{state}</span> {html.escape(text)}"
        case "model":
            return _model(record)
        case "parameters":
            return "" if record.parameters is None else f"{_si(record.parameters)}"
        case "tokens" | "steps":
            last = record.last(label.removesuffix("s") if label == "steps" else label)
            return "" if last is None else f"{last:,.0f}"
        case "training loss":
            return _number(record.last("train/loss"), ".4f")
        case "best validation, in training":
            found = [record.column("validation/loss").tolist(), [record.summary.get("validation/loss")]]
            values = [v for part in found for v in part if isinstance(v, int | float) and math.isfinite(v)]
            return _number(min(values, default=None), ".4f")
        case "final validation":
            bits = record.summary.get("validation/bits_per_byte")
            return f"{bits:.3f} bits per byte" if isinstance(bits, int | float) else ""
        case "tokens/s":
            return _number(record.median("train/tokens_per_second"), ",.0f", " (median)")
        case "MFU":
            return _number(record.median("train/mfu"), ".1%", " (median)")
        case "training time":
            return duration(record.train_seconds) if record.train_seconds else ""
        case "peak memory":
            key = "system/peak_gpu_memory_gb" if "system/peak_gpu_memory_gb" in record.columns else _RESIDENT
            return _number(max((v for v in record.column(key).tolist() if v > 0), default=None), ".1f", " GB")
        case "skipped steps":
            return _number(record.last("stability/skipped_steps"), ",.0f")
        case "stages":
            return ", ".join(html.escape(name) for name, _, _ in record.stages)
        case "hardware":
            return _hardware(record.environment)
        case _:
            commit = record.environment.get("git")
            changed = " with changes" if record.environment.get("git_dirty") else ""
            return f"<code>{html.escape(str(commit))[:12]}</code>{changed}" if commit else ""


_RESIDENT = "system/peak_memory_gb"


def _model(record: Record) -> str:
    if record.model is None:
        return html.escape(str(record.config.get("name", "")))
    m = record.model
    text = f"{m.num_hidden_layers} layers, {m.hidden_size:,} wide, {m.n_routed_experts} experts"
    adapted = record.config.get("lora")
    return text + (f", LoRA of rank {html.escape(str(adapted.get('rank')))}" if isinstance(adapted, dict) else "")


def _hardware(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus")
    if isinstance(gpus, list) and gpus:
        return ", ".join(f"{gpus.count(gpu)} x {html.escape(str(gpu))}" for gpu in dict.fromkeys(map(str, gpus)))
    return f"{html.escape(str(environment['cpus']))} CPU cores" if environment.get("cpus") else ""


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _si(number: int) -> str:
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= bound:
            return f"{number / bound:.4g}{unit}"
    return str(number)


def _events(records: Sequence[Record]) -> str:
    """All but checkpoints, of which the last one counts."""
    rows = []
    for record in records:
        saved = [place for place, event in enumerate(record.events) if event.get("kind") == "checkpoint"]
        shown = [event for place, event in enumerate(record.events) if place not in saved[:-1]]
        for event in shown[-200:]:
            run = (record.name,) if len(records) > 1 else ()
            cells = (*run, event.get("time"), event.get("step"), event.get("kind"), event.get("text"))
            rows.append([html.escape(str(cell)) for cell in cells])
    head = (*(("run",) if len(records) > 1 else ()), "time", "step", "event", "")
    return _details("events", f"Events ({len(rows)})", _table(rows, head), open=True) if rows else ""


def _differences(records: Sequence[Record]) -> str:
    if len(records) < 2:
        return ""
    rows = [
        [html.escape(str(cell)) for cell in (key, *("-" if value is None else value for value in values))]
        for key, values in differences(list(records))
    ]
    head = ("key", *(html.escape(record.name) for record in records))
    table = _table(rows, head) if rows else "<p>None but names and places.</p>"
    return _details("differences", "Differences of the configs", table, open=True)


def _configs(records: Sequence[Record]) -> str:
    return "".join(
        _details(
            f"config-{index}",
            f"Resolved config: {html.escape(record.name)}",
            f"<pre>{html.escape(record.config_text)}</pre>",
        )
        for index, record in enumerate(records)
        if record.config_text
    )


def _details(name: str, title: str, body: str, open: bool = False) -> str:
    return f"<details id='{name}'{' open' if open else ''}><summary>{title}</summary>{body}</details>"


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'">
<link rel=icon href="data:,">
<title>%TITLE%</title>
<style>%STYLE%</style>
</head>
<body>
<header>
<h1>%TITLE%</h1>
<p class=controls><span id=when></span>
<label><input type=checkbox id=smooth checked> smooth</label>
<label><input type=checkbox id=log> log scale</label></p>
</header>
<main>
<div id=head></div>
<div id=charts></div>
<div id=tail></div>
<p class=note>%NOTE%</p>
</main>
<script>%PLOTLY%</script>
<script type=application/json id=data>%DATA%</script>
<script>%SCRIPT%</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6675; --line: #dfe3e8;
  --grid: #e7eaee; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12161c; --card: #1a2028; --ink: #e6eaf0; --soft: #9aa6b5; --line: #2c3540; --grid: #2a323c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
header, main { max-width: 1680px; margin: 0 auto; padding: 0 16px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 24px; }
h1 { font-size: 22px; margin: 16px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 26px 0 10px; }
h3 { font-size: 15px; margin: 0; }
.controls { color: var(--soft); margin: 4px 0 10px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.controls label { white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px; border: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 90px; }
tbody th { font-weight: 500; color: var(--soft); white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 190px), 1fr)); gap: 8px; margin: 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 6px 12px; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; overflow-wrap: anywhere; font-weight: 500; }
.state { font-weight: 600; } .running, .complete { color: #16a34a; } .silent { color: #d97706; }
.interrupted, .failed { color: #dc2626; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 10px 10px 6px; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figure.wide { grid-column: 1 / -1; }
figcaption, .note { color: var(--soft); font-size: 13px; }
details { margin: 18px 0; } summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
pre { background: var(--card); border: 1px solid var(--line); padding: 12px; overflow-x: auto; font-size: 13px; }
@media (max-width: 600px) { header, main { padding: 0 10px; } th, td { padding: 4px 8px; } }
"""

_SCRIPT = """
"use strict";
const TITLES = {overview: "Overview", train: "Training", validation: "Validation", moe: "Experts", attn: "Attention",
  mhc: "Hyper-connections", optim: "Optimizer", stability: "Stability", system: "System", data: "Data"};
const byId = (id) => document.getElementById(id);
let state = JSON.parse(byId("data").textContent);
const drawn = new Map();
const touch = matchMedia("(pointer: coarse)").matches;  // there, a finger on a chart scrolls the page
let shownTail = null;

function section(name) {
  let grid = byId("section-" + name);
  if (!grid) {
    const heading = document.createElement("h2");
    heading.textContent = TITLES[name] || name;
    grid = document.createElement("div");
    grid.id = "section-" + name;
    grid.className = "grid";
    byId("charts").append(heading, grid);
  }
  return grid;
}

function place(chart) {
  if (!drawn.has(chart.id)) {
    const figure = document.createElement("figure"), title = document.createElement("h3");
    const plot = document.createElement("div"), note = document.createElement("figcaption");
    figure.append(title, plot, note);
    figure.className = chart.wide ? "wide" : "";
    section(chart.section).append(figure);
    drawn.set(chart.id, {figure, title, plot, note});
  }
  const parts = drawn.get(chart.id);
  parts.title.textContent = chart.title;
  parts.note.textContent = chart.note;
  parts.plot.dataset.chart = chart.id;
  return parts.plot;
}

function styled(chart) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue("--" + name).trim();
  const smooth = byId("smooth").checked, log = chart.log && byId("log").checked;
  const data = chart.data.map((trace) => {
    if (trace.meta === "smooth") return {...trace, visible: smooth};
    if (trace.meta === "raw") return {...trace, opacity: smooth ? 0.35 : 1, showlegend: !smooth};
    return {...trace};
  });
  const layout = {height: 290, ...chart.layout, autosize: true, dragmode: touch ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 8, r: 8, t: 12, b: 8},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("ink")},
    font: {color: color("ink"), size: 12, family: "system-ui, sans-serif"},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: {size: 12}}};
  for (const key of ["xaxis", "yaxis"]) {
    layout[key] = {...(chart.layout[key] || {}), gridcolor: color("grid"), linecolor: color("line"),
      zerolinecolor: color("grid"), automargin: true};
  }
  if (log) { layout.yaxis.type = "log"; delete layout.yaxis.range; }
  layout.uirevision = log ? "log" : "linear";
  return [data, layout];
}

function show() {
  byId("when").textContent = state.when;
  byId("head").innerHTML = state.head;  // escaped where it was made
  if (state.tail !== shownTail) {
    const open = new Map([...document.querySelectorAll("details")].map((d) => [d.id, d.open]));
    byId("tail").innerHTML = shownTail = state.tail;
    for (const details of document.querySelectorAll("details"))
      if (open.has(details.id)) details.open = open.get(details.id);
  }
}

function draw() {
  const wanted = new Set(state.charts.map((chart) => chart.id));
  for (const [id, parts] of drawn) if (!wanted.has(id)) { parts.figure.remove(); drawn.delete(id); }
  for (const chart of state.charts) {
    const [data, layout] = styled(chart);
    Plotly.react(place(chart), data, layout, {responsive: true, displaylogo: false,
      displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]});
  }
}

async function poll() {
  try {
    const answer = await fetch("data.json?have=" + encodeURIComponent(state.version));
    if (!answer.ok) throw new Error(answer.status);
    const fresh = await answer.json();
    state = {...state, ...fresh};
    show();
    if (fresh.charts) draw();
  } catch {
    byId("when").textContent = state.when + "; openv4 report does not answer, trying again";
  }
  setTimeout(poll, state.interval * 1000);
}

show();
draw();
for (const id of ["smooth", "log"]) byId(id).addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
if (state.interval) setTimeout(poll, state.interval * 1000);
"""
