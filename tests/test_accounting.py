"""Counts of parameters and of floating-point operations, against the recipe's figures and a count by hand."""

import math

import pytest
import torch
from model_cases import CSA, HCA, SWA, random_config, random_model

from openv4.model import ModelConfig, Transformer
from openv4.model.accounting import (
    cache_bytes,
    cache_bytes_per_token,
    count_parameters,
    parameter_table,
    training_flops_per_token,
    v4_entry_bytes,
    v4_key_bytes,
)
from openv4.model.cache import Cache
from openv4.model.config import AttentionMode
from openv4.train.config import load_config


@pytest.fixture(scope="module")
def flash() -> ModelConfig:
    return load_config(["model=v4_flash"]).model


@pytest.fixture(scope="module")
def pro() -> ModelConfig:
    return load_config(["model=v4_pro"]).model


def test_parameters_of_flash_and_pro(flash: ModelConfig, pro: ModelConfig) -> None:
    """Recipe 12: the paper's 284B/13B and 1.6T/49B, exactly."""
    count = count_parameters(flash)
    assert count.total == 284_332_230_231
    assert round(count.active / 1e9, 2) == 13.27
    assert round((count.total + count.mtp) / 1e9, 3) == 290.942
    count = count_parameters(pro)
    assert count.total == 1_572_997_179_491
    assert round(count.active / 1e9, 2) == 48.85
    assert round((count.total + count.mtp) / 1e9, 3) == 1598.837


def test_stored_elements_of_flash(flash: ModelConfig) -> None:
    """Recipe 8.3: the released files hold 158,069,433,298 elements: two FP4 weights are one element, an FP4 scale
    stands for 32 weights, an FP8 scale for a block of 128 x 128, and the tables of the hash layers come along."""
    d, inner, experts = flash.hidden_size, flash.moe_intermediate_size, flash.n_routed_experts
    count = count_parameters(flash)
    blocks = flash.num_hidden_layers + 1
    routed = blocks * experts * 3 * d * inner
    heads = flash.num_attention_heads * flash.head_dim
    grouped = flash.o_groups * flash.o_lora_rank
    fp8 = blocks * (
        flash.q_lora_rank * d + heads * flash.q_lora_rank + flash.head_dim * d + grouped * heads // flash.o_groups
    )
    fp8 += blocks * (d * grouped + 3 * d * inner) + 2 * d * d
    fp8 += flash.kinds.count("csa") * flash.index_n_heads * flash.index_head_dim * flash.q_lora_rank
    buffers = flash.num_hash_layers * flash.vocab_size * flash.num_experts_per_tok
    buffers += (blocks - flash.num_hash_layers) * experts
    stored = count.total + count.mtp - routed // 2 + routed // 32 + fp8 // 128**2 + buffers
    assert stored == 158_069_433_298


