"""Counts of parameters and of floating-point operations, against the recipe's figures and a count by hand."""

import pytest
from model_cases import CSA, HCA, SWA, random_config

from openv4.model import ModelConfig, Transformer
from openv4.model.accounting import count_parameters, parameter_table, training_flops_per_token
from openv4.model.transformer import AttentionMode
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


def test_table_for_the_start_of_a_run(flash: ModelConfig) -> None:
    table = dict(parameter_table(flash))
    assert table["layers"] == "43 (2 SWA, 21 CSA, 20 HCA)"
    assert table["experts"] == "256 routed, 6 active, 1 shared"
    assert table["parameters"] == "284.33B total, 13.27B active, 6.61B in the MTP block"
