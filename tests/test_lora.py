"""Adapters against matrices that they are folded into, their files, and what training may and may not change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import EVERYTHING, randomise, tokens_for, with_hca
from model_cases import SWA, random_config, random_model, relative_rms
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from openv4.kernels.quantize import dequantize, quantize_fp8
from openv4.model import ModelConfig, Transformer
from openv4.model.config import LoRAConfig, Recompute, WeightsError
from openv4.model.layers import Linear
from openv4.model.lora import (
    add_lora,
    fill_adapter,
    load_adapter,
    lora_parameters,
    merge_lora,
    read_adapter,
    save_adapter,
)
from openv4.model.loss import Counts, training_losses

pytestmark = pytest.mark.usefixtures("one_thread")

# The adapters of a CSA layer, by the end of their name, and of which target they are part.
CSA_LAYER = {
    "attn.wq_a": "wq_a",
    "attn.wq_b": "wq_b",
    "attn.wkv": "wkv",
    "attn.wo_a": "wo_a",
    "attn.wo_b": "wo_b",
    "ffn.shared_experts.w1": "shared_experts",
    "ffn.shared_experts.w2": "shared_experts",
    "ffn.shared_experts.w3": "shared_experts",
    "ffn.experts.gate_up": "experts",
    "ffn.experts.down": "experts",
    "attn.compressor.wkv": "compressor",
    "attn.compressor.wgate": "compressor",
    "attn.indexer.wq_b": "indexer",
    "attn.indexer.weights_proj": "indexer",
    "attn.indexer.compressor.wkv": "indexer",
    "attn.indexer.compressor.wgate": "indexer",
}


def config_of(seed: int, **fixed: object) -> ModelConfig:
    return random_config(seed, **(with_hca(seed) | fixed))


def adapted(seed: int, lora: LoRAConfig, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Transformer]:
    """A model with adapters that act, float32 or float64, and the same without."""
    config = config_of(seed)
    model, base = random_model(config, seed).to(dtype), random_model(config, seed).to(dtype)
    add_lora(model, lora, seed)
    randomise(model, seed)
    return model.to(dtype) if dtype == torch.float64 else model, base


def dense(base: Transformer, factors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of ``base`` with products of A and B added, by plain matrix arithmetic; gradients reach A and B."""
    weights = dict(base.named_parameters())
    for name, a in factors.items():
        if not name.endswith(".A"):
            continue
        delta = torch.einsum("...or,...ri->...oi", factors[name[:-1] + "B"], a) * scale
        owner, _, leaf = name[:-2].partition(".lora")
        if leaf == ".gate_up":
            inner = delta.shape[1] // 2
            weights[f"{owner}.w1"] = weights[f"{owner}.w1"] + delta[:, :inner]
            weights[f"{owner}.w3"] = weights[f"{owner}.w3"] + delta[:, inner:]
        elif leaf == ".down":
            weights[f"{owner}.w2"] = weights[f"{owner}.w2"] + delta
        else:
            weights[f"{owner}.weight"] = weights[f"{owner}.weight"] + delta
    return weights


def losses_of(model: Transformer, weights: dict[str, Tensor] | None, tokens: Tensor) -> Tensor:
    """The total loss of a training call, the indexer's included."""
    segments = torch.zeros_like(tokens)
    segments[0, 17:] = 1

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            losses = training_losses(self.model, tokens, segments, "sparse", indexer=True)
            total: Tensor = losses.total(Counts.of([segments]), 0.3, 0.1, 0.7)
            return total

    if weights is None:
        total: Tensor = Call()()
        return total
    result: Tensor = functional_call(Call(), {f"model.{name}": tensor for name, tensor in weights.items()})
    return result


