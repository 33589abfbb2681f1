"""Our side of Transformer Engine: paddings, splits, caching and places of gradients, with a double in its place.

The double multiplies as the package is documented to (block-scaled FP8, gradients added to ``main_grad`` in float32),
on a CPU and from our own rounding; so results must equal the emulation's. Whether the real one does, only a Hopper GPU
with the package can show.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_cases import random_config, random_model, relative_rms
from torch import Tensor, nn

import openv4.train.precision as precision_module
import openv4.train.transformer_engine as engine_module
from openv4.kernels.fp8 import round_columns, round_rows, round_weight
from openv4.model.loss import Counts, training_losses
from openv4.train.config import PrecisionConfig
from openv4.train.precision import apply_precision, describe_precision
from openv4.train.transformer_engine import BlockScaling, _grouped, why_not


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        assert x.dtype == weight.dtype == torch.bfloat16 and not len(x) % 16, "what the package asks for"
        rounded = round_weight(weight, x.dtype)
        assert torch.equal(rounded, weight), "rounding a rounded weight changes nothing"
        ctx.save_for_backward(x, rounded)
        ctx.weight = weight
        return round_rows(x) @ rounded.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x, rounded = ctx.saved_tensors
        if ctx.weight.requires_grad and len(x):
            ctx.weight.main_grad += round_columns(gradient).float().T @ round_columns(x).float()
        return round_rows(gradient) @ rounded, None


class _Double(nn.Module):
    """Linear and GroupedLinear; remembers whether it was told of new weights."""

    def __init__(self, *sizes: int, bias: bool, params_dtype: torch.dtype, device: str, fuse_wgrad_accumulation: bool):
        super().__init__()
        assert not bias and params_dtype == torch.bfloat16 and fuse_wgrad_accumulation
        self.count = sizes[0] if len(sizes) == 3 else 1
        self.news: list[bool] = []

    def forward(self, x: Tensor, splits: list[int] | None = None, is_first_microbatch: bool = True) -> Tensor:
        assert _recipes, "called outside the autocast"
        self.news.append(is_first_microbatch)
        if splits is None:
            return _Product.apply(x, self.weight)
        parts = [_Product.apply(part, getattr(self, f"weight{i}")) for i, part in enumerate(x.split(splits))]
        return torch.cat(parts)


_recipes: list[object] = []


@contextlib.contextmanager
def _autocast(enabled: bool, recipe: object) -> Iterator[None]:
    _recipes.append(recipe)
    yield
    _recipes.pop()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    common, recipe = types.ModuleType("transformer_engine.common"), types.ModuleType("transformer_engine.common.recipe")
    pytorch.Linear = pytorch.GroupedLinear = _Double
    pytorch.autocast = _autocast
    pytorch.is_fp8_block_scaling_available = lambda return_reason: (True, "")
    recipe.Float8BlockScaling = object
    for module in (package, pytorch, common, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(precision_module, "why_not", lambda device, streams: None)


def test_a_model_computes_what_the_emulation_computes(double: None) -> None:
    """Losses and gradients in fp8 and fp4_qat, two micro-batches, over features of whole units and odd ones."""
    config = random_config(
        11, hidden_size=48, q_lora_rank=32, head_dim=16, qk_rope_head_dim=4, index_head_dim=8, o_lora_rank=12,
        moe_intermediate_size=16, layer_types=(), compress_ratios=(4, 0, 16, 0), num_hidden_layers=3,
        swiglu_limit=1.5, n_routed_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    tokens = torch.randint(0, config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    segments = torch.zeros_like(tokens)
    for compute in ("fp8", "fp4_qat"):
        results = []
        for accelerated in (False, True):
            model = random_model(config, 0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(precision_module, "why_not", lambda *_, a=accelerated: None if a else "no")
                apply_precision(model, PrecisionConfig(compute))
            for _ in range(2):
                losses = training_losses(model, tokens, segments, indexer=True)
                losses.total(Counts.of([segments]), 0.3, 0.1, 0.7).backward()
            results.append((losses.main.detach(), {n: p.grad for n, p in model.named_parameters()}))
            if accelerated:
                products = [m.rounded for m in model.modules() if isinstance(getattr(m, "rounded", None), BlockScaling)]
                experts = [m.engine for m in model.modules() if getattr(m, "engine", None)]
                assert len(products) > 10 and len(experts) == 4
                for product in [*products, *(p for e in experts for p in e.products)]:
                    assert product._module.news == [True, False]
        (wanted, expected), (found, gradients) = results
        assert relative_rms(found, wanted) < 2e-3  # bf16, and another order of sums
        assert gradients.keys() == expected.keys()
        together = [
            torch.cat([g.flatten() for g in grads.values() if g is not None]) for grads in (gradients, expected)
        ]
        assert relative_rms(*together) < 0.05


def test_rows_of_experts_come_in_whole_units() -> None:
    ids = torch.randint(0, 7, (29, 3), generator=torch.Generator().manual_seed(3))
    order, splits, place = _grouped(ids, 9)
    assert splits[7:] == [0, 0] and all(not size % 16 for size in splits)
    assert torch.equal(order[place.flatten()], torch.arange(87))
    expert = torch.arange(9).repeat_interleave(torch.tensor(splits))
    assert torch.equal(expert[place], ids)
    assert int((order == 87).sum()) == sum(splits) - 87


def test_the_message_says_what_runs_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    config = PrecisionConfig("fp8")
    assert describe_precision(config, None, cpu) == (
        "products in fp8 on bf16 streams: emulated exactly (no CUDA device)"
    )
    assert describe_precision(config, "bf16", cpu) == "products in bf16"
    assert "Transformer Engine needs bf16" in str(why_not(cuda, "fp32"))
    engine_module._unavailable.cache_clear()
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert why_not(cuda, "bf16") == "transformer-engine is not installed; pip install 'openv4[te]'"
    engine_module._unavailable.cache_clear()
