"""How the benchmarks measure and report: turns, medians, correctness gates, peak memory, the table and the plot.

Every benchmark first shows that both sides compute the same thing, then lets them take strict turns, so that a busy
machine slows both. What it publishes is merged into cpu_benchmarks.json; the table and the plot are drawn from there.
"""

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "docs" / "results"
THREADS = 2
ROUNDS = 7
LONG_ROUNDS, LONG_SECONDS = 3, 20.0  # where a turn of an arm takes this long; the whole must stay under half an hour
NOISY = 0.15  # of the median: a wider interquartile range voids a timing
ORDER = ("step_vs_hf", "cost_exponent", "mem_growth", "mhc_block", "moe_block", "ce_mem", "muon_step")
OURS, PEER = "openv4", "transformers"


@dataclass(frozen=True)
class Timing:
    """Seconds of one arm over its rounds."""

    median_s: float
    min_s: float
    iqr_s: float
    rounds: int
    noisy: bool

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, min(seconds), third - first, len(seconds), third - first > NOISY * median)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``value`` is held against ``target``; a target missed is told, not raised."""

    name: str
    ours: str
    peer: str
    ratio: float | None = None  # peer over ours: above 1 is in our favour
    value: float | None = None
    target: float | None = None
    at_least: bool = True  # the target is a lower bound, otherwise an upper one
    noisy: bool = False

    @property
    def bound(self) -> str:
        return "-" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"

    @property
    def verdict(self) -> str:
        if self.value is None or self.target is None:
            return "-"
        share = self.value / self.target
        met = share >= 1 if self.at_least else share <= 1
        return ("yes" if met else f"missed by {abs(share - 1):.0%}") + (", noisy" if self.noisy else "")


def faster(name: str, ours: Timing, peer: Timing, target: float | None = None, note: str = "") -> Row:
    """The row of a comparison of medians, to be at least ``target`` times as fast."""
    ratio = peer.median_s / ours.median_s
    noisy = ours.noisy or peer.noisy
    return Row(name, duration(ours) + note, duration(peer), ratio, ratio, target, noisy=noisy)


def duration(timing: Timing) -> str:
    seconds = timing.median_s
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def alternate(
    arms: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, warm_up: bool = True, rehearse: bool = False
) -> dict[str, Timing]:
    """Times arms that take turns, A B A B; one round goes untimed first, unless the caller has just run one.

    ``rehearse`` runs an arm once untimed before each timed run, for arms of milliseconds: compiled code brings a second
    OpenMP library, whose threads spin for a while after their turn on the core that the next arm needs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-int(warm_up), rounds):
        if turn >= LONG_ROUNDS and any(min(times) > LONG_SECONDS for times in seconds.values()):
            break
        for name, arm in arms.items():
            gc.collect()
            if rehearse:
                arm()
            start = time.perf_counter()
            arm()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(times) for name, times in seconds.items()}


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|ours - theirs| / |theirs| over all pairs at once, in float64."""
    squares = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs]
    error, norm = (float(torch.stack(column).sum()) for column in zip(*squares, strict=True))
    return math.sqrt(error / norm)


def gate(output: tuple[Tensor, Tensor], gradients: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Both sides compute the same: loss or output within 1e-6 relative, the global gradient within 1e-5 (float32)."""
    errors = {"output_error": relative_error([output]), "gradient_error": relative_error(gradients)}
    assert errors["output_error"] <= 1e-6, errors
    assert errors["gradient_error"] <= 1e-5, errors
    return errors


def slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of the best ``values ~ lengths^p``, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(v) for v in values]).slope


def in_child(function: Callable[..., Any], *arguments: object) -> Any:
    """``function(*arguments)`` in a fresh process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_two_threads) as pool:
        return pool.submit(function, *arguments).result()


def _two_threads() -> None:
    torch.set_num_threads(THREADS)


def resident_mb() -> float:
    """Resident memory of this process now, MB (Linux with glibc), after what is free went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_mb("VmRSS")


