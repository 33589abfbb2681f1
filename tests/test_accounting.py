"""Counts of parameters and of floating-point operations, against the recipe's figures and a count by hand."""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch
from flop_cases import counted_flops
from model_cases import random_config, random_model
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from openv4.kernels.quantize import block_of
from openv4.model import ModelConfig, Transformer, save_pretrained
from openv4.model.accounting import (
    FP4_GROUP,
    FP8_BLOCK,
    V32,
    cache_bytes,
    cache_bytes_per_token,
    checkpoint_bytes,
    count_parameters,
    parameter_table,
    parameters_by_part,
    release_bytes,
    stored_elements,
    tensor_bytes,
    training_flops,
    training_flops_per_token,
    v4_entry_bytes,
    v4_key_bytes,
)
from openv4.model.cache import Cache
from openv4.model.config import AttentionMode, LoRAConfig, Recompute
from openv4.model.lora import add_lora, lora_parameters
from openv4.model.loss import training_losses
from openv4.model.released import FORMATS, Format, stored_bytes
from openv4.model.shapes import adapter_shapes, tensor_shapes
from openv4.optim.config import OptimConfig
from openv4.optim.groups import build_optimizers
from openv4.train.checkpoint import TrainState
from openv4.train.checkpoint_writer import save_checkpoint, whole_snapshot
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


def test_stored_elements_and_bytes_of_flash(flash: ModelConfig) -> None:
    """Recipe 8.3: the released files hold 158,069,433,298 elements in 148.65 GiB; two FP4 weights are one element."""
    assert stored_elements(flash, "fp4+fp8") == 158_069_433_298
    assert round(release_bytes(flash, "fp4+fp8") / 2**30, 2) == 148.65
    assert (flash.kinds.count("csa"), flash.num_hash_layers) == (21, 3)


def test_bytes_of_other_releases(flash: ModelConfig, pro: ModelConfig) -> None:
    """Recipe 8.3: 864.70 GB for Pro; the Base models 294.7 and 1606.0 GB with a copy of embedding and head."""
    assert round(release_bytes(pro, "fp4+fp8") / 1e9, 2) == 864.70
    for config, size in ((flash, 294.7), (pro, 1606.0)):
        copies = 2 * 2 * config.vocab_size * config.hidden_size
        assert round((release_bytes(config, "fp8") + copies) / 1e9, 1) == size


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", [None, 1, 3])
def test_release_bytes_are_those_of_written_files(format: Format, seed: int | None, tmp_path: Path) -> None:
    config = load_config(["model=nano"]).model if seed is None else random_config(seed)
    model = random_model(config, 0)
    save_pretrained(model, tmp_path / "model", format)
    tensors = load_file(tmp_path / "model" / "model.safetensors").values()
    assert release_bytes(config, format) == sum(t.numel() * t.element_size() for t in tensors)
    assert stored_elements(config, format) == sum(t.numel() for t in tensors)
    for s in tensor_shapes(config):
        dtype = torch.int64 if s.stored == "int64" else torch.float32
        assert tensor_bytes(s, format) == sum(stored_bytes(name, s.shape, dtype, format) for name in s.names())


def test_blocks_of_scales() -> None:
    assert block_of(torch.empty(0, dtype=torch.float8_e4m3fn)) == (FP8_BLOCK, FP8_BLOCK)
    assert block_of(torch.empty(0, dtype=torch.int8)) == (1, FP4_GROUP)


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3, targets=("attention", "experts", "indexer"))])
def test_checkpoint_bytes_are_those_of_a_checkpoint(
    matrices: Literal["muon", "adamw"], lora: LoRAConfig | None, tmp_path: Path
) -> None:
    config = random_config(6)
    model = random_model(config, 6)
    if lora is not None:
        add_lora(model, lora)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    splits = {} if lora else model.row_splits()
    optimizers = build_optimizers(named, splits, OptimConfig(matrices=matrices))
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1e-3, torch.zeros(()))
    snapshot = whole_snapshot(model, optimizers, TrainState(step=1), None if lora is None else (lora, ""))
    folder = save_checkpoint(tmp_path, snapshot, keep=1)
    stored = [item for file in folder.glob("*.safetensors") for item in load_file(file).items()]
    expected = sum(t.numel() * t.element_size() for name, t in stored if not name.startswith("rng."))
    assert checkpoint_bytes(config, matrices, lora) == expected


@pytest.mark.parametrize("seed", range(6))
def test_parameters_by_part_add_up(seed: int) -> None:
    config = random_config(seed)
    count = count_parameters(config)
    for mtp, whole in ((False, (count.total, count.active)), (True, (count.mtp, count.mtp_active))):
        assert tuple(map(sum, zip(*parameters_by_part(config, mtp).values(), strict=True))) == whole


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


MODES: list[tuple[AttentionMode, bool]] = [
    ("sparse", False),
    ("sparse", True),
    ("dense", False),
    ("dense", True),
    ("indexer_warmup", False),
]


@pytest.mark.parametrize(("attention", "indexer_loss"), MODES)
@pytest.mark.parametrize(("seed", "length"), [(0, 19), (5, 17), pytest.param(1, 16, marks=pytest.mark.slow)])
def test_training_flops_are_those_of_the_reference(
    seed: int, length: int, attention: AttentionMode, indexer_loss: bool
) -> None:
    """``flop_cases`` counts a loop that computes nothing invisible; the two agree to the operation, not only to 1%.

    Documents have at least one block of every ratio: from shorter ones, a compressor gets no gradient in truth.
    """
    config = random_config(seed)
    found = training_flops_per_token(config, length, attention, True, indexer_loss=indexer_loss)
    assert found * length == pytest.approx(counted_flops(config, length, attention, True, indexer_loss), rel=1e-12)