@pytest.mark.parametrize("targets", [("attention", "shared_experts"), *((part,) for part in EVERYTHING), EVERYTHING])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_dense_deltas(seed: int, targets: tuple[str, ...]) -> None:
    """Losses and the gradients of every A and B, float64; the MTP block reads the same streams without adapters."""
    lora = LoRAConfig(rank=3 + seed, alpha=5.0, targets=targets)
    model, base = adapted(seed, lora, torch.float64)
    tokens = tokens_for(model.config, seed)
    ours = losses_of(model, None, tokens)
    ours.backward()
    factors = {name: p.detach().clone().requires_grad_() for name, p in lora_parameters(model).items()}
    theirs = losses_of(base, dense(base, factors, 5.0 / (3 + seed)), tokens)
    expected = torch.autograd.grad(theirs, list(factors.values()))
    assert relative_rms(ours, theirs) < 1e-11
    assert not torch.equal(theirs, losses_of(base, None, tokens))
    for (name, parameter), gradient in zip(lora_parameters(model).items(), expected, strict=True):
        assert parameter.grad is not None, name
        assert gradient.any(), name
        assert relative_rms(parameter.grad, gradient) < 1e-8, name
    with torch.no_grad():
        logits = functional_call(base, dense(base, factors, 5.0 / (3 + seed)), tokens)
        assert relative_rms(model(tokens), logits) < 1e-12


@pytest.mark.parametrize("targets", [LoRAConfig().targets, EVERYTHING])
@pytest.mark.parametrize("seed", range(5))
def test_fresh_adapters_change_no_bit(seed: int, targets: tuple[str, ...]) -> None:
    config = random_config(seed)
    model, base = random_model(config, seed), random_model(config, seed)
    tokens = tokens_for(config, seed)
    add_lora(model, LoRAConfig(rank=5, targets=targets), seed)
    assert torch.equal(model(tokens), base(tokens))
    assert torch.equal(losses_of(model, None, tokens), losses_of(base, None, tokens))


@pytest.mark.parametrize("targets", [(part,) for part in sorted(set(CSA_LAYER.values()))] + [("attention", "wq_a")])
def test_names_and_shapes(targets: tuple[str, ...]) -> None:
    """A CSA, an HCA and a window layer; an MTP block, which gets none."""
    config = config_of(3)
    model = random_model(config, 3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    add_lora(model, LoRAConfig(rank=3, targets=targets))
    parts = set(targets) | ({"wq_a", "wq_b", "wkv", "wo_a", "wo_b"} if "attention" in targets else set())
    expected: dict[str, tuple[int, ...]] = {}
    for layer, absent in enumerate(["nothing", ".indexer.", ".compressor"]):
        for name, part in CSA_LAYER.items():
            if part not in parts or absent in name or (layer == 2 and ".indexer." in name):
                continue
            full = f"layers.{layer}.{name}"
            owner, _, leaf = full.rpartition(".")
            if part != "experts":
                outputs, inputs = shapes[f"{full}.weight"]
                lora, stack = f"{full}.lora", ()
            else:
                stack = (config.n_routed_experts,)
                outputs, inputs = shapes[f"{owner}.{'w1' if leaf == 'gate_up' else 'w2'}"][1:]
                outputs *= 2 if leaf == "gate_up" else 1
                lora = f"{owner}.lora.{leaf}"
            expected |= {f"{lora}.A": (*stack, 3, inputs), f"{lora}.B": (*stack, outputs, 3)}
    assert {name: tuple(p.shape) for name, p in lora_parameters(model).items()} == expected
    assert expected
    assert not any(name.startswith("mtp") for name in expected)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in expected), name


def test_initial_values() -> None:
    """A is uniform, by its name and the seed alone; B is zero; the model's own weights stay."""
    config = config_of(4, hidden_size=48)
    model, other, third = (random_model(config, 4) for _ in range(3))
    add_lora(model, LoRAConfig(rank=16, targets=EVERYTHING), 7)
    add_lora(other, LoRAConfig(rank=16, targets=("wq_a", "experts")), 7)
    add_lora(third, LoRAConfig(rank=16, targets=("wq_a", "experts")), 8)
    drawn = lora_parameters(model)
    for name, parameter in lora_parameters(other).items():
        assert torch.equal(parameter, drawn[name])
        assert name.endswith(".B") or not torch.equal(parameter, lora_parameters(third)[name])
    for name, parameter in drawn.items():
        assert parameter.dtype == torch.float32
        if name.endswith(".B"):
            assert not parameter.any()
        else:
            bound = parameter.shape[-1] ** -0.5
            assert parameter.abs().max() <= bound
            # Of n uniform numbers the mean square is bound^2 / 3 within some 0.9 / sqrt(n) of it.
            spread = float(parameter.detach().square().mean()) / (bound**2 / 3) - 1
            assert abs(spread) < 5 * 0.9 * parameter.numel() ** -0.5, name
    assert not torch.equal(drawn["layers.0.attn.wq_a.lora.A"], drawn["layers.1.attn.wq_a.lora.A"])
    untouched = random_model(config, 4).state_dict()
    assert all(torch.equal(t, untouched[name]) for name, t in model.state_dict().items() if ".lora." not in name)


