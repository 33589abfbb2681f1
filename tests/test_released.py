"""Released names and formats, both ways: what is written, what is read, and what is refused."""

import errno
import json
import random
import re
import resource
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import CSA, HCA, SWA, random_config, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openv4.model import ModelConfig, Transformer, load_pretrained, save_pretrained
from openv4.model import tensor_files as released_module
from openv4.model.config import ModelConfigError, WeightsError, YarnConfig
from openv4.model.released import check_weights, released_tensors
from openv4.model.tensor_files import INDEX, new_folder, weight_files
from openv4.train.config import load_config

# Every kind of layer: window, CSA, HCA, hash-routed and learned, and the MTP block. No two sizes are equal.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "head_dim": 14,
    "qk_rope_head_dim": 6,
    "q_lora_rank": 22,
    "o_groups": 3,
    "o_lora_rank": 5,
    "compress_ratios": (0, 128, 4, 4, 0),
    "n_routed_experts": 7,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 18,
    "index_n_heads": 24,
    "index_head_dim": 8,
    "index_topk": 3,
    "num_hash_layers": 3,
    "rope_scaling": YarnConfig(),
}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The table of recipe 8.3 written out, with the float formats of an unquantised export."""
    f32, bf16, i64 = torch.float32, torch.bfloat16, torch.int64
    d, c, heads, inner = config.hidden_size, config.head_dim, config.num_attention_heads, config.moe_intermediate_size
    latent, groups, rank = config.q_lora_rank, config.o_groups, config.o_lora_rank
    index_heads, index_dim, experts = config.index_n_heads, config.index_head_dim, config.n_routed_experts
    table: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "embed.weight": ((config.vocab_size, d), bf16),
        "head.weight": ((config.vocab_size, d), bf16),
        "norm.weight": ((d,), bf16),
        "mtp.0.e_proj.weight": ((d, d), bf16),
        "mtp.0.h_proj.weight": ((d, d), bf16),
        "mtp.0.enorm.weight": ((d,), bf16),
        "mtp.0.hnorm.weight": ((d,), bf16),
        "mtp.0.norm.weight": ((d,), bf16),
    }
    for owner in ("", "mtp.0."):
        table[f"{owner}hc_head_fn"] = ((4, 4 * d), f32)
        table[f"{owner}hc_head_base"] = ((4,), f32)
        table[f"{owner}hc_head_scale"] = ((1,), f32)
    for layer, ratio in enumerate(config.compress_ratios):
        p = f"layers.{layer}." if layer < config.num_hidden_layers else "mtp.0."
        for site in ("attn", "ffn"):
            table[f"{p}{site}_norm.weight"] = ((d,), bf16)
            table[f"{p}hc_{site}_fn"] = ((24, 4 * d), f32)
            table[f"{p}hc_{site}_base"] = ((24,), f32)
            table[f"{p}hc_{site}_scale"] = ((3,), f32)
        table[f"{p}attn.attn_sink"] = ((heads,), f32)
        table[f"{p}attn.wq_a.weight"] = ((latent, d), bf16)
        table[f"{p}attn.q_norm.weight"] = ((latent,), bf16)
        table[f"{p}attn.wq_b.weight"] = ((heads * c, latent), bf16)
        table[f"{p}attn.wkv.weight"] = ((c, d), bf16)
        table[f"{p}attn.kv_norm.weight"] = ((c,), bf16)
        table[f"{p}attn.wo_a.weight"] = ((groups * rank, heads * c // groups), bf16)
        table[f"{p}attn.wo_b.weight"] = ((d, groups * rank), bf16)
        if ratio:
            width = 2 * c if ratio == 4 else c
            table[f"{p}attn.compressor.wkv.weight"] = ((width, d), bf16)
            table[f"{p}attn.compressor.wgate.weight"] = ((width, d), bf16)
            table[f"{p}attn.compressor.ape"] = ((ratio, width), f32)
            table[f"{p}attn.compressor.norm.weight"] = ((c,), bf16)
        if ratio == 4:
            table[f"{p}attn.indexer.wq_b.weight"] = ((index_heads * index_dim, latent), bf16)
            table[f"{p}attn.indexer.weights_proj.weight"] = ((index_heads, d), bf16)
            table[f"{p}attn.indexer.compressor.wkv.weight"] = ((2 * index_dim, d), bf16)
            table[f"{p}attn.indexer.compressor.wgate.weight"] = ((2 * index_dim, d), bf16)
            table[f"{p}attn.indexer.compressor.ape"] = ((4, 2 * index_dim), f32)
            table[f"{p}attn.indexer.compressor.norm.weight"] = ((index_dim,), bf16)
        table[f"{p}ffn.gate.weight"] = ((experts, d), bf16)
        if layer < config.num_hash_layers:
            table[f"{p}ffn.gate.tid2eid"] = ((config.vocab_size, config.num_experts_per_tok), i64)
        else:
            table[f"{p}ffn.gate.bias"] = ((experts,), f32)
        for expert in (*(f"experts.{index}" for index in range(experts)), "shared_experts"):
            table[f"{p}ffn.{expert}.w1.weight"] = ((inner, d), bf16)
            table[f"{p}ffn.{expert}.w2.weight"] = ((d, inner), bf16)
            table[f"{p}ffn.{expert}.w3.weight"] = ((inner, d), bf16)
    return table


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export, read by the safetensors library alone."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(left: Transformer, right: Transformer) -> bool:
    """Bit for bit, names and dtypes included."""
    mine, theirs = dict(left.state_dict()), dict(right.state_dict())
    return list(mine) == list(theirs) and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def same_config(left: ModelConfig, right: ModelConfig) -> bool:
    """Equal, whether the kinds of layers are spelled out or follow from the ratios."""
    return left.kinds == right.kinds and replace(left, layer_types=()) == replace(right, layer_types=())


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ModelConfig(**SIZES), 1)


@pytest.fixture(scope="module")
def fp32(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "fp32"
    save_pretrained(model, folder, "fp32")
    return folder


def copied(fp32: Path, folder: Path, **config: Any) -> Path:
    """A copy of the export, whose config.json may be changed."""
    folder.mkdir()
    for file in fp32.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if config:
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(values))
    return folder


# What is written.


@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_names_shapes_and_dtypes_are_the_released_ones(model: Transformer, tmp_path: Path, format: str) -> None:
    save_pretrained(model, tmp_path / "export", format)
    expected = expected_tensors(model.config)
    if format == "fp32":
        widened = {torch.bfloat16: torch.float32}
        expected = {name: (shape, widened.get(dtype, dtype)) for name, (shape, dtype) in expected.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored(tmp_path / "export").items()}
    assert found == expected


def test_number_of_tensors_of_flash() -> None:
    """The released Flash files hold 69,187 tensors, one `.scale` beside each FP8 or FP4 weight among them."""
    with torch.device("meta"):
        names = [name for name, _ in released_tensors(Transformer(load_config(["model=v4_flash"]).model))]
    quantised = re.compile(r"\.(wq_a|wq_b|wkv|wo_a|wo_b|e_proj|h_proj|w1|w2|w3)\.weight$")
    scales = [name for name in names if quantised.search(name) and ".compressor." not in name]
    assert len(names) + len(scales) == 69_187


def test_fp32_round_trip_is_exact(model: Transformer, fp32: Path) -> None:
    assert equal(load_pretrained(fp32, torch.float32), model)
    assert same_config(load_pretrained(fp32, torch.float32).config, model.config)


def test_bf16_round_trip_is_exact_for_what_bf16_can_hold(model: Transformer, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "one", "bf16")
    rounded = load_pretrained(tmp_path / "one", torch.float32)
    save_pretrained(rounded, tmp_path / "two", "bf16")
    assert equal(load_pretrained(tmp_path / "two", torch.float32), rounded)
    for name, tensor in rounded.state_dict().items():
        original = model.state_dict()[name]
        if name.endswith(("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias", "tid2eid")):
            assert torch.equal(tensor, original), f"{name} keeps its full precision"
        else:
            assert torch.equal(tensor, original.bfloat16().float()), f"{name} is rounded to nearest even"


def test_dtype_of_a_loaded_model(fp32: Path) -> None:
    loaded = load_pretrained(fp32)
    for name, tensor in loaded.state_dict().items():
        f32 = name.endswith(("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias"))
        expected = torch.int64 if "tid2eid" in name else torch.float32 if f32 else torch.bfloat16
        assert tensor.dtype == expected, name
    assert loaded(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_a_loaded_model_shares_no_memory_with_the_file(fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "copy")
    loaded = load_pretrained(folder, torch.float32)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("seed", range(6))
def test_round_trip_of_random_configs(seed: int, tmp_path: Path) -> None:
    model = random_model(random_config(seed), seed)
    save_pretrained(model, tmp_path / "export", "fp32", max_shard_bytes=30_000)
    loaded = load_pretrained(tmp_path / "export", torch.float32)
    assert equal(loaded, model)
    assert same_config(loaded.config, model.config)


def test_sharding_by_size(model: Transformer, tmp_path: Path) -> None:
    limit = 20_000
    save_pretrained(model, tmp_path / "export", "bf16", max_shard_bytes=limit)
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 5
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "export" / INDEX).read_text())
    total = 0
    seen: dict[str, str] = {}
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
        seen |= dict.fromkeys(tensors, file.name)
    assert index["weight_map"] == seen
    assert index["metadata"]["total_size"] == total
    assert list(seen) and set(seen) == set(expected_tensors(model.config))
    assert equal(load_pretrained(tmp_path / "export", torch.float32), _bf16(model))


def _bf16(model: Transformer) -> Transformer:
    """The model with the weights that a bf16 export holds."""
    rounded = Transformer(model.config)
    f32 = ("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias", "tid2eid")
    values = {k: v if k.endswith(f32) else v.bfloat16().float() for k, v in model.state_dict().items()}
    rounded.load_state_dict(values)
    return rounded


def test_one_file_has_no_index_and_every_file_is_marked_for_torch(fp32: Path) -> None:
    assert sorted(file.name for file in fp32.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(fp32 / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_expert_is_a_slice_of_the_stack(model: Transformer, fp32: Path) -> None:
    tensors = stored(fp32)
    stack = model.state_dict()["layers.3.ffn.experts.w2"]
    for expert in range(7):
        assert torch.equal(tensors[f"layers.3.ffn.experts.{expert}.w2.weight"], stack[expert])


# Weights that do not fit.


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "bad")
    tensors = stored(folder)
    del tensors["norm.weight"], tensors["layers.2.attn.indexer.wq_b.weight"]
    tensors["layers.9.attn.attn_sink"] = torch.zeros(6)
    tensors["head.weight"] = tensors["head.weight"].T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as raised:
        load_pretrained(folder)
    message = str(raised.value)
    assert "2 missing" in message and "norm.weight" in message and "layers.2.attn.indexer.wq_b.weight" in message
    assert "1 unexpected: layers.9.attn.attn_sink" in message
    assert "1 misshapen: head.weight is (40, 61), not (61, 40)" in message
    assert str(folder) in message and "\n" not in message


def test_a_long_list_is_shortened(fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "bad")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: .* and [0-9]+ more.*1 unexpected: a") as raised:
        load_pretrained(folder)
    assert len(str(raised.value)) < 600


def test_config_of_another_size_asks_for_no_memory(fp32: Path, tmp_path: Path) -> None:
    """The weights' headers are compared before anything of config.json's size is allocated (here terabytes)."""
    folder = copied(fp32, tmp_path / "bad", vocab_size=2_000_000_000)
    with pytest.raises(WeightsError, match=r"embed.weight is \(61, 40\), not \(2000000000, 40\)"):
        load_pretrained(folder)


def header_of(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def with_header(content: bytes, header: dict[str, Any]) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def change(name: str, **values: Any) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        header = header_of(content)
        header[name] |= values
        return with_header(content, header)

    return changed


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "header only": lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]],
    "half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "a byte too many": lambda content: content + b"\0",
    "header of 0 bytes": lambda content: struct.pack("<Q", 0) + content[8:],
    "header of 2^63 bytes": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "header of 2^64 - 1 bytes": lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
    "header of 90 MB": lambda content: struct.pack("<Q", 90_000_000) + content[8:],
    "header is no JSON": lambda content: content[:8] + b"\xff" * 100 + content[108:],
    "header is a list": lambda content: struct.pack("<Q", 2) + b"[]" + content[8:],
    "pickle": lambda content: b"\x80\x04\x95" + content,
    "zip": lambda content: b"PK\x03\x04" + content,
    "offsets beyond the file": change("norm.weight", data_offsets=[0, 2**62]),
    "offsets backwards": change("norm.weight", data_offsets=[160, 0]),
    "negative offsets": change("norm.weight", data_offsets=[-160, 0]),
    "two tensors in one place": change("norm.weight", data_offsets=[0, 160]),
    "huge shape": change("norm.weight", shape=[2**62, 2**62]),
    "other dtype": change("norm.weight", dtype="F64"),
    "unknown dtype": change("norm.weight", dtype="PICKLE"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(kind: str, fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "bad")
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError) as raised:
        load_pretrained(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert str(file) in str(raised.value) and "again" in str(raised.value) and "\n" not in str(raised.value)
    assert grown < 64_000, f"{grown} KiB for a file of a few hundred"


def test_tensors_of_another_kind_of_number(fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "bad")
    tensors = stored(folder)
    tensors["norm.weight"] = tensors["norm.weight"].int()
    tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].float()
    tensors["embed.weight"] = tensors["embed.weight"].to(torch.float8_e4m3fn)
    tensors["head.weight"] = tensors["head.weight"].half()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="3 misshapen") as raised:
        load_pretrained(folder)
    for words in ("norm.weight is of type I32", "tid2eid is of type F32", "embed.weight is of type F8_E4M3"):
        assert words in str(raised.value)


def test_random_damage_to_a_header(fp32: Path, tmp_path: Path) -> None:
    """Whatever byte of the header changes: it loads, or WeightsError says what is wrong; nothing else escapes."""
    folder = copied(fp32, tmp_path / "bad")
    file = folder / "model.safetensors"
    content, rng, refused = file.read_bytes(), random.Random(0), 0
    (length,) = struct.unpack("<Q", content[:8])
    with torch.device("meta"):
        empty = Transformer(ModelConfig.from_json(folder))
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.randrange(8 + length)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            check_weights(empty, folder)
        except WeightsError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", ".hidden", "a/b.safetensors", "..", "", 3, None]
)
def test_an_index_cannot_point_outside_its_folder(name: Any, fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "bad")
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    with pytest.raises(WeightsError, match=r"refused|not a safetensors index|named by the index but missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}', "null", "\x00"])
def test_an_index_that_is_none(text: str, fp32: Path, tmp_path: Path) -> None:
    folder = copied(fp32, tmp_path / "bad")
    (folder / INDEX).write_text(text)
    with pytest.raises(WeightsError, match="not a safetensors index"):
        load_pretrained(folder)


def test_a_shard_that_is_missing(model: Transformer, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "export", "fp32", max_shard_bytes=50_000)
    lost = sorted((tmp_path / "export").glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(WeightsError, match=f"{lost.name}: named by the index but missing"):
        load_pretrained(tmp_path / "export")


def test_what_is_no_folder_of_weights(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match="no such file"):
        load_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelConfigError, match="no such file"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_bytes((fp32 / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        weight_files(tmp_path / "empty")


# config.json.


def released_flash() -> dict[str, Any]:
    """The keys of the released Flash config.json that recipe 1 lists, and some that say nothing to us."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": 43,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 129280,
    }


