"""The DeepSeek-V4 architecture as plain modules on one device."""

from .config import ModelConfig
from .released import load_pretrained, save_pretrained
from .transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "load_pretrained", "save_pretrained"]
