"""The plan of memory against what training steps allocate and what a process takes, and against its own rules."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import CSA, HCA, SWA, random_config
from test_memory import Meter

from openv4.data.loader import Batch
from openv4.kernels import attention, cross_entropy, indexer, moe
from openv4.model import ModelConfig, Transformer, load_pretrained, save_pretrained
from openv4.model.activations import PORTIONS, TILE
from openv4.model.config import LoRAConfig
from openv4.model.init import init_weights
from openv4.model.lora import add_lora, lora_parameters
from openv4.model.memory import CPU_STACK_ELEMENTS, STACK_ELEMENTS, Layout, training_memory
from openv4.optim import muon
from openv4.optim.config import OptimConfig
from openv4.optim.groups import build_optimizers
from openv4.optim.schedule import Plan
from openv4.train.config import load_config
from openv4.train.loop import training_step
from openv4.train.precision import held_values

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = ("routed experts", "other weights", "adapters")
PROCESS = ("process", "freed, not returned", "compiled products")


def preset(name: str) -> ModelConfig:
    return load_config([f"model={name}"]).model


def planned(config: ModelConfig, layout: Layout | None = None, **options: Any) -> dict[str, float]:
    """Bytes by item, without those of the process."""
    items = training_memory(config, layout, **options)
    return {item.name: item.bytes for item in items if item.name not in PROCESS}


def odd_config(seed: int) -> ModelConfig:
    """Wider than ``random_config``, so that a step takes megabytes, and no number that is a power of two throughout."""
    r = random.Random(seed)
    kinds = [r.choice([SWA, CSA, HCA]) for _ in range(r.randint(1, 4))] + [CSA]
    ratio = {SWA: 0, CSA: r.choice([2, 4]), HCA: r.choice([16, 32, 128])}
    groups, rope, experts = r.choice([1, 2, 4]), r.choice([8, 16]), r.choice([3, 8, 16, 48])
    return random_config(
        seed,
        vocab_size=r.choice([500, 4096, 9000]),
        hidden_size=r.choice([48, 96, 136, 200, 256]),
        num_hidden_layers=len(kinds),
        num_attention_heads=groups * r.choice([1, 2, 4]),
        head_dim=rope + r.choice([8, 32, 64]),
        qk_rope_head_dim=rope,
        q_lora_rank=r.choice([32, 96, 160]),
        o_groups=groups,
        o_lora_rank=r.choice([16, 64, 100]),
        compress_ratios=(*(ratio[kind] for kind in kinds), 0),
        layer_types=tuple(kinds),
        n_routed_experts=experts,
        num_experts_per_tok=r.randint(1, min(6, experts)),
        moe_intermediate_size=r.choice([30, 64, 112]),
        index_n_heads=r.choice([4, 16, 32]),
        index_head_dim=rope + r.choice([0, 16, 32]),
        index_topk=r.choice([8, 64]),
        sliding_window=r.choice([8, 64, 128]),
        hc_mult=r.choice([1, 2, 3, 4, 6]),
        hc_sinkhorn_iters=r.choice([3, 20]),
    )


def measured(model: Transformer, rows: int, length: int, micro_batches: int, optim: OptimConfig, **plan: Any) -> float:
    """Bytes of all tensors at the fullest moment of the second step."""
    optimizers = build_optimizers(model.named_parameters(), model.row_splits(), optim)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        tokens = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
        segments = (torch.rand(rows, length, generator=generator) < 3 / length).int().cumsum(1, dtype=torch.int32)
        return Batch(tokens, segments, ((),) * rows)

    values: dict[str, Any] = {"stage": 0, "name": "test", "sequence_length": length, "rows": rows, "lr": 1e-3}
    values |= {"balance_weight": 0.01, "bias_speed": 0.0} | plan

    def step() -> None:
        training_step(model, optimizers, [batch() for _ in range(micro_batches)], Plan(**values), 1.0)

    step()
    held = sum(t.untyped_storage().nbytes() for t in model.state_dict().values())
    held += sum(t.nbytes for t in optimizers.state_tensors().values())
    with Meter() as meter:
        step()
    return float(held + meter.peak)


def error(config: ModelConfig, rows: int, length: int, **options: Any) -> float:
    """Relative error of the plan of full training; ``options`` are those of ``training_memory``."""
    compute, optim = options.get("compute", "fp32"), OptimConfig(matrices=options.get("matrices", "muon"))
    mode = options.get("attention", "sparse")
    model = Transformer(
        config, torch.float32 if compute == "fp32" else torch.bfloat16, options.get("recompute", "none")
    )
    init_weights(model, 0)
    mtp = options.get("mtp", True) and mode != "indexer_warmup"
    weights = {"mtp_weight": 0.3 * mtp, "indexer_weight": 1.0 * options.get("indexer", False)}
    real = measured(model, rows, length, options.get("micro_batches", 1), optim, attention=mode, **weights)
    plan = planned(config, rows=rows, length=length, device="cpu", threads=1, **{"compute": compute} | options)
    return sum(plan.values()) / real - 1


@pytest.mark.parametrize(
    ("model", "rows", "length", "options"),
    [
        ("tiny", 2, 1024, {}),
        ("tiny", 1, 1024, {"recompute": "full", "attention": "dense"}),
        ("nano", 1, 4096, {"recompute": "selective", "indexer": True}),
        ("nano", 3, 512, {"compute": "bf16", "mtp": False, "matrices": "adamw"}),
        ("nano", 2, 1024, {"attention": "indexer_warmup"}),
        ("nano", 1, 1000, {"micro_batches": 2, "recompute": "full"}),
    ],
)
def test_the_plan_is_within_a_tenth_of_what_a_step_allocates(
    model: str, rows: int, length: int, options: dict[str, Any]
) -> None:
    assert abs(error(preset(model), rows, length, **options)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_odd_models_are_planned_within_a_tenth(seed: int) -> None:
    r = random.Random(seed)
    options: dict[str, Any] = {
        "recompute": r.choice(["none", "selective", "full"]),
        "compute": r.choice(["fp32", "fp32", "bf16"]),
        "attention": r.choice(["sparse", "sparse", "dense", "indexer_warmup"]),
        "mtp": r.random() < 0.7,
        "micro_batches": r.choice([1, 2]),
        "matrices": r.choice(["muon", "adamw"]),
    }
    options["indexer"] = options["attention"] == "indexer_warmup" or (
        options["attention"] == "sparse" and r.random() < 0.5
    )
    assert abs(error(odd_config(seed), r.choice([1, 2]), r.choice([512, 1000, 2048]), **options)) < 0.1


@pytest.mark.parametrize(
    ("base", "compute", "recompute", "targets"),
    [
        ("released", "bf16", "full", ("attention", "shared_experts")),
        ("bf16", "fp32", "none", ("attention", "experts")),
        ("fp32", "fp32", "selective", ("shared_experts", "compressor", "indexer")),
    ],
)
def test_lora_is_planned_within_a_tenth(
    base: Any, compute: Any, recompute: Any, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """And its weights to the byte."""
    lora, learns = LoRAConfig(8, targets=targets), "indexer" in targets
    config = replace(preset("tiny"), vocab_size=2000)
    whole = Transformer(config)
    init_weights(whole, 0)
    save_pretrained(whole, tmp_path / "base", format="fp4+fp8")
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    model = load_pretrained(tmp_path / "base", dtype, keep_quantized=base == "released")
    model.compute_dtype, model.recompute = torch.float32 if compute == "fp32" else torch.bfloat16, recompute
    add_lora(model, lora)
    plan = planned(
        config, length=512, mtp=False, lora=lora, base=base, compute=compute, recompute=recompute, indexer=learns,
        device="cpu",
    )  # fmt: skip
    assert sum(plan[name] for name in WEIGHTS) == sum(t.untyped_storage().nbytes() for t in model.state_dict().values())
    assert plan["adapters"] == sum(4 * p.numel() for p in lora_parameters(model).values())
    weights = {"mtp_weight": 0.0, "indexer_weight": 1.0 * learns}
    real = measured(model, 1, 512, 1, OptimConfig(), attention="sparse", **weights)
    assert abs(sum(plan.values()) / real - 1) < 0.1


RUN = [
    *("run=smoke", "threads=1", "steps=2", "validation.every=0", "validation.tokens=2048"),
    *("validation.byte_model_order=null", "logging.wandb=disabled", "logging.peak_tflops=1"),
    *("logging.sample_prompt=null", "checkpoint.every=0", "data.workers=0"),
    *("stages.0.batch_tokens_start=null", "stages.0.batch_ramp_tokens=0", "stages.0.warmup_steps=0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rows", "length", "recompute"),
    [("nano", 1, 256, "none"), ("tiny", 2, 1024, "none"), ("tiny", 1, 1024, "full"), ("nano", 1, 4096, "selective")],
)
def test_a_process_takes_what_is_planned(
    model: str, rows: int, length: int, recompute: Any, king_james: Path, tmp_path: Path
) -> None:
    """`openv4 train` in a process of its own: its peak of resident memory, as the system counts it."""
    sizes = [f"stages.0.sequence_length={length}", f"stages.0.batch_tokens={rows * length}"]
    sizes += [f"micro_batch_tokens={rows * length}", f"model={model}", f"recompute={recompute}"]
    script = Path(sys.executable).with_name("openv4")
    command = [str(script), "train", *RUN, *sizes, f"data={king_james}", f"output={tmp_path / 'run'}"]
    program = (
        "import json, resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True, check=True
    )
    items = training_memory(
        preset(model), rows=rows, length=length, attention="dense", compute="fp32", recompute=recompute, device="cpu",
        threads=1,
    )  # fmt: skip
    assert abs(sum(item.bytes for item in items) / int(child.stdout) - 1) < 0.1


def test_the_largest_model_is_planned_without_torch() -> None:
    program = """
