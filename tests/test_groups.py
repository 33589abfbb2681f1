"""The sorting of released names, and the two optimizers as one: skipping, measuring, saving, clipping."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from openv4.optim.config import AdamWConfig, MuonConfig, OptimConfig
from openv4.optim.groups import ADAMW_GROUPS, MUON_GROUPS, Optimizers, build_optimizers, clip_by_global_norm
from openv4.optim.muon import Muon

D, F, E, C, V = 16, 8, 3, 4, 20  # hidden, expert width, experts, head dim, vocabulary
LAYER_RATIOS = {0: 0, 1: 4, 2: 128, 3: 4}  # window only, CSA, HCA, CSA; MTP is window only
Expected = dict[str, tuple[str, tuple[int, ...]]]


def compressor(prefix: str, group: str, rows: int, ratio: int, head: int) -> Expected:
    return {
        f"{prefix}.wkv.weight": (group, (rows, D)),
        f"{prefix}.wgate.weight": (group, (rows, D)),
        f"{prefix}.ape": ("compressor positions", (ratio, rows)),
        f"{prefix}.norm.weight": ("norms", (head,)),
    }


def block(prefix: str, ratio: int) -> Expected:
    result: Expected = {
        f"{prefix}.attn_norm.weight": ("norms", (D,)),
        f"{prefix}.ffn_norm.weight": ("norms", (D,)),
        f"{prefix}.attn.attn_sink": ("attention sinks", (2,)),
        f"{prefix}.attn.wq_a.weight": ("attention", (8, D)),
        f"{prefix}.attn.q_norm.weight": ("norms", (8,)),
        f"{prefix}.attn.wq_b.weight": ("attention", (2 * C, 8)),
        f"{prefix}.attn.wkv.weight": ("attention", (C, D)),
        f"{prefix}.attn.kv_norm.weight": ("norms", (C,)),
        f"{prefix}.attn.wo_a.weight": ("attention", (8, C)),
        f"{prefix}.attn.wo_b.weight": ("attention", (D, 8)),
        f"{prefix}.ffn.gate.weight": ("router", (E, D)),
        f"{prefix}.ffn.experts.w1": ("routed experts", (E, F, D)),
        f"{prefix}.ffn.experts.w2": ("routed experts", (E, D, F)),
        f"{prefix}.ffn.experts.w3": ("routed experts", (E, F, D)),
        f"{prefix}.ffn.shared_experts.w1.weight": ("shared expert", (F, D)),
        f"{prefix}.ffn.shared_experts.w2.weight": ("shared expert", (D, F)),
        f"{prefix}.ffn.shared_experts.w3.weight": ("shared expert", (F, D)),
    }
    for part in ("attn", "ffn"):
        result[f"{prefix}.hc_{part}_fn"] = ("mHC projections", (24, 4 * D))
        result[f"{prefix}.hc_{part}_base"] = ("mHC biases and gates", (24,))
        result[f"{prefix}.hc_{part}_scale"] = ("mHC biases and gates", (3,))
    if ratio:
        result |= compressor(f"{prefix}.attn.compressor", "compressor", C * (2 if ratio == 4 else 1), ratio, C)
    if ratio == 4:
        result |= compressor(f"{prefix}.attn.indexer.compressor", "indexer", 2 * C, ratio, C)
        result[f"{prefix}.attn.indexer.wq_b.weight"] = ("indexer", (8, 8))
        result[f"{prefix}.attn.indexer.weights_proj.weight"] = ("indexer", (2, D))
    return result


def hyper_head(prefix: str) -> Expected:
    return {
        f"{prefix}hc_head_fn": ("mHC projections", (4, 4 * D)),
        f"{prefix}hc_head_base": ("mHC biases and gates", (4,)),
        f"{prefix}hc_head_scale": ("mHC biases and gates", (1,)),
    }


def released() -> Expected:
    """Every trained tensor of a four-layer model with MTP: name -> group, shape."""
    result: Expected = {
        "embed.weight": ("embedding and head", (V, D)),
        "head.weight": ("embedding and head", (V, D)),
        "norm.weight": ("norms", (D,)),
    } | hyper_head("")
    for layer, ratio in LAYER_RATIOS.items():
        result |= block(f"layers.{layer}", ratio)
    result |= block("mtp.0", 0) | hyper_head("mtp.0.")
    for name in ("e_proj", "h_proj"):
        result[f"mtp.0.{name}.weight"] = ("MTP projections", (D, D))
    for name in ("enorm", "hnorm", "norm"):
        result[f"mtp.0.{name}.weight"] = ("norms", (D,))
    return result


def row_splits() -> dict[str, tuple[int, ...]]:
    splits: dict[str, tuple[int, ...]] = {}
    for name, (_, shape) in released().items():
        if name.endswith(("hc_attn_fn", "hc_ffn_fn")):
            splits[name] = (4, 4, 16)
        elif name.endswith("wo_a.weight"):
            splits[name] = (4, 4)
        elif ".compressor.w" in name and shape[0] == 2 * C:
            splits[name] = (C, C)
    return splits


def model(seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, (_, shape) in released().items()}


def fill_gradients(parameters: dict[str, Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for name, parameter in parameters.items():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if "indexer" in name else gradient  # in a dense stage the indexer has no gradient


def train(optimizers: Optimizers, parameters: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        fill_gradients(parameters, step)
        optimizers.step(lr=0.01, found_inf=torch.zeros(()))
        optimizers.zero_grad()


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bitwise_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and torch.equal(a[name].signbit(), b[name].signbit()) for name in a
    )


@pytest.fixture(autouse=True)
def without_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_released_name_finds_its_group() -> None:
    optimizers = build_optimizers(model().items(), row_splits(), OptimConfig())
    found = {name: group for group, names in optimizers.groups.items() for name in names}
    assert found == {name: group for name, (group, _) in released().items()}
    absent = {"other vectors", "other matrices", "LoRA adapters"}
    assert set(optimizers.groups) == {*ADAMW_GROUPS, *MUON_GROUPS} - absent


def test_each_optimizer_owns_its_groups() -> None:
    parameters = model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    assert optimizers.muon is not None
    assert optimizers.adamw is not None
    muon = {name for group in optimizers.muon.param_groups for name in group["param_names"]}
    adamw = {name for group in optimizers.adamw.param_groups for name in group["param_names"]}
    assert muon == {name for name, (group, _) in released().items() if group in MUON_GROUPS}
    assert adamw == set(parameters) - muon
    assert {group["weight_decay"] for group in optimizers.adamw.param_groups} == {0.1}
    assert {group["eps"] for group in optimizers.adamw.param_groups} == {1e-20}


def test_unknown_names_are_sorted_by_their_dimensions() -> None:
    parameters = {"layers.0.ffn.gate.bias": Parameter(torch.ones(4)), "extra": Parameter(torch.ones(4, 4))}
    optimizers = build_optimizers(parameters.items(), {}, OptimConfig())
    assert optimizers.groups == {"other vectors": ["layers.0.ffn.gate.bias"], "other matrices": ["extra"]}


ADAPTERS = [
    "layers.0.attn.wq_a.lora.A",
    "layers.0.attn.wo_a.lora.B",
    "layers.1.attn.indexer.compressor.wkv.lora.A",
    "layers.1.attn.compressor.wgate.lora.B",
    "layers.1.ffn.shared_experts.w2.lora.A",
    "layers.1.ffn.experts.lora.gate_up.B",
]


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_adapters_are_a_group_of_adamw(decay_vectors: bool) -> None:
    """Decayed like the embedding, whatever becomes of vectors; what is frozen beside them has no optimizer."""
    frozen = {name: Parameter(parameter, requires_grad=False) for name, parameter in model().items()}
    adapters = {name: Parameter(torch.ones(3, 4)) for name in ADAPTERS}
    optimizers = build_optimizers((frozen | adapters).items(), row_splits(), OptimConfig(decay_vectors=decay_vectors))
    assert optimizers.groups == {"LoRA adapters": ADAPTERS}
    assert optimizers.muon is None
    for parameter in adapters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(lr=0.5, found_inf=torch.zeros(()))
    assert all(torch.equal(parameter, torch.full((3, 4), 0.95)) for parameter in adapters.values())
    (row,) = optimizers.table()
    assert (row.group, row.optimizer, row.tensors, row.parameters) == ("LoRA adapters", "AdamW", 6, 72)


def test_table() -> None:
    parameters = model()
    rows = {row.group: row for row in build_optimizers(parameters.items(), row_splits(), OptimConfig()).table()}
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in parameters.values())
    assert sum(row.tensors for row in rows.values()) == len(parameters)
    experts = rows["routed experts"]
    assert (experts.optimizer, experts.tensors, experts.matrices) == ("Muon", 15, 15 * E)
    assert experts.shapes == ((E, F, D), (E, D, F))
    assert rows["mHC projections"].matrices == 5 * 2 * 3 + 2
    assert rows["compressor"].matrices == 2 * (2 + 1 + 2)
    assert (rows["norms"].optimizer, rows["norms"].matrices) == ("AdamW", 0)


def test_step_equals_torch_adamw_and_muon() -> None:
    parameters, copies = model(), model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    train(optimizers, parameters, range(3))
    vectors = [p for name, p in copies.items() if released()[name][0] in ADAMW_GROUPS]
    adamw = torch.optim.AdamW(vectors, lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    splits = row_splits()
    matrices = [
        {"params": [p], "row_splits": splits.get(name, ())}
        for name, p in copies.items()
        if released()[name][0] in MUON_GROUPS
    ]
    muon = Muon(matrices, lr=0.01)
    for step in range(3):
        fill_gradients(copies, step)
        adamw.step()
        muon.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, copies[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_decay_of_vectors_is_a_choice(decay_vectors: bool) -> None:
    parameters = {"norm.weight": Parameter(torch.ones(4)), "embed.weight": Parameter(torch.ones(4, 4))}
    optimizers = build_optimizers(parameters.items(), {}, OptimConfig(decay_vectors=decay_vectors))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(lr=0.5, found_inf=torch.zeros(()))
    assert torch.equal(parameters["embed.weight"], torch.full((4, 4), 0.95))
    assert torch.equal(parameters["norm.weight"], torch.full((4,), 0.95 if decay_vectors else 1.0))


@pytest.mark.parametrize("found_inf", [1.0, 3.0])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_found_inf_changes_nothing(steps_before: int, found_inf: float) -> None:
    parameters = model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    train(optimizers, parameters, range(steps_before))
    weights, state = clones(dict(parameters)), clones(optimizers.state_tensors())
    fill_gradients(parameters, 50)
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.flatten()[0] = math.nan
    optimizers.step(lr=0.01, found_inf=torch.tensor(found_inf))
    assert bitwise_equal(clones(dict(parameters)), weights)
    if steps_before:
        assert bitwise_equal(optimizers.state_tensors(), state)
        assert optimizers.state_tensors()["step.embed.weight"] == steps_before
    else:
        assert not any(tensor.any() for tensor in optimizers.state_tensors().values())
    assert all(rms.isfinite() for rms in optimizers.update_rms().values())
    train(optimizers, parameters, range(steps_before, 4))
    twin = model()
    train(build_optimizers(twin.items(), row_splits(), OptimConfig()), twin, range(4))
    assert bitwise_equal(dict(parameters), dict(twin))


def test_update_rms() -> None:
    parameters = model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    assert optimizers.update_rms() == {}
    train(optimizers, parameters, range(2))
    before = clones(dict(parameters))
    fill_gradients(parameters, 2)
    optimizers.step(lr=0.01, found_inf=torch.zeros(()))
    rms = optimizers.update_rms()
    assert set(rms) == set(optimizers.groups) - {"indexer"}
    for group, value in rms.items():
        assert value.shape == ()
        names = [name for name in optimizers.groups[group] if "indexer" not in name]
        updates = [(before[name] * (1 - 0.001) - parameters[name]).flatten() / 0.01 for name in names]
        assert value.item() == pytest.approx(torch.cat(updates).square().mean().sqrt().item(), rel=1e-4)
        if group in MUON_GROUPS:
            assert value.item() == pytest.approx(0.18, rel=0.05)


def test_residuals_are_root_means_over_the_matrices_of_a_group() -> None:
    parameters = model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    assert optimizers.residuals() == {}
    fill_gradients(parameters, 0)
    for name, parameter in parameters.items():
        if ".experts." in name:
            assert parameter.grad is not None
            parameter.grad[0] = 0  # one expert of each stack has no token
    optimizers.step(lr=0.01, found_inf=torch.zeros(()))
    found = optimizers.residuals()
    assert set(found) == set(optimizers.groups) & set(MUON_GROUPS) - {"indexer"}
    for group, value in found.items():
        stacked = next(parameters[name] for name in optimizers.groups[group])
        wanted = (1 / len(stacked)) ** 0.5 if group == "routed experts" else 0.0
        assert value.item() == pytest.approx(wanted, abs=0.005)


def test_saved_state_continues_bitwise() -> None:
    parameters = model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    train(optimizers, parameters, range(3))
    state = clones(optimizers.state_tensors())
    assert "momentum.layers.1.attn.compressor.wkv.weight" in state
    assert "exp_avg.layers.1.attn.compressor.ape" in state
    assert state["step.norm.weight"].shape == ()
    assert not any("indexer" in name for name in state)
    restored = {name: Parameter(parameter.clone()) for name, parameter in parameters.items()}
    others = build_optimizers(restored.items(), row_splits(), OptimConfig())
    others.load_state_tensors(state)
    train(optimizers, parameters, range(3, 6))
    train(others, restored, range(3, 6))
    assert bitwise_equal(dict(parameters), dict(restored))
    assert bitwise_equal(optimizers.state_tensors(), others.state_tensors())
    # Loading copies, and takes away what the saved run did not have.
    others.load_state_tensors({})
    assert others.state_tensors() == {}
    assert state["step.norm.weight"] == 3


def test_state_that_does_not_fit_is_refused_whole() -> None:
    parameters = model()
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    train(optimizers, parameters, range(1))
    good = clones(optimizers.state_tensors())
    bad = dict(good)
    del bad["exp_avg_sq.norm.weight"]
    bad["momentum.nowhere"] = torch.zeros(2)
    bad["momentum.mtp.0.e_proj.weight"] = torch.zeros(2, 2)
    bad["exp_avg.embed.weight"] = bad["exp_avg.embed.weight"].bfloat16()
    with pytest.raises(ValueError, match="optimizer state does not fit") as error:
        optimizers.load_state_tensors(bad)
    message = str(error.value)
    assert "\n" not in message
    assert "missing exp_avg_sq.norm.weight" in message
    assert "unexpected momentum.nowhere" in message
    assert "momentum.mtp.0.e_proj.weight is float32[2, 2], not float32[16, 16]" in message
    assert "exp_avg.embed.weight is bfloat16[20, 16], not float32[20, 16]" in message
    assert bitwise_equal(optimizers.state_tensors(), good)


def test_frozen_parameters_are_left_out() -> None:
    parameters = model()
    for name, parameter in parameters.items():
        parameter.requires_grad_("wq_a" in name)
    optimizers = build_optimizers(parameters.items(), row_splits(), OptimConfig())
    assert list(optimizers.groups) == ["attention"]
    assert optimizers.adamw is None
    train(optimizers, {name: p for name, p in parameters.items() if p.requires_grad}, range(1))
    assert set(optimizers.update_rms()) == {"attention"}


def test_bad_row_splits_are_refused() -> None:
    parameters = model()
    with pytest.raises(ValueError, match=r"no parameter is named layers\.9\.hc_attn_fn"):
        build_optimizers(parameters.items(), {"layers.9.hc_attn_fn": (4, 4, 16)}, OptimConfig())
    with pytest.raises(ValueError, match=r"embed\.weight belongs to AdamW"):
        build_optimizers(parameters.items(), {"embed.weight": (10, 10)}, OptimConfig())
    with pytest.raises(ValueError, match=r"layers\.0\.hc_attn_fn has shape \(24, 64\), but row_splits \(4, 4\)"):
        build_optimizers(parameters.items(), {"layers.0.hc_attn_fn": (4, 4)}, OptimConfig())


def test_bad_constants_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.muon\.momentum = 1\.5 is outside \[0, 1\)"):
        MuonConfig(momentum=1.5)
    with pytest.raises(ValueError, match=r"optim\.muon\.update_rms = 0\.0"):
        MuonConfig(update_rms=0.0)
    with pytest.raises(ValueError, match=r"optim\.adamw\.eps = 1e-50"):
        AdamWConfig(eps=1e-50)
    with pytest.raises(ValueError, match=r"optim\.adamw\.beta2 = nan"):
        AdamWConfig(beta2=math.nan)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_equals_torch(max_norm: float) -> None:
    parameters, copies = model(), model()
    fill_gradients(parameters, 0)
    fill_gradients(copies, 0)
    norm, found_inf = clip_by_global_norm(parameters.values(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(copies.values(), max_norm)
    torch.testing.assert_close(norm, expected)
    assert found_inf == 0
    assert norm.shape == found_inf.shape == ()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, copies[name].grad)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_clip_reports_a_norm_that_is_not_finite(poison: float) -> None:
    parameters = [Parameter(torch.ones(4)), Parameter(torch.ones(4))]
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    parameters[1].grad[2] = poison  # type: ignore[index]
    norm, found_inf = clip_by_global_norm(parameters, 1.0)
    assert not norm.isfinite()
    assert found_inf == 1


def test_clip_without_gradients() -> None:
    norm, found_inf = clip_by_global_norm([Parameter(torch.ones(4))], 1.0)
    assert norm == 0
    assert found_inf == 0
