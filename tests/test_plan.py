"""`openv4 plan`: what it says of memory, time and communication, against counts of another kind."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_cases import Run
from torch.utils.flop_counter import FlopCounterMode

from openv4.launch.plan import PlanConfig
from openv4.model import ModelConfig, Transformer
from openv4.model.accounting import training_flops_per_token
from openv4.model.memory import Layout
from openv4.model.shapes import tensor_shapes
from openv4.optim.config import OptimConfig
from openv4.optim.groups import build_optimizers
from openv4.train.cluster import Cluster, GpuConfig, Shares
from openv4.train.config import ConfigError, load, load_config
from openv4.train.metrics import read_metrics
from openv4.train.planning import (
    Fitting,
    Placement,
    muon_flops,
    nearest,
    placements,
    plan_stage,
    search,
    stage_bytes,
    why_impossible,
)
from openv4.train.precision import held_values

SMALL_GPU = ["gpu.memory_gb=6.8", "gpu.per_node=4", "model=small", "run=smoke"]


@pytest.fixture
def plan(openv4: Run) -> Callable[..., dict]:  # type: ignore[type-arg]
    """`openv4 plan ... --json`, read."""

    def run(*arguments: object) -> dict:  # type: ignore[type-arg]
        result = openv4("plan", *arguments, "--json")
        assert result.code == 0, result
        return json.loads(result.out)  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize("arguments", [["run=pretrain_pro"], ["run=pretrain_pro", "nodes=256", "compute=fp8"]])
def test_the_largest_model_is_planned_in_two_seconds_without_torch(arguments: list[str]) -> None:
    """Processor time, so that a busy machine fails nothing; memory of the whole process."""
    code = (
        "import re, sys, time; from openv4.launch.cli import main; main(); "
        # Unlike the system's ru_maxrss, this is not inherited from the process that started it.
        "resident = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
        "print(time.process_time(), int(resident) / 1024, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-P", "-c", code, "plan", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes, *imported = result.stdout.splitlines()[-1].split()
    assert float(seconds) < 4 and float(megabytes) < 300 and imported == ["False", "False"]  # 2 s on an idle machine
    assert "1573.00B total" in result.stdout and "does not fit" in result.stdout


def test_a_plan_adds_up(plan: Callable[..., dict]) -> None:  # type: ignore[type-arg]
    found = plan("run=pretrain_flash", "nodes=64", "recompute=full", "micro_batch_tokens=8192")
    run = load_config(["run=pretrain_flash", "data.path=x"])
    assert found["parameters"]["total"] == 284_332_230_231 and found["cluster"]["gpus"] == 512
    assert [s["tokens"] for s in found["stages"]] == [stage.tokens for stage in run.stages]
    assert found["tokens"] == sum(stage.tokens for stage in run.stages)
    for s in found["stages"]:
        assert s["bytes"] == pytest.approx(sum(item["bytes"] for item in s["memory"]))
        assert s["fits"] == (s["bytes"] <= found["cluster"]["memory_bytes"])
        parts = sum(s["compute_seconds"].values()) + s["communication_seconds"] + s["update_seconds"]
        assert s["step_seconds"] == pytest.approx(parts)
        assert s["tokens_per_day"] == pytest.approx(86400 * s["batch_tokens"] / s["step_seconds"])
        assert s["gpu_hours"] == pytest.approx(s["seconds"] * 512 / 3600)
        assert 0 < s["mfu"] < 1
        assert s["seconds"] >= 0.999 * s["tokens"] / s["tokens_per_second"]  # a ramp has more updates per token
    assert found["gpu_hours"] == pytest.approx(sum(s["gpu_hours"] for s in found["stages"]))


def test_flops_of_flash_are_those_of_a_published_measurement() -> None:
    """731 TFLOP/s at 8,056 tokens a second, as published for Flash at 4K: 90.7 GFLOP a token."""
    flash = load_config(["model=v4_flash"]).model
    assert training_flops_per_token(flash, 4096, "sparse") == pytest.approx(731e12 / 8056, rel=0.02)


def test_a_way_out_fits_when_it_is_planned(plan: Callable[..., dict]) -> None:  # type: ignore[type-arg]
    tight = plan(*SMALL_GPU, "gpus=4")
    assert not tight["fits"]
    for stage in tight["stages"]:
        way = stage["nearest"]
        keys = [f"{key}={way[key]}" for key in ("gpus", "expert", "context", "recompute", "micro_rows")]
        again = next(s for s in plan(*SMALL_GPU, *keys)["stages"] if s["name"] == stage["name"])
        assert again["fits"] and again["bytes"] == pytest.approx(way["bytes"])


def test_what_fits_nowhere_says_why(openv4: Run) -> None:
    out = openv4("plan", "run=pretrain_pro", "gpus=8").out
    assert re.search(
        r"stage '4k' does not fit: [\d.]+ of 80 GB; nothing does on up to 8,192 GPUs: .* GB of gradients", out
    )


GPU = GpuConfig("a GPU", 6.75, 50, 100, 200, 400, 2.0, 100, 10, per_node=4)


@pytest.mark.parametrize("gpus", [4, 12])
def test_search_finds_the_fastest_that_fits(gpus: int) -> None:
    """Against all placements, each calculated: the pruned search loses none that is the largest of its kind."""
    run = load_config(["run=smoke", "model=small"])
    for stage in run.stages:
        everything = Cluster(GPU, gpus, compute="bf16")
        bytes = {p: stage_bytes(run, stage, everything, p) for p in placements(run, stage, gpus)}
        capacity = sorted(bytes.values())[len(bytes) // 2] + 1000  # nothing is just on the border
        cluster = replace(everything, gpu=replace(GPU, memory_gb=capacity / 1e9))
        fitting = [p for p, needed in bytes.items() if needed <= cluster.capacity]
        assert 0 < len(fitting) < len(bytes)
        largest = {(p.layout, p.recompute): p for p in sorted(fitting, key=lambda p: p.rows)}
        found = search(run, stage, 1, cluster)
        assert {p.placement for p in found} == set(largest.values())
        assert [p.seconds for p in found] == sorted(
            plan_stage(run, stage, 1, cluster, p).seconds for p in largest.values()
        )


def test_nearest_changes_nothing_that_fits() -> None:
    run = load_config(["run=smoke", "model=nano"])
    cluster = Cluster(GPU, 4)
    for placement in placements(run, run.stages[0], 4):
        if Fitting(run, run.stages[0], cluster)(placement):
            assert nearest(run, run.stages[0], 1, cluster, placement).placement == placement


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["gpus=12", "expert=8"], "expert=8 does not divide gpus=12"),
        (["gpus=15", "expert=5"], "expert=5 does not divide the 16 routed experts"),
        (["gpus=8", "context=3"], "context=3 does not divide gpus=8"),
        (["gpus=64", "context=1"], "a step has 16 rows of 128 tokens for 64 groups of GPUs"),
        (["gpus=4", "context=4"], "context=4 leaves 32 tokens of a row to each GPU, a block or window has 64"),
        (["gpus=9", "nodes=1"], "nodes=1 of 8 GPUs and gpus=9 contradict each other"),
        (["gpu=a100", "compute=fp8"], "A100 SXM 80 GB has no FP8 arithmetic"),
        (["gpus=0"], "gpus=0 must be positive"),
        (["gpus=-8"], "gpus=-8 must be positive"),
        (["gpus=2.5"], "gpus=2.5 must be a whole number"),
        (["gpu.memory_gb=nan"], "gpu.memory_gb=nan must be positive"),
        (["row_tokens=0"], "row_tokens=0 must be positive"),
        (["row_tokens=64", "gpus=abc"], "gpus='abc' must be a whole number"),
        (["row_tokens=64", "nodes=abc"], "nodes='abc' must be a whole number"),
        (["row_tokens=64", "stages.0.batch_tokens=x"], "stages.0.batch_tokens='x' must be a whole number"),
        (["run=lora", "model=v4_flash", "precision.base=fp8"], "choose from fp32, bf16, released"),
        (["run=lora", "model=v4_flash", "lora.rank=0"], "lora.rank = 0: choose a whole number"),
        (["run=lora", "model=v4_flahs"], "model=v4_flahs: no such preset; did you mean v4_flash?"),
        (["shares.matmul=1.5"], "shares.matmul=1.5 must be above 0 and at most 1"),
        (["gpu=h1000"], "no such preset; did you mean h100"),
        (["gpu.memory_gb=-1"], "gpu.memory_gb=-1.0 must be positive"),
        (["show=efficient"], "did you mean efficiency"),
        (["stages.0.batch_tokens=100"], "make it a multiple of sequence_length"),
        (["measured=nowhere"], "no run with two logged steps"),
        (["run=lora"], "model is not set"),
        (["epxert=4"], "epxert: unknown key; did you mean expert"),
    ],
)
def test_impossible_plans_are_refused(refused: Callable[..., str], arguments: list[str], reason: str) -> None:
    run = [] if arguments[0].startswith("run=") else ["run=smoke"]
    assert reason in refused("plan", *run, *arguments)


def test_placements_contradict_nothing() -> None:
    run = load_config(["run=long_context_smoke"])
    for stage in run.stages:
        found = list(placements(run, stage, 8))
        assert found and all(why_impossible(run, stage, p) is None for p in found)
        assert len(set(found)) == len(found)


def test_exchange_with_experts_counts_what_leaves_a_gpu() -> None:
    """Two nodes of two GPUs, an expert each, one token to every expert: to each other GPU a copy, there and back."""
    run = load_config(
        [
            "run=smoke",
            "model=nano",
            "model.n_routed_experts=4",
            "model.num_experts_per_tok=4",
            "model.num_hash_layers=1",
        ]
    )
    gpu = GpuConfig("a GPU", 80, 50, 100, 200, 400, 2.0, 100, 10, per_node=2)
    stage = run.stages[0]
    for recompute, ways in (("none", 2), ("full", 3)):
        placement = Placement(Layout(4, 4, 1), 1, recompute)  # type: ignore[arg-type]
        found = plan_stage(run, stage, 1, Cluster(gpu, 4, compute="bf16"), placement)
        exchange = found.traffic[0]
        blocks, rows = run.model.num_hidden_layers + 1, stage.batch_tokens // stage.sequence_length
        tokens = rows * stage.sequence_length // 4  # of each GPU in a step
        copy = 2 * run.model.hidden_size  # bytes
        assert exchange.link == blocks * tokens * 1 * copy * 2 * ways  # one GPU in the node, dispatch and combine
        assert exchange.network == blocks * tokens * 2 * copy * 2 * ways  # two beyond


def test_exchange_of_gradients() -> None:
    """Each of N GPUs owns a part: it sends (N - 1) / N of the gradients, and as much of the new weights."""
    run = load_config(["run=smoke", "model=nano"])
    found = plan_stage(run, run.stages[0], 1, Cluster(GPU, 4, compute="bf16"), Placement(Layout(4, 2, 1), 1, "none"))
    sent = {t.name: t.link + t.network for t in found.traffic}
    with torch.device("meta"):
        model = Transformer(run.model)
    model.compute_dtype = torch.bfloat16
    held = held_values(model)  # what a run sends in bfloat16
    sizes = {name: (4 + (2 if name in held else 4)) * p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert sent["dense gradients and weights"] == pytest.approx((sum(sizes.values()) - experts) * 3 / 4)
    assert sent["experts' gradients and weights"] == pytest.approx(experts / 2 * 1 / 2)


@pytest.mark.parametrize("seed", range(4))
def test_muon_flops_are_those_of_a_step(seed: int, one_thread: None) -> None:
    """Against torch's counter on a real step of the optimizer."""
    from model_cases import random_config

    config: ModelConfig = random_config(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    optimizers = build_optimizers(model.named_parameters(), model.row_splits(), OptimConfig())
    with FlopCounterMode(display=False) as counter:
        optimizers.step(1e-3, torch.zeros(()))
    assert sum(muon_flops(s, config) for s in tensor_shapes(config)) == counter.get_total_flops()


def test_measured_speed_is_planned_again(plan: Callable[..., dict], workshop: Path) -> None:  # type: ignore[type-arg]
    run = workshop / "run"
    rows = read_metrics(run / "metrics.jsonl")[1:]
    last = [row["train/tokens_per_second"] for row in rows if row["train/stage"] == rows[-1]["train/stage"]]
    config = load_config(["run=smoke"])
    found = plan(f"measured={run}", "run=smoke", "gpu=cpu")
    share = found["shares"]["matmul"]
    assert 0 < share < 1 and all(found["shares"][k] == share for k in ("experts", "attention", "bandwidth"))
    ideal = plan("run=smoke", "gpu=cpu", *(f"shares.{k}=1.0" for k in ("matmul", "experts", "attention", "bandwidth")))
    for slow, fast in zip(found["stages"], ideal["stages"], strict=True):
        assert slow["tokens_per_second"] == pytest.approx(share * fast["tokens_per_second"])
    assert min(last) > 0 and config.name == "smoke"


def test_lora_of_released_weights(plan: Callable[..., dict], release: Path) -> None:  # type: ignore[type-arg]
    flash = plan("run=lora", "model=v4_flash", "gpus=8", "row_tokens=8192", "recompute=full", "data_tokens=1000000")
    (stage,) = flash["stages"]
    assert flash["fits"] and stage["sequence_length"] == 8192 and stage["batch_tokens"] == 8 * 8192
    assert stage["tokens"] == 2_000_000  # two epochs
    assert flash["parameters"]["total"] == 284_332_230_231
    small = plan("run=lora", f"model.pretrained={release}", "gpus=1", "row_tokens=64")
    names = {item["name"]: item["bytes"] for item in small["stages"][0]["memory"]}
    assert small["parameters"]["total"] < 10**7 and any("adapters" in name for name in names)


def test_a_length_that_depends_on_the_data_is_asked_for(openv4: Run) -> None:
    lora = ["plan", "run=lora", "model=tiny", "gpus=1", "row_tokens=512"]
    asked = "its length depends on the data: give data_tokens=<number>"
    assert asked in openv4(*lora).out
    assert asked not in openv4(*lora, "data_tokens=10000").out
    assert asked not in openv4("plan", "run=smoke", "gpus=1").out


def test_a_plan_says_what_it_assumes(openv4: Run) -> None:
    out = openv4("plan", "run=smoke", "gpus=2", "shares.matmul=0.37", "--search").out
    for text in (
        "calculated, not measured",
        "linear maps 37%",
        "989 TFLOP/s bf16",
        "data sheet",
        "(assumed)",
        "placements",
    ):
        assert text in out
    assert re.search(r"fits: [\d.]+ GB to spare", out)


def test_a_page(openv4: Run, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert openv4("plan", "run=smoke", "gpus=2", "name=<script>alert(1)</script>", f"html={page}").code == 0
    text = page.read_text()
    assert "<script>alert(1)" not in text and "&lt;script&gt;" in text
    assert not re.search(
        r"<(script|link|img|iframe)[^>]* (src|href)=", text[text.index("<h2>") :] + text.split("<script")[0]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]


def test_presets_of_gpus_compose() -> None:
    for gpu in ("h100", "h200", "b200", "a100", "cpu"):
        config = load("plan", PlanConfig, ["run=smoke", f"gpu={gpu}"])
        assert config.cluster().capacity > 1e9
    with pytest.raises(ConfigError, match="per_node"):
        load("plan", PlanConfig, ["run=smoke", "gpu.per_node=0"])


def test_overlap_hides_communication() -> None:
    run = load_config(["run=smoke", "model=nano"])
    placement = Placement(Layout(8, 4, 1), 1, "none")
    shown, hidden = (
        plan_stage(run, run.stages[0], 1, Cluster(GPU, 8, Shares(overlap=overlap)), placement)
        for overlap in (0.0, 0.75)
    )
    assert hidden.communication == pytest.approx(shown.communication / 4) and hidden.compute == shown.compute
