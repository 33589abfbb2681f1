"""The GPU benchmarks' harness, on a CPU: counts, gates, isolation, the page; and every benchmark once, tiny."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_gpu_attention as attention
import bench_gpu_kernels as kernels
import bench_gpu_model as model
import gpu_floors as floors
import gpu_protocol
import gpu_run
import pytest
import torch
from gpu_floors import H100, Work
from gpu_passes import Passes
from gpu_protocol import NOT_RUN, Benchmark, Case, NotHereError, Place, Row, Target, agreement, page, run, table

pytestmark = pytest.mark.usefixtures("one_thread")  # all is tiny here

ROOT = Path(__file__).parents[1]
CPU = Place(torch.device("cpu"), "torch")
BENCHMARKS = gpu_run.registered()
T = 4096

# GFLOP, MB and microseconds on an H100 at 4096 tokens, derived by hand for one layer of V4-Flash; None: not binding.
FLOORS: dict[str, tuple[Work, float | None, float | None, float]] = {
    "mHC pre": (floors.mhc_pre(T), 3.4, 170, 57),
    "mHC post": (floors.mhc_post(T), 0.7, 302, 101),
    "mHC post + pre": (floors.mhc_post_pre(T), None, 336, 112),
    "mHC backward": (floors.mhc_post_pre_backward(T), None, 504, 168),
    "RMSNorm + FP8": (floors.fp8_rows(T, 4096), 0.07, 51, 17),
    "index scores, bf16": (floors.index_scores(T), 34, 72, 43),
    "index scores, FP8": (floors.index_scores(T, width=floors.FP8), 34, 38, 23),
    "CSA core": (floors.attention(T, 4, 512, False), 274, 551, 342),
    "CSA core, backward": (floors.attention(T, 4, 512, True), 684, 1098, 855),
    "CSA core, 16k": (floors.attention(4 * T, 4, 512, False), None, None, 1631),
    "HCA core": (floors.attention(T, 128, None, False), 76, 541, 180),
    "HCA core, backward": (floors.attention(T, 128, None, True), 190, 1086, 362),
    "HCA core, 65k": (floors.attention(16 * T, 128, None, False), None, None, 4100),
    "MoE, all experts": (floors.experts(T, 257, 7, False), 1443, 13757, 4586),
    "MoE, an eighth of the experts": (floors.experts(T, 33, 7, False), 1443, 2483, 1804),
    "MoE, backward": (floors.experts(T, 33, 7, True), 2886, 4966, 3608),
    "router": (floors.router(T), 8.6, 38, 25),
    "FP4 of all experts": (floors.fp4_weight(768), None, 32400, 10800),
    "FP4 of a matrix": (floors.fp4_weight(1), None, None, 14),
    "Newton-Schulz of an expert": (floors.newton_schulz(1, 2048, 4096), 412, None, 520),
    "Newton-Schulz of q_b": (floors.newton_schulz(1, 1024, 32768), 245, None, 310),
    "Newton-Schulz of o_b": (floors.newton_schulz(1, 4096, 8192), 3299, None, 4100),
    "head and cross-entropy": (floors.cross_entropy(T), 13014, None, 16300),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name: str) -> None:
    """To two percent, or to the last digit that was kept."""
    work, gflop, megabytes, microseconds = FLOORS[name]
    if gflop is not None:
        assert work.flops / 1e9 == pytest.approx(gflop, rel=0.02, abs=0.05)
    if megabytes is not None:
        assert work.bytes / 1e6 == pytest.approx(megabytes, rel=0.02)
    assert work.seconds(H100) * 1e6 == pytest.approx(microseconds, rel=0.02, abs=0.5)


def test_every_benchmark_is_registered_once() -> None:
    keys = [benchmark.key for benchmark in BENCHMARKS]
    assert len(set(keys)) == len(keys)
    assert {benchmark.name.split()[0] for benchmark in BENCHMARKS} == {f"D{n}" for n in range(1, 15)}
    assert all(name in gpu_protocol.ABSENT for benchmark in BENCHMARKS for name in benchmark.absent)
    assert not any("|" in key for key in keys)


def test_the_page_in_docs_lists_every_benchmark() -> None:
    """It is drawn anew by `python tests/gpu_run.py --table`."""
    folder = ROOT / "docs" / "results"
    text = (folder / "gpu_benchmarks.md").read_text()
    assert text == page(BENCHMARKS, gpu_protocol.load(folder / "gpu_benchmarks.json"))
    for benchmark in BENCHMARKS:
        assert f"| {benchmark.name} | {benchmark.size} |" in text


def test_what_was_not_run_says_so() -> None:
    text = page(BENCHMARKS, {"runs": []})
    assert text.count(NOT_RUN) == len(BENCHMARKS)
    assert "Nothing here has been run" in text


def test_table_holds_values_against_targets() -> None:
    targets = (Target("share", 0.85), Target("extra MB", 256, False), Target("over Liger", 1.4))
    benchmark = Benchmark("D1 a", "T 1", "g", lambda _: Case(lambda: ""), targets)
    values = {"ms": 0.5, "share": 0.9, "ratio": 3.0, "extra MB": 300.0}
    row = Row(benchmark.key, "measured", "1e-3 from torch", values, {"torch": 1.5, "Liger": "not installed: skipped"})
    line = table([benchmark], {row.key: row}).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "D1 a",
        "T 1",
        "0.5",
        "90%",
        "torch 1.5; Liger not installed: skipped",
        "3x",
        "share >= 0.85; extra MB <= 256; over Liger >= 1.4",
        "yes; no; -",
        "extra MB 300",
        "1e-3 from torch",
    ]


def measured(case: Case, seconds: Mapping[Any, float], **options: Any) -> Row:
    """Of a case whose arms take as long as they are said to."""
    benchmark = Benchmark("D1 a", "T 1", "g", lambda _: case, **options)
    return run(benchmark, CPU, lambda call: seconds[call], H100)


def ours() -> None: ...
def fast() -> None: ...
def slow() -> None: ...


def test_times_shares_and_ratios() -> None:
    case = Case(lambda: "fine", ours, {"fast": fast, "slow": slow}, Work(0.0, 3e9), lambda _: {"extra MB": 7.0})
    times = {ours: 2e-3, fast: 3e-3, slow: 8e-3}
    row = measured(case, times, targets=(Target("over slow", 4),), absent=("Liger",))
    assert row.status == "measured" and row.correctness == "fine"
    assert row.values == pytest.approx({"ms": 2, "share": 0.5, "ratio": 1.5, "over slow": 4, "extra MB": 7})
    assert row.peers == {"Liger": "not installed: skipped", "fast": 3.0, "slow": 8.0}


def test_what_is_wrong_is_not_timed() -> None:
    def wrong() -> str:
        raise AssertionError("output 0 is off by 1.0 | from torch")

    row = measured(Case(wrong, ours), {})
    assert (row.status, row.values, row.peers) == ("wrong", {}, {})
    assert row.correctness == "FAILED: AssertionError: output 0 is off by 1.0 / from torch"
    assert not gpu_run.sound([{"rows": [asdict(row)]}])


def test_a_failing_peer_costs_its_own_arm() -> None:
    row = measured(Case(lambda: "fine", ours, {"fast": fast, "slow": slow}), {ours: 1e-3, slow: 2e-3})
    assert row.values == {"ms": 1.0, "ratio": 2.0}
    assert row.peers["fast"].startswith("failed: KeyError")  # type: ignore[union-attr]


def test_what_is_missing_is_named() -> None:
    def build(_: Place) -> Case:
        raise NotHereError("not run: there is no kernels.moe.swirl")

    row = run(Benchmark("D1 a", "T 1", "g", build), CPU, lambda _: 1.0, H100)
    assert row.status == "not run: there is no kernels.moe.swirl"
    assert gpu_run.sound([{"rows": [asdict(row)]}])


def test_agreement_sees_every_difference() -> None:
    x = torch.arange(1.0, 9.0)
    assert agreement({"x": x * 1.01}, {"x": x}, 0.02, "torch") == "1e-02 from torch"
    for found in ({"x": x * 1.03}, {"x": x.double()}, {"x": x[:4]}, {"y": x}, {"x": x * torch.nan}):
        with pytest.raises(AssertionError):
            agreement(found, {"x": x}, 0.02, "torch")
    for same in (torch.zeros(()), torch.ones(3).to(torch.float8_e4m3fn), torch.arange(3)):
        assert agreement({"x": same}, {"x": same}, 0, "torch") == "equal to torch"
        with pytest.raises(AssertionError, match="x differs from torch"):
            agreement({"x": (same.float() + 2).to(same.dtype)}, {"x": same}, 0, "torch")


def test_a_result_that_varies_is_wrong() -> None:
    calls: list[int] = []

    def drifting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * (1 + 1e-4 * len(calls))

    with pytest.raises(AssertionError, match="differs from the first of two runs"):
        Passes(drifting, {"x": torch.ones(3)}).agree(CPU, backward=False)


SMALL: dict[str, Callable[[Place], Case]] = {
    "post + pre": partial(kernels.mhc_post_pre, tokens=40, backward=False, hidden=32),
    "post + pre, backward": partial(kernels.mhc_post_pre, tokens=40, backward=True, hidden=32),
    "Sinkhorn": partial(kernels.sinkhorn_inside, tokens=40, hidden=32),
    "norm": partial(kernels.rms_norm_fp8, tokens=40, hidden=256),
    "SwiGLU": partial(kernels.swiglu_fp8, rows=40, inner=256),
    "FP4": partial(kernels.fp4_weight, matrices=2, rows=128, columns=256),
    "selection": partial(attention.select_entries, tokens=128, dtype=torch.bfloat16, heads=4, dim=32, k=8),
    "CSA": partial(attention.attention, tokens=160, ratio=4, k=8, backward=False, heads=4, dim=32),
    "CSA, backward": partial(attention.attention, tokens=160, ratio=4, k=8, backward=True, heads=4, dim=32),
    "HCA, backward": partial(attention.attention, tokens=300, ratio=128, k=None, backward=True, heads=4, dim=32),
    "experts": partial(kernels.experts, tokens=64, zipf=True, backward=False, count=8, hidden=32, inner=48),
    "experts, backward": partial(kernels.experts, tokens=64, zipf=False, backward=True, count=8, hidden=32, inner=48),
    "router": partial(kernels.router, tokens=64, hidden=32, count=16),
    "Newton-Schulz": partial(kernels.newton_schulz, matrices=2, rows=64, columns=128),
    "head": partial(kernels.cross_entropy, tokens=64, weight=torch.float32, vocabulary=200, hidden=32),
}
CONFIG = replace(
    model.CONFIG,
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 16, 0),
    layer_types=("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    sliding_window=16,
    index_n_heads=8,
    index_head_dim=32,
    index_topk=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
)
WHOLE: dict[str, Callable[[Place], Case]] = {
    "step": partial(model.step, length=64, config=CONFIG, tokens=128),
    "mHC": partial(model.mhc_tax, length=64, config=CONFIG),
    "MTP": partial(model.mtp_tax, length=64, config=CONFIG),
    "QAT": partial(model.qat_tax, length=64, config=CONFIG, micro_batches=2),
    "Muon": partial(model.muon_tax, length=64, config=CONFIG, tokens=256),
    "anticipation": partial(model.anticipation_tax, length=64, config=CONFIG),
    "determinism": partial(model.determinism, length=64, config=CONFIG, steps=2),
    "MoE layer": partial(model.host_of_experts, tokens=64, config=CONFIG),
    "micro-batch": partial(model.host_of_step, length=64, config=CONFIG),
}


@pytest.mark.parametrize("name", [*SMALL, *WHOLE])
def test_benchmarks_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from its tensors to its row, with a clock that says a second for everything; peers run as well."""
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    monkeypatch.setattr(model, "wall", partial(model.wall, rounds=1))

    def clock(call: Callable[[], object]) -> float:
        call()
        return 1.0

    benchmark = Benchmark("D1 a", "tiny", "g", (SMALL | WHOLE)[name])
    row = run(benchmark, CPU, clock, H100)
    assert row.status == "measured", row
    assert row.correctness not in ("-", "") and row.values
    failed = {peer: told for peer, told in row.peers.items() if isinstance(told, str)}
    assert not failed, failed
    assert all(isinstance(value, float | int) for value in row.values.values())


