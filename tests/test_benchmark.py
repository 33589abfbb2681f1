"""The CPU benchmarks beside transformers and torch: `make bench`, or one of them by `-k mhc_block`.

Each compares results first and fails if they differ; a target that is missed is a line in the table. Results are merged
into docs/results/cpu_benchmarks.json, from which the table (cpu_benchmarks.md) and the plot (length_scaling.png) come.
Run them on an idle machine with 20 GB of memory free: transformers takes about 18 for a step of 8192 tokens.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_protocol
import pytest
import torch
from bench_protocol import OURS, PEER, Row, Timing, alternate, faster, in_child, slope, table

Publish = Callable[[Sequence[Row], dict[str, Any]], None]

STEP_TARGETS = {4096: 10.0, 8192: 20.0}
OUR_TIMED = (1024, 2048, 4096, 8192, 16384)
OUR_MEASURED = (1024, 2048, 4096, 8192, 16384, 32768)
THEIR_LENGTHS = (1024, 2048, 4096)
BLOCK_TOKENS = 4096
VOCABULARY = 129280
CROSS_ENTROPY_TOKENS = (2048, 8192)


@pytest.fixture(scope="module")
def _final_table() -> Iterator[None]:
    yield
    page = bench_protocol.RESULTS / "cpu_benchmarks.md"
    print("\n" + page.read_text() if page.exists() else "")


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Publish:
    """Only for `--bench`: what a benchmark hands its rows and measurements to."""
    if not request.config.getoption("--bench"):
        pytest.skip("a benchmark; run it with --bench")
    pytest.importorskip("transformers", reason="the peer; installed by `make bench`")
    request.getfixturevalue("_final_table")
    bench_protocol.environment()  # asks git before anything is written
    name, load = request.node.name.removeprefix("test_"), os.getloadavg()
    return lambda rows, measurements: bench_protocol.publish(name, rows, measurements, load)


@pytest.fixture
def release(publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported weights, one folder for all benchmarks."""
    from bench_length import export

    return export(tmp_path_factory.getbasetemp() / "release")


def test_step_vs_hf(publish: Publish, release: Path) -> None:
    """Forward, backward and AdamW on the same weights."""
    from bench_length import fastest_experts, step_times

    rows, times, checks = [], {OURS: {}, PEER: {}}, {}
    for length, target in STEP_TARGETS.items():
        timings, checks[length] = step_times(length, release, with_peer=True)
        for name, timing in timings.items():
            times[name][length] = timing
        speed = f" ({length / timings[OURS].median_s:.0f} tokens/s)"
        rows.append(faster(f"step_vs_hf, {length} tokens", timings[OURS], timings[PEER], target, speed))
    experts, experts_times = fastest_experts(release)
    peer = {"attn_implementation": "eager", "experts_implementation": experts, "experts_times": experts_times}
    publish(rows, {"times": times, "checks": checks, "peer": peer})


def test_cost_exponent(publish: Publish, release: Path) -> None:
    """How the time of a step grows with its length."""
    from bench_length import step_times

    times: dict[str, dict[int, Timing]] = {OURS: {}, PEER: {}}
    checks = {}
    for length in OUR_TIMED:
        timings, checks[length] = step_times(length, release, with_peer=length in THEIR_LENGTHS)
        for name, timing in timings.items():
            times[name][length] = timing
    ours, peer = (slope(list(arm), [t.median_s for t in arm.values()]) for arm in times.values())
    noisy = any(timing.noisy for arm in times.values() for timing in arm.values())
    name = f"cost_exponent, {OUR_TIMED[0]} to {OUR_TIMED[-1]} tokens"
    row = Row(name, f"{ours:.2f}", f"{peer:.2f} (to {THEIR_LENGTHS[-1]})", None, ours, 1.10, False, noisy)
    publish([row], {"times": times, "checks": checks, "exponents": {OURS: ours, PEER: peer}})


def test_mem_growth(publish: Publish, release: Path) -> None:
    """Peak memory of a step: ours with recompute="full", transformers plain and with gradient checkpointing."""
    from bench_length import CHECKPOINTED, fastest_experts, peak_of_step

    experts, _ = fastest_experts(release)
    lengths = {OURS: OUR_MEASURED, PEER: THEIR_LENGTHS, CHECKPOINTED: THEIR_LENGTHS}
    peaks = {
        arm: {length: in_child(peak_of_step, arm, length, release, experts) for length in of_arm}
        for arm, of_arm in lengths.items()
    }
    for length in THEIR_LENGTHS:
        losses = [peaks[arm][length]["loss"] for arm in lengths]
        assert max(losses) / min(losses) - 1 <= 1e-4, losses  # not aligned; test_step_vs_hf compares in earnest
    exponents = {arm: slope(list(p), [peak["activation_mb"] for peak in p.values()]) for arm, p in peaks.items()}
    middle, longest = THEIR_LENGTHS[-1], OUR_MEASURED[-1]
    total = {arm: peaks[arm][middle]["total_mb"] for arm in lengths}
    most = peaks[OURS][longest]["total_mb"]
    others = " / ".join(f"{exponents[arm]:.2f}" for arm in (PEER, CHECKPOINTED)) + f" checkpointed (to {middle})"
    both = f"{total[PEER]:.0f} / {total[CHECKPOINTED]:.0f} MB checkpointed"
    ratio = total[CHECKPOINTED] / total[OURS]
    name = f"mem_growth, {OUR_MEASURED[0]} to {longest} tokens"
    rows = [
        Row(f"{name}, exponent", f"{exponents[OURS]:.2f}", others, None, exponents[OURS], 1.05, False),
        Row(f"mem_growth, {middle} tokens, MB", f"{total[OURS]:.0f} MB", both, ratio, total[OURS], 500, False),
        Row(f"mem_growth, {longest} tokens, MB", f"{most:.0f} MB", "not run", None, most, 4000, False),
    ]
    publish(rows, {"peaks": peaks, "exponents": exponents, "experts_implementation": experts})