def test_released_config_gives_the_preset(tmp_path: Path) -> None:
    values = released_flash()
    assert len(values["compress_ratios"]) == 44
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = ModelConfig.from_json(tmp_path)
    assert config == ModelConfig.from_json(tmp_path / "config.json")
    preset = load_config(["model=v4_flash"]).model
    assert config == replace(preset, initializer_range=0.02)
    assert type(config.rope_theta) is float or config.rope_theta == 10000


def test_export_config_reads_back(model: Transformer, fp32: Path) -> None:
    values = json.loads((fp32 / "config.json").read_text())
    assert values["model_type"] == "deepseek_v4" and values["architectures"] == ["DeepseekV4ForCausalLM"]
    assert values["layer_types"] == [SWA, HCA, CSA, CSA]
    assert values["compress_ratios"] == [0, 128, 4, 4, 0]
    assert values["compress_rates"] == {CSA: 4, HCA: 128}
    assert values["rope_scaling"] | {"factor": 16.0, "type": "yarn"} == values["rope_scaling"]
    assert "hc_init" not in values, "how training began is no part of the architecture"
    assert same_config(ModelConfig.from_json(fp32), model.config)


def test_config_as_transformers_writes_it(fp32: Path, tmp_path: Path) -> None:
    """Other keys for the same: rope_parameters, compress_rates, mlp_layer_types, partial_rotary_factor."""
    transformers = pytest.importorskip("transformers", reason="installed by `make test`")
    transformers.AutoConfig.from_pretrained(fp32).save_pretrained(tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_parameters" in values and "compress_ratios" not in values and "num_hash_layers" not in values
    ours, theirs = ModelConfig.from_json(fp32), ModelConfig.from_json(tmp_path / "theirs")
    assert same_config(ours, theirs)
    assert theirs.rope_scaling == YarnConfig()


def test_other_spellings_of_one_config() -> None:
    values = released_flash()
    plain = ModelConfig.from_dict(values)
    kinds = {0: SWA, 4: CSA, 128: HCA}
    by_types = {k: v for k, v in values.items() if k not in ("compress_ratios", "num_hash_layers", "qk_rope_head_dim")}
    by_types["layer_types"] = [kinds[ratio] for ratio in values["compress_ratios"][:43]]
    by_types["mlp_layer_types"] = ["hash_moe"] * 3 + ["moe"] * 40
    by_types["partial_rotary_factor"] = 0.125
    assert same_config(ModelConfig.from_dict(by_types), plain)
    nulls = values | {"layer_types": None, "mlp_layer_types": None, "rope_parameters": None, "compress_rates": None}
    assert ModelConfig.from_dict(nulls) == plain
    no_yarn = values | {"rope_scaling": None}
    assert ModelConfig.from_dict(no_yarn) == replace(plain, rope_scaling=None)
    rope_type = {"rope_type": "yarn", **values["rope_scaling"]}
    assert ModelConfig.from_dict(values | {"rope_scaling": rope_type}) == plain


OTHER_ARCHITECTURES = [
    ("model_type", "deepseek_v3"),
    ("model_type", "llama"),
    ("tie_word_embeddings", True),
    ("scoring_func", "sigmoid"),
    ("norm_topk_prob", False),
    ("attention_bias", True),
    ("hidden_act", "gelu"),
    ("num_key_value_heads", 8),
    ("n_shared_experts", 2),
    ("num_nextn_predict_layers", 2),
    ("rope_scaling", {"type": "linear", "factor": 4}),
    ("layer_types", ["full_attention"] * 43),
    ("mlp_layer_types", ["moe"] * 40 + ["hash_moe"] * 3),
]


@pytest.mark.parametrize(("key", "value"), OTHER_ARCHITECTURES)
def test_other_architectures_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released_flash() | {key: value}))
    with pytest.raises(ModelConfigError) as raised:
        ModelConfig.from_json(tmp_path)
    message = str(raised.value)
    assert str(tmp_path) in message and "\n" not in message
    assert key in message or (key, "compress_ratios" in message) == ("num_nextn_predict_layers", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "43"),
        ("num_hidden_layers", None),
        ("vocab_size", 10**30),
        ("vocab_size", True),
        ("head_dim", 512.5),
        ("compress_ratios", 4),
        ("compress_ratios", ["4"] * 44),
        ("compress_ratios", [4] * 7),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"type": "yarn", "factor": "16"}),
        ("rope_parameters", 3),
        ("layer_types", 3),
        ("mlp_layer_types", 3),
        ("compress_rates", 4),
        ("eos_token_id", [1, 2]),
        ("eos_token_id", 129280),
        ("rms_norm_eps", -1),
        ("swiglu_limit", "ten"),
    ],
)
def test_values_that_make_no_sense_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ModelConfigError, match=key):
        ModelConfig.from_dict(released_flash() | {key: value})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"deepseek_v4"', "{}", "\x00", "PK\x03\x04"])
