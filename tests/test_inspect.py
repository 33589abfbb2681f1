"""`openv4 inspect`, from headers alone, and `openv4 plan`, from a config alone."""

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import release_fixture as oracle
from cli_cases import Run, spoil
from finetune_cases import write_base

from openv4.model.config import LoRAConfig, ModelConfig, without_mtp
from openv4.model.memory import Layout, training_memory
from openv4.train.config import load_config

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")


def lines_of(out: str) -> dict[str, str]:
    """The lines `label: text`."""
    return dict(re.findall(r"^ *(\w[\w ]*): (.*)$", out, re.MULTILINE))


def types_of(out: str) -> dict[str, tuple[int, int]]:
    """Tensors and bytes of each type, from the table."""
    rows = re.findall(r"^\W*([A-Z]\w+) +\W +([\d,]+) +\W +([\d,]+) *\W*$", out, re.MULTILINE)
    return {kind: (int(count.replace(",", "")), int(size.replace(",", ""))) for kind, count, size in rows}


@pytest.mark.parametrize("variant", ["instruct", "base"])
@pytest.mark.parametrize("spelling", ["{}", "path={}"])
def test_what_a_release_holds(variant: str, spelling: str, openv4: Run, tmp_path: Path) -> None:
    base = write_base(tmp_path / "a, [b]", variant)
    result = openv4("inspect", spelling.format(base))
    assert (result.code, result.err) == (0, "")
    found, stored = lines_of(result.out), oracle.read_release(base)
    size = sum(len(tensor.data) for tensor in stored.values())
    assert found["folder"] == str(base)
    assert (
        found["variant"]
        == {
            "instruct": "instruct layout: FP4 routed experts, FP8 matrices",
            "base": "Base layout: FP8 matrices, routed experts included",
        }[variant]
    )
    assert (found["MTP block"], found["stored"]) == ("yes", f"{len(stored)} tensors in 1 files, {size:,} bytes")
    assert found["beside"] == "tokenizer.json, tokenizer_config.json, generation_config.json, LICENSE"
    assert [found[kind] for kind in ("missing", "unexpected", "misshapen")] == ["none"] * 3
    types = {tensor.dtype for tensor in stored.values()}
    assert types_of(result.out) == {
        kind: (
            sum(tensor.dtype == kind for tensor in stored.values()),
            sum(len(tensor.data) for tensor in stored.values() if tensor.dtype == kind),
        )
        for kind in types
    }
    assert ("I8" in types) == (variant == "instruct")


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "fp4+fp8"])
def test_exports(format: str, release: Path, openv4: Run, tmp_path: Path) -> None:
    """Of every format; and without the files beside."""
    assert openv4("export", f"checkpoint={release}", f"output={tmp_path / 'out'}", f"format={format}").code == 0
    shutil.rmtree(tmp_path / "bare", ignore_errors=True)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "bare")
    found = lines_of(openv4("inspect", tmp_path / "bare").out)
    words = {"fp32": "float32", "bf16": "bfloat16", "fp8": "Base layout", "fp4+fp8": "instruct layout"}
    assert words[format] in found["variant"] and found["beside"] == "nothing"


