"""Unconstrained hyper-connections, composite gains, and the numbers of docs/results/mhc_gain.json."""

import json
import math
import runpy
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hyper_connection_cases import SHAPES, TOLERANCE, draw, run
from model_cases import random_config, random_model, relative_rms
from run_cases import rows, tiny_config
from torch import Tensor

from openv4.kernels.hyper_connection import composite_gains, mhc_pre, mixing_coefficients, sinkhorn
from openv4.model import ModelConfig, Transformer, load_pretrained, save_pretrained
from openv4.model.attention import AttentionTask
from openv4.model.config import ModelConfigError
from openv4.model.init import init_weights
from openv4.model.loss import training_losses
from openv4.model.tensor_files import WeightsError
from openv4.train.checkpoint import find_weights
from openv4.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
EPS, NORM_EPS = 1e-6, 1e-5


# Unconstrained coefficients.


def our_pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, mixing = mhc_pre(streams, fn, base, scale, 20, EPS, NORM_EPS, "none")
    return x, *mixing


def plain_pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 5 of arXiv 2512.24880, one coefficient after the other."""
    count = streams.shape[2]
    flat = streams.flatten(2)
    normed = flat / (flat.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()

    def coefficient(row: int, gate: int) -> Tensor:
        return scale[gate] * torch.tanh((normed * fn[row]).sum(-1)) + base[row]

    pre = [coefficient(s, 0) for s in range(count)]
    post = [coefficient(count + s, 1) for s in range(count)]
    residual = [[coefficient(2 * count + count * j + k, 2) for k in range(count)] for j in range(count)]
    x = torch.stack([weight.unsqueeze(-1) * streams[:, :, s] for s, weight in enumerate(pre)]).sum(0)
    return x, torch.stack(post, -1), torch.stack([torch.stack(row, -1) for row in residual], -2)


@pytest.mark.parametrize(("batch", "length"), SHAPES[:6])
@pytest.mark.parametrize(("streams", "hidden"), [(4, 6), (1, 8), (3, 7), (5, 33)])
def test_unconstrained_equals_the_plain_formula(batch: int, length: int, streams: int, hidden: int) -> None:
    """Outputs and all gradients."""
    arguments = draw("pre", batch, length, streams, hidden, seed=length)
    for dtype, tolerance in TOLERANCE.items():
        pairs = zip(run(our_pre, arguments, dtype), run(plain_pre, arguments, dtype), strict=True)
        for index, (a, b) in enumerate(pairs):
            assert a.shape == b.shape, index
            assert a.dtype == b.dtype, index
            assert relative_rms(a, b) < tolerance, (index, dtype)


def test_unconstrained_gradcheck() -> None:
    assert torch.autograd.gradcheck(our_pre, [x.requires_grad_() for x in draw("pre", 2, 2, streams=2, hidden=3)])


def test_unconstrained_coefficients_may_be_negative() -> None:
    streams, fn, base, scale = draw("pre", 2, 30)
    pre, mixing = mixing_coefficients(streams, fn, base, scale, 20, EPS, NORM_EPS, "none")
    x, post, residual = plain_pre(streams, fn, base, scale)
    assert relative_rms((pre.unsqueeze(-1) * streams).sum(2), x) < 1e-13
    for ours, plain in zip(mixing, (post, residual), strict=True):
        assert relative_rms(ours, plain) < 1e-13
        assert (ours < 0).any()


# Composite gains.


@pytest.mark.parametrize(("sites", "tokens", "streams"), [(1, 1, 1), (1, 5, 4), (2, 3, 2), (7, 4, 3), (86, 2, 4)])
def test_composite_gains_are_row_and_column_sums_of_products(sites: int, tokens: int, streams: int) -> None:
    """Against numpy's products in the papers' convention: H leads from its column to its row."""
    rng = np.random.default_rng(sites)
    matrices = rng.normal(size=(sites, tokens, streams, streams)) / math.sqrt(streams)
    gains = composite_gains([torch.from_numpy(m) for m in matrices])
    assert gains.forward.shape == gains.backward.shape == (sites, tokens)
    for token in range(tokens):
        mappings = [m[token].T for m in matrices]
        ups = list(accumulate(mappings, lambda product, mapping: mapping @ product))
        downs = list(accumulate(reversed(mappings), lambda product, mapping: product @ mapping))[::-1]
        for gain, products, axis in ((gains.forward, ups, 1), (gains.backward, downs, 0)):
            expected = [max(abs(product.sum(axis))) for product in products]
            # A row's sum may be a small difference of large terms, whose magnitudes bound its rounding.
            bounds = [1e-13 * sites * np.linalg.norm(product) for product in products]
            assert (abs(gain[:, token].numpy() - expected) <= bounds).all()


def test_composite_gain_of_one_known_path() -> None:
    """Stream 0 doubles into stream 1, which then counts three times into stream 0; stream 1 is lost, sign and all."""
    first = torch.tensor([[0.0, 2.0], [0.0, -0.5]])  # from (first) to (second)
    second = torch.tensor([[0.0, 0.0], [-3.0, 0.0]])
    gains = composite_gains([first, second])
    assert gains.forward.tolist() == [1.5, 4.5]
    assert gains.backward.tolist() == [6.0, 3.0]


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("kind", ["normal", "uniform", "signs"])
def test_mhc_never_amplifies_forward(size: float, kind: str) -> None:
    """Sinkhorn's last step normalises what flows into each stream: whatever the logits, forward gains are at most one
    and backward gains at most S, as those of every product of matrices whose incoming weights sum to one."""
    generator = torch.Generator().manual_seed(int(size))
    logits = torch.randn(122, 16, 4, 4, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        logits = 2 * torch.rand(logits.shape, generator=generator, dtype=torch.float64) - 1
    elif kind == "signs":
        logits = logits.sign()
    for dtype, rounding in ((torch.float64, 1e-13), (torch.float32, 122 * 2**-22)):
        matrices = sinkhorn((size * logits).to(dtype), 20, EPS)
        gains = composite_gains(list(matrices))
        single = composite_gains([matrices])
        assert (single.forward <= 1 + rounding).all()
        assert (gains.forward <= 1 + rounding).all()
        assert (gains.backward <= 4 * (1 + rounding)).all()


# Models.


def free_config(seed: int, **fixed: object) -> ModelConfig:
    return random_config(seed, hc_constraint="none", **fixed)


def test_a_fresh_model_is_a_plain_residual_network() -> None:
    """Every stream holds embedding + sum of the layers' outputs, each layer having read that very sum."""
    config = free_config(3, num_hidden_layers=3, compress_ratios=(0, 4, 0, 0), layer_types=(), hc_mult=4)
    model = Transformer(config).double()
    init_weights(model)
    tokens = torch.arange(20)[None] % config.vocab_size
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    for block in model.layers:
        for norm, layer in ((block.attn_norm, block.attn), (block.ffn_norm, block.ffn)):
            norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr, arg-type]
            layer.register_forward_hook(lambda _, args, out: outputs.append(out[0]))  # type: ignore[union-attr, arg-type]
    result = model.run(tokens, mtp=False)
    total = model.embed(tokens)
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(x, total, rtol=1e-12, atol=1e-12)
        total = total + output
    for stream in range(4):
        torch.testing.assert_close(result.streams[:, :, stream], total, rtol=1e-12, atol=1e-12)
    for report in result.reports.values():
        for residual in report.residuals:
            assert torch.equal(residual, torch.eye(4, dtype=residual.dtype).expand_as(residual))


