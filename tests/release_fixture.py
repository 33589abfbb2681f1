"""Tiny checkpoints in the released layouts, written byte by byte, and what they stand for (recipe 8.1 to 8.3).

An oracle: it shares no code and no library with what it tests. safetensors files are assembled with ``struct``, numbers
are decoded by bit arithmetic in numpy, and the values are float64. ``write_release`` makes a folder; ``read_release``
reads any folder of safetensors back as raw bytes; ``values`` decodes such bytes; ``quantise_fp8`` and ``quantise_fp4``
are the rule of recipe 8.1, with a nearest code that is searched for.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

INDEX = "model.safetensors.index.json"
COPIES = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}
ITEMSIZE = {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}

# Window, HCA and CSA layers, hash-routed and learned, MTP block; no two sizes are equal, and those that are quantised
# in 128x128 blocks lie below, at and beyond a block. FP4 needs multiples of 32 for d and f.
RAGGED: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "head_dim": 24,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 131,
    "o_groups": 3,
    "o_lora_rank": 43,
    "compress_ratios": [0, 128, 4, 4, 0],
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "index_n_heads": 24,
    "index_head_dim": 16,
    "index_topk": 3,
    "num_hash_layers": 3,
}
# Whole blocks everywhere that is beyond one, which is what transformers can dequantise.
EVEN: dict[str, Any] = RAGGED | {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 32,
    "compress_ratios": [0, 128, 4, 4, 0],
    "moe_intermediate_size": 256,
    "sliding_window": 8,
}


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it: safetensors' dtype name, shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


# Formats, each decoded by its definition.

E2M1: Values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(codes: Codes) -> Values:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities; 0x7F and 0xFF are NaN."""
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size = np.where(codes & 127 == 127, np.nan, size)
    return np.where(codes & 128, -size, size)


def e8m0(codes: Codes) -> Values:
    """A power of two, bias 127; 0xFF is NaN."""
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(int) - 127))


def unpack(packed: Codes) -> Codes:
    """FP4 codes of bytes ``[..., I / 2]``: the low nibble is the even index."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: Codes) -> Codes:
    """The bytes of FP4 codes ``[..., I]``."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def bf16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """The words of values, cut to 8 significant bits."""
    words = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return words


def fits_bf16(values: Values) -> npt.NDArray[np.bool_]:
    """Whether bfloat16, subnormals included, holds each value exactly."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    fits: npt.NDArray[np.bool_] = (single == values) & (single.view(np.uint32) & 0xFFFF == 0)
    return fits


def spread(scales: Values, shape: tuple[int, ...], block: tuple[int, int]) -> Values:
    """The scale of each element of a matrix, from one scale per block."""
    return scales.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]


# The rule of recipe 8.1.

E4M3_SIZES = e4m3(np.arange(127, dtype=np.uint8))  # 0 to 448, by code


def nearest(values: Values, sizes: Values) -> npt.NDArray[np.int64]:
    """Index of the nearest of ``sizes`` (ascending) to ``|value|``; a tie takes the even code, beyond is the last."""
    middles = (sizes[1:] + sizes[:-1]) / 2
    codes = np.searchsorted(middles, np.abs(values))  # how many middles are smaller
    tie = middles[np.minimum(codes, len(middles) - 1)] == np.abs(values)
    chosen: npt.NDArray[np.int64] = codes + (tie & (codes % 2 == 1))
    return chosen


def scale_exponent(amax: Values, largest: float, floor: float) -> npt.NDArray[np.int64]:
    """k of the smallest 2^k with largest * 2^k >= max(amax, floor)."""
    mantissa, exponent = np.frexp(np.maximum(amax, floor) / largest)
    smallest: npt.NDArray[np.int64] = exponent - (mantissa == 0.5)
    return smallest


def block_amax(weight: Values, block: tuple[int, int]) -> Values:
    rows, columns = range(0, weight.shape[0], block[0]), range(0, weight.shape[1], block[1])
    return np.array([[np.abs(weight[r : r + block[0], c : c + block[1]]).max() for c in columns] for r in rows])


