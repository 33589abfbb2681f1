"""The charts of a report: which metrics stand together, and how curves, stages and events are drawn with plotly."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from ..train.metrics import GROUPS
from ..train.record import Column, Record

MAX_POINTS = 2000
_COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#ca8a04", "#06b6d4", "#ec4899", "#84cc16", "#8b5cf6")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Events that a curve may bend at; the others are in the list of events only.
_MARKED = {
    "resume": "#3b82f6",
    "skipped": "#ef4444",
    "spike": "#ef4444",
    "rollback": "#a855f7",
    "interrupted": "#f97316",
    "failed": "#f97316",
}
_QUIET = ("start", "stage", "checkpoint", "end")


@dataclass(frozen=True)
class Panel:
    """A chart of one or several metrics over tokens.

    Attributes:
        keys: metric -> what the legend calls it; a name that ends in / stands for all metrics that start with it.
        smooth: a moving average is drawn over the curves.
        log: the page's switch to a logarithmic axis applies.
        marks: events are marked.
    """

    section: str
    title: str
    keys: dict[str, str]
    unit: str = ""
    note: str = ""
    smooth: bool = False
    log: bool = False
    marks: bool = False


PANELS = (
    Panel(
        "overview",
        "Loss",
        {"train/loss": "training", "validation/loss": "validation"},
        "nats per token",
        smooth=True,
        log=True,
        marks=True,
    ),
    Panel("overview", "Validation, bits per byte", {"validation/bits_per_byte": "validation"}, log=True),
    Panel("overview", "Learning rate", {"train/lr": "learning rate"}),
    Panel(
        "overview", "Gradient norm", {"train/grad_norm": "norm"}, "before clipping", smooth=True, log=True, marks=True
    ),
    Panel("overview", "Throughput", {"train/tokens_per_second": "tokens/s"}, "tokens/s", smooth=True, marks=True),
    Panel("overview", "Model FLOPs utilization", {"train/mfu": "MFU"}, "share of the device's peak", smooth=True),
    Panel("train", "Multi-token prediction loss", {"train/mtp_loss": "MTP"}, "nats per token", smooth=True, log=True),
    Panel("train", "Balance loss", {"train/balance_loss": "summed over blocks"}, smooth=True, log=True),
    Panel(
        "train",
        "Batch and row length",
        {"train/batch_tokens": "batch", "train/sequence_length": "row"},
        "tokens",
        log=True,
    ),
    Panel(
        "moe",
        "Expert load",
        {"moe/load_max": "largest", "moe/load_min": "smallest"},
        "times its block's mean",
        "Over all blocks; 1 is an even load.",
        log=True,
    ),
    Panel("moe", "Experts without a token", {"moe/dead_experts": "in that step", "moe/dead_experts/": ""}),
    Panel(
        "moe",
        "Largest activation",
        {"moe/activation_max": "of all blocks", "moe/activation_max/": ""},
        "absolute, in the output of a block's experts",
        log=True,
        marks=True,
    ),
    Panel(
        "attn",
        "Attention sinks",
        {"attn/sink_mass": "mean", "attn/sink_mass_max": "largest of a layer"},
        "share of the attention mass",
    ),
    Panel(
        "attn",
        "Indexer loss",
        {"attn/indexer_kl": "KL", "attn/indexer_kl_uniform": "of a uniform indexer"},
        "nats",
        log=True,
    ),
    Panel("attn", "Indexer recall", {"attn/indexer_recall": "recall"}, "share of the best top-k caught"),
    Panel(
        "mhc",
        "Stream mixing, gain through the depth",
        {"mhc/forward_gain": "forward", "mhc/backward_gain": "backward"},
        note="Largest row and column sum of the product of all mixings; 1 is neutral.",
    ),
    Panel("optim", "Update RMS by parameter group", {"optim/update_rms/": ""}, "before the learning rate", log=True),
    Panel(
        "optim",
        "Distance of updates from orthogonal",
        {"optim/newton_schulz_residual/": ""},
        "root mean of (s^2 - 1)^2",
        "Over the singular values s of Muon's orthogonalised updates; 1 where a matrix has no gradient.",
        log=True,
    ),
    Panel(
        "stability",
        "Largest number of the residual streams",
        {"stability/stream_max": "after any block", "stability/stream_max/": ""},
        "absolute",
        log=True,
        marks=True,
    ),
    Panel("stability", "Steps skipped so far", {"stability/skipped_steps": "skipped"}, marks=True),
    Panel(
        "stability",
        "Loss above its level",
        {"stability/spike_score": "score"},
        "robust standard deviations",
        marks=True,
    ),
    Panel(
        "moe", "Router staleness", {"moe/stale_experts": "share"}, "share of ids that the router would choose otherwise"
    ),
    Panel("stability", "Clamped activations", {"stability/clamp_rate": "rate"}, "share of SwiGLU inputs"),
    Panel("system", "Time per step", {"system/step_seconds": "step"}, "seconds", smooth=True),
    Panel("system", "Waiting for data", {"system/data_wait": "share of the step"}),
    Panel(
        "system",
        "Checkpoints and validation",
        {"system/checkpoint_seconds": "checkpoint", "system/validation_seconds": "validation"},
        "seconds since the last row",
    ),
    Panel(
        "system", "Peak memory", {"system/peak_memory_gb": "resident", "system/peak_gpu_memory_gb": "GPU"}, "10^9 bytes"
    ),
    Panel("data", "Padding", {"data/padding": "share of the tokens"}),
    Panel("data", "Epoch", {"data/epoch": "epoch"}),
)
# Shown by another chart, or not by itself.
_ELSEWHERE = ("step", "tokens", "train/stage", "moe/load_max/", "moe/load_mean", "validation/untrained_")


def charts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """All charts for which a run has numbers, as the page takes them: id, section, title, note, log, data, layout."""
    found = [chart for panel in _panels(records) if (chart := _draw(panel, records)) is not None]
    for record in records:
        if record.loads:
            found += [_load_heat_map(record, records), _load_history(record, records)]
    order = ("overview", *GROUPS)
    found.sort(key=lambda chart: order.index(chart["section"]) if chart["section"] in order else len(order))
    for number, chart in enumerate(found):
        chart["order"] = number
    return found


def _panels(records: Sequence[Record]) -> list[Panel]:
    """``PANELS``, and one for every other metric that a run has."""
    known = [key for panel in PANELS for key in panel.keys] + list(_ELSEWHERE)
    keys = dict.fromkeys(key for record in records for key in record.columns)
    others = [k for k in keys if not any(k == name or (name[-1] in "/_" and k.startswith(name)) for name in known)]
    return [*PANELS, *(Panel(key.split("/")[0], key, {key: key}) for key in others)]


def _draw(panel: Panel, records: Sequence[Record]) -> dict[str, Any] | None:
    figure = go.Figure()
    for index, record in enumerate(records):
        series = [
            (key, label or key.removeprefix(name))
            for name, label in panel.keys.items()
            for key in ([k for k in record.columns if k.startswith(name)] if name.endswith("/") else [name])
        ]
        for number, (key, label) in enumerate(series):
            x, step, y = _curve(record, key)
            if not np.isfinite(y).any():
                continue
            alone = len(records) == 1
            color = _COLORS[(number if alone else index) % len(_COLORS)]
            dash = "solid" if alone else _DASHES[number % len(_DASHES)]
            name = label if alone else record.name if len(series) == 1 else f"{record.name}, {label}"
            style = {"name": _plain(name), "legendgroup": f"{index}/{key}", "line": {"color": color, "dash": dash}}
            average = _average(y) if panel.smooth and key.startswith("train/") and len(y) >= 30 else None
            _add(figure, x, step, y, style | ({} if average is None else {"meta": "raw"}))
            if average is not None:
                _add(figure, x, step, average, style | {"meta": "smooth", "hoverinfo": "skip"})
    if not figure.data:
        return None
    if panel.marks:
        _mark_events(figure, records)
    _shade_stages(figure, records)
    legend = sum(trace.meta != "smooth" and trace.showlegend is not False for trace in figure.data)
    figure.update_layout(
        xaxis={"title": {"text": "tokens"}, "rangemode": "tozero"},
        yaxis={"title": {"text": _plain(panel.unit)}, "exponentformat": "power", "range": _flat(figure)},
        height=None if not 7 <= legend <= 16 else min(290 + 14 * legend, 480),
        hovermode="closest",
        showlegend=1 < legend <= 16,
    )
    return _chart(panel.section, panel.title, panel.note, figure, log=panel.log)


def _plain(text: str) -> str:
    """Text that plotly shows as it is: it knows tags, and of quotes it does not know the entities."""
    return html.escape(text, quote=False)


def _flat(figure: go.Figure) -> tuple[float, float] | None:
    """An axis for curves that are one number but for its rounding, which would else be drawn as large as mountains."""
    values = np.concatenate([trace.y for trace in figure.data if trace.yaxis != "y2"])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low > 1e-4 * max(abs(low), abs(high)):
        return None
    return (0.0, 1.0) if low == high == 0 else (low - 0.1 * abs(low), high + 0.1 * abs(high))


def _curve(record: Record, key: str) -> tuple[Column, Column, Column]:
    """Tokens, steps and values of a metric. One that has a number in some rows only is a curve of these, so that gaps
    are left for numbers that are not finite, not for steps that were not measured."""
    x, step, y = record.tokens, record.steps, record.column(key)
    if key.startswith(("validation/", "system/checkpoint", "system/validation")):
        there = np.isfinite(y)
        x, step, y = x[there], step[there], y[there]
        untrained = record.last(key.replace("validation/", "validation/untrained_", 1))
        if key.startswith("validation/") and untrained is not None:
            x, step, y = np.append(0.0, x), np.append(0.0, step), np.append(untrained, y)
    return x, step, y


def _add(figure: go.Figure, x: Column, step: Column, y: Column, style: dict[str, Any]) -> None:
    chosen = thin(y)
    lone = len(chosen) < 40
    raw = style.get("meta") == "raw"
    line = style["line"] | {"width": 1.2 if raw else 2}
    figure.add_trace(
        go.Scatter(
            x=x[chosen],
            y=y[chosen].astype(np.float32),
            customdata=step[chosen].astype(np.int32),
            mode="lines+markers" if lone else "lines",
            marker={"size": 5},
            connectgaps=False,
            hovertemplate="%{y:.5g}<br>step %{customdata:,}, %{x:.4s} tokens<extra>" + style["name"] + "</extra>",
            **(style | {"line": line}),
        )
        if style.get("hoverinfo") != "skip"
        else go.Scatter(x=x[chosen], y=y[chosen].astype(np.float32), mode="lines", **(style | {"line": line}))
    )


def thin(y: Column, limit: int = MAX_POINTS) -> NDArray[np.int64]:
    """Which points of a curve to draw: all, or of each of ``limit / 4`` stretches the first, the smallest, the largest,
    and one that is not finite if there is any, so that no spike and no gap gets lost."""
    if len(y) <= limit:
        return np.arange(len(y))
    keep = {len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), (limit - 1) // 4):
        values = y[stretch]
        there = np.isfinite(values)
        keep.add(int(stretch[0]))
        if there.any():
            keep.add(int(stretch[np.where(there, values, np.inf).argmin()]))
            keep.add(int(stretch[np.where(there, values, -np.inf).argmax()]))
        if not there.all():
            keep.add(int(stretch[there.argmin()]))
    return np.array(sorted(keep))


def _average(y: Column) -> Column:
    """Exponential moving average over about a twentieth of the curve; gaps stay gaps and do not end it."""
    weight = min(1.0, 2 / (len(y) / 25 + 1))
    mean, seen, result = 0.0, 0.0, np.full(len(y), math.nan)
    for index, value in enumerate(y.tolist()):
        if math.isfinite(value):
            mean += weight * (value - mean)
            seen += weight * (1 - seen)
            result[index] = mean / seen  # the start counts as unknown, not as zero
    return result


def _shade_stages(figure: go.Figure, records: Sequence[Record]) -> None:
    """Bands, where all runs have the same stages."""
    if any(record.config.get("stages") != records[0].config.get("stages") for record in records):
        return
    stages = max((record.stages for record in records), key=len)
    end = max((float(record.tokens[-1]) for record in records if len(record.tokens)), default=0.0)
    if len(stages) < 2:
        return
    for number, (name, start, stop) in enumerate(stages):
        stop = end if number == len(stages) - 1 else stop
        figure.add_shape(
            type="rect",
            x0=start,
            x1=stop,
            y0=0,
            y1=1,
            yref="paper",
            line_width=0,
            layer="below",
            fillcolor="rgba(120,140,180,0.14)" if number % 2 else "rgba(120,140,180,0.04)",
        )
        if end and (stop - start) / end > 0.12:
            figure.add_annotation(
                x=start, y=1, yref="paper", text=_plain(name), showarrow=False, xanchor="left", yanchor="top"
            )


def _mark_events(figure: go.Figure, records: Sequence[Record]) -> None:
    """A dashed line and a mark with its text for each, at the foot of the chart."""
    x: list[float] = []
    texts, colors = [], []
    for record in records:
        marked = [e for e in record.events if e.get("kind") not in _QUIET and isinstance(e.get("step"), int)][-100:]
        if not marked:
            continue
        x += record.tokens_at(np.array([float(event["step"]) for event in marked])).tolist()
        of = f"{record.name}, " if len(records) > 1 else ""
        texts += [_plain(f"{of}step {e['step']:,}: {e['kind']}, {e.get('text', '')}")[:200] for e in marked]
        colors += [_MARKED.get(str(event["kind"]), "#a855f7") for event in marked]
    if not x:
        return
    for place, color in zip(x, colors, strict=True):
        line = {"color": color, "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, yref="paper", line=line, opacity=0.7)
    figure.add_trace(
        go.Scatter(
            x=x,
            y=[0.03] * len(x),
            yaxis="y2",
            mode="markers",
            name="events",
            showlegend=False,
            marker={"symbol": "triangle-up", "size": 10, "color": colors},
            hovertext=texts,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})


_SCALE = (0.25, 0.5, 1.0, 2.0, 4.0)


def _heat_map(z: Column, **options: Any) -> go.Heatmap:
    """Loads on a logarithmic scale of colours whose middle is an even load."""
    return go.Heatmap(
        z=np.log2(np.clip(z, _SCALE[0], _SCALE[-1])).astype(np.float32),
        zmin=math.log2(_SCALE[0]),
        zmax=math.log2(_SCALE[-1]),
        colorscale=[[0, "#1d4ed8"], [0.25, "#7da7f5"], [0.5, "#f3f4f6"], [0.75, "#f59e6b"], [1, "#b91c1c"]],
        colorbar={
            "tickvals": [math.log2(value) for value in _SCALE],
            "ticktext": ["&#8804; 1/4", "1/2", "1", "2", "&#8805; 4"],
            "thickness": 12,
            "len": 1,
        },
        **options,
    )


def _load_heat_map(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    row = record.loads[-1]
    blocks = [_plain(block) for block in row["load"]]
    width = max(len(load) for load in row["load"].values())
    load = np.full((len(blocks), width), math.nan)
    for index, values in enumerate(row["load"].values()):
        load[index, : len(values)] = values
    order = np.argsort(-load, axis=1)
    figure = go.Figure(
        _heat_map(
            np.take_along_axis(load, order, 1),
            y=blocks,
            x=np.arange(1, width + 1),
            customdata=np.stack([order, np.take_along_axis(load, order, 1)], -1).astype(np.float32),
            hovertemplate="%{y}, expert %{customdata[0]}: %{customdata[1]:.2f} times the mean<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": {"text": "experts of a block, most loaded first"}},
        yaxis={"autorange": "reversed", "type": "category"},
        height=_height(len(blocks)),
    )
    title = f"Load of every expert at step {int(row['step']):,}"
    return _chart("moe", _titled(title, record, records), "", figure, wide=True, id=f"load-{record.name}")


def _load_history(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    blocks = list(record.loads[-1]["load"])
    steps = np.array([float(row["step"]) for row in record.loads])
    z = np.array([[max(row["load"].get(block) or [math.nan]) for row in record.loads] for block in blocks])
    figure = go.Figure(
        _heat_map(
            z,
            x=record.tokens_at(steps),
            y=[_plain(block) for block in blocks],
            customdata=np.stack([np.broadcast_to(steps, z.shape), z], -1).astype(np.float32),
            hovertemplate="%{y}, step %{customdata[0]:,}: %{customdata[1]:.2f} times the mean<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": {"text": "tokens"}},
        yaxis={"autorange": "reversed", "type": "category"},
        height=_height(len(blocks)),
    )
    title = _titled("Most loaded expert of each block", record, records)
    return _chart("moe", title, "", figure, wide=True, id=f"load-history-{record.name}")


def _height(blocks: int) -> int:
    return min(760, 110 + 22 * max(blocks, 4) if blocks < 20 else 110 + 14 * blocks)


def _titled(title: str, record: Record, records: Sequence[Record]) -> str:
    return title if len(records) == 1 else f"{title}: {record.name}"


def _chart(
    section: str,
    title: str,
    note: str,
    figure: go.Figure,
    log: bool = False,
    wide: bool = False,
    id: str = "",
) -> dict[str, Any]:
    drawn: dict[str, Any] = json.loads(figure.to_json())
    drawn["layout"].pop("template", None)
    return {"id": id or title, "section": section, "title": title, "note": note, "log": log, "wide": wide} | drawn