def test_files_that_are_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError) as raised:
        ModelConfig.from_json(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_a_config_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ModelConfigError, match="not a JSON file"):
        ModelConfig.from_json(tmp_path)


def test_nothing_in_a_config_is_a_secret_default() -> None:
    """Each field of ModelConfig is written, or known to be left out: none is lost on the way through a file."""
    config = ModelConfig(**SIZES, swiglu_limit=3.0, hc_eps=1e-5, rope_theta=123.0, routed_scaling_factor=2.5)
    written = config.to_json()
    assert set(asdict(config)) - set(written) == {"hc_init", "hc_constraint"}
    assert same_config(ModelConfig.from_dict(written), config)


# Folders that appear whole or not at all.


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as temporary:
        assert not target.exists() and temporary.parent == target.parent and temporary.name.startswith(".")
        (temporary / "file").write_text("x")
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert target.stat().st_mode & 0o777 == 0o755, "readable for others, which mkdtemp's folders are not"


def test_new_folder_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "empty" / "file").exists()


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_new_folder_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    expected = WeightsError if isinstance(error, OSError) else type(error)

    def fill() -> None:
        with new_folder(tmp_path / "target") as temporary:
            (temporary / "file").write_text("x")
            raise error

    with pytest.raises(expected) as raised:
        fill()
    assert list(tmp_path.iterdir()) == []
    if expected is WeightsError:
        assert "No space left" in str(raised.value) and "free some space" in str(raised.value)