import json, re, sys, time
from pathlib import Path
from openv4.train.config import load_config
from openv4.model.memory import Layout, training_memory
config = load_config(["model=v4_pro"]).model
start = time.process_time()
items = training_memory(config, Layout(2048, 64), length=16384, recompute="full")
seconds = time.process_time() - start
resident = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]  # a parent's is not inherited
imported = {name.partition(".")[0] for name in sys.modules} & {"torch", "numpy"}
print(json.dumps([seconds, 1024 * int(resident), sorted(imported), sum(item.bytes for item in items)]))
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, resident, imported, total = json.loads(child.stdout)
    assert imported == []
    assert seconds < 0.5  # 40 ms where nothing else runs
    assert resident < 300e6
    assert total > 2 * 4 * (1.6e12 / 64)  # weights and gradients of the experts alone


def test_the_kernels_numbers_are_repeated_truly() -> None:
    kernels: dict[str, Any] = {"attention": attention, "indexer": indexer, "cross_entropy": cross_entropy, "moe": moe}
    for name, module in kernels.items():
        assert PORTIONS[name] == {"cpu": module.CPU_ELEMENTS, "gpu": module.GPU_ELEMENTS}
    assert moe.TILE == TILE
    assert muon.CPU_ELEMENTS_PER_THREAD == CPU_STACK_ELEMENTS
    assert muon.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).max_elements == STACK_ELEMENTS