def test_sites_read_the_streams_in_turn() -> None:
    model = Transformer(free_config(5, num_hidden_layers=3, compress_ratios=(0, 4, 0, 0), layer_types=(), hc_mult=4))
    init_weights(model)
    read = [
        int(model.get_parameter(f"{block}.hc_{site}_base")[:4].argmax())
        for block in ("layers.0", "layers.1", "layers.2", "mtp.0")
        for site in ("attn", "ffn")
    ]
    assert read == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("constraint", ["sinkhorn", "none"])
def test_streams_persist_across_blocks(constraint: str) -> None:
    """A block gets each stream as the one before left it. Averaging and copying them in between, which would make a
    plain residual network of either kind, changes the outcome."""
    model = random_model(random_config(2, hc_constraint=constraint, num_hidden_layers=3, hc_mult=4,
                                       compress_ratios=(0, 4, 0, 0), layer_types=()), 2)  # fmt: skip
    tokens = torch.arange(24)[None] % model.config.vocab_size
    left: list[Tensor] = []
    met: list[Tensor] = []
    handles = []
    for block in model.layers:
        handles.append(block.register_forward_pre_hook(lambda _, args: met.append(args[0])))
        handles.append(block.register_forward_hook(lambda _, args, out: left.append(out[0])))
    output = model.run(tokens, mtp=False)
    for before, after in zip(left, [*met[1:], output.streams], strict=True):
        assert torch.equal(before, after)
        apart = before - before.mean(2, keepdim=True)
        assert apart.norm() > 0.1 * before.norm()
    for handle in handles:
        handle.remove()
    for block in model.layers[1:]:
        block.register_forward_pre_hook(lambda _, args: (args[0].mean(2, keepdim=True).expand_as(args[0]), *args[1:]))
    assert relative_rms(model.run(tokens, mtp=False).streams, output.streams) > 0.1