def test_peers_of_attention_attend_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for ratio, k in ((4, 8), (128, None)):
        drawn = attention.attention_inputs(CPU, 300, ratio, k, 4, 32)
        inputs = {n: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in drawn.items()}
        expected = attention.operation("kernels.attention", "hybrid_attention")
        found = attention.flex(inputs)(**inputs)
        assert gpu_protocol.relative_rms(found, expected(**inputs)[0]) < 1e-5
        inputs["sink"] = torch.full_like(inputs["sink"], -100)  # the other peer knows no sink
        assert gpu_protocol.relative_rms(attention.masked(inputs)(**inputs), expected(**inputs)[0]) < 1e-5


def test_plain_residual_is_a_plain_residual() -> None:
    """With mHC patched away and one stream, a block only adds its outputs; the gain of training is not zero."""
    training = model.Training(CPU, replace(CONFIG, hc_mult=1), 1, 32)
    with model.plain_residual():
        loss = training.micro()
    projections = [p for name, p in training.model.named_parameters() if name.endswith("hc_attn_fn")]
    assert loss.isfinite() and all(p.grad is None for p in projections)
    assert training.model.embed.weight.grad is not None


def test_groups_are_chosen_in_their_order() -> None:
    known = gpu_run.group_names(BENCHMARKS)
    assert known[:2] == ["correctness", "ceilings"] and len(set(known)) == len(known)
    assert gpu_run.chosen(["all"], BENCHMARKS) == gpu_run.chosen([], BENCHMARKS) == known
    assert gpu_run.chosen(["moe,ceilings"], BENCHMARKS) == ["ceilings", "moe"]
    with pytest.raises(ValueError, match="GROUP=mo: choose from all, correctness, ceilings"):
        gpu_run.chosen(["mo"], BENCHMARKS)