def quantise_fp8(weight: Values, scales: Values | None = None) -> tuple[Codes, Values]:
    """E4M3 codes of a matrix and the scales of its 128x128 blocks."""
    block = (128, 128)
    if scales is None:
        scales = np.ldexp(1.0, scale_exponent(block_amax(weight, block), 448.0, 1e-4))
    codes = nearest(weight / spread(scales, weight.shape, block), E4M3_SIZES)
    return (codes | np.where(np.signbit(weight), 128, 0)).astype(np.uint8), scales


def quantise_fp4(weight: Values, scales: Values | None = None) -> tuple[Codes, Values]:
    """E2M1 codes, not packed, of a matrix and the scales of its 1x32 groups."""
    block = (1, 32)
    if scales is None:
        scales = np.ldexp(1.0, scale_exponent(block_amax(weight, block), 6.0, 6 * 2.0**-126))
    codes = nearest(weight / spread(scales, weight.shape, block), E2M1[:8])
    return (codes | np.where(np.signbit(weight), 8, 0)).astype(np.uint8), scales


# The table of recipe 8.3.


def table(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Format ("BF16", "F32", "I64", "FP8" or "EXPERT") and shape of every released tensor but the scales."""
    d, c, heads, inner = (
        config[k] for k in ("hidden_size", "head_dim", "num_attention_heads", "moe_intermediate_size")
    )
    latent, groups, rank = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    experts, vocabulary, depth = config["n_routed_experts"], config["vocab_size"], config["num_hidden_layers"]
    found: dict[str, tuple[str, tuple[int, ...]]] = {"embed.weight": ("BF16", (vocabulary, d))}

    def add(prefix: str, kind: str, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            found[prefix + name.replace("__", ".")] = (kind, shape)

    for layer, ratio in enumerate(config["compress_ratios"]):
        p = "mtp.0." if layer == depth else f"layers.{layer}."
        add(p, "BF16", attn_norm__weight=(d,), ffn_norm__weight=(d,))
        for site in ("attn", "ffn"):
            add(f"{p}hc_{site}_", "F32", fn=(24, 4 * d), base=(24,), scale=(3,))
        a = f"{p}attn."
        add(a, "F32", attn_sink=(heads,))
        add(a, "BF16", q_norm__weight=(latent,), kv_norm__weight=(c,))
        add(a, "FP8", wq_a__weight=(latent, d), wq_b__weight=(c * heads, latent), wkv__weight=(c, d))
        add(a, "FP8", wo_a__weight=(rank * groups, c * heads // groups), wo_b__weight=(d, rank * groups))
        if ratio:
            width = 2 * c if ratio == 4 else c
            add(f"{a}compressor.", "BF16", wkv__weight=(width, d), wgate__weight=(width, d), norm__weight=(c,))
            add(f"{a}compressor.", "F32", ape=(ratio, width))
        if ratio == 4:
            add(f"{a}indexer.", "FP8", wq_b__weight=(index_heads * index_dim, latent))
            add(f"{a}indexer.", "BF16", weights_proj__weight=(index_heads, d))
            add(f"{a}indexer.compressor.", "BF16", wkv__weight=(2 * index_dim, d), wgate__weight=(2 * index_dim, d))
            add(f"{a}indexer.compressor.", "BF16", norm__weight=(index_dim,))
            add(f"{a}indexer.compressor.", "F32", ape=(4, 2 * index_dim))
        add(f"{p}ffn.gate.", "BF16", weight=(experts, d))
        if layer < config["num_hash_layers"]:
            add(f"{p}ffn.gate.", "I64", tid2eid=(vocabulary, config["num_experts_per_tok"]))
        else:
            add(f"{p}ffn.gate.", "F32", bias=(experts,))
        for expert in range(experts):
            e = f"{p}ffn.experts.{expert}."
            add(e, "EXPERT", w1__weight=(inner, d), w2__weight=(d, inner), w3__weight=(inner, d))
        shared = f"{p}ffn.shared_experts."
        add(shared, "FP8", w1__weight=(inner, d), w2__weight=(d, inner), w3__weight=(inner, d))
        if p == "mtp.0.":
            add(p, "FP8", e_proj__weight=(d, d), h_proj__weight=(d, d))
            add(p, "BF16", enorm__weight=(d,), hnorm__weight=(d,), norm__weight=(d,))
            add(f"{p}hc_head_", "F32", fn=(4, 4 * d), base=(4,), scale=(1,))
    add("", "BF16", norm__weight=(d,), head__weight=(vocabulary, d))
    add("hc_head_", "F32", fn=(4, 4 * d), base=(4,), scale=(1,))
    return found


def config_json(sizes: Mapping[str, Any], variant: str = "instruct", expert_dtype: bool = True) -> dict[str, Any]:
    """``config.json`` with the released keys (recipe 1); Base has no ``expert_dtype``, early Flash neither."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        **({"expert_dtype": "fp4"} if variant == "instruct" and expert_dtype else {}),
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": len(sizes["compress_ratios"]) - sizes["num_hidden_layers"],
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
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
        **sizes,
    }