def test_only_adapters_learn() -> None:
    model, _ = adapted(1, LoRAConfig(rank=2, targets=EVERYTHING))
    tokens = tokens_for(model.config, 1)
    losses_of(model, None, tokens).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora." in name), name
    model.zero_grad()
    model(tokens).square().sum().backward()  # the language model's loss leaves the indexer alone
    for name, parameter in lora_parameters(model).items():
        assert (parameter.grad is None) == (".indexer." in name), name


def test_bfloat16_streams_and_weights() -> None:
    """Adapters stay float32 and compute in the dtype of their input."""
    config = config_of(2)
    exact = random_model(config, 2)
    for dtype, compute in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        model = Transformer(config, compute_dtype=compute)
        model.load_state_dict(exact.state_dict())
        model.to(dtype)
        add_lora(model, LoRAConfig(rank=4, targets=EVERYTHING), 0)
        randomise(model)
        assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
        tokens = tokens_for(config, 2)
        losses_of(model, None, tokens).backward()
        assert {p.grad.dtype for p in lora_parameters(model).values() if p.grad is not None} == {torch.float32}
        linear = model.get_submodule("layers.0.attn.wq_a")
        x = torch.randn(2, 3, config.hidden_size).bfloat16()
        assert linear(x).dtype == torch.bfloat16
        weight = linear.get_parameter("weight").double() + 2.0 * 4.0 * (
            linear.get_parameter("lora.B").double() @ linear.get_parameter("lora.A").double()
        )
        assert relative_rms(linear(x), x.double() @ weight.T) < 4 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging(dtype: torch.dtype) -> None:
    """One rounding to the matrix's dtype; names, shapes and trainability are those of a model without adapters."""
    lora = LoRAConfig(rank=3, alpha=2.0, targets=EVERYTHING)
    model, base = adapted(3, lora, dtype)
    tokens = tokens_for(model.config, 3)
    unmerged = model(tokens)
    factors = {name: p.detach().double() for name, p in lora_parameters(model).items()}
    expected = dense(base.double(), factors, 2.0 / 3)
    merge_lora(model)
    state = model.state_dict()
    assert list(state) == list(base.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    changed = set()
    for name, weight in expected.items():
        assert state[name].dtype == dtype
        # One rounding, and before it those of sums over three products.
        assert relative_rms(state[name], weight) < torch.finfo(dtype).eps, name
        if not torch.equal(weight, base.state_dict()[name]):
            changed.add(name)
    assert len(changed) == len(factors) // 2 + sum(name.endswith("gate_up.A") for name in factors)  # w1 and w3
    if dtype == torch.float32:
        assert relative_rms(model(tokens), unmerged) < 1e-5
    add_lora(model, lora)  # and again


def test_a_quantised_base() -> None:
    """Adapters are shaped by the layer, not by its codes, and add to its product; there is no matrix to fold into."""
    model, base = random_model(config_of(1), 1), random_model(config_of(1), 1)
    for name in ("layers.0.attn.wq_a", "layers.1.attn.wo_a", "layers.2.ffn.shared_experts.w2"):
        linear, twin = model.get_submodule(name), base.get_submodule(name)
        assert isinstance(linear, Linear)
        assert isinstance(twin, Linear)
        codes, scale = quantize_fp8(linear.weight.detach())
        twin.weight.data = dequantize(codes, scale, torch.float32)
        linear.hold_quantized(codes, scale)
    for each in (model, base):
        add_lora(each, LoRAConfig(rank=3), 1)
        randomise(each, 1)
    tokens = tokens_for(model.config, 1)
    assert relative_rms(model(tokens), base(tokens)) < 1e-5
    losses_of(model, None, tokens).backward()
    losses_of(base, None, tokens).backward()
    for name, parameter in lora_parameters(model).items():
        other = lora_parameters(base)[name]
        assert parameter.grad is not None
        assert other.grad is not None
        assert relative_rms(parameter.grad, other.grad) < 1e-3, name
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wq_a\.weight is held quantised; fold its adapter with"):
        merge_lora(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("targets", [("wq_a", "wq_b", "wkv", "wo_b", "shared_experts", "compressor", "indexer")])
def test_a_replay_drops_the_same(recompute: Recompute, targets: tuple[str, ...]) -> None:
    """Bit for bit, and the generator stands where it stands without recomputation."""
    results = []
    for mode in ("none", recompute):
        model, _ = adapted(0, LoRAConfig(rank=3, dropout=0.4, targets=targets))
        model.recompute = mode
        torch.manual_seed(5)
        loss = losses_of(model, None, tokens_for(model.config, 0))
        loss.backward()
        results.append([loss, torch.rand(3), *(p.grad for p in lora_parameters(model).values())])
    assert all(t is not None and torch.equal(t, other) for t, other in zip(*results, strict=True))


def test_dropout() -> None:
    """Of the adapter's input alone, in training alone, right on average."""
    model, base = adapted(1, LoRAConfig(rank=3, alpha=6.0, dropout=0.25, targets=("wq_a",)))
    tokens = tokens_for(model.config, 1)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    layer = model.get_submodule("layers.0.attn.wq_a")
    x = torch.randn(1, 20000, model.config.hidden_size)[:, :1].expand(-1, 20000, -1)
    exact = layer(x)
    assert torch.equal(exact[0, 0], exact[0, 1])
    model.train()
    noisy = layer(x)
    plain = base.get_submodule("layers.0.attn.wq_a")(x)
    variance = (noisy - plain)[0].var(0)
    assert (variance > 0).all()
    error = (noisy - exact)[0].mean(0).abs()
    assert (error < 5 * (variance / 20000).sqrt()).all()
    # Var of sum_i m_i x_i w_i with m = 0 or 1 / (1 - p): p / (1 - p) sum_i (x_i w_i)^2.
    row = (layer.get_parameter("lora.B") @ layer.get_parameter("lora.A") * 2.0)[0]
    expected = 0.25 / 0.75 * float((row * x[0, 0]).detach().square().sum())
    assert float(variance[0]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "lora.rank = 0: choose a whole number"),
        ({"rank": 2.5}, "lora.rank = 2.5"),
        ({"alpha": 0.0}, "lora.alpha = 0.0: choose a positive number"),
        ({"alpha": float("nan")}, "lora.alpha = nan"),
        ({"dropout": 1.0}, "lora.dropout = 1.0: choose a number in"),
        ({"targets": ()}, r"lora.targets = \[\]: choose from attention, wq_a"),
        ({"targets": ("attention", "q_proj")}, r"lora.targets = .*q_proj.*: choose from"),
        ({"dropout": 0.1}, "lora.dropout = 0.1: PEFT has no dropout for wo_a, .*set lora.dropout=0.0"),
        ({"dropout": 0.1, "targets": ("wo_a", "experts")}, "for wo_a and experts"),
    ],
)
def test_bad_settings_are_refused_in_a_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LoRAConfig(**values)
    assert "\n" not in str(error.value)