TOYS = """
import ctypes
import time
from gpu_protocol import Benchmark, Case


def crash():
    ctypes.string_at(0)


def wait():
    time.sleep(1000)


def check():
    return "fine"


BENCHMARKS = [
    Benchmark("D1 first", "s", "toys", lambda place: Case(check, lambda: None)),
    Benchmark("D2 crash", "s", "toys", lambda place: Case(check, crash)),
    Benchmark("D3 next", "s", "toys", lambda place: Case(check, lambda: None)),
    Benchmark("D4 hang", "s", "toys", lambda place: Case(check, wait)),
    Benchmark("D5 last", "s", "toys", lambda place: Case(check, lambda: None)),
]
"""


def test_a_group_outlives_what_crashes_and_ends_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    entry = gpu_run.run_group("toys", ["toys"], "cpu", each=2)
    status = {row["key"]: row["status"] for row in entry["rows"]}
    assert status["D1 first, s"] == status["D3 next, s"] == status["D5 last, s"] == "measured"
    assert status["D2 crash, s"] == "crashed with exit code -11"
    assert status["D4 hang, s"] == "took more than 2 s"
    assert entry["note"] == "D2 crash, s: crashed with exit code -11; D4 hang, s: took more than 2 s"
    assert entry["ceilings"]["flops"]["bf16"] > 0 and entry["ceilings"]["bytes"] > 0
    entry = gpu_run.run_group("toys", ["toys"], "cpu", seconds=0.1)
    assert {row["status"] for row in entry["rows"]} == {"not run (timed out after 0 s)"}