def test_training_flops_without_an_mtp_block() -> None:
    config = random_config(2, num_nextn_predict_layers=0, layer_types=(), num_hidden_layers=2, compress_ratios=(4, 8))
    counted = counted_flops(config, 9, "sparse", False)
    for mtp in (True, False):
        assert 9 * training_flops_per_token(config, 9, "sparse", mtp) == pytest.approx(counted, rel=1e-12)


@pytest.mark.slow
def test_flops_of_a_preset_are_those_of_the_reference() -> None:
    config, length = load_config(["model=nano"]).model, 16
    found = training_flops_per_token(config, length, "sparse")
    assert found * length == pytest.approx(counted_flops(config, length, "sparse", True), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 3])
def test_lora_leaves_out_the_gradients_of_frozen_weights(seed: int) -> None:
    """Without adapters the step is that of a reference whose embedding alone learns. An adapter [out, rank] [rank, in]
    adds six operations per number of it, of experts for those that a token chooses."""
    config, length = random_config(seed), 11
    lora = LoRAConfig(rank=5, targets=("attention", "experts", "shared_experts", "compressor"))
    work = training_flops(config, length, "sparse", False, lora=lora)
    base = sum(w.total for w in work if w.part != "adapters")
    assert base * length == pytest.approx(counted_flops(config, length, "sparse", False, frozen=True), rel=1e-12)
    model, share = Transformer(config), config.num_experts_per_tok / config.n_routed_experts
    add_lora(model, lora)
    used = sum(p.numel() * (share if ".experts." in name else 1) for name, p in lora_parameters(model).items())
    assert sum(w.total for w in work if w.part == "adapters") == pytest.approx(6 * used, rel=1e-12)


def test_adapters_of_the_indexer_learn_by_its_loss_alone() -> None:
    config, lora = random_config(1), LoRAConfig(rank=4, targets=("indexer",))
    shapes = adapter_shapes(config, lora)
    a, b = (sum(s.numel for s in shapes if s.name.endswith(end)) for end in (".A", ".B"))

    def backward(attention: AttentionMode, loss: bool) -> float:
        work = training_flops(config, 20, attention, False, indexer_loss=loss, lora=lora)
        return sum(w.backward for w in work if w.part == "adapters")

    assert backward("sparse", False) == 0
    assert backward("sparse", True) == backward("indexer_warmup", False) == 2 * a + 4 * b


@pytest.mark.parametrize("seed", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_recomputation_does_again_what_the_accounting_says(seed: int) -> None:
    """Products with weights, counted in the package's own model: it runs them once per token, whatever is visible, so
    that the difference to a step without recomputation is exactly what is replayed. Attention's own products cover
    masked keys, too; of those, it is compared that both kinds of recomputation repeat the same."""
    config, length = random_config(seed), 24
    tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))

    def counts(recompute: Recompute) -> Counter[str]:
        model = random_model(config, seed)
        model.recompute = recompute
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
        with counter:
            losses = training_losses(model, tokens, torch.zeros_like(tokens), "sparse", mtp=False)
            (losses.main + losses.balance).backward()
        return Counter({str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()})

    none, selective, full = (counts(mode) for mode in ("none", "selective", "full"))
    assert (none["aten.mm"], none["aten._grouped_mm"]) == (selective["aten.mm"], selective["aten._grouped_mm"])
    assert selective["aten.bmm"] == full["aten.bmm"] > none["aten.bmm"]
    # Forward, and in backward the gradients of inputs and weights.
    assert full["aten._grouped_mm"] == none["aten._grouped_mm"] * 4 // 3
    again = {mode: training_flops(config, length, "sparse", False, recompute=mode) for mode in ("selective", "full")}
    matrices = {mode: {w.part: 0.0 for w in work} for mode, work in again.items()}
    for mode, work in again.items():
        for w in work:
            matrices[mode][w.part] += w.replayed
    first_projection = matrices["selective"].pop("attention")
    core = matrices["selective"].pop("attention core")
    mixing = matrices["selective"].pop("stream mixing")
    assert not any(matrices["selective"].values())
    replayed = matrices["full"]
    assert (replayed.pop("attention core"), replayed.pop("stream mixing")) == (core, mixing)
    assert replayed.pop("routed experts") > 0 and replayed.pop("head") == replayed.pop("index scores") == 0
    expected = sum(replayed.values()) - first_projection
    assert full["aten.mm"] - none["aten.mm"] == pytest.approx(expected * length, rel=1e-12)
    grouped = config.o_lora_rank * config.num_attention_heads * config.head_dim
    assert first_projection == 2 * config.num_hidden_layers * grouped


def grouped_flops(left: tuple[int, ...], right: tuple[int, ...], *_: object, **__: object) -> int:
    """Of rows times one of a stack of matrices; or, for the gradient of the stack, of rows times rows."""
    return 2 * left[0] * left[1] * right[-1]


def test_no_recomputation_is_the_default_and_costs_nothing(flash: ModelConfig) -> None:
    assert not any(w.replayed for w in training_flops(flash, 4096))
    plain, full = (training_flops_per_token(flash, 4096, "sparse", recompute=mode) for mode in ("none", "full"))
    assert 1.25 < full / plain < 4 / 3


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
    assert cache_bytes(V32, 1_000_000) == v3
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