def test_what_a_model_lacks_is_refused_and_the_model_stays() -> None:
    config = random_config(0, layer_types=(SWA, SWA), compress_ratios=(0, 0, 0), num_hidden_layers=2, num_hash_layers=1)
    model = random_model(config, 0)
    with pytest.raises(ValueError, match=r"lora\.targets = .*no layer of this model has compressor or indexer"):
        add_lora(model, LoRAConfig(targets=("wq_a", "indexer", "compressor")))
    assert not lora_parameters(model)
    assert all(p.requires_grad for p in model.parameters())
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoRAConfig())


@pytest.mark.parametrize("targets", [("wkv",), ("experts",), EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapters_come_back(dtype: torch.dtype, targets: tuple[str, ...], tmp_path: Path) -> None:
    lora = LoRAConfig(rank=3, alpha=4.5, targets=targets)
    model, base = adapted(2, lora, dtype)
    save_adapter(model, lora, tmp_path / "adapter", "some/base")
    assert sorted(p.name for p in tmp_path.glob("adapter/*")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {t.dtype for t in load_file(tmp_path / "adapter/adapter_model.safetensors").values()} == {torch.float32}
    loaded = load_adapter(base, tmp_path / "adapter")
    assert (loaded.rank, loaded.alpha, loaded.dropout, loaded.parts) == (3, 4.5, 0.0, lora.parts)
    assert list(lora_parameters(base)) == list(lora_parameters(model))
    for name, parameter in lora_parameters(base).items():
        assert torch.equal(parameter, lora_parameters(model)[name])
        assert parameter.requires_grad
    assert not base.head.weight.requires_grad
    tokens = tokens_for(model.config, 2)
    assert torch.equal(base(tokens), model(tokens))
    save_adapter(base, loaded, tmp_path / "again", "some/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_adapters_that_are_in_place_are_filled(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=3, targets=("wkv", "experts"))
    model, _ = adapted(2, lora)
    save_adapter(model, lora, tmp_path / "adapter")
    for rank, targets in ((3, ("wkv",)), (4, ("wkv", "experts"))):
        other = random_model(config_of(2), 2)
        add_lora(other, LoRAConfig(rank=rank, targets=targets))
        with pytest.raises(WeightsError, match="other targets or ranks than the model's"):
            fill_adapter(other, tmp_path / "adapter")
    same = random_model(config_of(2), 2)
    add_lora(same, lora, 9)
    parameters = lora_parameters(same)
    fill_adapter(same, tmp_path / "adapter")
    for name, parameter in lora_parameters(model).items():
        assert lora_parameters(same)[name] is parameters[name]  # an optimizer holds it
        assert torch.equal(parameters[name], parameter)


def test_adapters_by_released_name(tmp_path: Path) -> None:
    """Without a model: every delta that merging adds, one matrix at a time."""
    lora = LoRAConfig(rank=3, alpha=2.0, targets=EVERYTHING)
    model, base = adapted(5, lora)
    save_adapter(model, lora, tmp_path / "adapter")
    adapters = read_adapter(tmp_path / "adapter", model.config)
    merge_lora(model)
    own, merged = base.state_dict(), model.state_dict()
    seen = set()
    for name, low in adapters.items():
        owner, stacked, rest = name.partition(".experts.")
        if stacked:
            expert, matrix, _ = rest.split(".")
            seen.add(f"{owner}.experts.{matrix}")
            before, after = (state[f"{owner}.experts.{matrix}"][int(expert)] for state in (own, merged))
        else:
            seen.add(name)
            before, after = own[name], merged[name]
        delta = low.delta()
        assert (delta.dtype, delta.shape) == (torch.float32, after.shape)
        assert delta.any(), name
        assert torch.equal(before + delta, after), name
    assert seen == {name for name in own if not torch.equal(own[name], merged[name])}
    experts = {name for name in adapters if ".ffn.experts." in name}
    assert len(experts) == 3 * 3 * model.config.n_routed_experts
    assert "layers.0.attn.wo_a.weight" in adapters


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=3, targets=("attention", "experts"))
    model, base = adapted(2, lora)
    folder = tmp_path / "adapter"
    save_adapter(model, lora, folder)
    prefix = "base_model.model.model.layers"

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{prefix}.0.self_attn.kv_proj.lora_A.weight"]
        tensors[f"{prefix}.0.lm_head.lora_A.weight"] = torch.zeros(3, 3)
        tensors[f"{prefix}.1.self_attn.o_a_proj.lora_B.weight"] = torch.zeros(2, 3)
        tensors[f"{prefix}.1.mlp.experts.lora_B.weight"] = tensors[f"{prefix}.1.mlp.experts.lora_B.weight"].to(
            torch.int8
        )

    rewrite(folder, change)
    with pytest.raises(WeightsError) as error:
        load_adapter(base, folder)
    message = str(error.value)
    assert "\n" not in message
    assert f"1 missing: {prefix}.0.self_attn.kv_proj.lora_A.weight" in message
    assert f"1 unexpected: {prefix}.0.lm_head.lora_A.weight" in message
    assert f"1 misshapen: {prefix}.1.self_attn.o_a_proj.lora_B.weight is (2, 3), not" in message
    assert f"1 of other types: {prefix}.1.mlp.experts.lora_B.weight is I8" in message
    assert not lora_parameters(base)
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(WeightsError, match="1 missing"):
        read_adapter(folder, base.config)
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors: damaged or unreadable"):
        load_adapter(base, folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "use_dora=True is no plain LoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"a_variant_of_tomorrow": {"r": 1}}, "a_variant_of_tomorrow="),
        ({"fan_in_fan_out": True, "use_qalora": True}, "fan_in_fan_out=True, use_qalora=True"),
        ({"peft_type": "IA3"}, "not the config of a LoRA adapter"),
        ({"r": 0}, "lora.rank = 0"),
        ({"r": None}, "lora.rank = None"),
        ({"lora_alpha": "x"}, "lora.alpha = 'x'"),
        ({"rank_pattern": {"kv_proj": -1}}, "lora.rank = -1"),
        ({"rank_pattern": {"(": 2}}, "unterminated subpattern"),
        ({"target_modules": "(", "target_parameters": None}, "unterminated subpattern"),
        ({"target_modules": [3]}, "str"),
        ({"target_modules": ["nothing"], "target_parameters": None}, "name nothing that openv4 adapts"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "gate_up_proj or down_proj of layers.0.ffn.experts alone"),
        ({"lora_dropout": 0.5}, "lora.dropout = 0.5: PEFT has no dropout"),
        ({"r": 4}, "misshapen"),
        ({"target_modules": ["self_attn.kv_proj", "lm_head"], "layers_to_transform": [1]}, "4 unexpected"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    lora = LoRAConfig(rank=3, targets=("wkv", "wo_a", "experts"))
    model, base = adapted(2, lora)
    folder = tmp_path / "adapter"
    save_adapter(model, lora, folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"] = ["self_attn.kv_proj"]
    file.write_text(json.dumps(settings | values))
    with pytest.raises(WeightsError, match=message) as error:
        load_adapter(base, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert not lora_parameters(base)


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    model = random_model(config_of(1), 1)
    with pytest.raises(WeightsError, match=r"adapter_config\.json: not readable"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(WeightsError, match="not the config of a LoRA adapter"):
        load_adapter(model, tmp_path)
    with pytest.raises(WeightsError, match="no adapters to save"):
        save_adapter(model, LoRAConfig(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    add_lora(model, LoRAConfig())
    with pytest.raises(WeightsError, match="already there and not empty"):
        save_adapter(model, LoRAConfig(), tmp_path)


def test_adapters_on_the_meta_device() -> None:
    """Shapes alone, for a model too large for this machine."""
    with torch.device("meta"):
        model = Transformer(config_of(1))
    add_lora(model, LoRAConfig(rank=4, targets=EVERYTHING))
    assert {p.device.type for p in lora_parameters(model).values()} == {"meta"}


def test_a_step_trains_adapters_from_their_start() -> None:
    """B is zero, so the first step moves B and leaves A; the loss falls over a few."""
    config = config_of(0)
    model = random_model(config, 0)
    add_lora(model, LoRAConfig(rank=4, targets=EVERYTHING))
    tokens = tokens_for(config, 0)
    loss = losses_of(model, None, tokens)
    loss.backward()
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith(".B"), name
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.003)
    for _ in range(5):
        optimizer.zero_grad()
        losses_of(model, None, tokens).backward()
        optimizer.step()
    assert losses_of(model, None, tokens) < loss - 0.05