def test_results_are_appended_and_the_newest_shown(tmp_path: Path) -> None:
    benchmark = Benchmark("D1 a", "T 1", "g", lambda _: Case(lambda: ""))
    where = gpu_protocol.conditions(torch.device("cpu"))
    assert where["commit"] and where["versions"]["torch"] == torch.__version__
    for ms in (2.0, 1.0):
        row = Row(benchmark.key, "measured", "fine", {"ms": ms})
        entry = {"group": "g", "conditions": where, "rows": [asdict(row)], "ceilings": asdict(H100)}
        results = gpu_protocol.append(tmp_path / "new" / "results.json", entry)
    assert len(results["runs"]) == 2
    assert gpu_run.main(["--merge", str(tmp_path / "new" / "results.json"), "--output", str(tmp_path)]) == 0
    assert gpu_protocol.load(tmp_path / "gpu_benchmarks.json") == results
    text = page([benchmark], results)
    assert "| 1 |" in text and "| 2 |" not in text
    assert "bf16 800" in text and "3.00 TB/s" in text and NOT_RUN not in text


def test_test_files_run_without_conftest(tmp_path: Path) -> None:
    good, bad, silent = (tmp_path / f"test_{name}.py" for name in ("good", "bad", "silent"))
    good.write_text("import pytest\ndef test_a(): ...\n@pytest.mark.gpu\ndef test_b(): ...\n")
    bad.write_text("def test_a(): assert 0\n")
    silent.write_text("import os\nos._exit(3)\n")
    (tmp_path / "conftest.py").write_text("import a_module_that_a_bare_machine_lacks\n")
    told = gpu_run.run_tests([(good, ["-m", "gpu"]), (bad, []), (silent, [])], seconds=60)
    assert told["test_good.py"].startswith("1 passed in")
    assert told["test_bad.py"].startswith("0 passed, 1 failed in")
    assert told["test_silent.py"] == "crashed with exit code 3"
    assert not gpu_run.sound([{"tests": told}]) and gpu_run.sound([{"tests": {"a": told["test_good.py"]}}])


