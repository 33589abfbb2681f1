"""Released layouts, both ways: FP4 and FP8 checkpoints made byte by byte, their values, their bits, what is refused."""

import copy
import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import release_fixture as oracle
import torch
from model_cases import random_model, relative_rms
from release_fixture import COPIES, EVEN, INDEX, RAGGED, Stored, Values

from openv4.model import ModelConfig, Transformer, load_pretrained, save_pretrained
from openv4.model.config import ModelConfigError, WeightsError
from openv4.model.released import released_tensors
from openv4.model.tensor_files import TensorFolder

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {"instruct": "fp4+fp8", "base": "fp8"}
FLOAT32 = ("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias")


def model_values(model: Transformer) -> dict[str, torch.Tensor]:
    """The model's tensors by released name; a stack of experts is taken apart."""
    found = {}
    for name, tensor in model.state_dict().items():
        prefix, stacked, matrix = name.rpartition(".experts.")
        if stacked:
            found |= {f"{prefix}.experts.{e}.{matrix}.weight": weight for e, weight in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def assert_values(model: Transformer, expected: Mapping[str, Values]) -> None:
    """Every tensor has the expected values, signs of zeros included."""
    found = model_values(model)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        ours = tensor.double().numpy()
        assert ours.shape == expected[name].shape, name
        assert np.array_equal(ours, expected[name]), name
        assert np.array_equal(np.signbit(ours), np.signbit(expected[name])), name


def differing(left: Mapping[str, Stored], right: Mapping[str, Stored]) -> list[str]:
    """Names of the tensors that one side lacks, or whose dtype, shape or bytes differ."""
    return [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]


# Reading.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", ["F8_E8M0", "F32"])
@pytest.mark.parametrize(("variant", "shards"), [("instruct", 1), ("instruct", 3), ("base", 1), ("base", 4)])
def test_values_are_exact(variant: str, shards: int, scale_dtype: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path, RAGGED, variant, shards, shards, scale_dtype=scale_dtype)
    model = load_pretrained(tmp_path, dtype)
    assert_values(model, expected)
    for name, tensor in model_values(model).items():
        kept = torch.int64 if name.endswith("tid2eid") else torch.float32 if name.endswith(FLOAT32) else dtype
        assert tensor.dtype == kept, name


def test_the_default_is_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    oracle.write_release(tmp_path, RAGGED, wild=False)
    model = load_pretrained(tmp_path)
    assert model.state_dict()["layers.0.attn.wq_a.weight"].dtype == torch.bfloat16
    assert model(torch.arange(20).unsqueeze(0)).isfinite().all()


def test_early_flash_does_not_name_its_fp4(tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path, RAGGED, expert_dtype=False)
    assert_values(load_pretrained(tmp_path), expected)


def test_config_of_a_release_says_nothing_about_its_format(tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "a", RAGGED)
    oracle.write_release(tmp_path / "b", RAGGED, "base")
    assert ModelConfig.from_json(tmp_path / "a") == ModelConfig.from_json(tmp_path / "b")


def test_no_mtp_block_where_the_config_has_none(tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path, RAGGED | {"compress_ratios": [0, 128, 4, 4]})
    assert not [name for name in expected if name.startswith("mtp")]
    assert_values(load_pretrained(tmp_path), expected)


def test_extra_copies_are_read_past(tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path, RAGGED, "base", extra_copies=True, shards=2)
    assert set(COPIES) < set(oracle.read_release(tmp_path)) and not set(COPIES) & set(expected)
    assert_values(load_pretrained(tmp_path), expected)


def test_a_copy_that_is_none_is_refused(tmp_path: Path) -> None:
    tensors = oracle.random_tensors(RAGGED, "base")
    tensors |= {"mtp.0.head.weight": tensors["embed.weight"]}
    oracle.write_folder(tmp_path, oracle.config_json(RAGGED, "base"), tensors)
    assert "mtp.0.head.weight" in refusal(tmp_path)


def test_files_may_be_links_as_in_a_download_cache(tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path / "blobs", RAGGED, shards=2)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert_values(load_pretrained(tmp_path / "snapshot"), expected)


def test_a_loaded_model_shares_nothing_with_the_files(tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path, RAGGED)
    model = load_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert_values(model, expected)


# The same layout again.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("variant", "copies"), [("instruct", False), ("instruct", True), ("base", False), ("base", True)]
)
def test_loading_and_saving_gives_the_same_bits(variant: str, copies: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the scales: no amax calls for them, blocks of zeros have some, codes are subnormal or negative zeros."""
    oracle.write_release(tmp_path / "source", RAGGED, variant, shards=2, extra_copies=copies)
    save_pretrained(load_pretrained(tmp_path / "source", dtype), tmp_path / "again", FORMATS[variant])
    source, again = oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "again")
    assert differing(source, again) == []
    save_pretrained(
        load_pretrained(tmp_path / "again", dtype), tmp_path / "third", FORMATS[variant], max_shard_bytes=10**5
    )
    assert len(list((tmp_path / "third").glob("*.safetensors"))) > 5
    assert differing(source, oracle.read_release(tmp_path / "third")) == []


@pytest.mark.parametrize("variant", FORMATS)
def test_config_and_index_of_what_is_saved(variant: str, tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "source", RAGGED, variant, shards=2)
    save_pretrained(load_pretrained(tmp_path / "source"), tmp_path / "again", FORMATS[variant], max_shard_bytes=10**5)
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "again"))
    assert ours["quantization_config"] == theirs["quantization_config"]
    assert ours.get("expert_dtype") == theirs.get("expert_dtype")
    source, again = (ModelConfig.from_json(tmp_path / name) for name in ("source", "again"))
    assert source.kinds == again.kinds and replace(source, layer_types=()) == replace(again, layer_types=())
    index = json.loads((tmp_path / "again" / INDEX).read_text())
    files = sorted(file.name for file in (tmp_path / "again").glob("*.safetensors"))
    tensors = {file: oracle.read_safetensors(tmp_path / "again" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in tensors[file]}
    sizes = [sum(len(stored.data) for stored in held.values()) for held in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 10**5 or len(tensors[file]) <= 2 for file, size in zip(files, sizes, strict=True))


@pytest.mark.parametrize("variant", FORMATS)
def test_bits_survive_a_model_that_was_moved_about(variant: str, tmp_path: Path) -> None:
    """Widened, copied, its state handed to another loaded model: what was released is still known."""
    oracle.write_release(tmp_path / "source", RAGGED, variant)
    source = oracle.read_release(tmp_path / "source")
    model = load_pretrained(tmp_path / "source")
    save_pretrained(copy.deepcopy(model).float(), tmp_path / "wide", FORMATS[variant])
    assert differing(source, oracle.read_release(tmp_path / "wide")) == []
    other = load_pretrained(tmp_path / "source", torch.float32)
    other.load_state_dict(model.state_dict())
    save_pretrained(other, tmp_path / "other", FORMATS[variant])
    assert differing(source, oracle.read_release(tmp_path / "other")) == []


@pytest.mark.parametrize("format", ["bf16", "fp32"])
@pytest.mark.parametrize("variant", FORMATS)
def test_dequantised_exports_are_exact(variant: str, format: str, tmp_path: Path) -> None:
    expected = oracle.write_release(tmp_path / "source", RAGGED, variant)
    save_pretrained(load_pretrained(tmp_path / "source"), tmp_path / "plain", format)
    written = oracle.read_release(tmp_path / "plain")
    assert not [name for name in written if name.endswith(".scale")]
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    for name, stored in written.items():
        kept = "I64" if name.endswith("tid2eid") else "F32" if format == "fp32" or name.endswith(FLOAT32) else "BF16"
        assert stored.dtype == kept, name
    assert differing_values(oracle.values(written), expected) == []
    assert_values(load_pretrained(tmp_path / "plain"), expected)


def differing_values(left: Mapping[str, Values], right: Mapping[str, Values]) -> list[str]:
    assert set(left) == set(right)
    return [name for name in left if not np.array_equal(left[name], right[name])]


def test_an_instruct_model_as_fp8_loses_nothing(tmp_path: Path) -> None:
    """The FP4 scales of a usable model are close together, so E4M3 holds every value (recipe 8.2)."""
    expected = oracle.write_release(tmp_path / "source", RAGGED, wild=False)
    save_pretrained(load_pretrained(tmp_path / "source"), tmp_path / "fp8", "fp8")
    written = oracle.read_release(tmp_path / "fp8")
    assert not [name for name in written if written[name].dtype in ("I8", "F8_E8M0")]
    assert differing_values(oracle.values(written), expected) == []


def test_a_base_model_as_fp4(tmp_path: Path) -> None:
    """Experts are rounded by the rule, dense matrices keep codes and scales, which are now E8M0."""
    expected = oracle.write_release(tmp_path / "source", RAGGED, "base", wild=False)
    save_pretrained(load_pretrained(tmp_path / "source"), tmp_path / "fp4", "fp4+fp8")
    source, written = oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "fp4")
    assert set(source) == set(written)
    for name, (kind, _) in oracle.table(RAGGED).items():
        if kind == "EXPERT":
            assert_stored(written, name, *oracle.quantise_fp4(expected[name]), "F8_E8M0")
        else:
            assert written[name] == source[name]


def assert_stored(
    tensors: Mapping[str, Stored], name: str, codes: oracle.Codes, scales: Values, scale_dtype: str
) -> None:
    """A quantised weight and its scale, bit for bit; FP4 codes come unpacked."""
    stored = tensors[name]
    if stored.dtype == "I8":
        codes = oracle.pack(codes)
    assert np.array_equal(oracle.array(stored), codes), name
    assert tensors[oracle.scale_of(name)] == oracle.stored_scales(scales, scale_dtype), name


# A model that was never released, and one that was changed.


def stored_kinds(sizes: Mapping[str, Any], variant: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a release, as the fixture writes it."""
    return {name: (stored.dtype, stored.shape) for name, stored in oracle.random_tensors(sizes, variant).items()}


@pytest.mark.parametrize("sizes", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("variant", FORMATS)
def test_a_new_model_is_quantised_by_the_rule(variant: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(ModelConfig.from_dict(oracle.config_json(sizes)), 7)
    save_pretrained(model, tmp_path, FORMATS[variant])
    written = oracle.read_release(tmp_path)
    assert {name: (stored.dtype, stored.shape) for name, stored in written.items()} == stored_kinds(sizes, variant)
    weights = {name: tensor.double().numpy() for name, tensor in model_values(model).items()}
    scale_dtype = {"instruct": "F8_E8M0", "base": "F32"}[variant]
    for name, (kind, _) in oracle.table(sizes).items():
        if kind == "EXPERT" and variant == "instruct":
            assert_stored(written, name, *oracle.quantise_fp4(weights[name]), scale_dtype)
        elif kind in ("EXPERT", "FP8"):
            assert_stored(written, name, *oracle.quantise_fp8(weights[name]), scale_dtype)
        elif kind == "BF16":
            nearest = model_values(model)[name].bfloat16().view(torch.int16).numpy().tobytes()
            assert written[name].data == nearest, name
        else:
            assert np.array_equal(oracle.array(written[name]), weights[name]), name
    assert_values(load_pretrained(tmp_path), oracle.values(written))


CHANGED = [
    "layers.0.attn.wq_b.weight",
    "layers.1.attn.wo_a.weight",
    "layers.2.attn.indexer.wq_b.weight",
    "layers.3.ffn.experts.1.w1.weight",
    "layers.0.ffn.experts.2.w2.weight",
    "layers.1.ffn.shared_experts.w3.weight",
    "mtp.0.e_proj.weight",
    "mtp.0.ffn.experts.0.w3.weight",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", FORMATS)
def test_changed_tensors_follow_the_rule_and_all_others_stay(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "source", RAGGED, variant, 3)
    model = load_pretrained(tmp_path / "source", dtype)
    targets = {name: model_values(model)[name] for name in CHANGED}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for target in targets.values():
            target.copy_(torch.randn(target.shape, generator=generator))
    save_pretrained(model, tmp_path / "again", FORMATS[variant])
    source, again = oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "again")
    assert set(differing(source, again)) == {*CHANGED, *map(oracle.scale_of, CHANGED)}
    for name, target in targets.items():
        quantise = oracle.quantise_fp4 if source[name].dtype == "I8" else oracle.quantise_fp8
        assert_stored(again, name, *quantise(target.double().numpy()), source[oracle.scale_of(name)].dtype)


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq_b.weight", "layers.3.ffn.experts.1.w1.weight", "mtp.0.h_proj.weight"]
)
@pytest.mark.parametrize("variant", FORMATS)
def test_one_changed_number_changes_one_block(variant: str, name: str, tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "source", RAGGED, variant, 4)
    model = load_pretrained(tmp_path / "source", torch.float32)
    target = model_values(model)[name]
    with torch.no_grad():
        target[5, 130] = 0.3
    save_pretrained(model, tmp_path / "again", FORMATS[variant])
    source, again = oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "again")
    scale = oracle.scale_of(name)
    assert {name} <= set(differing(source, again)) <= {name, scale}
    weight = target.double().numpy()
    fp4 = source[name].dtype == "I8"
    quantise, block, decode = (
        (oracle.quantise_fp4, (1, 32), oracle.unpack) if fp4 else (oracle.quantise_fp8, (128, 128), np.copy)
    )
    rows, columns = ((s // b * b, s // b * b + b) for s, b in zip((5, 130), block, strict=True))
    inside = np.s_[rows[0] : rows[1], columns[0] : columns[1]]
    before, after = (oracle.array(tensors[scale]).copy() for tensors in (source, again))
    changed = 5 // block[0], 130 // block[1]
    stored = oracle.array(again[name])
    # The block takes the rule's scale, or its own where that represents the new values no worse.
    stored_scale = oracle.array(source[scale])
    own = oracle.e8m0(stored_scale) if source[scale].dtype == "F8_E8M0" else stored_scale.astype(np.float64)
    ways = [quantise(weight), quantise(weight, own)]
    errors = []
    for codes, scales in ways:
        numbers = oracle.E2M1[codes] if fp4 else oracle.e4m3(codes)
        errors.append(((numbers * oracle.spread(scales, weight.shape, block) - weight)[inside] ** 2).sum())
    codes, scales = ways[int(errors[1] <= errors[0])]
    expected = decode(oracle.array(source[name])).copy()
    expected[inside] = codes[inside]
    assert np.array_equal(decode(stored), expected)
    assert after[changed] == oracle.array(oracle.stored_scales(scales, source[scale].dtype))[changed]
    after[changed] = before[changed]
    assert np.array_equal(before, after)


@pytest.mark.parametrize("variant", FORMATS)
def test_a_changed_unquantised_tensor(variant: str, tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "source", RAGGED, variant, 5)
    model = load_pretrained(tmp_path / "source")
    with torch.no_grad():
        model.state_dict()["layers.2.ffn_norm.weight"].fill_(1.5)
        model.state_dict()["layers.3.ffn.gate.bias"].fill_(0.1)
    save_pretrained(model, tmp_path / "again", FORMATS[variant])
    source, again = oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "again")
    assert differing(source, again) == ["layers.2.ffn_norm.weight", "layers.3.ffn.gate.bias"]


def test_a_changed_embedding_changes_its_copy(tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "source", RAGGED, "base", extra_copies=True)
    model = load_pretrained(tmp_path / "source")
    with torch.no_grad():
        model.state_dict()["embed.weight"].fill_(0.25)
    save_pretrained(model, tmp_path / "again", "fp8")
    source, again = oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "again")
    assert differing(source, again) == ["embed.weight", "mtp.0.emb.tok_emb.weight"]
    assert again["embed.weight"] == again["mtp.0.emb.tok_emb.weight"]


def test_a_model_held_quantised(tmp_path: Path) -> None:
    """Codes and scales as they are in memory: the same logits, and the same bits when it is saved."""
    oracle.write_release(tmp_path / "source", RAGGED, wild=False)
    plain, held = (load_pretrained(tmp_path / "source", keep_quantized=kept) for kept in (False, True))
    tokens = torch.arange(40).unsqueeze(0)
    assert torch.equal(plain(tokens), held(tokens))
    save_pretrained(held, tmp_path / "again", "fp4+fp8")
    assert differing(oracle.read_release(tmp_path / "source"), oracle.read_release(tmp_path / "again")) == []


# What is refused.

Tensors = dict[str, Stored]
FP8 = "layers.1.attn.wq_b.weight"
EXPERT = "layers.3.ffn.experts.2.w2.weight"
FP8_SCALE, EXPERT_SCALE = oracle.scale_of(FP8), oracle.scale_of(EXPERT)


@pytest.mark.parametrize("variant", ["instruct", "base"])
def test_only_what_is_owned_is_read(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that owns two layers' attention and some experts reads these and no byte of the others."""
    expected = oracle.write_release(tmp_path / "release", RAGGED, variant, shards=3, extra_copies=variant == "base")
    read: list[str] = []
    whole = TensorFolder.read
    monkeypatch.setattr(TensorFolder, "read", lambda folder, name: read.append(name) or whole(folder, name))

    def owned(name: str) -> bool:
        return name.startswith(("layers.1.attn.", "layers.2.attn.")) or ".experts.1." in name

    model = load_pretrained(tmp_path / "release", torch.float32, owned=owned)
    assert {name for name in read if not name.endswith(".scale")} == {name for name in expected if owned(name)}
    assert {name.removesuffix("scale") + "weight" for name in read if name.endswith(".scale")} <= set(read)
    tensors = dict(released_tensors(model))
    for name, values in expected.items():
        if owned(name):
            assert np.array_equal(tensors[name].detach().double().numpy(), values)
        elif name in tensors and ".experts." not in name:
            assert tensors[name].device.type == "meta"


def refusal(folder: Path) -> str:
    """The message with which loading fails: one line that names the folder."""
    with pytest.raises((WeightsError, ModelConfigError)) as raised:
        load_pretrained(folder)
    message = str(raised.value)
    assert "\n" not in message and str(folder) in message and len(message) < 700
    return message


def with_bytes(tensors: Tensors, name: str, **at: bytes) -> None:
    """Puts bytes at the front (``first``) or the back (``last``) of a tensor."""
    data = bytearray(tensors[name].data)
    if "first" in at:
        data[: len(at["first"])] = at["first"]
    else:
        data[-len(at["last"]) :] = at["last"]
    tensors[name] = replace(tensors[name], data=bytes(data))


def reshaped(tensors: Tensors, name: str, *shape: int) -> None:
    stored = tensors[name]
    size = oracle.ITEMSIZE[stored.dtype] * int(np.prod(shape))
    tensors[name] = Stored(stored.dtype, shape, (stored.data * (size // max(len(stored.data), 1) + 1))[:size])


def as_fp8(tensors: Tensors, name: str) -> None:
    tensors[name] = Stored("F8_E4M3", (160, 96), bytes(160 * 96))
    tensors[oracle.scale_of(name)] = Stored("F8_E8M0", (2, 1), bytes([127, 127]))


def dtype(tensors: Tensors, name: str, kind: str) -> None:
    tensors[name] = replace(tensors[name], dtype=kind)


# What is wrong -> variant, the damage, the tensor that the message names, words of the message.
DAMAGED: dict[str, tuple[str, Callable[[Tensors], object], str, str]] = {
    "FP8 weight without scale": ("instruct", lambda t: t.pop(FP8_SCALE), FP8_SCALE, "missing"),
    "FP4 weight without scale": ("instruct", lambda t: t.pop(EXPERT_SCALE), EXPERT_SCALE, "missing"),
    "base weight without scale": ("base", lambda t: t.pop(EXPERT_SCALE), EXPERT_SCALE, "missing"),
    "scale without weight": ("instruct", lambda t: t.pop(FP8), FP8, "missing"),
    "scale of an unquantised weight": (
        "instruct",
        lambda t: t.update({"norm.scale": t[FP8_SCALE]}),
        "norm.scale",
        "unexpected",
    ),
    "FP8 scale turned": ("instruct", lambda t: reshaped(t, "mtp.0.attn.wo_a.scale", 1, 2), "mtp.0.attn.wo_a.scale", ""),
    "FP8 scale cut": ("instruct", lambda t: reshaped(t, FP8_SCALE, 1, 2), FP8_SCALE, r"\(2, 2\)"),
    "FP8 scale flat": ("base", lambda t: reshaped(t, FP8_SCALE, 4), FP8_SCALE, r"\(2, 2\)"),
    "FP8 scale of one number": ("base", lambda t: reshaped(t, FP8_SCALE), FP8_SCALE, r"\(2, 2\)"),
    "FP4 scale in FP8's blocks": ("instruct", lambda t: reshaped(t, EXPERT_SCALE, 2, 1), EXPERT_SCALE, r"\(160, 3\)"),
    "FP4 scale along the output": ("instruct", lambda t: reshaped(t, EXPERT_SCALE, 5, 96), EXPERT_SCALE, r"\(160, 3\)"),
    "FP4 codes not packed": ("instruct", lambda t: reshaped(t, EXPERT, 160, 96), EXPERT, r"\(160, 96\)"),
    "FP8 weight turned": ("instruct", lambda t: reshaped(t, FP8, 131, 144), FP8, r"\(144, 131\)"),
    "scale of 3": ("base", lambda t: with_bytes(t, FP8_SCALE, first=struct.pack("<f", 3.0)), FP8_SCALE, "power"),
    "scale of zero": ("base", lambda t: with_bytes(t, FP8_SCALE, last=struct.pack("<f", 0.0)), FP8_SCALE, "power"),
    "negative scale": ("base", lambda t: with_bytes(t, FP8_SCALE, last=struct.pack("<f", -0.5)), FP8_SCALE, "power"),
    "infinite scale": ("base", lambda t: with_bytes(t, FP8_SCALE, last=b"\0\0\x80\x7f"), FP8_SCALE, "power"),
    "F32 scale is NaN": ("base", lambda t: with_bytes(t, EXPERT_SCALE, last=b"\0\0\xc0\x7f"), EXPERT_SCALE, "power"),
    "E8M0 scale is NaN": ("instruct", lambda t: with_bytes(t, FP8_SCALE, last=b"\xff"), FP8_SCALE, "power"),
    "FP4's scale is NaN": ("instruct", lambda t: with_bytes(t, EXPERT_SCALE, last=b"\xff"), EXPERT_SCALE, "power"),
    "FP8 code is NaN": ("instruct", lambda t: with_bytes(t, FP8, last=b"\x7f"), FP8, "NaN"),
    "FP8 code is -NaN": ("base", lambda t: with_bytes(t, EXPERT, first=b"\xff"), EXPERT, "NaN"),
    "scales in BF16": ("base", lambda t: t.update({FP8_SCALE: Stored("BF16", (2, 2), bytes(8))}), FP8_SCALE, "BF16"),
    "E5M2 codes": ("base", lambda t: dtype(t, FP8, "F8_E5M2"), FP8, "F8_E5M2"),
    "unsigned FP4": ("instruct", lambda t: dtype(t, EXPERT, "U8"), EXPERT, "U8"),
    "FP4 in a dense layer": (
        "instruct",
        lambda t: t.update({FP8: Stored("I8", (144, 66), bytes(144 * 66))}),
        FP8,
        "I8",
    ),
    "quantised norm": (
        "instruct",
        lambda t: t.update({"norm.weight": Stored("F8_E4M3", (160,), bytes(160))}),
        "norm",
        "",
    ),
    "an FP8 expert among FP4 ones": ("instruct", lambda t: as_fp8(t, EXPERT), EXPERT, "F8_E4M3"),
    "a DSpark head": (
        "instruct",
        lambda t: t.update({"mtp.2.markov_head.markov_w1": t["norm.weight"]}),
        "markov_w1",
        "DSpark",
    ),
    "an engram": ("instruct", lambda t: t.update({"layers.1.engram.value.weight": t["norm.weight"]}), "", r"V4\.1"),
}


@pytest.mark.parametrize("wrong", DAMAGED)
def test_damaged_releases_are_refused(wrong: str, tmp_path: Path) -> None:
    variant, damage, name, words = DAMAGED[wrong]
    tensors = oracle.random_tensors(RAGGED, variant, wild=False)
    damage(tensors)
    oracle.write_folder(tmp_path, oracle.config_json(RAGGED, variant), tensors, shards=3)
    message = refusal(tmp_path)
    assert name in message and re.search(words, message), message
    if any(kind in wrong for kind in ("NaN", "scale of 3", "scale of zero", "negative", "infinite")):
        holder = next(file for file in tmp_path.glob("*.safetensors") if name in oracle.read_safetensors(file))
        assert str(holder) in message


def test_weights_beyond_bfloat16_are_not_rounded_silently(tmp_path: Path) -> None:
    """448 * 2^127 is no number of float32; the smallest code times 2^-127 is one of float32 alone."""
    tensors = oracle.random_tensors(RAGGED, wild=False)
    rows, columns = tensors[FP8].shape
    for code, scale in ((0x7E, 254), (0x01, 0)):
        tensors[FP8] = Stored("F8_E4M3", (rows, columns), bytes([code]) * (rows * columns))
        tensors[FP8_SCALE] = Stored("F8_E8M0", (2, 2), bytes([scale]) * 4)
        oracle.write_folder(tmp_path, oracle.config_json(RAGGED), tensors)
        assert FP8 in refusal(tmp_path)
    assert_values(load_pretrained(tmp_path, torch.float32), oracle.values(tensors))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_shard(keep: float, tmp_path: Path) -> None:
    oracle.write_release(tmp_path, RAGGED, shards=3)
    file = tmp_path / oracle.shard_names(3)[1]
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert str(file) in refusal(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    oracle.write_release(tmp_path, RAGGED, shards=3)
    (tmp_path / oracle.shard_names(3)[2]).unlink()
    assert oracle.shard_names(3)[2] in refusal(tmp_path)


def test_swapped_shards(tmp_path: Path) -> None:
    """Files of one size in each other's place: every tensor is there, but not where the index says."""
    tensors = oracle.random_tensors(RAGGED)
    norms = [f"layers.{layer}.attn_norm.weight" for layer in (0, 1)]
    rest = {name: stored for name, stored in tensors.items() if name not in norms}
    oracle.write_folder(tmp_path, oracle.config_json(RAGGED), rest)
    (tmp_path / "model.safetensors").rename(tmp_path / oracle.shard_names(3)[2])
    weight_map = dict.fromkeys(rest, oracle.shard_names(3)[2])
    for file, name in zip(oracle.shard_names(3), norms, strict=False):
        oracle.write_safetensors(tmp_path / file, {name: tensors[name]})
        weight_map[name] = file
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_values(load_pretrained(tmp_path), oracle.values(tensors))
    first, second = (tmp_path / file for file in oracle.shard_names(3)[:2])
    assert first.stat().st_size == second.stat().st_size
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    message = refusal(tmp_path)
    assert norms[0] in message and first.name in message and second.name in message


@pytest.mark.parametrize("other", ["../elsewhere/model.safetensors", "/etc/hostname", "..", ""])
def test_an_index_that_leaves_the_folder(other: str, tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "release", RAGGED, shards=2)
    oracle.write_release(tmp_path / "elsewhere", RAGGED)
    index = json.loads((tmp_path / "release" / INDEX).read_text())
    index["weight_map"]["norm.weight"] = other
    (tmp_path / "release" / INDEX).write_text(json.dumps(index))
    refusal(tmp_path / "release")


def test_a_tensor_that_the_index_lacks_or_invents(tmp_path: Path) -> None:
    oracle.write_release(tmp_path, RAGGED, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    lacking = {name: file for name, file in index["weight_map"].items() if name != FP8}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": lacking}))
    assert FP8 in refusal(tmp_path)
    inventing = index["weight_map"] | {"layers.9.norm.weight": oracle.shard_names(2)[0]}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": inventing}))
    assert "layers.9.norm.weight" in refusal(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    oracle.write_release(tmp_path, RAGGED, shards=2)
    first, second = (tmp_path / file for file in oracle.shard_names(2))
    shared, tensors = oracle.read_safetensors(first), oracle.read_safetensors(second)
    name = next(iter(shared))
    oracle.write_safetensors(second, tensors | {name: shared[name]})
    assert name in refusal(tmp_path)


# Keys of config.json that make another model of it -> a word of the message.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "DSpark": ({"dspark_block_size": 4}, "DSpark"),
    "V4.1 by its type": ({"model_type": "deepseek_v41"}, "V4.1"),
    "V4.1 by its class": ({"architectures": ["DeepseekV41ForCausalLM"]}, "V4.1"),
    "V4.1 by both": ({"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41"}, "V4.1"),
    "V4.1 by its engram": ({"engram_layers": [1, 2]}, "V4.1"),
    "V4.1 by its nesting": ({"text_config": dict(RAGGED), "model_type": "deepseek_v41"}, "V4.1"),
    "V3": ({"model_type": "deepseek_v3"}, "deepseek_v3"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_models_are_refused_by_name(other: str, tmp_path: Path) -> None:
    keys, word = OTHERS[other]
    oracle.write_folder(tmp_path, oracle.config_json(RAGGED) | keys, oracle.random_tensors(RAGGED))
    assert word in refusal(tmp_path)


@pytest.mark.parametrize("named", [True, False])
def test_a_whole_dspark_release(named: bool, tmp_path: Path) -> None:
    """mtp.0 to mtp.2 are a drafter's: no enorm and hnorm, a Markov head at the end; the config may not say so."""
    tensors = oracle.random_tensors(RAGGED)
    block = {name: stored for name, stored in tensors.items() if name.startswith("mtp.0.")}
    for name in ("mtp.0.enorm.weight", "mtp.0.hnorm.weight"):
        del block[name], tensors[name]
    for number in (1, 2):
        tensors |= {name.replace("mtp.0.", f"mtp.{number}."): stored for name, stored in block.items()}
    tensors["mtp.2.markov_head.markov_w1"] = Stored("BF16", (61, 8), bytes(976))
    keys = {"dspark_block_size": 4} if named else {}
    oracle.write_folder(tmp_path, oracle.config_json(RAGGED) | keys, tensors)
    assert "DSpark" in refusal(tmp_path)


def test_formats_that_do_not_exist(tmp_path: Path) -> None:
    model = random_model(ModelConfig.from_dict(oracle.config_json(RAGGED)), 0)
    for format in ("fp4", "FP8", "int8", ""):
        with pytest.raises(WeightsError, match=r"choose from fp32, bf16, fp8, fp4\+fp8"):
            save_pretrained(model, tmp_path / "export", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [FP8, EXPERT])
@pytest.mark.parametrize("format", FORMATS.values())
def test_what_is_not_finite_is_not_quantised(format: str, name: str, bad: float, tmp_path: Path) -> None:
    model = random_model(ModelConfig.from_dict(oracle.config_json(RAGGED)), 0)
    with torch.no_grad():
        model_values(model)[name][3, 4] = bad
    with pytest.raises(WeightsError, match=re.escape(name)):
        save_pretrained(model, tmp_path / "export", format)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_fp4_cannot_pack(tmp_path: Path) -> None:
    model = random_model(ModelConfig.from_dict(oracle.config_json(RAGGED | {"moe_intermediate_size": 97})), 0)
    with pytest.raises(WeightsError, match=r"experts\.0\.w2\.weight.*97") as raised:
        save_pretrained(model, tmp_path / "export", "fp4+fp8")
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []
    save_pretrained(model, tmp_path / "export", "fp8")


# Nothing half-written.


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 200 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", FORMATS.values())
def test_a_full_disk_leaves_nothing(format: str, small_disk: None, tmp_path: Path) -> None:
    """The first shards fit, one does not: neither they nor the folder stay."""
    model = random_model(ModelConfig.from_dict(oracle.config_json(RAGGED | {"vocab_size": 1000})), 0)
    with pytest.raises(WeightsError, match="cannot write") as raised:
        save_pretrained(model, tmp_path / "export", format, max_shard_bytes=150_000)
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


# Memory.

PEAK = """
import ctypes, gc, sys
import torch
from pathlib import Path
from openv4.model import load_pretrained, save_pretrained
torch.set_num_threads(1)

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def peak(work):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what the last step freed is there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    result = work()
    return result, memory("VmHWM") - before

small, large, target, dtype, format = sys.argv[1:]
save_pretrained(load_pretrained(small, getattr(torch, dtype)), target + "-small", format)  # imports, pools
model, loading = peak(lambda: load_pretrained(large, getattr(torch, dtype)))
size = sum(tensor.nbytes for tensor in model.state_dict().values())
_, saving = peak(lambda: save_pretrained(model, target, format, max_shard_bytes=1))
print(size, loading, saving)
"""
# Some 30 MB in equal expert matrices of 512 x 512.
HEAVY = EVEN | {
    "num_hidden_layers": 2,
    "compress_ratios": [0, 0],
    "hidden_size": 512,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_hash_layers": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "shards", "dtype"), [("instruct", 1, "bfloat16"), ("base", 1, "float32"), ("base", 5, "bfloat16")]
)
def test_memory_beyond_the_model_is_a_few_tensors(variant: str, shards: int, dtype: str, tmp_path: Path) -> None:
    """At most four times the largest tensor as it is in memory, in float32: not a file, and not a layer's experts."""
    oracle.write_release(tmp_path / "small", EVEN, variant, wild=False)
    oracle.write_release(tmp_path / "large", HEAVY, variant, shards=shards, wild=False)
    arguments = [tmp_path / "small", tmp_path / "large", tmp_path / "again", dtype, FORMATS[variant]]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)], env=environment, capture_output=True, text=True, check=True
    )
    size, loading, saving = map(int, output.stdout.split())
    largest = 4 * 512 * 512
    on_disk = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert on_disk > 12 * largest and size > 40 * largest
    assert loading - size < 4 * largest
    assert saving < 4 * largest
    assert differing(oracle.read_release(tmp_path / "large"), oracle.read_release(tmp_path / "again")) == []


# transformers reads what we write, we read what it writes.

transformers = pytest.importorskip("transformers", reason="the independent implementation; installed by `make test`")
transformers.utils.logging.disable_progress_bar()
TOKENS = torch.randint(0, 61, (2, 140), generator=torch.Generator().manual_seed(0))


def their_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    assert not any(info.values()), info
    return model.float() if dtype == torch.float32 else model  # of a quantised folder it casts only what it dequantises


@pytest.mark.parametrize("variant", FORMATS)
def test_transformers_dequantises_a_release_as_we_do(variant: str, tmp_path: Path) -> None:
    """The fixture's bytes, read by both: on a CPU transformers dequantises to the dtype that it is asked for."""
    oracle.write_release(tmp_path, EVEN, variant, wild=False)
    ours = load_pretrained(tmp_path, torch.float32)(TOKENS)
    theirs = their_model(tmp_path)(TOKENS, use_cache=False).logits
    assert ours.std() > 0.1 and relative_rms(ours, theirs) < 1e-5


@pytest.mark.parametrize("format", FORMATS.values())
@pytest.mark.parametrize("explicit", [False, True])
def test_transformers_reads_our_quantised_export(format: str, explicit: bool, tmp_path: Path) -> None:
    model = random_model(ModelConfig.from_dict(oracle.config_json(EVEN)), 11)
    save_pretrained(model, tmp_path / "export", format)
    options = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if explicit else {}
    theirs = their_model(tmp_path / "export", **options)(TOKENS, use_cache=False).logits
    loaded = load_pretrained(tmp_path / "export", torch.float32)
    assert relative_rms(loaded(TOKENS), theirs) < 1e-5
    assert 1e-3 < relative_rms(model(TOKENS), theirs) < 1, "rounding shows"


@pytest.mark.parametrize("limit", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_transformers_saved(dtype: torch.dtype, limit: str, tmp_path: Path) -> None:
    """It drops the MTP block but not its number, prefixes names, and stores norms as float32."""
    source = random_model(ModelConfig.from_dict(oracle.config_json(EVEN)), 12)
    save_pretrained(source, tmp_path / "ours", "bf16" if dtype == torch.bfloat16 else "fp32")
    theirs = their_model(tmp_path / "ours", dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    loaded, original = (load_pretrained(tmp_path / name, torch.float32) for name in ("theirs", "ours"))
    assert loaded.config.num_nextn_predict_layers == 0
    expected = {name: tensor for name, tensor in model_values(original).items() if not name.startswith("mtp.")}
    found = model_values(loaded)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert relative_rms(loaded(TOKENS), original(TOKENS)) < 1e-6


def test_a_model_that_transformers_made(tmp_path: Path) -> None:
    """Never loaded from a file, so everything is bfloat16 there, mixing matrices included."""
    oracle.write_release(tmp_path / "release", EVEN)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "release")
    del config.quantization_config
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    theirs.save_pretrained(tmp_path / "theirs")
    again = their_model(tmp_path / "theirs")
    loaded = load_pretrained(tmp_path / "theirs", torch.float32)
    assert relative_rms(loaded(TOKENS), again(TOKENS, use_cache=False).logits) < 1e-5


def test_transformers_own_names_are_refused_with_the_way_out(tmp_path: Path) -> None:
    oracle.write_release(tmp_path / "release", EVEN, wild=False)
    their_model(tmp_path / "release").save_pretrained(tmp_path / "theirs", save_original_format=False)
    assert "save_original_format=True" in refusal(tmp_path / "theirs")
