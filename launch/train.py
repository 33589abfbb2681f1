"""``openv4 train``: pretraining, from prepared text to checkpoints. The same command again resumes."""

import torch

from ..train.config import ConfigError, TrainConfig
from ..train.loop import train

CONFIG = TrainConfig


def run(config: TrainConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no CUDA device here; use device=auto or cpu")
    train(config)
