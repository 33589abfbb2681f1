"""peft on transformers' DeepseekV4ForCausalLM reads our adapters and writes adapters that we read: same logits."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import EVERYTHING, randomise, tokens_for, with_hca
from model_cases import random_config, random_model, relative_rms
from safetensors.torch import load_file

from openv4.model import Transformer, load_pretrained, save_pretrained
from openv4.model.config import LoRAConfig, WeightsError
from openv4.model.lora import add_lora, load_adapter, lora_parameters, merge_lora, save_adapter

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the independent implementation; installed by `make test`")
peft = pytest.importorskip("peft", reason="the independent implementation; installed by `make test`")
transformers.utils.logging.disable_progress_bar()

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ("wq_a", "wq_b", "wkv", "wo_b", "shared_experts", "compressor", "indexer")
SETS = [*((part,) for part in (*MODULES, "wo_a", "experts")), ("attention", "shared_experts"), EVERYTHING]
# float32 rounds by 6e-8 a step; some hundred dependent operations, as in test_parity.
CLOSE = 1e-5


def base_model(folder: Path, seed: int, **fixed: object) -> Transformer:
    """A CSA, an HCA and a window layer, hash and learned routing; exported to ``folder``."""
    model = random_model(random_config(seed, **(with_hca(seed) | fixed)), seed)
    save_pretrained(model, folder, "fp32")
    return model


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped_mm refuses widths that are no multiple of 16 bytes
        dtype=torch.float32,
    )


def loaded_by_peft(base: Path, adapter: Path) -> Any:
    """After checking that peft finds every tensor and uses every one."""
    model = peft.get_peft_model(theirs_of(base), peft.PeftConfig.from_pretrained(adapter))
    report = peft.set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(theirs_of(base), adapter, is_trainable=True)
    # A deprecation of transformers' own; a pattern for a parameter, which peft applies, but looks for among modules.
    expected = ("is_gradient_checkpointing", "pattern keys did not match any targeted module")
    assert not [str(w.message) for w in caught if not any(text in str(w.message) for text in expected)]
    return loaded.eval()


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Transformer):
        return model(tokens)
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("targets", SETS)
def test_peft_reads_ours(targets: tuple[str, ...], tmp_path: Path) -> None:
    seed = SETS.index(targets)
    model = base_model(tmp_path / "base", seed)
    tokens = tokens_for(model.config, seed)
    plain = model(tokens)
    lora = LoRAConfig(rank=2 + seed % 3, alpha=5.5, targets=targets)
    add_lora(model, lora, seed)
    randomise(model, seed)
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = loaded_by_peft(tmp_path / "base", tmp_path / "adapter")
    ours, expected = model(tokens), logits_of(theirs, tokens)
    assert relative_rms(plain, ours) > 100 * CLOSE or targets == ("indexer",)  # a choice is not always another one
    assert relative_rms(ours, expected) < CLOSE
    # Nothing but ours is adapted, and peft counts as many numbers.
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in lora_parameters(model).values())
    if "experts" in targets:  # where both read the whole model
        merge_lora(model)
        merged = theirs.merge_and_unload()
        assert relative_rms(logits_of(merged, tokens), model(tokens)) < CLOSE


def test_a_single_expert_and_a_single_group(tmp_path: Path) -> None:
    """Where peft stacks nothing."""
    single = {"n_routed_experts": 1, "num_experts_per_tok": 1, "o_groups": 1, "num_attention_heads": 2}
    model = base_model(tmp_path / "base", 1, **single)
    lora = LoRAConfig(rank=3, targets=EVERYTHING)
    add_lora(model, lora)
    randomise(model)
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "base"))
    tokens = tokens_for(model.config, 1)
    theirs = loaded_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert relative_rms(model(tokens), logits_of(theirs, tokens)) < CLOSE


@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_peft(seed: int, tmp_path: Path) -> None:
    """Of every A and B but the indexer's, which transformers does not train; read as saved gradients, so to say."""
    model = base_model(tmp_path / "base", seed)
    lora = LoRAConfig(rank=3, targets=("attention", "shared_experts", "experts", "compressor"))
    add_lora(model, lora, seed)
    randomise(model, seed)
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = loaded_by_peft(tmp_path / "base", tmp_path / "adapter")
    tokens = tokens_for(model.config, seed)
    weight = torch.randn(*tokens.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(seed))
    (model(tokens) * weight).sum().backward()
    (logits_of(theirs, tokens) * weight).sum().backward()
    with torch.no_grad():
        for parameter in (*lora_parameters(model).values(), *theirs.parameters()):
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
    save_adapter(model, lora, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert set(ours) == set(expected)
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert ours[name].shape == gradient.shape
        assert gradient.any()
        assert (ours[name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-6 * total, name


def trained_by_peft(base: Path, folder: Path, tokens: torch.Tensor, **settings: object) -> torch.Tensor:
    """A step of peft's on transformers' model, saved to ``folder``; its logits afterwards."""
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs_of(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(2):  # B is zero at first, and A has no gradient then
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    with torch.no_grad():
        return logits_of(model.eval(), tokens)


THEIRS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lists": ({"target_modules": ["q_a_proj", "self_attn.o_b_proj"]}, {"wq_a", "wo_b"}),
    # A short name hits attention, compressors and indexers; gate_proj is in compressors and the shared expert.
    "short names": (
        {"target_modules": ["kv_proj", "gate_proj"], "lora_alpha": 3},
        {"wkv", "shared_experts", "compressor", "indexer"},
    ),
    "pattern": ({"target_modules": r".*layers\.[02]\.self_attn\.(q_b|kv)_proj"}, {"wq_b", "wkv"}),
    "parameters": (
        {
            "target_modules": [],
            "target_parameters": ["o_a_proj.weight", "mlp.experts.down_proj", "experts.gate_up_proj"],
        },
        {"wo_a", "experts"},
    ),
    "both": (
        {"target_modules": ["up_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"shared_experts", "experts"},
    ),
    "linear as parameter": ({"target_modules": [], "target_parameters": ["q_a_proj.weight"]}, {"wq_a"}),
    "layers": ({"target_modules": ["q_a_proj"], "layers_to_transform": [1, 2]}, {"wq_a"}),
    "a layer": ({"target_modules": ["q_a_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"wq_a"}),
    "exclusion": (
        {"target_modules": ["q_b_proj", "o_b_proj"], "exclude_modules": ["indexer.q_b_proj"]},
        {"wq_b", "wo_b"},
    ),
    "ranks": (
        {
            "target_modules": ["q_a_proj", "o_b_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"q_a_proj": 2, r"layers\.1\..*gate_up_proj": 5},
            "alpha_pattern": {"o_b_proj": 9},
        },
        {"wq_a", "wo_b", "experts"},
    ),
    "rank-stabilised": (
        {"target_modules": ["q_a_proj", "o_b_proj"], "use_rslora": True, "rank_pattern": {"o_b_proj": 7}},
        {"wq_a", "wo_b"},
    ),
    "dropout": ({"target_modules": ["q_a_proj"], "lora_dropout": 0.3}, {"wq_a"}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_ours_reads_what_peft_trained(case: str, tmp_path: Path) -> None:
    """And writes it again so that peft reads it."""
    settings, parts = THEIRS[case]
    model = base_model(tmp_path / "base", 3)
    tokens = tokens_for(model.config, 3)
    expected = trained_by_peft(tmp_path / "base", tmp_path / "adapter", tokens, **({"r": 4} | settings))
    assert relative_rms(model(tokens), expected) > 100 * CLOSE
    lora = load_adapter(model, tmp_path / "adapter")
    model.eval()
    assert lora.parts == parts
    assert lora.dropout == settings.get("lora_dropout", 0.0)
    assert relative_rms(model(tokens), expected) < CLOSE
    save_adapter(model, lora, tmp_path / "again", str(tmp_path / "base"))
    first, again = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("adapter", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    theirs = loaded_by_peft(tmp_path / "base", tmp_path / "again")
    assert relative_rms(logits_of(theirs, tokens), expected) < CLOSE
    other = load_pretrained(tmp_path / "base", torch.float32)
    assert load_adapter(other, tmp_path / "again") == lora
    assert torch.equal(other.eval()(tokens), model(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["q_a_proj", "lm_head"]}, r"3 unexpected: .*lm_head\.lora_A"),
    ],
)
def test_what_only_peft_can_do_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = base_model(tmp_path / "base", 1)
    tokens = tokens_for(model.config, 1)
    settings = {"r": 3, "target_modules": ["q_a_proj"]} | settings
    trained_by_peft(tmp_path / "base", tmp_path / "adapter", tokens, **settings)
    with pytest.raises(WeightsError, match=message):
        load_adapter(model, tmp_path / "adapter")


def test_peft_draws_as_wide_as_we_do(tmp_path: Path) -> None:
    """The bound of A of each target; of n uniform numbers the largest lies within some 10 / n of it."""
    model = base_model(tmp_path / "base", 2)
    lora = LoRAConfig(rank=8, targets=EVERYTHING)
    add_lora(model, lora)
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "base"))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs_of(tmp_path / "base"), peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("adapter", "theirs"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].shape == tensor.shape
        largest, other = float(ours[name].abs().max()), float(tensor.abs().max())
        assert abs(largest - other) <= 10 / tensor.numel() * other, name
