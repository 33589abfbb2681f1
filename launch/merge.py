"""``openv4 merge``: fold LoRA adapters into the weights they were trained on, in any format, one tensor at a time."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..kernels.moe import LowRank
from ..kernels.quantize import dequantize
from ..model.lora import read_adapter
from ..model.released import (
    Release,
    Weight,
    copy_companions,
    refuse_unconstrained,
    released_tensors,
    scale_name,
    write_release,
)
from ..model.tensor_files import new_folder
from ..model.transformer import Transformer
from ..train.checkpoint import base_of, find_weights
from ..train.config import ConfigError
from ..train.progress import progress_bar

# Below these, a kind of tensor is reported as lost: less than half of what was learned is in the files, or it points
# elsewhere.
MIN_RATIO, MIN_COSINE = 0.5, 0.7


@dataclass(frozen=True)
class MergeConfig:
    """Attributes:
    adapter: a LoRA run, one of its checkpoints, or a folder in PEFT's format.
    output: folder to write; must not exist, or be empty.
    base: folder of the weights that were adapted; null takes the one that the adapter names.
    format: fp32, bf16, fp8 or fp4+fp8; null: that of the base.
    max_shard_gb: size beyond which the weights are split over several files, in 10^9 bytes.
    """

    adapter: str
    output: str
    base: str | None = None
    format: Literal["fp32", "bf16", "fp8", "fp4+fp8"] | None = None
    max_shard_gb: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.max_shard_gb < math.inf:
            raise ConfigError(f"max_shard_gb={self.max_shard_gb} must be positive")


CONFIG = MergeConfig


@dataclass
class Survival:
    """How much of what was learned is in the files, by kind of tensor: <wanted, stored>, |wanted|^2, |stored|^2."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, wanted: Tensor, stored: Tensor) -> None:
        kind = re.sub(r"(^|\.)(layers|experts)\.\d+", r"\1\2", name).removesuffix(".weight")
        pairs = ((wanted, stored), (wanted, wanted), (stored, stored))
        sums = torch.stack([(a.double() * b.double()).sum() for a, b in pairs])
        self.sums[kind] = self.sums.get(kind, 0) + sums

    def rows(self) -> list[tuple[str, float, float]]:
        """Kind of tensor, cosine and norm ratio; 1 and 1 where nothing was learned."""
        result = []
        for kind, (dot, wanted, stored) in sorted((kind, sums.tolist()) for kind, sums in self.sums.items()):
            ratio = math.sqrt(stored / wanted) if wanted else 1.0
            cosine = dot / math.sqrt(wanted * stored) if wanted and stored else float(not wanted)
            result.append((kind, cosine, ratio))
        return result


def run(config: MergeConfig) -> None:
    folder = find_weights(config.adapter)
    base = Release(config.base or base_of(folder))
    with torch.device("meta"):
        model = Transformer(base.config)
    base.check(dict(released_tensors(model)))
    deltas = read_adapter(folder, base.config)
    survival = Survival()

    def observe(name: str, value: Tensor, stored: Mapping[str, Tensor]) -> None:
        if name in deltas:
            scale = stored.get(scale_name(name))
            kept = stored[name].float() if scale is None else dequantize(stored[name], scale, torch.float32)
            survival.add(name, deltas[name].delta(), kept - base.read(name)[0].float())

    format = config.format or base.format
    refuse_unconstrained(base.config)
    with new_folder(Path(config.output)) as temporary, progress_bar("merging") as advance:
        weights = merged(base.weights(), deltas)
        shard = int(config.max_shard_gb * 1e9)
        write_release(temporary, weights, base.config, format, shard, base.copies, observe, advance)
        copy_companions(base.folder, temporary)
    print_survival(survival, format)
    print(f"{folder} merged into {base.folder}, written to {config.output} as {format}")


def merged(weights: Mapping[str, Weight], deltas: Mapping[str, LowRank]) -> dict[str, Weight]:
    """The weights, with what the adapters add."""

    def add(name: str, weight: Weight) -> Weight:
        if name not in deltas:
            return weight
        return weight._replace(dtype=torch.float32, read=lambda: weight.read().float() + deltas[name].delta())

    return {name: add(name, weight) for name, weight in weights.items()}


def print_survival(survival: Survival, format: str) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("tensors", "cosine", "norm ratio", title=f"what is left of the adapters in {format}")
    lost = []
    for kind, cosine, ratio in survival.rows():
        table.add_row(kind, f"{cosine:.4f}", f"{ratio:.4f}")
        if cosine < MIN_COSINE or ratio < MIN_RATIO:
            lost.append(kind)
    console.print(table)
    if lost:
        console.print(
            f"warning: rounding to {format} loses most of what was learned in {', '.join(lost)}; choose "
            "format=bf16, or serve base and adapter side by side"
        )