@pytest.mark.parametrize("seed", range(6))
def test_parameters_are_those_of_the_built_model(seed: int) -> None:
    config = random_config(seed)
    model, count = Transformer(config), count_parameters(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert count.total + count.mtp == sum(sizes.values())
    assert count.mtp == sum(size for name, size in sizes.items() if name.startswith("mtp."))
    unused = 1 - config.num_experts_per_tok / config.n_routed_experts
    idle = sum(size * unused for name, size in sizes.items() if ".experts." in name and not name.startswith("mtp."))
    assert count.active == pytest.approx(count.total - sizes["embed.weight"] - idle, abs=1e-3)


def counted(config: ModelConfig, length: int, attention: AttentionMode, mtp: bool) -> float:
    """Operations of a document, token by token and key by key, over its length."""
    sizes = {name: p.numel() for name, p in Transformer(config).named_parameters() if name != "embed.weight"}
    # Forward once, backward twice: of the model, or in a warm-up of the indexer alone.
    passes = {"model": 3, "index": 1} if attention != "indexer_warmup" else {"model": 1, "index": 3}
    mtp = mtp and attention != "indexer_warmup"
    total = 0.0
    for name, size in sizes.items():
        if name.startswith("mtp.") and not mtp:
            continue
        used = size * config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else size
        total += length * 2 * passes["model"] * used
    if mtp:  # the output head once more
        total += length * 6 * config.vocab_size * config.hidden_size
    blocks = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    for kind, ratio in list(zip(config.kinds, config.compress_ratios, strict=True))[:blocks]:
        for token in range(length):
            keys = len([other for other in range(length) if 0 <= token - other < config.sliding_window])
            entries = [entry for entry in range(length) if ratio and (entry + 1) * ratio <= token + 1]
            if kind == "csa" and attention != "dense":
                total += passes["index"] * 2 * config.index_n_heads * config.index_head_dim * len(entries)
            if kind == "csa" and attention == "indexer_warmup":  # the target
                total += 2 * config.num_attention_heads * config.head_dim * len(entries)
            if kind == "csa" and attention == "sparse":
                entries = entries[: config.index_topk]
            # Scores and weighted sum, a product and an addition each.
            total += passes["model"] * 4 * config.num_attention_heads * config.head_dim * (keys + len(entries))
    return total / length


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("attention", ["dense", "indexer_warmup", "sparse"])
def test_training_flops_equal_a_count_by_hand(seed: int, attention: AttentionMode) -> None:
    config = random_config(seed, num_hidden_layers=3, layer_types=(SWA, CSA, HCA), compress_ratios=(0, 3, 7, 0))
    for length in (1, 2, 3, 7, 16, 40, 61):
        for mtp in (True, False):
            found = training_flops_per_token(config, length, attention, mtp)
            assert found == pytest.approx(counted(config, length, attention, mtp), rel=1e-12), (length, mtp)


def test_training_flops_without_an_mtp_block() -> None:
    config = random_config(2, num_nextn_predict_layers=0, layer_types=(), num_hidden_layers=2, compress_ratios=(4, 8))
    assert training_flops_per_token(config, 32, "sparse", False) == pytest.approx(counted(config, 32, "sparse", False))


def test_flash_at_4k(flash: ModelConfig) -> None:
    """NVIDIA's published 731 TFLOP/s at 8,056 tokens/s are 90.8e9 a token."""
    assert training_flops_per_token(flash, 4096, "sparse") == pytest.approx(90.8e9, rel=0.02)


def test_more_context_costs_more(flash: ModelConfig) -> None:
    costs = [training_flops_per_token(flash, length, "sparse") for length in (1024, 4096, 65536, 1_048_576)]
    assert costs == sorted(costs)
    assert training_flops_per_token(flash, 65536, "dense") > training_flops_per_token(flash, 65536, "sparse")


def test_cache_of_flash_and_pro_at_a_million_tokens(flash: ModelConfig, pro: ModelConfig) -> None:
    """Recipe 12, to the digits given there; V3.2 keeps 788 bytes per token in each of 61 layers."""
    v3 = 61 * 788 * 1_000_000
    for config, gigabytes, share, window in ((pro, 5.036, 10.48, 4.6), (flash, 3.517, 7.32, 3.2)):
        total = cache_bytes(config, 1_000_000)
        assert round(total / 1e9, 3) == gigabytes and round(100 * total / v3, 2) == share
        assert round((total - 1_000_000 * cache_bytes_per_token(config)) / 1e6, 1) == window
        assert (v4_entry_bytes(config), v4_key_bytes(config)) == (584, 68)
    # With keys in FP8, 128 bytes and a scale of 4 (recipe 12: 11.5% and 8.0%).
    assert [round(100 * cache_bytes(c, 1_000_000, key_bytes=132) / v3, 1) for c in (pro, flash)] == [11.5, 8.0]


@pytest.mark.parametrize("seed", range(6))
def test_cache_bytes_are_those_of_a_cache(seed: int) -> None:
    """In float32, for any ratios, at lengths that leave no block incomplete; but for what the two count differently:
    the window's token at hand, and the last block where blocks overlap, which the next one will need."""
    config = random_config(seed)
    model, cache = random_model(config, seed), Cache(config)
    ratios = [ratio for ratio in config.compress_ratios if ratio]
    length = math.lcm(*ratios) * (1 + 40 // math.lcm(*ratios))
    model.decode(torch.zeros(1, length, dtype=torch.long), cache)
    main = config.kinds[: config.num_hidden_layers]
    size = {"entry_bytes": 4 * config.head_dim, "key_bytes": 4 * config.index_head_dim}
    widths = 2 * 2 * 4 * (config.head_dim + config.index_head_dim)
    pending = sum(r * widths for kind, r in zip(main, config.compress_ratios, strict=False) if kind == "csa")
    expected = cache_bytes(config, length, **size) - len(main) * 4 * config.head_dim + pending
    assert cache.bytes == pytest.approx(expected, rel=1e-12)
    assert cache.bytes_per_token == pytest.approx(cache_bytes_per_token(config, **size), rel=1e-12)


def test_a_cache_of_few_tokens(flash: ModelConfig) -> None:
    """Windows fill first: below 128 tokens they grow by a key/value per layer."""
    assert cache_bytes(flash, 0) == 0
    assert cache_bytes(flash, 100) == pytest.approx(100 * (43 * 584 + cache_bytes_per_token(flash)))


def test_table_for_the_start_of_a_run(flash: ModelConfig) -> None:
    table = dict(parameter_table(flash))
    assert table["layers"] == "43 (2 SWA, 21 CSA, 20 HCA)"
    assert table["experts"] == "256 routed, 6 active, 1 shared"
    assert table["parameters"] == "284.33B total, 13.27B active, 6.61B in the MTP block"
