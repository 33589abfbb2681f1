"""A plan as one HTML page: memory of each stage's GPUs, the stages in time, a step's seconds. It needs no network."""

from html import escape
from pathlib import Path
from typing import Any

from ..train.planning import RunPlan, StagePlan

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .6rem; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } tr:nth-child(even) { background: #8882 }
.scroll { overflow-x: auto } .chart { background: #fff; border-radius: .5rem; margin: 1rem 0 }
.no { color: #c22; font-weight: bold }
"""


def write_page(path: Path, title: str, plan: RunPlan) -> None:
    """Writes the page, whole or not at all."""
    import plotly.graph_objects as go

    cluster = plan.cluster
    names = [p.stage.name for p in plan.stages]
    kinds = list(dict.fromkeys(item.name for p in plan.stages for item in p.memory))
    memory = go.Figure([go.Bar(name=kind, x=names, y=[_held(p, kind) / 1e9 for p in plan.stages]) for kind in kinds])
    memory.add_hline(cluster.capacity / 1e9, line_dash="dash", annotation_text=f"{cluster.capacity / 1e9:g} GB")
    memory.update_layout(barmode="stack", title="memory of each GPU", yaxis_title="GB", height=520)

    starts = [sum(p.seconds for p in plan.stages[:i]) / 86400 for i in range(len(names))]
    timeline = go.Figure(
        go.Bar(
            base=starts,
            x=[p.seconds / 86400 for p in plan.stages],
            y=names,
            orientation="h",
            text=[f"{amount(p.tokens)} tokens, {amount(p.gpu_hours)} GPU-hours" for p in plan.stages],
        )
    )
    timeline.update_xaxes(range=[0, 1.3 * plan.seconds / 86400])  # room for the texts
    timeline.update_layout(title="stages", xaxis_title="days", yaxis_autorange="reversed", height=120 + 45 * len(names))

    seconds = [p.compute | {"communication": p.communication, "optimizer": p.update} for p in plan.stages]
    steps = go.Figure([go.Bar(name=kind, x=names, y=[s[kind] for s in seconds]) for kind in seconds[0]])
    steps.update_layout(barmode="stack", title="a step at full batch", yaxis_title="seconds", height=480)

    charts = []
    for index, figure in enumerate((memory, timeline, steps)):
        figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 40})
        figure.update_layout(legend={"orientation": "h", "y": -0.2})
        chart = figure.to_html(full_html=False, include_plotlyjs=index == 0, config={"responsive": True})
        charts.append(f'<div class="chart">{chart}</div>')

    verdict = "fits" if plan.fits else '<span class="no">does not fit</span>'
    heading = f"{escape(title)} on {cluster.gpus:,} x {escape(cluster.gpu.name)}"
    rates = ", ".join(f"{key} {value:.0%}" for key, value in vars(cluster.shares).items())
    text = (
        f"<p>Calculated, not measured: {escape(cluster.gpu.source)}; shares reached: {rates}; {cluster.compute}. "
        f"{amount(plan.tokens)} tokens, {plan.seconds / 86400:,.4g} days, {amount(plan.gpu_hours)} GPU-hours: "
        f"{verdict}.</p>"
    )
    worst = max(plan.stages, key=lambda p: p.bytes)
    items = [(i.name, f"{i.bytes / 1e9:.2f}", i.how) for i in worst.memory]
    rows = [
        (
            p.stage.name,
            f"{p.stage.sequence_length:,}",
            p.stage.attention,
            str(p.placement),
            f"{p.bytes / 1e9:.1f}",
            f"{p.step_seconds:.2f}",
            f"{plan.mfu(p):.1%}",
            amount(86400 * p.tokens_per_second),
            f"{p.seconds / 86400:,.3g}",
        )
        for p in plan.stages
    ]
    columns = ("stage", "row", "attention", "placement", "GB", "step s", "MFU", "tokens/day", "days")
    tables = _table(columns, rows) + f"<h2>memory of stage {escape(worst.stage.name)}</h2>"
    tables += _table(("kind", "GB", "how"), items)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{_STYLE}</style></head><body><h1>{heading}</h1>{text}{''.join(charts)}"
        f"<h2>stages</h2>{tables}</body></html>"
    )
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def amount(number: float) -> str:
    """A large number in four digits: 32T, 5.088M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _held(p: StagePlan, kind: str) -> float:
    return sum(item.bytes for item in p.memory if item.name == kind)


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
