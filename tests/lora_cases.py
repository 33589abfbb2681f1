"""Models with adapters that act, which the tests of LoRA share."""

import torch

from openv4.model import ModelConfig, Transformer
from openv4.model.lora import lora_parameters

EVERYTHING = ("attention", "shared_experts", "experts", "compressor", "indexer")


def with_hca(seed: int) -> dict[str, object]:
    """For ``random_config``: a layer of each kind, so that every target has something to adapt."""
    return {
        "layer_types": (),
        "compress_ratios": (4, 8, 0, 0),
        "num_hidden_layers": 3,
        "num_hash_layers": seed % 3,
    }


def randomise(model: Transformer, seed: int = 0) -> None:
    """Adapters about half as strong as what they adapt; B is zero before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith(".B"):
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * 0.5 * parameter.shape[-1] ** -0.5)


def tokens_for(config: ModelConfig, seed: int, length: int = 41) -> torch.Tensor:
    """``[2, length]``."""
    return torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
