"""``openv4 train``: pretraining, from prepared text to checkpoints. The same command again resumes."""

from ..train.config import TrainConfig
from ..train.loop import train

CONFIG = TrainConfig


def run(config: TrainConfig) -> None:
    train(config)