def test_statistics_are_the_gains_of_all_sites() -> None:
    """Of the main model's sites, attention before MoE, over tokens that are not padding; also with negative entries."""
    model = random_model(free_config(4, hc_mult=4, num_hidden_layers=2, compress_ratios=(0, 4, 0), layer_types=()), 4)
    tokens = torch.arange(40).reshape(2, 20) % model.config.vocab_size
    segments = torch.zeros_like(tokens)
    segments[1, -7:] = -1
    found = training_losses(model, tokens, segments, statistics=True).statistics
    reports = model.run(tokens, segments, task=AttentionTask(), mtp=False).reports
    forward, backward = [], []
    for row, token in torch.nonzero(segments >= 0).tolist():
        product = np.eye(4)
        for layer in range(2):
            for site in reports[f"layers.{layer}"].residuals:
                product = site[row, token].double().numpy().T @ product
        forward.append(max(abs(product.sum(1))))
        backward.append(max(abs(product.sum(0))))
    assert found["mhc/forward_gain"].item() == pytest.approx(np.mean(forward), rel=1e-4)
    assert found["mhc/backward_gain"].item() == pytest.approx(np.mean(backward), rel=1e-4)


def test_an_unconstrained_model_trains_and_resumes(small_data: Path, tmp_path: Path) -> None:
    """Eight steps at once, and with a break after the fourth: the same rows and weights; the loss falls, the mixing
    moves, and the checkpoint reads back as what it is."""
    straight = train(tiny_config(small_data, tmp_path / "straight", "model.hc_constraint=none"))
    train(tiny_config(small_data, tmp_path / "broken", "model.hc_constraint=none", "steps=4"))
    broken = train(tiny_config(small_data, tmp_path / "broken", "model.hc_constraint=none"))
    assert rows(straight) == rows(broken)
    losses = [row["train/loss"] for row in rows(straight)]
    assert losses[-1] < losses[0] - 0.2
    models = [load_pretrained(find_weights(folder), torch.float32) for folder in (straight, broken)]
    assert models[0].config.hc_constraint == "none"
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert models[0].get_parameter("layers.0.hc_ffn_fn").abs().sum() > 0
    assert rows(straight)[0]["mhc/forward_gain"] == 1
    assert rows(straight)[-1]["mhc/forward_gain"] != 1


def test_no_export_of_an_unconstrained_model(openv4: Any, small_data: Path, tmp_path: Path) -> None:
    import transformers

    model = random_model(free_config(1), 1)
    with pytest.raises(WeightsError, match=r"^model\.hc_constraint=none: .* hc_constraint=sinkhorn to export[^\n]*$"):
        save_pretrained(model, tmp_path / "export", "fp32")
    assert not (tmp_path / "export").exists()
    folder = train(tiny_config(small_data, tmp_path / "run", "model.hc_constraint=none", "steps=1"))
    result = openv4("export", f"checkpoint={folder}", f"output={tmp_path / 'export'}")
    assert result.code != 0
    assert "model.hc_constraint=none" in result.err
    assert not (tmp_path / "export").exists()
    # Its checkpoint is nothing that transformers would take for DeepSeek-V4, and compute mHC with.
    with pytest.raises(ValueError, match="openv4_unconstrained"):
        transformers.AutoConfig.from_pretrained(find_weights(folder))


def test_the_config_says_which_it_is() -> None:
    plain, free = random_config(6), free_config(6)
    assert "hc_constraint" not in plain.to_json()
    assert ModelConfig.from_dict(plain.to_json()).hc_constraint == "sinkhorn"
    assert ModelConfig.from_dict(free.to_json()).hc_constraint == "none"
    with pytest.raises(ModelConfigError, match="hc_constraint=birkhoff must be sinkhorn or none"):
        random_config(6, hc_constraint="birkhoff")
    with pytest.raises(ModelConfigError, match="hc_init=identity is for hc_constraint=sinkhorn"):
        free_config(6, hc_init="identity")
    with pytest.raises(ModelConfigError, match="model_type"):
        ModelConfig.from_dict(free.to_json() | {"hc_constraint": "sinkhorn"})


# The figure's numbers.


def approximately(found: Any, expected: Any) -> bool:
    """Equal but for rounding, leaf by leaf."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(approximately(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(approximately, found, expected))
    return bool(found == pytest.approx(expected, rel=1e-6, abs=1e-9))


def test_published_numbers_of_random_matrices() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "mhc_gain.py"))
    published = json.loads((ROOT / "docs" / "results" / "mhc_gain.json").read_text())
    assert approximately(script["random_part"](), published["random"])
    assert (ROOT / "docs" / "results" / "mhc_gain.md").read_text() == script["table"](published)
    for trained in published["trained"]:
        assert len(trained["forward"]) == len(trained["backward"]) == 2 * script["LAYERS"]
        if trained["arm"] != "HC":
            assert max(trained["forward"]) <= 1 + 1e-4
            assert max(trained["backward"]) <= 4 + 1e-4