def test_new_folder_touches_nothing_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("used", "file"):
        with pytest.raises(WeightsError, match="already there"), new_folder(tmp_path / name):
            raise AssertionError("must not be entered")
    assert (tmp_path / "used" / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "used"]
    with pytest.raises(WeightsError, match="cannot write"), new_folder(tmp_path / "file" / "below"):
        raise AssertionError("must not be entered")


def test_someone_else_takes_the_name_meanwhile(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "target") as temporary:
            (temporary / "file").write_text("mine")
            (tmp_path / "target").mkdir()
            (tmp_path / "target" / "file").write_text("theirs")

    with pytest.raises(WeightsError, match="cannot write"):
        fill()
    assert (tmp_path / "target" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_save_that_fails_leaves_nothing(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full_disk(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)
        written.append(path)

    monkeypatch.setattr(released_module, "save_file", full_disk)
    with pytest.raises(WeightsError, match=r"No space left on device.*free some space"):
        save_pretrained(model, tmp_path / "export", "fp32", max_shard_bytes=30_000)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_what_save_refuses(model: Transformer, fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="format='fp16': choose from fp32, bf16"):
        save_pretrained(model, tmp_path / "export", "fp16")
    with pytest.raises(WeightsError, match="already there and not empty"):
        save_pretrained(model, fp32)
    with pytest.raises(WeightsError, match="cannot write"):
        save_pretrained(model, tmp_path / "export", tokenizer=tmp_path / "no_tokenizer.json")
    assert list(tmp_path.iterdir()) == []
