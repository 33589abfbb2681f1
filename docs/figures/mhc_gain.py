"""Composite gain of hyper-connections (HC) and of mHC over depth: random matrices, and small models that we train.

    python -P docs/figures/mhc_gain.py

writes docs/results/mhc_gain.json, .md and .png. The models stay in runs/mhc_gain; those that are there already are not
trained again, so a second call only draws. Source: recipe 4 and 13; arXiv 2512.24880, figures 3 and 7.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from torch import Tensor

from openv4.data.loader import validation_batches
from openv4.data.prepare import KING_JAMES, ensure_prepared
from openv4.data.shards import PreparedData
from openv4.kernels.hyper_connection import composite_gains, sinkhorn
from openv4.model import load_pretrained
from openv4.model.attention import AttentionTask
from openv4.train.checkpoint import find_weights
from openv4.train.config import load_config
from openv4.train.loop import train

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "mhc_gain"
RESULTS = ROOT / "docs" / "results"

# Random matrices: 2 sites a layer.
STREAMS, ITERATIONS, EPS = 4, 20, 1e-6
SITES = {"flash": 86, "pro": 122}
SMALL_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SCALES = {"HC": SMALL_SCALES, "mHC": (*SMALL_SCALES, 2.0, 5.0, 10.0, 100.0)}  # beyond 1, HC's gains are astronomical
CHAINS = 64
CURVE_SCALE = 0.2
ERROR_ITERATIONS, ERROR_SCALES, ERROR_MATRICES = (1, 2, 5, 10, 20, 50, 100), (0.1, 1.0, 2.0, 5.0, 10.0), 4096

# Trained models.
LAYERS, STEPS, ROW, BATCH, VOCABULARY = 24, 240, 64, 512, 1024
ARMS = {
    "HC": ("model.hc_constraint=none",),
    "mHC": (),
    "mHC, identity": ("model.hc_init=identity",),
}
RATES = (6.0e-3, 2.4e-2)  # that of the run `smoke`, and four times as much
SEEDS = (0, 1, 2)
HELD_OUT_TOKENS = 256
OVERRIDES = [
    "run=smoke",
    "model=nano",
    f"model.vocab_size={VOCABULARY}",
    f"model.num_hidden_layers={LAYERS}",
    f"model.compress_ratios={[0, 4, 16, 4] * (LAYERS // 4)}",
    "model.num_nextn_predict_layers=0",
    "model.n_routed_experts=4",
    "model.num_experts_per_tok=1",
    f"micro_batch_tokens={BATCH}",
    "threads=1",
    "data.workers=0",
    "checkpoint.every=0",
    "validation.every=0",
    "validation.byte_model_order=null",
    "logging.every=5",
    "logging.wandb=disabled",
    "logging.sample_prompt=null",
    "logging.peak_tflops=1",
]


# Random matrices.


def constrained(noise: Tensor, scale: float, iterations: int = ITERATIONS) -> Tensor:
    """mHC's mixing of random logits."""
    return sinkhorn(scale * noise, iterations, EPS)


def unconstrained(noise: Tensor, scale: float) -> Tensor:
    """HC's mixing: the identity that it starts from, and a dynamic term whose gate has grown to ``scale``."""
    return torch.eye(STREAMS, dtype=noise.dtype) + scale * torch.tanh(noise)


KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {"HC": unconstrained, "mHC": constrained}


