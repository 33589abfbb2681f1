"""``openv4 export``: a run's weights in the released format, which transformers and inference engines load."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..model.released import load_pretrained, save_pretrained
from ..train.checkpoint import find_tokenizer, find_weights
from ..train.config import ConfigError


@dataclass(frozen=True)
class ExportConfig:
    """Attributes:
    checkpoint: a run, one of its checkpoints, or another export.
    output: folder to write; must not exist, or be empty.
    format: bf16 or fp32.
    max_shard_gb: size beyond which the weights are split over several files, in 10^9 bytes.
    """

    checkpoint: str
    output: str
    format: Literal["bf16", "fp32"] = "bf16"
    max_shard_gb: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.max_shard_gb < math.inf:
            raise ConfigError(f"max_shard_gb={self.max_shard_gb} must be positive")


CONFIG = ExportConfig


def run(config: ExportConfig) -> None:
    weights = find_weights(config.checkpoint)  # checksums are compared here, once
    model = load_pretrained(weights, torch.float32)
    tokenizer = find_tokenizer(config.checkpoint)
    save_pretrained(model, config.output, config.format, tokenizer, int(config.max_shard_gb * 1e9))
    print(f"{weights} written to {Path(config.output)} as {config.format}")