def peak_mb_of(call: Callable[[], object]) -> float:
    """Largest resident memory of this process during ``call``, MB.

    VmHWM is what getrusage calls ru_maxrss, except that a child does not inherit its parent's and that it can be reset.
    """
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key + ":"))


@cache
def copy_rate() -> float:
    """Bytes per second, read plus written, of copying 256 MB."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / alternate({"copy": lambda: target.copy_(source)})["copy"].median_s


@cache
def environment() -> dict[str, Any]:
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "commit": _git("rev-parse", "HEAD")
        + (" with changes" if _git("status", "--porcelain", "-uno", ":/", ":!/docs") else ""),
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
    }


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def publish(name: str, rows: Sequence[Row], measurements: dict[str, Any], load_before: tuple[float, ...]) -> None:
    """Merges one benchmark into the JSON file, then draws the table and the plot from all that are there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "cpu_benchmarks.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {
        "environment": environment(),
        "load": {"before": load_before, "after": os.getloadavg()},
        "rows": [asdict(row) for row in rows],
        "measurements": json.loads(json.dumps(measurements, default=asdict)),
    }
    results = {key: results[key] for key in sorted(results, key=ORDER.index)}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "cpu_benchmarks.md").write_text(report(results))
    plot(results, RESULTS / "length_scaling.png")
    print("\n" + table(rows))


def table(rows: Iterable[Row]) -> str:
    """Markdown, padded so that it reads as well in a terminal."""
    cells = [["benchmark", "ours", "peer", "ratio", "target", "met?"]]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3g}x"
        cells.append([row.name, row.ours, row.peer, ratio, row.bound, row.verdict])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join(lines) + "\n"


def report(results: Mapping[str, Any]) -> str:
    """The page cpu_benchmarks.md."""
    lines = [
        "# CPU benchmarks",
        "",
        "Written by `make bench`; all figures are in `cpu_benchmarks.json`. Medians of turns taken A B A B, after the",
        "loss (or the output) agreed to 1e-6 and the global gradient to 1e-5. Ratio: peer over ours, above 1 is in our",
        "favour. `noisy`: an interquartile range above 15 % of its median.",
        "",
        table(Row(**row) for entry in results.values() for row in entry["rows"]),
    ]
    for name, entry in results.items():
        e, load = entry["environment"], entry["load"]
        used = ", ".join(f"{package} {number}" for package, number in e["versions"].items())
        machine = f"{e['cpu']}, {e['threads']} threads of {e['cores']} cores"
        loads = f"load {load['before'][0]:.1f} before and {load['after'][0]:.1f} after"
        lines.append(f"- `{name}`: commit {e['commit'][:9]}{e['commit'][40:]}, {machine}, {used}, {loads}")
    return "\n".join(lines) + "\n\n![time and memory against length](length_scaling.png)\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time and memory of a training step against length, log-log; nothing where neither was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times: dict[str, dict[int, float]] = {}
    for name in ("cost_exponent", "step_vs_hf"):
        for arm, lengths in results.get(name, {}).get("measurements", {}).get("times", {}).items():
            times.setdefault(arm, {}).update((int(n), timing["median_s"]) for n, timing in lengths.items())
    memory = {
        arm: {int(n): peak["total_mb"] for n, peak in lengths.items()}
        for arm, lengths in results.get("mem_growth", {}).get("measurements", {}).get("peaks", {}).items()
    }
    if not times and not memory:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    panels = (("seconds a step", times), ("MB above the imported libraries, at the peak", memory))
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for arm, points in curves.items():
            lengths = sorted(points)
            axis.loglog(lengths, [points[n] for n in lengths], "o-", base=2, label=arm)
        axis.set_yscale("log", base=10)
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(True, alpha=0.3)
        if curves:
            axis.legend()
    figure.suptitle("Training step of a 10M-parameter DeepSeek-V4, float32, batch 1, 2 CPU threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
