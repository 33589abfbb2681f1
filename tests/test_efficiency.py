"""The paper's efficiency figures: against those of the recipe, and against a count by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_cases import random_config

from openv4.launch.efficiency import GQA_BYTES, PAPER, WEIGHTINGS, efficiency, models, run_efficiency
from openv4.model import ModelConfig
from openv4.model.accounting import (
    INFERRED,
    UNWEIGHTED,
    V32,
    FormatWeights,
    cache_bytes,
    count_parameters,
    decode_flops,
)
from openv4.train.config import ConfigError

MILLION = 1_000_000


def test_the_recipes_table() -> None:
    """Recipe 12, digit for digit."""
    plain, inferred, third = efficiency(MILLION)["flops_per_token"].values()
    assert [f"{plain['V3.2'] / 1e12:.3f}", *(f"{plain[n] / 1e9:.1f}" for n in PAPER)] == ["1.109", "294.2", "135.2"]
    expected = ["1.144", "306.3", "114.8"]
    assert [f"{inferred['V3.2'] / 1e12:.3f}", *(f"{inferred[n] / 1e9:.1f}" for n in PAPER)] == expected
    ratios = [[f"{100 * row[n] / row['V3.2']:.1f}" for n in PAPER] for row in (plain, inferred, third)]
    assert ratios == [["26.5", "12.2"], ["26.8", "10.0"], ["32.1", "13.8"]]


def test_ratios_at_two_to_the_twenty() -> None:
    *_, inferred, _ = efficiency(2**20)["flops_ratio"].values()
    assert [f"{100 * inferred[name]:.1f}" for name in PAPER] == ["26.5", "10.0"]


def test_caches() -> None:
    row = efficiency(MILLION)
    assert [f"{row['cache_bytes'][n] / 1e9:.3f}" for n in ("V3.2", *PAPER)] == ["48.068", "5.036", "3.517"]
    assert [f"{100 * row['cache_ratio'][n]:.2f}" for n in PAPER] == ["10.48", "7.32"]
    assert [f"{100 * row['cache_ratio_gqa8x128_bf16'][n]:.2f}" for n in PAPER] == ["2.02", "2.00"]
    assert GQA_BYTES == 4096


def test_only_the_inferred_weighting_rounds_to_the_paper() -> None:
    ratios = efficiency(MILLION)["flops_ratio"]
    matching = [label for label, row in ratios.items() if all(round(100 * row[n]) == PAPER[n][0] for n in PAPER)]
    assert matching == [label for label in WEIGHTINGS if "*" in label] and WEIGHTINGS[matching[0]] is INFERRED
    cache = efficiency(MILLION)["cache_ratio"]
    assert [round(100 * cache[name]) for name in PAPER] == [PAPER[name][1] for name in PAPER]


def by_hand(config: ModelConfig, context: int, weights: FormatWeights) -> float:
    """The last token's operations, key by key."""
    total = 2.0 * count_parameters(config).active * weights.fp8
    for kind, ratio in list(zip(config.kinds, config.compress_ratios, strict=True))[: config.num_hidden_layers]:
        keys = sum(1 for other in range(context) if context - 1 - other < config.sliding_window)
        blocks = sum(1 for block in range(context) if ratio and (block + 1) * ratio <= context)
        if kind == "csa":
            for _ in range(blocks):
                total += weights.fp4 * 2 * config.index_n_heads * config.index_head_dim
            blocks = len(list(range(blocks))[: config.index_topk])
        for _ in range(keys + blocks):
            total += weights.bf16 * 2 * (2 * config.num_attention_heads * config.head_dim)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_decoding_equals_a_count_by_hand(seed: int) -> None:
    config, weights = random_config(seed), FormatWeights(1.25, 0.375, 3.0)
    for context in (1, 2, 5, 16, 33, 70):
        assert decode_flops(config, context, weights) == pytest.approx(by_hand(config, context, weights), rel=1e-12)


@pytest.mark.parametrize("context", [1, 2047, 2048, 2049, 131072])
def test_v32_by_hand(context: int) -> None:
    """61 layers: 64 heads of 128 score every token; 128 heads read 576 and sum 512 channels of 2048 tokens."""
    score, read = 2 * 64 * 128 * context, 2 * 128 * (576 + 512) * min(context, 2048)
    assert decode_flops(V32, context, UNWEIGHTED) == 2 * 37.48e9 + 61 * (score + read)
    assert decode_flops(V32, context) == 2 * 37.48e9 + 61 * (score + 2 * read)
    assert cache_bytes(V32, context) == 61 * 788 * context


def test_curves_rise_and_keep_their_order() -> None:
    contexts = [4096 * 2**step for step in range(9)]
    curves = {name: [decode_flops(model, n) for n in contexts] for name, model in models().items()}
    assert all(values == sorted(values) for values in curves.values())
    assert all(v > p > f for v, p, f in list(zip(*curves.values(), strict=True))[3:])  # Pro is larger than V3.2


def test_output_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    run_efficiency()
    text = capsys.readouterr().out
    for figure in ("26.776%", "10.032%", "26.454%", "9.966%", "10.477%", "7.318%", "2.016%", "1.997%", "27% / 10%"):
        assert figure in text, figure
    assert "inferred" in text and "no formula" in text and "1,000,000" in text and "1,048,576" in text


def test_output_as_json_and_at_another_context(capsys: pytest.CaptureFixture[str]) -> None:
    run_efficiency(65536.0, as_json=True)
    first, second = json.loads(capsys.readouterr().out)
    assert (first["context"], second["context"]) == (65536, 2**20)
    assert first == json.loads(json.dumps(efficiency(65536)))
    run_efficiency(2**20, as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("context", [0, -4, 0.5, 1000.5, float("inf"), float("nan")])
def test_a_context_that_is_no_number_of_tokens(context: float) -> None:
    with pytest.raises(ConfigError, match=r"tokens=.*whole number"):
        run_efficiency(context)


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "new" / "efficiency.png"
    run_efficiency(png=png)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 20_000


def test_neither_torch_nor_numpy_is_imported() -> None:
    code = (
        "import sys\nfrom openv4.launch.efficiency import run_efficiency\nrun_efficiency(as_json=True)\n"
        "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
