"""How a GPU benchmark is measured and told: correctness first, then device time of each arm, then the row of the table.

Nothing here needs a GPU but ``DeviceTimer`` and what asks the driver: the rest is tested on a CPU.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_floors import Ceilings, Work

from openv4.kernels.dispatch import Choice

ROOT = Path(__file__).parents[1]
NOT_RUN = "not run (no GPU at hand)"
WARM_UPS, FLUSH_BYTES = 10, 256 * 2**20  # an H100 has 50 MB of L2
AHEAD = 2_000_000  # clock cycles, about a millisecond, in which the host launches what is timed
# Peers that need packages beyond torch and transformers, and the module that tells whether they are there.
ABSENT = {
    "TileKernels": "tile_kernels",
    "Liger": "liger_kernel",
    "torchao": "torchao",
    "DeepGEMM": "deep_gemm",
    "FlashMLA": "flash_mla",
    "FlashAttention-3": "flash_attn_interface",
    "Automodel": "nemo_automodel",
    "SonicMoE": "sonicmoe",
    "megablocks": "megablocks",
    "quack": "quack",
    "CCE": "cut_cross_entropy",
    "torchtitan": "torchtitan",
}
Timer = Callable[[Callable[[], object]], float]  # median seconds of a call


@dataclass(frozen=True)
class Place:
    """Where tensors lie, and which implementation is ours: Triton, but for tests on a CPU."""

    device: torch.device
    ours: Choice = "triton"


@dataclass(frozen=True)
class Target:
    """A bound on one of a row's values."""

    value: str
    bound: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{self.value} {'>=' if self.at_least else '<='} {self.bound:g}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass
class Case:
    """What a benchmark is made of, once its tensors exist.

    Attributes:
        check: returns what agreed and how well; raises AssertionError where our results are wrong.
        ours: what is timed; None where ``values`` measures all there is.
        peers: what does the same.
        floor: what it costs at least.
        values: further numbers, measured last.
    """

    check: Callable[[], str]
    ours: Callable[[], object] | None = None
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    floor: Work | None = None
    values: Callable[[Timer], Mapping[str, float]] = lambda _: {}


@dataclass(frozen=True)
class Benchmark:
    name: str
    size: str
    group: str
    build: Callable[[Place], Case]
    targets: tuple[Target, ...] = ()
    absent: tuple[str, ...] = ()  # peers of ``ABSENT``

    @property
    def key(self) -> str:
        return f"{self.name}, {self.size}"


@dataclass
class Row:
    """What became of a benchmark.

    ``values`` may hold "ms" of ours, "share" of the floor, "ratio" of the fastest peer to ours, "over <peer>" of one.
    """

    key: str
    status: str  # "measured", or why not
    correctness: str = "-"
    values: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float | str] = field(default_factory=dict)  # ms, or why not


class NotHereError(Exception):
    """Something that this machine or this version lacks; the message is the row's status."""


