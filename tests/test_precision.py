"""Training in fp8 and fp4_qat: what is rounded, when, what it leaves alone, and that runs in it are as reliable."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_cases import random_config, random_model, relative_rms
from run_cases import contents, rows, tiny_config
from torch import Tensor, nn

import openv4.model.precision as model_precision
from openv4.data.loader import Batch
from openv4.kernels.fp4 import fp4_weight
from openv4.kernels.fp8 import round_rows, round_weight
from openv4.model import Transformer
from openv4.model.config import Recompute
from openv4.model.loss import Counts, Losses, training_losses
from openv4.optim.config import OptimConfig
from openv4.optim.groups import build_optimizers
from openv4.optim.schedule import Compute, Plan
from openv4.train.config import ConfigError, PrecisionConfig, load_config
from openv4.train.loop import train, training_step
from openv4.train.precision import apply_precision, precision_table

pytestmark = pytest.mark.usefixtures("one_thread")

FP8 = PrecisionConfig("fp8", streams="fp32")
FP4 = PrecisionConfig("fp4_qat", streams="fp32")
BASELINE = PrecisionConfig("fp32")

# Recipe 8.3: what the instruct models hold in E4M3, the experts aside, which they hold in E2M1.
RELEASED_IN_FP8 = re.compile(
    r"(layers\.\d+|mtp\.0)\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|[eh]_proj)"
)
EXPERTS = re.compile(r"(layers\.\d+|mtp\.0)\.ffn\.experts")


def case(seed: int, **fixed: object) -> tuple[Transformer, Batch]:
    """A small model whose indexer can rotate, and two packed rows."""
    config = random_config(seed, **{"index_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 14, **fixed})
    tokens = torch.randint(0, config.vocab_size, (2, 53), generator=torch.Generator().manual_seed(seed))
    segments = torch.zeros(2, 53, dtype=torch.long)
    segments[0] = torch.tensor([0, 1, -1]).repeat_interleave(torch.tensor([30, 20, 3]))
    return random_model(config, seed), Batch(tokens, segments, ())


def run(model: Transformer, batch: Batch, statistics: bool = False) -> tuple[Losses, dict[str, Tensor]]:
    losses = training_losses(model, batch.tokens, batch.segments, indexer=True, statistics=statistics)
    losses.total(Counts.of([batch.segments]), 0.3, 0.1, 0.7).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses, found


@pytest.mark.parametrize("compute", ["fp8", "fp4_qat"])
def test_what_is_released_in_fp8_and_fp4_is_rounded_and_nothing_else(compute: Compute) -> None:
    model, _ = case(0, num_nextn_predict_layers=1)
    apply_precision(model, replace(FP8, compute=compute))
    rounded = {name: m for name, m in model.named_modules() if getattr(m, "rounded", None)}
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and RELEASED_IN_FP8.fullmatch(name)}
    experts = {name for name, _ in model.named_modules() if EXPERTS.fullmatch(name)}
    assert set(rounded) == linear | experts and len(experts) == model.config.num_hidden_layers + 1
    for name in experts:
        assert [weight.fp4 for weight in rounded[name].rounded] == [compute == "fp4_qat"] * 3
    simulated = {name for name, m in model.named_modules() if getattr(m, "simulate", None)}
    index = {n for n, _ in model.named_modules() if n.endswith(("attn.indexer", "attn.indexer.compressor"))}
    assert simulated == (index if compute == "fp4_qat" else set())
    apply_precision(model, BASELINE)
    assert not any(getattr(m, "rounded", None) or getattr(m, "simulate", None) for m in model.modules())


def test_products_are_those_of_rounded_weights_and_activations() -> None:
    """One linear map, the grouped one and the routed experts inside a model, by hand from the rounding functions."""
    model, _ = case(1, n_routed_experts=3, num_experts_per_tok=1, swiglu_limit=10.0)
    apply_precision(model, FP4)
    generator = torch.Generator().manual_seed(0)
    attention, ffn = model.layers[0].attn, model.layers[0].ffn
    x = torch.randn(2, 5, model.config.hidden_size, generator=generator)
    expected = round_rows(x) @ round_weight(attention.wq_a.weight, torch.float32).T
    assert relative_rms(attention.wq_a(x), expected) < 1e-6
    groups, rank = model.config.o_groups, model.config.o_lora_rank
    x = torch.randn(2, 5, groups, attention.wo_a.weight.shape[1], generator=generator)
    weight = round_weight(attention.wo_a.weight, torch.float32).view(groups, rank, -1)
    expected = torch.stack([round_rows(x)[:, :, g] @ weight[g].T for g in range(groups)], 2)
    assert relative_rms(attention.wo_a(x), expected) < 1e-6
    x = torch.randn(7, model.config.hidden_size, generator=generator)
    ids, weights = torch.tensor([[0], [2], [2], [0], [2], [0], [0]]), torch.rand(7, 1, generator=generator)
    w1, w3, w2 = (fp4_weight(w, torch.float32)[0] for w in (ffn.experts.w1, ffn.experts.w3, ffn.experts.w2))
    output, _ = ffn.experts(x, ids, weights)
    for token, expert in enumerate(ids.flatten().tolist()):
        row = round_rows(x[token : token + 1])
        hidden = nn.functional.silu(row @ w1[expert].T) * (row @ w3[expert].T) * weights[token]
        assert relative_rms(output[token], (round_rows(hidden) @ w2[expert].T)[0]) < 1e-5


@pytest.mark.parametrize("precision", [FP8, FP4, replace(FP8, kv="fp8")])
def test_rounding_changes_losses_and_gradients_a_little(precision: PrecisionConfig) -> None:
    """A part in ten, not in two, for E4M3 has 3 bits of mantissa and E2M1 one; and every weight still learns."""
    model, batch = case(2, index_topk=50)
    plain, wanted = run(model, batch)
    apply_precision(model, precision)
    losses, found = run(model, batch)
    assert sorted(found) == sorted(wanted)
    assert losses.main != plain.main and abs(losses.main / plain.main - 1) < 0.05
    together = [torch.cat([g.flatten() for g in grads.values()]) for grads in (found, wanted)]
    assert 1e-3 < relative_rms(*together) < 0.6
    assert all(bool(g.isfinite().all()) and g.dtype == torch.float32 for g in found.values())
    apply_precision(model, BASELINE)
    again, gradients = run(model, batch)
    assert torch.equal(again.main, plain.main)
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_weights_that_fp4_holds_train_as_in_fp8() -> None:
    """FP4 to FP8 loses nothing, so where masters lie on FP4's grid the two modes take the same step, bit for bit.

    Without CSA layers, whose indexer the two treat differently.
    """
    config = random_config(3, layer_types=(), compress_ratios=(0, 16, 0), num_hidden_layers=2)
    model = random_model(config, 3)
    tokens = torch.randint(0, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, torch.zeros_like(tokens), ())
    with torch.no_grad():
        for block in [*model.layers, *model.mtp]:
            for weight in (block.ffn.experts.w1, block.ffn.experts.w2, block.ffn.experts.w3):
                values, violations = fp4_weight(weight, torch.float32)
                weight.copy_(values)
                assert violations == 0
    results = []
    for precision in (FP8, FP4):
        apply_precision(model, precision)
        results.append(run(model, batch))
    assert torch.equal(results[0][0].main, results[1][0].main)
    assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())


def steps(model: Transformer, batch: Batch, micro_batches: int) -> list[Tensor]:
    """Two optimizer steps of some micro-batches; the weights after them."""
    optimizers = build_optimizers(model.named_parameters(), model.row_splits(), OptimConfig())
    plan = Plan(0, "", 53, 2, 1e-2, "sparse", 0.3, 0.1, 0.01, 0.5)
    for _ in range(2):
        training_step(model, optimizers, [batch] * micro_batches, plan, 1.0)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("precision", [FP8, FP4])
def test_weights_are_rounded_once_a_step(precision: PrecisionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a micro-batch; and rounding them every time gives the same step."""
    calls: list[int] = []
    for name in ("round_weight", "fp4_weight"):
        original = getattr(model_precision, name)
        monkeypatch.setattr(
            model_precision, name, lambda w, dtype, original=original: calls.append(1) or original(w, dtype)
        )
    model, batch = case(4, num_nextn_predict_layers=1)
    apply_precision(model, precision)
    sites = sum(len(m.rounded) if isinstance(m.rounded, tuple) else 1
                for m in model.modules() if getattr(m, "rounded", None))  # fmt: skip
    cached = steps(model, batch, 4)
    assert len(calls) == 2 * sites

    class Forgetful(model_precision.RoundedWeight):
        def values(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
            self._values = None
            return super().values(weight, dtype)

    model, batch = case(4, num_nextn_predict_layers=1)
    apply_precision(model, precision)
    for module in model.modules():
        if isinstance(getattr(module, "rounded", None), model_precision.RoundedWeight):
            module.rounded = Forgetful(model.gauge)
        elif getattr(module, "rounded", None):
            module.rounded = tuple(Forgetful(model.gauge, old.fp4) for old in module.rounded)
    calls.clear()
    uncached = steps(model, batch, 4)
    assert len(calls) == 8 * sites
    assert all(torch.equal(a, b) for a, b in zip(cached, uncached, strict=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute: Recompute) -> None:
    model, batch = case(5)
    apply_precision(model, FP4)
    plain, wanted = run(model, batch)
    model.recompute = recompute
    losses, found = run(model, batch)
    assert torch.equal(losses.main, plain.main)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_metrics_say_what_rounding_loses() -> None:
    model, batch = case(6)
    apply_precision(model, FP4)
    statistics = run(model, batch, statistics=True)[0].statistics
    kinds = {"fp8_activation", "fp8_weight", "fp4_weight", "fp4_index"}
    rates = {f"precision/{kind}_{rate}" for kind in kinds for rate in ("saturation", "underflow")}
    assert {name for name in statistics if name.startswith("precision")} == rates | {"precision/scale_violations"}
    assert all(0 <= float(statistics[name]) < 0.5 for name in rates)
    assert statistics["precision/scale_violations"] == 0
    assert run(model, batch)[0].statistics == {} and not model.gauge.active
    # A row of one large number: beside it the others vanish, and its block's FP4 scales are too far apart for FP8.
    with torch.no_grad():
        model.layers[0].ffn.experts.w1[0, 0, 0] = 1e7
    far = run(model, batch, statistics=True)[0].statistics
    assert far["precision/fp4_weight_underflow"] > statistics["precision/fp4_weight_underflow"]
    assert far["precision/fp8_weight_underflow"] > statistics["precision/fp8_weight_underflow"]


def test_a_nan_still_reaches_the_gradient_norm() -> None:
    """Saturation must not hide what the trainer skips a step for."""
    for poison in (torch.nan, torch.inf):
        model, batch = case(7)
        apply_precision(model, FP4)
        with torch.no_grad():
            model.layers[0].ffn.shared_experts.w1.weight[0, 0] = poison
        losses, found = run(model, batch)
        assert not losses.main.isfinite() or not all(bool(g.isfinite().all()) for g in found.values())


# Runs.


def test_a_run_changes_precision_by_stage_and_resumes_bit_for_bit(small_data: Path, tmp_path: Path) -> None:
    overrides = ("precision=fp8", "precision.streams=fp32", "stages.1.compute=fp4_qat", "checkpoint.every=3")
    whole = train(tiny_config(small_data, tmp_path / "whole", *overrides))
    for steps_done in (3, 6, 8):  # in the first stage, at the border's far side, at the end
        cut = train(tiny_config(small_data, tmp_path / "cut", *overrides, f"steps={steps_done}"))
    assert rows(cut) == rows(whole)
    saved = [
        contents(run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()) for run in (whole, cut)
    ]
    tensors = [{name: data for name, data in files.items() if name.endswith(".safetensors")} for files in saved]
    assert len(tensors[0]) >= 2 and tensors[0] == tensors[1]
    found = rows(whole)
    assert "precision/fp4_weight_underflow" not in found[0] and "precision/fp4_weight_underflow" in found[-1]
    events = (whole / "events.jsonl").read_text()
    assert "products in fp8 on fp32 streams: emulated exactly (no CUDA device)" in events
    assert "products in fp4_qat on fp32 streams" in events


@pytest.mark.parametrize("precision", ["fp8", "fp4_qat"])
def test_bf16_streams(precision: str, small_data: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("bf16", precision):
        found = rows(train(tiny_config(small_data, tmp_path / name, f"precision={name}", "precision.kv=fp8")))
        losses[name] = found[-1]["train/loss"]
    assert losses[precision] != losses["bf16"] and abs(losses[precision] / losses["bf16"] - 1) < 0.02


def test_bad_settings_get_one_line(small_data: Path, tmp_path: Path) -> None:
    for setting, message in (
        ("precision.compute=fp4", "precision.compute"),
        ("stages.0.compute=int8", "stages.0.compute='int8'; choose from fp32, bf16, fp8, fp4_qat"),
        ("model.index_head_dim=24", "model.index_head_dim=24 must be a power of two"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            tiny_config(small_data, tmp_path / "run", "precision=fp4_qat", setting)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=re.escape("precision.compute=fp8: the frozen weights of lora")):
        load_config(["run=lora", "model=nano", "model.pretrained=x", "data.path=y", "precision.compute=fp8"])


def test_the_table_in_the_documentation_is_the_codes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
    table = re.search(r"<!-- precision_table -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert table is not None
    flash = load_config(["model=v4_flash"]).model
    lines = ["| matrices | `fp8` | `fp4_qat` | released as |", "|---|---|---|---|"]
    lines += [f"| `{'`, `'.join(names.split(', '))}` | {' | '.join(rest)} |" for names, *rest in precision_table(flash)]
    assert table[1].strip() == "\n".join(lines), "should be:\n" + "\n".join(lines)
