"""transformers' DeepseekV4ForCausalLM, loaded from our export, gives our logits and our gradients."""

import os
import random
from pathlib import Path

import pytest
import torch
from model_cases import random_config, random_model, relative_rms
from torch import Tensor

from openv4.model import Transformer, save_pretrained

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the independent implementation; installed by `make test`")
transformers.utils.logging.disable_progress_bar()

# Our name, as it ends, and transformers' (recipe 8.4).
RENAMED = [
    ("indexer.compressor.wkv.weight", "compressor.indexer.kv_proj.weight"),
    ("indexer.compressor.wgate.weight", "compressor.indexer.gate_proj.weight"),
    ("indexer.compressor.norm.weight", "compressor.indexer.kv_norm.weight"),
    ("indexer.compressor.ape", "compressor.indexer.position_bias"),
    ("indexer.wq_b.weight", "compressor.indexer.q_b_proj.weight"),
    ("indexer.weights_proj.weight", "compressor.indexer.scorer.weights_proj.weight"),
    ("compressor.wkv.weight", "compressor.kv_proj.weight"),
    ("compressor.wgate.weight", "compressor.gate_proj.weight"),
    ("compressor.norm.weight", "compressor.kv_norm.weight"),
    ("compressor.ape", "compressor.position_bias"),
    ("attn_sink", "sinks"),
    ("wq_a.weight", "q_a_proj.weight"),
    ("q_norm.weight", "q_a_norm.weight"),
    ("wq_b.weight", "q_b_proj.weight"),
    ("attn.wkv.weight", "attn.kv_proj.weight"),
    ("wo_a.weight", "o_a_proj.weight"),
    ("wo_b.weight", "o_b_proj.weight"),
    ("shared_experts.w1.weight", "shared_experts.gate_proj.weight"),
    ("shared_experts.w2.weight", "shared_experts.down_proj.weight"),
    ("shared_experts.w3.weight", "shared_experts.up_proj.weight"),
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    *((f"hc_{site}_{part}", f"{site}_hc.{part}") for site in ("attn", "ffn") for part in ("fn", "base", "scale")),
    *((f"hc_head_{part}", f"hc_head.hc_{part}") for part in ("fn", "base", "scale")),
]
TOP = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}


def their_gradient(gradients: dict[str, Tensor | None], name: str, inner: int) -> Tensor | None:
    """The gradient of our parameter ``name`` in transformers' layout."""
    if name in TOP:
        return gradients[TOP[name]]
    for ours, theirs in RENAMED:
        if name.endswith(ours):
            name = name[: -len(ours)] + theirs
            break
    prefix, expert, matrix = name.partition(".ffn.experts.")
    name = "model." + prefix.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    if not expert:
        return gradients[name]
    stacked = gradients[f"{name}.mlp.experts.{'down_proj' if matrix == 'w2' else 'gate_up_proj'}"]
    assert stacked is not None
    return {"w1": stacked[:, :inner], "w3": stacked[:, inner:], "w2": stacked}[matrix]


def compare(model: Transformer, folder: Path, seed: int, length: int) -> None:
    """Logits and the global gradient within 1e-5 relative RMS, each gradient within 1e-3.

    Both sides run float32, whose rounding is 6e-8 a step; over some hundred dependent operations that gives 1e-6.
    A single small gradient may lose more to cancellation, hence 1e-3 there; one that vanishes exactly (the router's
    where each token has one expert, whose weight is always 1) is all rounding, so 1e-6 of the global norm is no error.
    """
    save_pretrained(model, folder, "fp32")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped_mm refuses widths that are no multiple of 16 bytes
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    weight = torch.randn(2, length, model.config.vocab_size, generator=generator) / tokens.numel()

    logits = model(tokens)
    (logits * weight).sum().backward()
    expected = theirs(tokens, use_cache=False).logits
    (expected * weight).sum().backward()
    assert relative_rms(logits, expected) < 1e-5

    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    total = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    error = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            continue
        reference = their_gradient(gradients, name, model.config.moe_intermediate_size)
        reference = torch.zeros_like(parameter) if reference is None else reference
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        difference = (ours.double() - reference.double()).norm()
        assert difference < 1e-3 * reference.norm() + 1e-6 * total, name
        error += float(difference) ** 2
    assert error**0.5 < 1e-5 * total


@pytest.mark.parametrize("seed", range(36))
def test_logits_and_gradients_on_random_configs(seed: int, tmp_path: Path) -> None:
    model = random_model(random_config(seed), seed)
    compare(model, tmp_path / "export", seed, random.Random(seed).choice([1, 2, 5, 13, 31, 47, 64]))


def test_released_ratios(tmp_path: Path) -> None:
    """Ratios 4 and 128 with the released window, over a length that completes a block of 128 and starts another."""
    config = random_config(
        3, compress_ratios=(128, 4, 0), layer_types=(), num_hidden_layers=2, sliding_window=128, num_hash_layers=1
    )
    compare(random_model(config, 3), tmp_path / "export", 3, 150)


def test_sharded_export_loads(tmp_path: Path) -> None:
    model = random_model(random_config(5), 5)
    save_pretrained(model, tmp_path / "export", "fp32", max_shard_bytes=20_000)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation="eager", dtype=torch.float32
    )
    tokens = torch.arange(23).unsqueeze(0)
    assert relative_rms(model(tokens), theirs(tokens, use_cache=False).logits) < 1e-5