# Random tensors.


def random_scales(shape: tuple[int, int], wild: bool, rng: np.random.Generator) -> Values:
    """Powers of two that no rule relates to the values: all that E8M0 has, or such that a model's logits are finite."""
    return np.ldexp(1.0, rng.integers(-127, 128, shape) if wild else rng.integers(-13, -9, shape))


def random_fp8(shape: tuple[int, int], wild: bool, rng: np.random.Generator) -> tuple[Codes, Values]:
    """All finite codes; where ``wild``, also blocks of zeros of both signs and of subnormals alone."""
    scales = random_scales((-(-shape[0] // 128), -(-shape[1] // 128)), wild, rng)
    codes = rng.integers(0, 127, shape, np.uint8)
    if wild:
        kind = spread(rng.integers(0, 4, scales.shape).astype(float), shape, (128, 128))
        codes = np.where(kind == 0, 0, np.where(kind == 1, codes % 8, codes)).astype(np.uint8)
    codes[~fits_bf16(e4m3(codes) * spread(scales, shape, (128, 128)))] = 0
    return codes | rng.integers(0, 2, shape, np.uint8) << 7, scales


def random_fp4(shape: tuple[int, int], wild: bool, rng: np.random.Generator) -> tuple[Codes, Values]:
    """All 16 codes, not packed; where ``wild``, also groups of zeros of both signs."""
    scales = random_scales((shape[0], shape[1] // 32), wild, rng) * (1 if wild else 32)
    codes = rng.integers(0, 8, shape, np.uint8)
    if wild:
        codes *= spread(rng.integers(0, 4, scales.shape).astype(float), shape, (1, 32)) > 0
    codes[~fits_bf16(E2M1[codes] * spread(scales, shape, (1, 32)))] = 0
    return codes | rng.integers(0, 2, shape, np.uint8) << 3, scales


def stored_scales(scales: Values, dtype: str) -> Stored:
    if dtype == "F32":
        return Stored("F32", scales.shape, scales.astype("<f4").tobytes())
    exponents = np.frexp(scales)[1] - 1 + 127
    return Stored("F8_E8M0", scales.shape, exponents.astype(np.uint8).tobytes())


def random_tensors(
    config: Mapping[str, Any],
    variant: str = "instruct",
    seed: int = 0,
    scale_dtype: str | None = None,
    wild: bool = True,
) -> dict[str, Stored]:
    """Every released tensor, scales included, in the table's order.

    ``wild`` draws scales of any size, as a loader must bear them; otherwise the weights are those of a usable model.
    """
    rng = np.random.default_rng(seed)
    scale_dtype = scale_dtype or {"instruct": "F8_E8M0", "base": "F32"}[variant]
    tensors: dict[str, Stored] = {}
    for name, (kind, shape) in table(config).items():
        if kind == "I64":
            rows = [rng.permutation(config["n_routed_experts"])[: shape[1]] for _ in range(shape[0])]
            tensors[name] = Stored("I64", shape, np.array(rows, "<i8").tobytes())
        elif kind in ("BF16", "F32"):
            centre, size = (1.0, 0.2) if "norm" in name else (0.0, shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
            drawn = (centre + size * rng.standard_normal(shape)).astype("<f4")
            data = bf16(drawn).astype("<u2") if kind == "BF16" else drawn
            tensors[name] = Stored(kind, shape, data.tobytes())
        elif kind == "EXPERT" and variant == "instruct":
            codes, scales = random_fp4((shape[0], shape[1]), wild, rng)
            tensors[name] = Stored("I8", (shape[0], shape[1] // 2), pack(codes).tobytes())
            tensors[scale_of(name)] = stored_scales(scales, scale_dtype)
        else:
            codes, scales = random_fp8((shape[0], shape[1]), wild, rng)
            tensors[name] = Stored("F8_E4M3", shape, codes.tobytes())
            tensors[scale_of(name)] = stored_scales(scales, scale_dtype)
    return tensors


def scale_of(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def array(stored: Stored) -> npt.NDArray[Any]:
    """Raw numbers: FP8, FP4 and E8M0 as uint8 codes (FP4 packed), BF16 as uint16 words."""
    kinds = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "F16": "<f2", "BF16": "<u2"}
    return np.frombuffer(stored.data, kinds.get(stored.dtype, "u1")).reshape(stored.shape)


def values(tensors: Mapping[str, Stored]) -> dict[str, Values]:
    """What the tensors stand for: each by its name, dequantised, without scales and copies."""
    found = {}
    for name, stored in tensors.items():
        raw = array(stored)
        scale = tensors.get(scale_of(name)) if name.endswith(".weight") else None
        if name in COPIES or name.endswith(".scale"):
            continue
        if stored.dtype == "BF16":
            found[name] = (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        elif scale is None:
            found[name] = raw.astype(np.float64)
        else:
            scales = e8m0(array(scale)) if scale.dtype == "F8_E8M0" else array(scale).astype(np.float64)
            matrix, block = (E2M1[unpack(raw)], (1, 32)) if stored.dtype == "I8" else (e4m3(raw), (128, 128))
            found[name] = matrix * spread(scales, matrix.shape, block)
    return found


# Files.


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """8 bytes of header length, a JSON header padded to a multiple of 8, the bytes (wide dtypes first, so aligned)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    order = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name].dtype], name))
    for name in order:
        end = position + len(tensors[name].data)
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(tensors[name].data for name in order)


def read_safetensors(path: Path) -> dict[str, Stored]:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Stored(entry["dtype"], tuple(entry["shape"]), content[start:end])
        assert end - start == ITEMSIZE[entry["dtype"]] * int(np.prod(entry["shape"], dtype=np.int64)), name
    return found


def shard_names(count: int) -> list[str]:
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored], shards: int = 1) -> Path:
    """A checkpoint of given tensors. With several shards names are dealt like cards: a scale is not with its weight."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    dealt = dict(_deal(list(tensors), shards))
    for file, names in dealt.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    size = sum(len(stored.data) for stored in tensors.values())
    weight_map = {name: file for file, names in dealt.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
    return folder


def _deal(names: list[str], shards: int) -> Iterator[tuple[str, list[str]]]:
    for number, file in enumerate(shard_names(shards)):
        yield file, names[number::shards]


def read_release(folder: Path) -> dict[str, Stored]:
    """The raw tensors of all safetensors files in a folder."""
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, stored in read_safetensors(file).items():
            assert name not in found, f"{name} is in two files"
            found[name] = stored
    return found


def write_release(
    folder: Path,
    sizes: Mapping[str, Any],
    variant: str = "instruct",
    seed: int = 0,
    shards: int = 1,
    extra_copies: bool = False,
    scale_dtype: str | None = None,
    wild: bool = True,
    expert_dtype: bool = True,
) -> dict[str, Values]:
    """Writes a random checkpoint in the layout of a release and returns the values of its tensors.

    Args:
        sizes: RAGGED, EVEN, or another dict of the config keys that set shapes.
        variant: "instruct" (FP4 routed experts, E8M0 scales) or "base" (FP8 throughout, float32 scales).
        extra_copies: adds the MTP block's copies of embedding and head, which Base probably ships (recipe 8.3).
        scale_dtype: "F8_E8M0" or "F32" where it shall not be the variant's.
        wild: scales of every size, which no usable model has (``random_tensors``).
        expert_dtype: whether the instruct config names its FP4 (early Flash did not).
    """
    tensors = random_tensors(sizes, variant, seed, scale_dtype, wild)
    if extra_copies:
        tensors |= {copy: tensors[original] for copy, original in COPIES.items()}
    write_folder(folder, config_json(sizes, variant, expert_dtype), tensors, shards)
    return values(tensors)
