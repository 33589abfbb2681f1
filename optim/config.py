"""The optimizers' constants."""

from dataclasses import dataclass, field
from typing import Literal

_TINY = 2.0**-126  # the smallest normal number in float32


@dataclass(frozen=True)
class MuonConfig:
    """Muon's constants, as published for DeepSeek-V4.

    Attributes:
        momentum: mu.
        weight_decay: lambda, times the learning rate.
        update_rms: gamma, the RMS of an update before the learning rate, matched to AdamW's.
    """

    momentum: float = 0.95
    weight_decay: float = 0.1
    update_rms: float = 0.18

    def __post_init__(self) -> None:
        _check("muon.momentum", self.momentum, 0.0 <= self.momentum < 1.0, "[0, 1)")
        _check("muon.weight_decay", self.weight_decay, 0.0 <= self.weight_decay < 1.0, "[0, 1)")
        _check("muon.update_rms", self.update_rms, 0.0 < self.update_rms <= 1.0, "(0, 1]")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW's constants, as published for DeepSeek-V4.

    Attributes:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: lambda, times the learning rate.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _check("adamw.beta1", self.beta1, 0.0 <= self.beta1 < 1.0, "[0, 1)")
        _check("adamw.beta2", self.beta2, 0.0 <= self.beta2 < 1.0, "[0, 1)")
        # The update divides by it in float32, where a parameter with no gradient yet has a second moment of zero.
        _check("adamw.eps", self.eps, _TINY <= self.eps < 1.0, f"[{_TINY:.2g}, 1)")
        _check("adamw.weight_decay", self.weight_decay, 0.0 <= self.weight_decay < 1.0, "[0, 1)")


@dataclass(frozen=True)
class OptimConfig:
    """Both optimizers; they share one learning rate, which the schedule gives.

    Attributes:
        muon: Muon's constants.
        adamw: AdamW's constants.
        matrices: the optimizer of what is Muon's otherwise; AdamW takes a second moment for each weight, and decays it.
        decay_vectors: whether AdamW's weight decay also acts on norms, biases, gates and sinks, not only on embedding,
            head and adapters. True is the literal reading of the paper, which names no exception.
    """

    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    matrices: Literal["muon", "adamw"] = "muon"
    decay_vectors: bool = True


def _check(key: str, value: float, valid: bool, interval: str) -> None:
    if not valid:
        raise ValueError(f"optim.{key} = {value} is outside {interval}")
