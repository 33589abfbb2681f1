"""Counts of parameters, floating-point operations and cache bytes, from a config alone (models are built on the meta
device)."""

import functools
from dataclasses import dataclass

import torch

from .config import AttentionMode, ModelConfig
from .transformer import Transformer


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; buffers (selection biases, hash tables) are not counted."""

    total: int  # without the MTP block
    active: int  # used by one token: body and head, without the embedding table and the MTP block
    mtp: int  # of the MTP block
    mtp_active: int


@functools.cache  # asked for with every logged step
def count_parameters(config: ModelConfig) -> ParameterCount:
    """Total and active parameters (recipe 12: 284.33B / 13.27B for Flash, 1573.0B / 48.85B for Pro)."""
    with torch.device("meta"):
        model = Transformer(config)
    counts = {"total": 0, "active": 0, "mtp": 0, "mtp_active": 0}
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        used = size * config.num_experts_per_tok // config.n_routed_experts if ".experts." in name else size
        in_mtp = name.startswith("mtp.")
        counts["mtp" if in_mtp else "total"] += size
        if name != "embed.weight":
            counts["mtp_active" if in_mtp else "active"] += used
    return ParameterCount(**counts)


def training_flops_per_token(config: ModelConfig, length: int, attention: AttentionMode, mtp: bool = True) -> float:
    """Floating-point operations of forward and backward per token of a document of ``length`` tokens, no recomputation.

    Two per weight and token forward, four backward; attention by the keys that a token sees on average; the indexer's
    scores forward only: its loss looks at few entries. In an indexer warm-up all is forward, but for the index scores,
    and the target takes the attention scores of the entries once more.
    """
    if attention == "indexer_warmup":
        mtp = False
    count = count_parameters(config)
    head = config.vocab_size * config.hidden_size
    weights = count.active + ((count.mtp_active + head) if mtp else 0)
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    core = index = target = 0.0
    for kind, ratio in list(zip(config.kinds, config.compress_ratios, strict=True))[:layers]:
        keys = _mean_of_capped_count(length, 1, config.sliding_window)
        visible = _mean_of_capped_count(length, ratio, length) if ratio else 0.0
        if kind == "csa" and attention == "sparse":
            keys += _mean_of_capped_count(length, ratio, config.index_topk)
        else:
            keys += visible
        if kind == "csa" and attention != "dense":
            index += 2 * config.index_n_heads * config.index_head_dim * visible
            target += 2 * config.num_attention_heads * config.head_dim * visible
        core += 4 * config.num_attention_heads * config.head_dim * keys
    if attention == "indexer_warmup":
        return 2 * weights + core + 3 * index + target
    return 3 * (2 * weights + core) + index


def _mean_of_capped_count(length: int, ratio: int, cap: int) -> float:
    """Mean over tokens t of min(floor((t + 1) / ratio), cap), exactly."""
    full = min(length // ratio, cap)
    # Blocks 1 .. full - 1 are the last seen for `ratio` tokens each; everything later sees the cap or the last block.
    below = ratio * (full * (full - 1) // 2)
    return (below + (length - (full * ratio - 1)) * full) / length if full else 0.0


def cache_bytes(config: ModelConfig, context: int, entry_bytes: float = 584, key_bytes: float = 68) -> float:
    """Bytes of the cache of one document of ``context`` tokens (recipe 12: at a million tokens 5.036 GB for Pro,
    3.517 GB for Flash).

    The windows, W tokens of every layer, and what ``cache_bytes_per_token`` says. Main layers only, for generation does
    not run the MTP block; of blocks that are not complete, only the share of the entry to come is counted.

    Args:
        entry_bytes: of a key/value, in a window or compressed; key_bytes: of an indexer's key. The defaults are those
            of Flash and Pro in the formats of DeepSeek's inference code; ``v4_entry_bytes`` and ``v4_key_bytes`` give
            them for other widths.
    """
    window = min(context, config.sliding_window) * config.num_hidden_layers * entry_bytes
    return window + context * cache_bytes_per_token(config, entry_bytes, key_bytes)


def cache_bytes_per_token(config: ModelConfig, entry_bytes: float = 584, key_bytes: float = 68) -> float:
    """What each token adds to the cache on average, once the windows are full: an entry per ``ratio`` tokens in every
    layer that compresses, and a key of the indexer per ``ratio`` tokens in every CSA layer."""
    layers = list(zip(config.kinds, config.compress_ratios, strict=True))[: config.num_hidden_layers]
    return sum((entry_bytes + (key_bytes if kind == "csa" else 0)) / ratio for kind, ratio in layers if ratio)


def v4_entry_bytes(config: ModelConfig) -> int:
    """Bytes of a key/value in the released format (recipe 8.5): E4M3, but BF16 for the rotated channels, and a scale
    byte for each 64 of the others, filled up to whole 8 bytes."""
    still, turned = config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim
    return -(-(still + 2 * turned + -(-still // 64)) // 8) * 8


def v4_key_bytes(config: ModelConfig) -> int:
    """Bytes of an indexer's key in the released format (recipe 8.5): E2M1, and a scale byte for each 32 channels."""
    return -(-config.index_head_dim // 2) + -(-config.index_head_dim // 32)


def parameter_table(config: ModelConfig) -> list[tuple[str, str]]:
    """Lines for the start of a run: what was built and how large it is."""
    count = count_parameters(config)
    kinds = config.kinds[: config.num_hidden_layers]
    return [
        ("layers", f"{len(kinds)} ({kinds.count('swa')} SWA, {kinds.count('csa')} CSA, {kinds.count('hca')} HCA)"),
        ("experts", f"{config.n_routed_experts} routed, {config.num_experts_per_tok} active, 1 shared"),
        ("parameters", f"{_si(count.total)} total, {_si(count.active)} active, {_si(count.mtp)} in the MTP block"),
    ]


def _si(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return str(number)