def test_mhc_block(publish: Publish) -> None:
    """One hyper-connection site of 4 streams of 256, forward and backward."""
    from bench_blocks import COMPILED, compare, hyper_connection_passes

    runs = hyper_connection_passes(BLOCK_TOKENS, 256)
    checks = {name: compare(runs[OURS], runs[name]) for name in (PEER, COMPILED)}
    times = alternate(runs, rehearse=True)
    floor = 8 * BLOCK_TOKENS * 4 * 256 * 4 / bench_protocol.copy_rate()  # 8 passes over the streams, seconds
    share = floor / times[OURS].median_s
    rows = [
        faster("mhc_block, transformers", times[OURS], times[PEER], 10, f" ({share:.0%} of the byte floor)"),
        faster("mhc_block, torch.compile of it", times[OURS], times[COMPILED], 1.5),
    ]
    measured = {"floor_s": floor, "share_of_floor": share, "copy_bytes_per_s": bench_protocol.copy_rate()}
    publish(rows, {"times": times, "checks": checks} | measured)


def test_moe_block(publish: Publish) -> None:
    """256 experts of 256 -> 64 -> 256, 6 a token, forward and backward, for even and for skewed routing."""
    from bench_blocks import choose_experts, compare, expert_passes

    experts, count, hidden, inner = 256, 6, 256, 64
    flops = 3 * 3 * 2 * BLOCK_TOKENS * count * hidden * inner  # 3 matrices; forward, and two products backward
    runs, checks = {}, {}
    for routing in ("uniform", "Zipf"):
        ids = choose_experts(BLOCK_TOKENS, experts, count, zipf=routing == "Zipf")
        both = expert_passes(ids, experts, hidden, inner)
        checks[routing] = compare(both[OURS], both[PEER])
        runs |= {(name, routing): run for name, run in both.items()}
    times = alternate({f"{name}, {routing}": run for (name, routing), run in runs.items()}, rehearse=True)
    rows = []
    for routing in ("uniform", "Zipf"):
        ours, peer = (times[f"{name}, {routing}"] for name in (OURS, PEER))
        rate = f" ({BLOCK_TOKENS / ours.median_s:.0f} tokens/s, {flops / ours.median_s / 1e9:.0f} GFLOP/s)"
        rows.append(faster(f"moe_block, {routing}", ours, peer, 3, rate))
    uniform, zipf = (times[f"{OURS}, {routing}"] for routing in ("uniform", "Zipf"))
    skew, peer_skew = (times[f"{name}, Zipf"].median_s / times[f"{name}, uniform"].median_s for name in (OURS, PEER))
    noisy = uniform.noisy or zipf.noisy
    rows.append(Row("moe_block, Zipf over uniform", f"{skew:.2f}", f"{peer_skew:.2f}", None, skew, 1.3, False, noisy))
    publish(rows, {"times": times, "checks": checks, "useful_flops": flops})


def test_ce_mem(publish: Publish) -> None:
    """Summed cross-entropy of a head of V4's vocabulary on hidden states of 256, forward and backward."""
    from bench_blocks import CHUNKED, TORCH, compare, cross_entropy_passes, cross_entropy_peak_mb

    rows, measurements = [], {}
    for tokens in CROSS_ENTROPY_TOKENS:
        sizes = (tokens, 256, VOCABULARY)
        peaks = {name: in_child(cross_entropy_peak_mb, name, *sizes) for name in (OURS, TORCH, CHUNKED)}
        runs = cross_entropy_passes(*sizes)
        del runs[CHUNKED]  # its memory alone: a turn takes minutes
        checks = {name: compare(runs[OURS], runs[name]) for name in runs if name != OURS}
        times = alternate(runs, warm_up=False)
        measurements[tokens] = {"peak_mb": peaks, "times": times, "checks": checks}
        for name in (TORCH, CHUNKED):
            label, main = f"ce_mem, {tokens} tokens, {name}", name == TORCH
            ratio = peaks[name] / peaks[OURS]
            extra = f"{peaks[OURS]:.0f} MB", f"{peaks[name]:.0f} MB"
            rows.append(Row(f"{label}, memory", *extra, ratio, ratio, 16 if main else None))
            if name in times:
                rows.append(faster(f"{label}, time", times[OURS], times[name], 1 if main else None))
    publish(rows, measurements)


