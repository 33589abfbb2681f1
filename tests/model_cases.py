"""Random small models that the tests of the architecture share."""

import random

import torch
from torch import Tensor

from openv4.model import ModelConfig, Transformer
from openv4.model.config import YarnConfig
from openv4.model.init import init_weights

CSA, HCA, SWA = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"


def random_config(seed: int, **fixed: object) -> ModelConfig:
    """A config whose every number varies with ``seed``: layer pattern, ratios, window, heads, groups, experts, YaRN.

    Indexers get at least 24 heads: a score is an exact zero, and so a tie, where no head's ReLU fires.
    """
    rng = random.Random(seed)
    csa, hca = rng.choice([2, 3, 4, 5]), rng.choice([6, 7, 8, 16])
    types = [rng.choice([SWA, CSA, HCA]) for _ in range(rng.randint(1, 4))]
    types[rng.randrange(len(types))] = CSA  # at least one layer selects
    ratio = {SWA: 0, CSA: csa, HCA: hca}
    groups = rng.choice([1, 2, 3])
    experts = rng.randint(3, 9)
    rope = rng.choice([4, 6, 8])
    values: dict[str, object] = {
        "vocab_size": rng.randint(40, 90),
        "hidden_size": rng.choice([24, 40, 48]),
        "num_hidden_layers": len(types),
        "num_attention_heads": groups * rng.choice([1, 2]),
        "head_dim": rope + rng.choice([4, 8, 10]),
        "qk_rope_head_dim": rope,
        "q_lora_rank": rng.choice([12, 20, 32]),
        "o_groups": groups,
        "o_lora_rank": rng.choice([6, 8, 12]),
        "compress_ratios": (*(ratio[kind] for kind in types), 0),
        "layer_types": tuple(types),
        "n_routed_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(3, experts)),
        "moe_intermediate_size": rng.choice([10, 16, 24]),
        "index_n_heads": rng.choice([24, 32]),
        "index_head_dim": rope + rng.choice([0, 4, 8]),
        "index_topk": rng.randint(1, 6),
        "sliding_window": rng.choice([1, 3, 8, 17]),
        "num_hash_layers": rng.randint(0, len(types)),
        "routed_scaling_factor": rng.choice([1.0, 1.5, 2.5]),
        "swiglu_limit": rng.choice([0.7, 1.5, 10.0]),
        "hc_mult": rng.choice([2, 4, 4, 4]),
        "rope_scaling": YarnConfig(rng.choice([4.0, 16.0]), rng.choice([16, 64])) if rng.random() < 0.5 else None,
        "compress_rope_theta": rng.choice([400.0, 160000.0]),
    }
    return ModelConfig(**(values | fixed))  # type: ignore[arg-type]


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Weights that make every mechanism act: sinks, position biases, mixing, selection biases, clamps."""
    model = Transformer(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * draw(tensor))
            elif name.endswith("_scale"):
                tensor.copy_(0.5 + 0.3 * draw(tensor).abs())
            elif name.endswith(("_base", "sink", "ape")):
                tensor.copy_(draw(tensor))
            elif name.endswith("gate.bias"):
                tensor.copy_(0.2 * draw(tensor))
            elif tensor.is_floating_point():
                tensor.copy_(draw(tensor) * tensor.shape[-1] ** -0.5)
    return model


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over norm of the second, in float64; 0 where both are zero."""
    ours, theirs = ours.detach(), theirs.detach()
    difference = (ours.double() - theirs.double()).square().sum().sqrt()
    size = theirs.double().square().sum().sqrt()
    return float(difference / size) if size > 0 else float(difference)
