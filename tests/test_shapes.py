"""The list of a model's tensors that is made from its config alone, against models that are built."""

import subprocess
import sys

import pytest
import torch
from model_cases import random_config

from openv4.model import ModelConfig, Transformer
from openv4.model.config import LORA_TARGETS, LoRAConfig
from openv4.model.lora import adapter_shapes as built_adapter_shapes
from openv4.model.released import released_tensors
from openv4.model.shapes import PARTS, adapter_shapes, logical_rows, tensor_shapes
from openv4.optim.groups import group_of
from openv4.train.config import load_config

PRESETS = ("nano", "tiny", "small", "v4_flash", "v4_pro")


def preset(name: str) -> ModelConfig:
    return load_config([f"model={name}"]).model


def built(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def assert_same(config: ModelConfig) -> None:
    model = built(config)
    listed = {s.parameter: s for s in tensor_shapes(config)}
    state = model.state_dict()
    assert list(listed) == list(state)  # in this order, too
    assert {name: s.stacked for name, s in listed.items()} == {name: tuple(t.shape) for name, t in state.items()}
    assert {name for name, s in listed.items() if s.trained} == {name for name, _ in model.named_parameters()}
    assert all((s.stored == "int64") == (state[name].dtype == torch.int64) for name, s in listed.items())
    assert sum(s.numel for s in listed.values()) == sum(t.numel() for t in state.values())
    main = tensor_shapes(config, mtp=False)
    assert main == tuple(s for s in listed.values() if not s.in_mtp)


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_of_the_presets(name: str) -> None:
    assert_same(preset(name))


@pytest.mark.parametrize("seed", range(20))
def test_shapes_of_random_models(seed: int) -> None:
    assert_same(random_config(seed))


def test_shapes_without_an_mtp_block_and_with_more_hash_layers_than_layers() -> None:
    shape = {"num_hidden_layers": 2, "layer_types": (), "compress_ratios": (4, 8)}
    assert_same(random_config(3, num_nextn_predict_layers=0, **shape))
    assert_same(random_config(4, num_hash_layers=9, **shape))


@pytest.mark.parametrize("seed", range(6))
def test_released_names(seed: int) -> None:
    config = random_config(seed)
    listed = {name: s.shape for s in tensor_shapes(config) for name in s.names()}
    assert listed == {name: tuple(t.shape) for name, t in released_tensors(built(config))}


@pytest.mark.parametrize("seed", range(6))
def test_parts_agree_with_the_groups_of_the_optimizers(seed: int) -> None:
    """Two places that sort the same names: they may differ in how fine they are, not in what belongs where."""
    finer = {
        "embedding and head": {"embedding", "head"},
        "mHC biases and gates": {"mHC"},
        "mHC projections": {"mHC"},
        "attention sinks": {"attention"},
        "compressor positions": {"compressor", "indexer"},
    }
    shapes = tensor_shapes(random_config(seed))
    for s in shapes:
        if s.trained:
            group = group_of(s.parameter, len(s.stacked))
            assert s.part in finer.get(group, {group}), s
    assert {s.part for s in shapes} <= set(PARTS)


def test_where_a_tensor_belongs() -> None:
    shapes = {s.name: s for s in tensor_shapes(preset("nano"))}
    assert shapes["layers.1.attn.indexer.compressor.ape"].part == "indexer"
    assert shapes["layers.1.attn.indexer.compressor.norm.weight"].part == "norms"
    assert shapes["mtp.0.e_proj.weight"].part == "MTP projections"
    assert shapes["mtp.0.norm.weight"].block == "mtp.0" and shapes["norm.weight"].block == ""
    experts = shapes["layers.3.ffn.experts.*.w2.weight"]
    assert experts.block == "layers.3" and experts.parameter == "layers.3.ffn.experts.w2"
    assert (experts.shape, experts.copies, experts.stacked) == ((64, 32), 8, (8, 64, 32))
    assert list(experts.names())[7] == "layers.3.ffn.experts.7.w2.weight"
    assert list(shapes["layers.3.ffn.shared_experts.w2.weight"].names()) == ["layers.3.ffn.shared_experts.w2.weight"]


@pytest.mark.parametrize("targets", [(target,) for target in LORA_TARGETS] + [LORA_TARGETS])
def test_adapters_are_those_that_would_be_added(targets: tuple[str, ...]) -> None:
    lora = LoRAConfig(rank=3, targets=targets)
    for config in (preset("nano"), random_config(5)):
        expected = built_adapter_shapes(built(config), lora)
        listed = adapter_shapes(config, lora)
        assert {s.name: (s.copies, *s.shape) if ".experts." in s.name else s.shape for s in listed} == expected


def test_the_largest_model_is_few_entries_and_no_torch() -> None:
    """1.6T parameters in some thousand entries, in a process that has never imported torch."""
    config = preset("v4_pro")
    assert len(tensor_shapes(config)) < 3000
    code = (
        "import sys\nfrom openv4.model.config import ModelConfig\nfrom openv4.model.shapes import tensor_shapes\n"
        f"config = ModelConfig(**{ {k: v for k, v in vars(config).items() if k != 'rope_scaling'}!r})\n"
        "print(sum(s.numel for s in tensor_shapes(config) if s.trained), *({'torch', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1598837325086"]


@pytest.mark.parametrize("seed", range(4))
def test_logical_matrices_are_those_that_muon_is_told(seed: int) -> None:
    config = random_config(seed)
    with torch.device("meta"):
        splits = Transformer(config).row_splits()
    for s in tensor_shapes(config):
        if s.matrix:
            assert splits.get(s.parameter, s.shape[:1]) == logical_rows(s, config), s.name