def test_what_is_spread_over_gpus() -> None:
    """Experts over the expert-parallel GPUs, state over all, dense weights over none, tokens over those of a row.

    Matrices are held in bfloat16 then, and their float32 originals are state.
    """
    config = preset("small")
    one = planned(config, length=4096, recompute="full")
    many = planned(config, Layout(16, 8, 2), length=4096, recompute="full")
    assert many["routed experts"] == one["routed experts"] / 8 / 2
    with torch.device("meta"):
        model = Transformer(config)
    model.compute_dtype = torch.bfloat16
    held = {name: model.get_parameter(name).numel() for name in held_values(model)}  # as a run does
    dense = sum(size for name, size in held.items() if ".experts." not in name)
    assert many["other weights"] == one["other weights"] - 2 * dense
    assert many["optimizer state"] == pytest.approx((one["optimizer state"] + 4 * sum(held.values())) / 16)
    assert many["batch"] == pytest.approx(one["batch"] / 2, rel=0.1)  # every GPU of a row knows all entries' places
    assert sum(many.values()) < sum(one.values())


def test_the_plan_grows_with_what_is_asked() -> None:
    config = preset("tiny")

    def needs(**options: Any) -> float:
        return sum(planned(config, **{"length": 4096, "recompute": "full"} | options).values())

    assert needs(length=2048) < needs() < needs(length=8192)
    assert needs() < needs(rows=2)
    assert needs() < needs(recompute="selective") < needs(recompute="none")
    assert needs() < needs(compute="fp32")
    assert needs(mtp=False) < needs()
    assert needs() < needs(micro_batches=2)
    assert needs() < needs(matrices="adamw")
    lora = {"lora": LoRAConfig(rank=8), "base": "released"}
    assert needs(**lora) < needs(lora=LoRAConfig(rank=8), base="bf16") < needs()
    assert needs(**lora) < needs(lora=LoRAConfig(rank=64), base="released")


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((8, 3, 1), {}, "expert=3 does not divide gpus=8"),
        ((8, 1, 0), {}, "context=0 must be at least 1"),
        ((32, 32, 1), {}, "expert=32 does not divide the 16 routed experts"),
        ((3, 1, 3), {"length": 1024}, "context=3 does not divide the rows' length=1024"),
    ],
)
def test_what_cannot_be_spread_is_refused(sizes: tuple[int, int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message + "$"):
        training_memory(preset("tiny"), Layout(*sizes), **{"length": 4096} | options)