def test_muon_step(publish: Publish) -> None:
    """One step on 48 experts of 128 x 256, two matrices of 256 x 4096, two of 512 x 2048; and its rounding error."""
    from bench_blocks import MUONS, PLAIN, TORCH, muon_error, muon_parameters

    errors = {name: muon_error(name, 1e4) for name in MUONS}
    assert errors[OURS] <= 1e-2, errors
    times = alternate({name: make(muon_parameters(), 0.01, 0.1).step for name, make in MUONS.items()}, rehearse=True)
    gain = errors[TORCH] / errors[OURS]
    rows = [
        faster("muon_step, torch.optim.Muon(ns_steps=10)", times[OURS], times[TORCH], 4),
        faster("muon_step, plain float32", times[OURS], times[PLAIN], 2),
        Row("muon_step, error at condition 1e4", f"{errors[OURS]:.1e}", f"{errors[TORCH]:.1e}", gain, gain, 100),
    ]
    publish(rows, {"times": times, "errors": errors})


def test_slope_is_the_exponent() -> None:
    lengths = (1024, 2048, 4096, 16384)
    assert slope(lengths, [3e-7 * n**1.85 for n in lengths]) == pytest.approx(1.85)
    assert slope(lengths, [5.0] * 4) == pytest.approx(0)
    noise = (1.1, 0.9, 1.0, 1.02)
    points = [(math.log(n), math.log(n * e)) for n, e in zip(lengths, noise, strict=True)]
    x, y = (sum(column) / 4 for column in zip(*points, strict=True))
    expected = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    assert slope(lengths, [n * e for n, e in zip(lengths, noise, strict=True)]) == pytest.approx(expected)


def test_timing_of_rounds() -> None:
    quiet = Timing.of([1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 5.0])
    assert (quiet.median_s, quiet.min_s, quiet.rounds, quiet.noisy) == (1.0, 0.9, 7, False)
    assert quiet.iqr_s == pytest.approx(0.1)  # one outlier of seven moves neither quartile far
    assert Timing.of([1.0, 1.0, 1.0, 1.2, 1.3, 1.3, 1.3]).noisy


def test_arms_take_turns() -> None:
    order: list[str] = []
    timings = alternate({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert "".join(order) == "abababab"
    assert {timing.rounds for timing in timings.values()} == {3}


def test_gate_refuses_what_differs() -> None:
    x = torch.linspace(1, 2, 1000)
    bench_protocol.gate((x[0], x[0]), [(x, x), (x, x)])
    with pytest.raises(AssertionError, match="gradient_error"):
        bench_protocol.gate((x[0], x[0]), [(x, x), (x * (1 + 3e-5), x)])
    with pytest.raises(AssertionError, match="output_error"):
        bench_protocol.gate((x[0] * 1.00001, x[0]), [(x, x)])
    with pytest.raises(AssertionError, match="nan"):
        bench_protocol.gate((x[0] * math.nan, x[0]), [(x, x)])


def test_peak_memory_counts_what_is_freed() -> None:
    before = bench_protocol.resident_mb()
    assert 95 < bench_protocol.peak_mb_of(lambda: torch.ones(25_000_000).sum()) - before < 120
    assert bench_protocol.resident_mb() - before < 20


def test_table_tells_by_how_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second benchmark, or the same again, leaves the others where they are."""
    fast, slow = (Timing(seconds, seconds, 0.0, 7, False) for seconds in (0.5, 4.0))
    rows = [
        faster("met", fast, slow, 8),
        faster("too slow", fast, slow, 10),
        Row("too large", "1.2", "-", None, 1.26, 1.05, False, noisy=True),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()]
    assert lines[2:] == [
        ["met", "500.0 ms", "4.00 s", "8x", ">= 8", "yes"],
        ["too slow", "500.0 ms", "4.00 s", "8x", ">= 10", "missed by 20%"],
        ["too large", "1.2", "-", "-", "<= 1.05", "missed by 20%, noisy"],
    ]
    monkeypatch.setattr(bench_protocol, "RESULTS", tmp_path)
    times = {OURS: {1024: fast, 2048: slow}}
    bench_protocol.publish("muon_step", rows[:1], {}, (0.0, 0.0, 0.0))
    bench_protocol.publish("cost_exponent", rows[1:2], {"times": times}, (0.0, 0.0, 0.0))
    bench_protocol.publish("muon_step", rows[2:], {}, (0.0, 0.0, 0.0))
    written = json.loads((tmp_path / "cpu_benchmarks.json").read_text())
    assert list(written) == ["cost_exponent", "muon_step"]
    assert written["cost_exponent"]["measurements"]["times"][OURS]["2048"]["median_s"] == 4.0
    page = (tmp_path / "cpu_benchmarks.md").read_text()
    assert "too slow" in page and "too large" in page and "8x    | >= 8 " not in page
    assert (tmp_path / "length_scaling.png").stat().st_size > 0