class DeviceTimer:
    """Median device time of a call: caches flushed before it, and the host ahead, so that launches cost nothing."""

    def __init__(self, seconds: float = 1.5) -> None:
        self.seconds = seconds
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(WARM_UPS):
            self._once(call)
        longest = max(self._once(call), 1e-6)
        return statistics.median(self._once(call) for _ in range(min(100, max(7, int(self.seconds / longest)))))

    def _once(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(AHEAD)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def host_timer(call: Callable[[], object], rounds: int = 3) -> float:
    """Of a CPU, for trying the benchmarks out."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(
    benchmark: Benchmark, place: Place, timer: Timer, ceilings: Ceilings, tell: Callable[[Row], None] = lambda _: None
) -> Row:
    """Checks, times ours, then the peers; ``tell`` gets the row whenever there is more in it.

    No time is taken of what computes something wrong.
    """
    row = Row(benchmark.key, "measured")
    try:
        case = benchmark.build(place)
        row.correctness = case.check()
        if case.ours is not None:
            seconds = timer(case.ours)
            row.values["ms"] = seconds * 1e3
            if case.floor is not None:
                row.values["share"] = case.floor.seconds(ceilings) / seconds
        tell(row)
        for name in benchmark.absent:
            row.peers[name] = "no arm" if find_spec(ABSENT[name]) else "not installed: skipped"
        for name, peer in case.peers.items():
            try:
                row.peers[name] = timer(peer) * 1e3
            except Exception as error:
                row.peers[name] = f"failed: {brief(error)}"
            tell(row)
        times = [ms for ms in row.peers.values() if not isinstance(ms, str)]
        if times and "ms" in row.values:
            row.values["ratio"] = min(times) / row.values["ms"]
        for target in benchmark.targets:
            peer = row.peers.get(target.value.removeprefix("over "))
            if target.value.startswith("over ") and isinstance(peer, float) and "ms" in row.values:
                row.values[target.value] = peer / row.values["ms"]
        row.values |= case.values(timer)
    except AssertionError as error:
        row.status, row.correctness, row.values = "wrong", f"FAILED: {brief(error)}", {}
    except NotHereError as error:
        row.status = str(error)
    except Exception as error:
        row.status = f"failed: {brief(error)}"
    tell(row)
    return row


def brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160].replace("|", "/")


def relative_rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over norm of what is wanted, in float32: the tensors may be gigabytes."""
    difference = torch.linalg.vector_norm(found.float() - wanted.float())
    return float(difference / torch.linalg.vector_norm(wanted.float()).clamp(min=1e-30))


def agreement(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float, against: str
) -> str:
    """Every named tensor within ``tolerance``, relative RMS; integers, and all if it is 0, exactly."""
    assert found.keys() == wanted.keys(), f"{sorted(found)} are not {sorted(wanted)}"
    worst = 0.0
    for name, value in wanted.items():
        ours = found[name]
        assert ours.shape == value.shape and ours.dtype == value.dtype, f"{name}: {ours.dtype}{list(ours.shape)}"
        if tolerance and value.is_floating_point():
            error = relative_rms(ours, value)
            assert error <= tolerance, f"{name} is off by {error:.1e} from {against}"
            worst = max(worst, error)
        else:
            pair = (x.float() if x.is_floating_point() and x.element_size() == 1 else x for x in (ours, value))
            assert torch.equal(*pair), f"{name} differs from {against}"
    return f"{worst:.0e} from {against}" if tolerance else f"equal to {against}"


def measure_ceilings(device: torch.device, timer: Timer) -> Ceilings:
    """Products of 8192 x 8192 random matrices in each format that works here, and a copy of more than 1 GB."""
    size, elements = (8192, 2**29) if device.type == "cuda" else (256, 2**20)
    wide = [torch.randn(size, size, device=device) for _ in range(2)]
    flops: dict[str, float] = {}
    work = 2 * size**3
    a, b = (x.bfloat16() for x in wide)
    flops["bf16"] = work / timer(lambda: a @ b)
    flops["fp32"] = work / timer(lambda: wide[0] @ wide[1])
    if device.type == "cuda":
        exact = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        flops["tf32"] = work / timer(lambda: wide[0] @ wide[1])
        torch.backends.cuda.matmul.fp32_precision = exact
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T.contiguous().T
        one = torch.ones((), device=device)
        try:
            rate = timer(lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
            flops["fp8"] = work / rate
        except RuntimeError as error:
            print(f"no FP8 product: {brief(error)}", flush=True)
    flops.setdefault("tf32", flops["fp32"])
    flops.setdefault("fp8", flops["bf16"])
    source = torch.empty(elements, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * source.nbytes / timer(lambda: target.copy_(source)))


def clocks() -> str:
    """What the driver says of clocks, power and temperature."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]) or "nvidia-smi: not found"


def conditions(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device, date."""
    git = ["git", "-C", os.fspath(ROOT)]
    changed = " with changes" if _output([*git, "status", "--porcelain", "-uno", ":/", ":!/docs"]) else ""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": (_output([*git, "rev-parse", "HEAD"]) or "unknown")[:12] + changed,
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def append(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Adds one group's run to the JSON file, and returns all of it."""
    results: dict[str, Any] = load(path)
    results["runs"].append(dict(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=asdict) + "\n")
    return results


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    return results


def latest(results: Mapping[str, Any]) -> dict[str, Row]:
    """The newest row of each benchmark."""
    return {row["key"]: Row(**row) for entry in results["runs"] for row in entry.get("rows", ())}


def page(benchmarks: Sequence[Benchmark], results: Mapping[str, Any]) -> str:
    """gpu_benchmarks.md: every registered benchmark, whether it was run or not."""
    rows = latest(results)
    lines = [
        "# GPU benchmarks",
        "",
        "Written by `make gpu`; raw data in `gpu_benchmarks.json`. Device time: the median after ten warm-ups, caches",
        "flushed, random data. Share: of the floor (`tests/gpu_floors.py`) by the ceilings that the same run measured.",
        "Ratio: the fastest peer over ours. What computes something wrong is not timed.",
        "",
        table(benchmarks, rows),
    ]
    if not results["runs"]:
        lines.append("Nothing here has been run: there was no GPU at hand. Targets were set beforehand.")
    tests = {name: verdict for entry in results["runs"] for name, verdict in entry.get("tests", {}).items()}
    if tests:
        lines += ["", "| tests on the GPU | |", "|---|---|", *(f"| {name} | {tests[name]} |" for name in sorted(tests))]
    lines += [""] if results["runs"] else []
    lines += [f"- {_told(entry)}" for entry in results["runs"]]
    return "\n".join(lines) + "\n"


def _told(entry: Mapping[str, Any]) -> str:
    where = entry["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    found = entry.get("ceilings")
    rates = ""
    if found:
        flops = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in found["flops"].items())
        rates = f"; ceilings {flops} TFLOP/s, {found['bytes'] / 1e12:.2f} TB/s; clocks {entry.get('clocks', '-')}"
    note = f"; {entry['note']}" if entry.get("note") else ""
    return f"`{entry['group']}`: {where['date']}, commit {where['commit']}, {where['device']}, {versions}{rates}{note}"


def table(benchmarks: Iterable[Benchmark], rows: Mapping[str, Row]) -> str:
    """Markdown; a benchmark without a row was not run."""
    head = ["benchmark", "size", "ours ms", "% of floor", "peers ms", "ratio", "target", "met?", "also", "correctness"]
    cells = [head, ["---"] * len(head)]
    for benchmark in benchmarks:
        row = rows.get(benchmark.key, Row(benchmark.key, NOT_RUN))
        shown = {"ms", "share", "ratio"}
        ours = f"{row.values['ms']:.4g}" if "ms" in row.values else "-" if row.status == "measured" else row.status
        share = f"{row.values['share']:.0%}" if "share" in row.values else "-"
        ratio = f"{row.values['ratio']:.3g}x" if "ratio" in row.values else "-"
        peers = [f"{name} {ms if isinstance(ms, str) else format(ms, '.4g')}" for name, ms in row.peers.items()]
        met = [
            "-" if t.value not in row.values else "yes" if t.met(row.values[t.value]) else "no"
            for t in benchmark.targets
        ]
        also = [f"{name} {value:.4g}" for name, value in row.values.items() if name not in shown]
        cells.append(
            [
                benchmark.name,
                benchmark.size,
                ours,
                share,
                "; ".join(peers) or "-",
                ratio,
                "; ".join(map(str, benchmark.targets)) or "-",
                "; ".join(met) or "-",
                "; ".join(also) or "-",
                row.correctness,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