BARE = """
import sys

class Lacks:
    def find_spec(self, name, *_):
        absent = ("hydra", "omegaconf", "wandb", "deepspeed", "plotly", "pyarrow", "peft", "hypothesis", "selenium")
        if name.split(".")[0] in absent:
            raise ImportError(name)

sys.meta_path.insert(0, Lacks())
import gpu_run, pytest
assert len(gpu_run.registered()) > 40
files = [str(path) for path, _ in gpu_run.kernel_tests()]
sys.exit(pytest.main([*files, "--setup-plan", "--noconftest", "-p", "thread_fixtures", "-p", "no:cacheprovider"]))
"""


def test_a_bare_machine_has_all_that_the_tests_need() -> None:
    """Modules and fixtures: no more than torch, triton, pytest, numpy, safetensors and transformers are there."""
    environment = gpu_run.environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    planned = result.stdout
    assert "test_kernels_agree_with_torch" in planned or " skipped" in planned  # without a device
    assert "test_codes_and_casts_equal_torchs" in planned


def test_make_gpu_needs_no_environment() -> None:
    result = subprocess.run(
        ["make", "-n", "gpu", "GROUP=mhc", "GPU_PYTHON=some-python"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "some-python tests/gpu_run.py mhc" in result.stdout and ".ns/openv4" in result.stdout
    assert "pip" not in result.stdout and ".venv" not in result.stdout


def test_without_a_device_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert gpu_run.main(["mhc", "--output", str(tmp_path)]) == 1
        assert NOT_RUN in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert gpu_run.main(["mo", "--output", str(tmp_path)]) == 2
    assert gpu_run.main(["--list"]) == 0
    assert "determinism" in capsys.readouterr().out
    assert gpu_run.main(["--table", "--output", str(tmp_path)]) == 0
    assert json.loads(json.dumps((tmp_path / "gpu_benchmarks.md").read_text())).count(NOT_RUN) == len(BENCHMARKS)
