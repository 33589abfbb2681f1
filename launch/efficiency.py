"""``openv4 plan efficiency``: the paper's efficiency figure, computed: cost of a token and cache over the context."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..model.accounting import (
    FP4_AS_FP8,
    INFERRED,
    UNWEIGHTED,
    V32,
    SparseMLA,
    cache_bytes,
    cache_bytes_per_token,
    count_parameters,
    decode_flops,
)
from ..model.config import ModelConfig
from ..train.config import ConfigError, load_config

Model = ModelConfig | SparseMLA

# The paper's figures at a million tokens, in percent of V3.2: operations, cache.
PAPER = {"V4-Pro": (27, 10), "V4-Flash": (10, 7)}
WEIGHTINGS = {
    "all operations 1": UNWEIGHTED,
    "FP4 1/2, FP8 1, BF16 2 *": INFERRED,
    "FP4 1, FP8 1, BF16 2": FP4_AS_FP8,
}
NOTE = (
    "* reproduces the paper, which prints ratios and no formula: that the indexer's FP4 scores count half an FP8 "
    "operation, attention in BF16 two, and FP4 experts (times FP8) one is inferred from the two ratios."
)
# Eight key/value heads of 128 channels, two bytes each: what the paper compares caches with, at equal depth.
GQA_BYTES = 8 * 2 * 128 * 2
CURVE = (4096, 2**20)


def models() -> dict[str, Model]:
    """The three models of the figure; V4's from their presets."""
    presets = {"V4-Pro": "v4_pro", "V4-Flash": "v4_flash"}
    return {"V3.2": V32, **{name: load_config([f"model={preset}"]).model for name, preset in presets.items()}}


def efficiency(context: int) -> dict[str, Any]:
    """All numbers at one context; ratios are fractions, of V3.2 or of grouped-query attention of the same depth."""
    found = models()
    flops = {
        label: {name: decode_flops(model, context, weights) for name, model in found.items()}
        for label, weights in WEIGHTINGS.items()
    }
    cache = {name: cache_bytes(model, context) for name, model in found.items()}
    depth = {name: m.num_hidden_layers for name, m in found.items() if isinstance(m, ModelConfig)}
    return {
        "context": context,
        "flops_per_token": flops,
        "flops_ratio": {label: {n: row[n] / row["V3.2"] for n in PAPER} for label, row in flops.items()},
        "cache_bytes": cache,
        "cache_bytes_per_token": {name: cache_bytes_per_token(model) for name, model in found.items()},
        "cache_ratio": {name: cache[name] / cache["V3.2"] for name in PAPER},
        "cache_ratio_gqa8x128_bf16": {n: cache[n] / (GQA_BYTES * layers * context) for n, layers in depth.items()},
        "active_parameters": {
            name: m.active if isinstance(m, SparseMLA) else count_parameters(m).active for name, m in found.items()
        },
        "paper_percent": {name: {"flops": pair[0], "cache": pair[1]} for name, pair in PAPER.items()},
        "note": NOTE.removeprefix("* "),
    }


def run_efficiency(context: float = 1e6, png: Path | None = None, as_json: bool = False) -> None:
    """Prints the figures at ``context`` and at 2^20 tokens, as tables or as JSON, and draws the curves into ``png``.

    Raises:
        ConfigError: the context is not a positive whole number. OSError: the picture cannot be written.
    """
    if not (context >= 1 and float(context).is_integer()):
        raise ConfigError(f"tokens={context:g} must be a whole number from 1 on, such as 1e6")
    numbers = [efficiency(n) for n in dict.fromkeys((int(context), 2**20))]
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        console = Console(highlight=False, markup=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = 140
        for row in numbers:
            console.print(_table(row))
        console.print(NOTE)
    if png is not None:
        draw(png)


def _table(row: dict[str, Any]) -> Table:
    table = Table(title=f"decoding at a context of {row['context']:,} tokens: operations per token, and the cache")
    for header in ("", "V3.2", *PAPER, *(f"{name} / V3.2" for name in PAPER), "the paper"):
        table.add_column(header, justify="left" if not header else "right")
    paper = [" / ".join(f"{pair[place]}%" for pair in PAPER.values()) for place in (0, 1)]
    for label, flops in row["flops_per_token"].items():
        ratios = [f"{100 * row['flops_ratio'][label][name]:.3f}%" for name in PAPER]
        cells = [f"{flops[name] / 1e9:,.3f} G" for name in ("V3.2", *PAPER)]
        table.add_row(label, *cells, *ratios, paper[0])
    cells = [f"{row['cache_bytes'][name] / 1e9:.4f} GB" for name in ("V3.2", *PAPER)]
    table.add_row("cache, bytes", *cells, *(f"{100 * row['cache_ratio'][name]:.3f}%" for name in PAPER), paper[1])
    shares = [f"{100 * row['cache_ratio_gqa8x128_bf16'][name]:.3f}%" for name in PAPER]
    table.add_row("cache / that of GQA 8 x 128, BF16", "", *shares, "", "", "2%")
    return table


def draw(png: Path) -> None:
    """Cost of a token, as the paper's figures weigh it, and size of the cache from 4K to 1M tokens of context."""
    import matplotlib  # here, so that the table needs none of it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, last = CURVE
    contexts = [first + (last - first) * step // 256 for step in range(257)]
    colors = {"V3.2": "#6b7280", "V4-Pro": "#3050d0", "V4-Flash": "#d97706"}
    found = models()
    panels = {
        "cost of a token / 10\u00b9\u00b2 FP8 operations": {
            name: [decode_flops(model, n) / 1e12 for n in contexts] for name, model in found.items()
        },
        "cache of a document / GB": {
            name: [cache_bytes(model, n) / 1e9 for n in contexts] for name, model in found.items()
        },
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, values in curves.items():
            axis.plot(contexts, values, color=colors[name], linewidth=2)
            share = f" {100 * values[-1] / curves['V3.2'][-1]:.1f}%" if name in PAPER else ""
            place = (6, -8 if name == "V4-Flash" else 0)  # right of the axes; lower, where it comes close to Pro's
            axis.annotate(f"{name}{share}", (last, values[-1]), place, color=colors[name], textcoords="offset points")
        axis.set(xlabel="context / tokens", ylabel=label, xlim=(0, last), ylim=(0, 1.1 * curves["V3.2"][-1]))
        axis.set_xticks([k * 2**18 for k in range(5)], ["0", "256K", "512K", "768K", "1M"])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    plt.close(figure)
