"""``openv4 plan``: does LoRA on a model fit a machine? The calculation, line by line."""

import math
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table

from ..model.config import LoRAConfig, ModelConfig
from ..model.memory import lora_memory
from ..train.config import ConfigError


@dataclass(frozen=True)
class PlanConfig:
    """Attributes:
    model: a preset, or keys of a config.json.
    lora: rank and targets of the adapters.
    base: what the frozen weights are kept in; released: FP4 experts, FP8 matrices.
    gpus: the routed experts are spread over them.
    gpu_gb: memory of each, in 10^9 bytes.
    row_tokens: tokens that a GPU trains on at once.
    """

    model: ModelConfig
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    base: Literal["fp32", "bf16", "released"] = "released"
    gpus: int = 8
    gpu_gb: float = 80.0
    row_tokens: int = 16384

    def __post_init__(self) -> None:
        for key in ("gpus", "gpu_gb", "row_tokens"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{key}={getattr(self, key)} must be positive")
        if self.model.n_routed_experts % self.gpus:
            raise ConfigError(f"gpus={self.gpus} does not divide the {self.model.n_routed_experts} routed experts")


CONFIG = PlanConfig


def run(config: PlanConfig) -> None:
    items = lora_memory(config.model, config.lora, config.base, config.gpus, config.row_tokens)
    table = Table("memory of each GPU", "GB", "how", title=f"LoRA, rows of {config.row_tokens:,} tokens, calculated")
    for item in items:
        table.add_row(item.name, f"{item.bytes / 1e9:.2f}", item.how)
    total = sum(item.bytes for item in items) / 1e9
    table.add_row("all", f"{total:.2f}", f"of {config.gpu_gb:g} GB")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(f"fits: {config.gpu_gb - total:.1f} GB to spare" if total <= config.gpu_gb else "does not fit")