def test_a_run_and_its_checkpoints(workshop: Path, openv4: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    for path in (workshop / "run", workshop / "run" / "checkpoints" / "step_8"):
        found = lines_of(openv4("inspect", path).out)
        assert found["folder"] == str(workshop / "run" / "checkpoints" / "step_8")
        assert found["variant"] == "not quantised, float32" and found["missing"] == "none"
    assert refused("inspect") == "path is not set; give path=..."
    assert refused("inspect", tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such folder")
    assert "holds neither config.json nor" in refused("inspect", tmp_path)
    assert refused("inspect", workshop / "run", "pth=x").startswith("pth: unknown key; did you mean path?")
    assert refused("inspect", workshop / "run", "x").startswith("'x' is not key=value")


def test_a_damaged_release(release: Path, openv4: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    """What is missing, unexpected and misshapen is listed, all of it, and is no error; a cut file is."""
    tensors = oracle.read_release(release)
    config = json.loads((release / "config.json").read_text())
    missing = ("norm.weight", "layers.1.ffn.experts.3.w2.scale", "mtp.0.e_proj.weight")
    changed = {name: stored for name, stored in tensors.items() if name not in missing}
    changed["layers.9.attn.wq_a.weight"] = tensors["layers.0.attn.wq_a.weight"]
    sink, gate = tensors["layers.0.attn.attn_sink"], tensors["layers.2.ffn.gate.bias"]
    changed["layers.0.attn.attn_sink"] = oracle.Stored("F32", (2,), sink.data[:8])
    changed["layers.2.ffn.gate.bias"] = oracle.Stored("I64", (2,), gate.data)
    oracle.write_folder(tmp_path / "odd", config, changed)
    result = openv4("inspect", tmp_path / "odd")
    assert result.code == 0, result
    found = lines_of(result.out)
    assert set(found["missing"].split(", ")) == set(missing)
    # The scale of a weight that is not there belongs to nothing.
    assert set(found["unexpected"].split(", ")) == {"layers.9.attn.wq_a.weight", "mtp.0.e_proj.scale"}
    assert found["misshapen"] == "layers.0.attn.attn_sink is (2,), not (4,), layers.2.ffn.gate.bias is of type I64"
    many = {name: stored for name, stored in tensors.items() if ".experts." not in name}
    oracle.write_folder(tmp_path / "dense", config, many)
    listed = lines_of(openv4("inspect", tmp_path / "dense").out)["missing"]
    assert listed.endswith(" and 28 more") and listed.count(",") == 19  # 4 blocks x 4 experts x 3 matrices

    oracle.write_folder(tmp_path / "cut", config, tensors, shards=3)
    spoil(tmp_path / "cut" / "model-00003-of-00003.safetensors", "cut")
    message = refused("inspect", tmp_path / "cut")
    assert message.startswith(f"{tmp_path / 'cut' / 'model-00003-of-00003.safetensors'}: damaged or unreadable")


def flash() -> dict[str, Any]:
    """The config of Flash, as its config.json has it."""
    config = asdict(load_config(["model=v4_flash"]).model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def write_flash(folder: Path, files: int = 46) -> tuple[int, int]:
    """Headers alone, data as holes of sparse files; the number of tensors and their bytes."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (kind, shape) in oracle.table(flash()).items():
        if kind == "EXPERT":
            tensors[name] = ("I8", (shape[0], shape[1] // 2))
            tensors[oracle.scale_of(name)] = ("F8_E8M0", (shape[0], shape[1] // 32))
        elif kind == "FP8":
            tensors[name] = ("F8_E4M3", shape)
            tensors[oracle.scale_of(name)] = ("F8_E8M0", tuple(-(-size // 128) for size in shape))
        else:
            tensors[name] = (kind, shape)
    folder.mkdir()
    config = oracle.config_json({k: v for k, v in flash().items() if k not in ("rope_scaling", "layer_types")})
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for number, file in enumerate(oracle.shard_names(files)):
        header: dict[str, Any] = {}
        position = 0
        for name in sorted(list(tensors)[number::files], key=lambda name: (-oracle.ITEMSIZE[tensors[name][0]], name)):
            dtype, shape = tensors[name]
            end = position + oracle.ITEMSIZE[dtype] * prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            weight_map[name], position = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + position)
        total += position
    (folder / oracle.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return len(tensors), total


def test_flash_in_a_moment(openv4: Run, tmp_path: Path) -> None:
    """69,187 tensors in 46 files (recipe 8.3), 160 GB that are not read."""
    count, size = write_flash(tmp_path / "flash")
    assert count == 69_187
    start = time.perf_counter()
    result = openv4("inspect", tmp_path / "flash")
    seconds = time.perf_counter() - start
    found = lines_of(result.out)
    assert found["stored"] == f"69,187 tensors in 46 files, {size:,} bytes"
    assert found["variant"].startswith("instruct layout")
    assert [found[kind] for kind in ("missing", "unexpected", "misshapen")] == ["none"] * 3
    assert found["parameters"] == "284.33B total, 13.27B active, 6.61B in the MTP block"
    assert seconds < 20, "two on an idle core"


# The plan.


def plan_rows(out: str) -> dict[str, float]:
    return {name.strip(): float(gb) for name, gb in re.findall(r"^\u2502 (\w[^\u2502]*)\u2502 +([\d.]+) ", out, re.M)}


@pytest.fixture(scope="module")
def flash_config() -> ModelConfig:
    return load_config(["model=v4_flash"]).model


def test_weights_of_the_plan_are_those_of_the_files(flash_config: ModelConfig, openv4: Run, tmp_path: Path) -> None:
    """Experts over the GPUs and the rest on each of them, without the MTP block; adapters counted by hand."""
    experts = others = 0
    for name, (kind, shape) in oracle.table(flash()).items():
        if name.startswith("mtp."):
            continue
        if kind == "EXPERT":
            experts += prod(shape) // 2 + prod(shape) // 32
        elif kind == "FP8":
            others += prod(shape) + prod(-(-size // 128) for size in shape)
        else:
            others += prod(shape) * {"BF16": 2, "F32": 4, "I64": 8}[kind]
    c, rank = flash_config, 16
    heads = c.num_attention_heads * c.head_dim
    pairs = [
        (c.hidden_size, c.q_lora_rank),
        (c.q_lora_rank, heads),
        (c.hidden_size, c.head_dim),
        (heads // c.o_groups, c.o_groups * c.o_lora_rank),
        (c.o_groups * c.o_lora_rank, c.hidden_size),
        *[(c.hidden_size, c.moe_intermediate_size)] * 3,
    ]
    adapters = c.num_hidden_layers * rank * sum(a + b for a, b in pairs)
    main = without_mtp(c)

    def items(gpus: int, lora: LoRAConfig, base: Any = "released") -> dict[str, float]:
        layout = Layout(gpus, gpus)
        found = training_memory(main, layout, length=16384, recompute="full", mtp=False, lora=lora, base=base)
        return {item.name: item.bytes for item in found}

    for gpus in (1, 8):
        found = items(gpus, LoRAConfig())
        assert found["routed experts"] == experts / gpus
        assert found["other weights"] == others
        assert found["adapters"] == 4 * adapters and found["optimizer state"] == 8 * adapters
    # With adapters on every expert, those are spread like the experts.
    every = c.num_hidden_layers * c.n_routed_experts * rank
    every *= (c.hidden_size + 2 * c.moe_intermediate_size) + (c.moe_intermediate_size + c.hidden_size)
    assert items(8, LoRAConfig(targets=("experts",)))["adapters"] == 4 * every / 8
    bf16 = items(8, LoRAConfig(), "bf16")
    assert bf16["routed experts"] == experts / 8 * 2 / (1 / 2 + 1 / 32)
    assert items(8, LoRAConfig(), "fp32")["routed experts"] == 2 * bf16["routed experts"]