def random_part() -> dict[str, Any]:
    """Gains of ``CHAINS`` chains of matrices by scale, from the same normal numbers for both kinds; float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(SITES.values()), CHAINS, STREAMS, STREAMS, generator=generator, dtype=torch.float64)
    gains: dict[str, Any] = {name: {kind: [] for kind in KINDS} for name in SITES}
    curves: dict[str, Any] = {}
    for kind, scale in ((kind, scale) for kind, scales in SCALES.items() for scale in scales):
        matrices = KINDS[kind](noise, scale)
        for name, sites in SITES.items():
            chain = matrices[:sites]
            composite, single = composite_gains(list(chain)), composite_gains([chain])
            gains[name][kind].append(
                {
                    "scale": scale,
                    "forward": spread(composite.forward[-1]),
                    "backward": spread(composite.backward[0]),
                    "largest_forward": spread(composite.forward.amax(0)),
                    "largest_backward": spread(composite.backward.amax(0)),
                    "single_forward": spread(single.forward),
                    "single_backward": spread(single.backward),
                }
            )
        if scale == CURVE_SCALE:
            both = composite_gains(list(matrices))
            curves[kind] = {
                way: [spread(site) for site in gain] for way, gain in zip(("forward", "backward"), both, strict=True)
            }
    logits = torch.randn(ERROR_MATRICES, STREAMS, STREAMS, generator=generator, dtype=torch.float64)
    errors = []
    for scale, iterations in product(ERROR_SCALES, ERROR_ITERATIONS):
        matrix = constrained(logits, scale, iterations)
        into, out_of = ((matrix.sum(dim) - 1).abs().amax(-1) for dim in (-2, -1))
        errors.append({"scale": scale, "iterations": iterations, "incoming": spread(into), "outgoing": spread(out_of)})
    return {"gains": gains, "curves": curves, "errors": errors}


def spread(values: Tensor) -> list[float]:
    """Smallest, median and largest."""
    return [float(x) for x in (values.min(), values.median(), values.max())]


# Trained models.


def run_folder(arm: str, rate: float, seed: int) -> Path:
    return RUNS / f"{arm.replace(', ', '_')}_{rate:g}_{seed}"


def train_one(arm: str, rate: float, seed: int) -> None:
    stage = (
        f"{{name: only, tokens: {STEPS * BATCH}, sequence_length: {ROW}, batch_tokens: {BATCH}, lr: {rate}, "
        f"lr_end: {rate / 10}, lr_shape: cosine, warmup_steps: 20, attention: dense, mtp_weight: 0.0, "
        "bias_speed: 0.02}"
    )
    settings = [f"stages=[{stage}]", f"seed={seed}", f"data={RUNS / 'data'}", f"output={run_folder(arm, rate, seed)}"]
    train(load_config([*OVERRIDES, *ARMS[arm], *settings]))


def trained_part() -> list[dict[str, Any]]:
    data = PreparedData(ensure_prepared(KING_JAMES, RUNS / "data", VOCABULARY, 0))
    jobs = [job for job in product(ARMS, RATES, SEEDS) if not (run_folder(*job) / "summary.json").exists()]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(train_one, *zip(*jobs, strict=True)) if jobs else ())
    row = next(validation_batches(data.split("validation"), 1, HELD_OUT_TOKENS, data.eos))
    assert (row.segments == 0).all()  # one document fills the row
    return [measure(*job, row.tokens) for job in product(ARMS, RATES, SEEDS)]


@torch.no_grad()
def measure(arm: str, rate: float, seed: int, tokens: Tensor) -> dict[str, Any]:
    """Losses of a run, and its gains: means over the tokens of one held-out sequence."""
    run = run_folder(arm, rate, seed)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    reports = (
        load_pretrained(find_weights(run), torch.float32).run(tokens, task=AttentionTask("dense")).reports.values()
    )
    residuals = [matrix for report in reports for matrix in report.residuals]
    composite, single = composite_gains(residuals), composite_gains([torch.stack(residuals)])
    means = {
        "forward": composite.forward,
        "backward": composite.backward,
        "single_forward": single.forward[0],
        "single_backward": single.backward[0],
    }
    return {
        "arm": arm,
        "lr": rate,
        "seed": seed,
        "loss": summary["validation/loss"],
        "skipped": summary["skipped"],
        "largest_gain_in_training": max(r["mhc/forward_gain"] for r in rows),
        "largest_grad_norm": max(r["train/grad_norm"] for r in rows),
        "seconds": STEPS * BATCH / median(r["train/tokens_per_second"] for r in rows[1:]),
        "steps": [r["step"] for r in rows],
        "training_loss": [r["train/loss"] for r in rows],
        **{name: gain.mean((-2, -1)).tolist() for name, gain in means.items()},
    }


# The figure and the table.

COLORS = {"HC": "tab:red", "mHC": "tab:blue", "mHC, identity": "tab:cyan"}
Style = Literal["-", "--", ":"]
STYLES: dict[str, Style] = {"forward": "-", "backward": "--"}


def draw(result: dict[str, Any], path: Path) -> None:
    plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.6), layout="constrained")
    draw_scales(axes[0, 0], result["random"]["gains"]["pro"])
    draw_curves(axes[0, 1], result["random"]["curves"])
    draw_errors(axes[0, 2], result["random"]["errors"])
    for axis, rate in zip(axes[1], RATES, strict=False):
        draw_depth(axis, [run for run in result["trained"] if run["lr"] == rate], rate)
    draw_losses(axes[1, 2], result["trained"])
    for axis, letter in zip(axes.flat, "abcdef", strict=True):
        axis.set_title(f"({letter}) {axis.get_title()}", loc="left", fontsize=8.5)
        axis.set_title("")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_scales(axis: Any, gains: dict[str, list[dict[str, Any]]]) -> None:
    for (kind, rows), (way, style) in product(gains.items(), STYLES.items()):
        draw_band(axis, [row["scale"] for row in rows], [row[way] for row in rows], style, COLORS[kind])
    axis.set(xscale="log", yscale="log", ylim=(0.3, 3e9), xlabel="scale of the random term", ylabel="composite gain")
    axis.set_title(f"random matrices, {SITES['pro']} sites (Pro), {CHAINS} chains")
    legend(axis, KINDS, STYLES, loc="upper right")


def draw_curves(axis: Any, curves: dict[str, dict[str, list[list[float]]]]) -> None:
    for (kind, ways), (way, style) in product(curves.items(), STYLES.items()):
        draw_band(axis, range(1, len(ways[way]) + 1), ways[way], style, COLORS[kind])
    axis.axvline(SITES["flash"], color="gray", linewidth=0.6, linestyle=":")
    axis.text(SITES["flash"] - 1, 0.12, "Flash's depth", ha="right", va="bottom", color="gray", fontsize=7)
    axis.set(yscale="log", ylim=(0.1, 5e3), xlabel="site", ylabel="composite gain")
    axis.set_title(f"random matrices, scale {CURVE_SCALE}, {CHAINS} chains")
    legend(axis, KINDS, STYLES, loc="upper center", ncols=2)


def draw_band(axis: Any, x: Sequence[float], spreads: Sequence[Sequence[float]], style: str, color: str) -> None:
    """The median as a line, smallest and largest as a band."""
    low, middle, high = zip(*spreads, strict=True)
    axis.plot(x, middle, style, color=color)
    axis.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)


def legend(axis: Any, names: Iterable[str], styles: Mapping[str, Style], **place: Any) -> None:
    """Colours first, then what solid and broken lines are."""
    handles = [Line2D([], [], color=COLORS[name], label=name) for name in names]
    handles += [Line2D([], [], color="black", linestyle=style, label=way) for way, style in styles.items()]
    axis.legend(handles=handles, **place)


def draw_errors(axis: Any, errors: list[dict[str, Any]]) -> None:
    colors = plt.get_cmap("viridis")
    for index, scale in enumerate(ERROR_SCALES):
        rows = [row for row in errors if row["scale"] == scale]
        steps = [row["iterations"] for row in rows]
        color = colors(index / len(ERROR_SCALES))
        axis.plot(steps, [row["outgoing"][1] for row in rows], "o-", ms=3, color=color, label=f"scale {scale:g}")
        axis.plot(steps, [row["outgoing"][2] for row in rows], ":", color=color)
    axis.axvline(ITERATIONS, color="gray", linewidth=0.6, linestyle=":")
    axis.set(xscale="log", yscale="log", ylim=(2e-8, 5))
    axis.set(xlabel="Sinkhorn iterations", ylabel="|sum - 1| of what leaves a stream")
    axis.set_xticks(ERROR_ITERATIONS, [str(i) for i in ERROR_ITERATIONS])
    axis.minorticks_off()
    axis.set_title(f"Sinkhorn's error: median, dotted worst of {ERROR_MATRICES:,}")
    axis.legend(ncols=3, loc="lower center")


def draw_depth(axis: Any, runs: Sequence[dict[str, Any]], rate: float) -> None:
    for run, (way, style) in product(runs, STYLES.items()):
        axis.plot(range(1, len(run[way]) + 1), run[way], style, color=COLORS[run["arm"]], alpha=0.8, linewidth=1.1)
    axis.set(yscale="log", ylim=(0.5, 3e8), xlabel="site", ylabel="composite gain, mean over tokens")
    axis.set_title(f"trained, {LAYERS} layers, learning rate {rate:g}, {len(SEEDS)} seeds")
    legend(axis, ARMS, STYLES, loc="upper center", ncols=2)


def draw_losses(axis: Any, runs: Sequence[dict[str, Any]]) -> None:
    styles: dict[float, Style] = dict(zip(RATES, ("-", ":"), strict=True))
    for run in runs:
        axis.plot(run["steps"], run["training_loss"], styles[run["lr"]], color=COLORS[run["arm"]], linewidth=0.8)
    axis.set(xlabel="step", ylabel="training loss (nats per token)")
    axis.set_title("training loss, all seeds")
    legend(axis, ARMS, {f"learning rate {rate:g}": style for rate, style in styles.items()}, loc="upper right")


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Composite gain of HC and mHC",
        "",
        "Written by `make figures` (`python -P docs/figures/mhc_gain.py`); all numbers are in `mhc_gain.json`. Forward "
        "gain:",
        "the largest magnitude of a row sum of H_l ... H_1; backward gain: of a column sum of H_L ... H_l.",
        "",
        "![composite gain over depth](mhc_gain.png)",
        "",
        f"## Trained: {LAYERS} layers, {2 * LAYERS} sites, d 64, {STEPS} steps of {BATCH} tokens, {len(SEEDS)} seeds",
        "",
        "The largest gain over depth, each a mean over the tokens of one held-out sequence, lowest to highest seed; "
        "loss",
        "in nats per token on the whole validation split, mean and each seed; seconds on one core of a shared machine.",
        "In training: the largest gain of the whole path that `mhc/forward_gain` of `metrics.jsonl` showed.",
        "",
        "| | lr | forward | backward | one site, forward | one site, backward | in training | loss | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rate, arm in product(RATES, ARMS):
        runs = [run for run in result["trained"] if (run["arm"], run["lr"]) == (arm, rate)]
        ways = ("forward", "backward", "single_forward", "single_backward")
        largest = [[max(run[way]) for run in runs] for way in ways]
        largest.append([run["largest_gain_in_training"] for run in runs])
        losses = [run["loss"] for run in runs]
        lines.append(
            f"| {arm} | {rate:g} | {' | '.join(interval(values) for values in largest)} | "
            f"{sum(losses) / len(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)}) | "
            f"{median(run['seconds'] for run in runs):.0f} |"
        )
    lines += [
        "",
        f"## Random: the whole chain's gain, median (largest of {CHAINS} chains)",
        "",
        "HC: identity + scale * tanh(normal); mHC: Sinkhorn of scale * normal, 20 iterations; of the same numbers.",
        "",
        "| | scale | Flash forward | Flash backward | Pro forward | Pro backward | one site, backward |",
        "|---|---|---|---|---|---|---|",
    ]
    gains = result["random"]["gains"]
    for kind in KINDS:
        for flash, pro in zip(gains["flash"][kind], gains["pro"][kind], strict=True):
            cells = [flash["forward"], flash["backward"], pro["forward"], pro["backward"], pro["single_backward"]]
            lines.append(f"| {kind} | {flash['scale']:g} | {' | '.join(f'{m:.4g} ({h:.4g})' for _, m, h in cells)} |")
    lines += [
        "",
        f"## Sinkhorn: |sum - 1| of what leaves a stream, median (largest of {ERROR_MATRICES} matrices)",
        "",
        "What enters a stream is normalised last and off by eps alone, wherever the logits do not leave it empty.",
        "",
        f"| scale | {' | '.join(f'{i}' for i in ERROR_ITERATIONS)} |",
        "|---" * (len(ERROR_ITERATIONS) + 1) + "|",
    ]
    for scale in ERROR_SCALES:
        cells = [row["outgoing"] for row in result["random"]["errors"] if row["scale"] == scale]
        lines.append(f"| {scale:g} | {' | '.join(f'{m:.1e} ({h:.1e})' for _, m, h in cells)} |")
    return "\n".join(lines) + "\n"


def interval(values: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    result = {"random": random_part(), "trained": trained_part()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mhc_gain.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "mhc_gain.md").write_text(table(result))
    draw(result, RESULTS / "mhc_gain.png")
