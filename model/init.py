"""Initial weights: one table of distributions, one function that applies it.

Every tensor draws from its own generator, seeded by the run's seed and the tensor's name, so that a weight does not
depend on the order of construction, the device, or how a model is spread over ranks.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .config import ModelConfig
from .released import first_expert
from .transformer import Transformer


def _zeros(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    tensor.zero_()


def _ones(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    tensor.fill_(1.0)


def _gate_of_mixing(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    tensor.fill_(0.01)


def _normal(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    drawn = torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, config.initializer_range, generator=generator)
    tensor.copy_(drawn)


def _mixing_projection(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    (_zeros if config.hc_constraint == "none" else _normal)(tensor, name, config, generator)


def _mixing_base(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    tensor.zero_()
    count = config.hc_mult
    if config.hc_constraint == "none":
        # A plain residual network (arXiv 2409.19606, equation 14): site k reads stream k modulo S and writes to all.
        # Streams are equal at first; being read in turn is what tells them apart.
        block, layer, site = name.split(".")
        depth = int(layer) + (config.num_hidden_layers if block == "mtp" else 0)
        tensor[(2 * depth + site.startswith("hc_ffn")) % count] = 1.0
        tensor[count : 2 * count] = 1.0
        tensor[2 * count :] = torch.eye(count).flatten()
    elif config.hc_init == "identity":
        tensor[:count] = (
            -math.log(count - 1.0) if count > 1 else 4.0
        )  # sigmoid gives 1 / count: the mean of the streams
        # Sinkhorn of 4 on the diagonal and 0 elsewhere keeps about nine tenths of each stream to itself.
        tensor[2 * count :] = 4.0 * torch.eye(count).flatten()


def _hash_table(tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Distinct experts for each token id, each expert used equally often (to one). V4's own table is not published."""
    experts, width = config.n_routed_experts, tensor.shape[1]
    pool = torch.empty(0, dtype=torch.long)
    drawn = []
    for _ in range(tensor.shape[0]):
        if len(pool) < width:
            # What is left of the last shuffle goes first, and to the end of the next: a row never repeats an expert.
            fresh = torch.randperm(experts, generator=generator)
            pool = torch.cat((pool, fresh[~torch.isin(fresh, pool)], pool))
        drawn.append(pool[:width])
        pool = pool[width:]
    tensor.copy_(torch.stack(drawn))


Distribution = Callable[[Tensor, str, ModelConfig, torch.Generator], None]  # of the tensor of this name

# First matching ending wins. Sources: recipe 1 (std), 4 (mHC); what no report states is zero, the neutral choice.
DISTRIBUTIONS: dict[str, Distribution] = {
    "norm.weight": _ones,
    "attn_sink": _zeros,
    ".ape": _zeros,
    "gate.bias": _zeros,
    "gate.tid2eid": _hash_table,
    "hc_head_scale": _gate_of_mixing,
    "hc_head_base": _zeros,
    "_scale": _gate_of_mixing,
    "_base": _mixing_base,
    "hc_attn_fn": _mixing_projection,
    "hc_ffn_fn": _mixing_projection,
    "": _normal,
}


@torch.no_grad()
def init_weights(model: Transformer, seed: int = 0) -> None:
    """Fills every parameter and buffer of ``model`` (which must not be on the meta device). Of a stack of experts that
    processes share each gets its part of what one would have."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        draw = next(draw for ending, draw in DISTRIBUTIONS.items() if name.endswith(ending))
        generator = generator_of(seed, name)
        if ".experts." in name and len(tensor) < model.config.n_routed_experts:
            whole = tensor.new_empty(model.config.n_routed_experts, *tensor.shape[1:])
            draw(whole, name, model.config, generator)
            first = first_expert(model.get_submodule(name.rpartition(".")[0]))
            tensor.copy_(whole[first : first + len(tensor)])
        else:
            draw(tensor, name, model.config, generator)


def generator_of(seed: int, name: str) -> torch.Generator:
    """The generator of one tensor's weights."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
