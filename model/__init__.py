"""The DeepSeek-V4 architecture as plain modules on one device."""

from typing import TYPE_CHECKING, Any

from .config import ModelConfig

if TYPE_CHECKING:
    from .released import load_pretrained, save_pretrained
    from .transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """What computes is imported when it is asked for: configs and plans must not wait two seconds for torch."""
    if name == "Transformer":
        from .transformer import Transformer

        return Transformer
    if name in __all__:
        from . import released

        return getattr(released, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
