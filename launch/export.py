"""``openv4 export``: weights in the released formats, which transformers and inference engines load."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..kernels.quantize import dequantize
from ..model.lora import CONFIG_FILE as ADAPTER_CONFIG
from ..model.released import (
    Release,
    copy_companions,
    copy_tokenizer,
    refuse_unconstrained,
    released_tensors,
    scale_name,
    write_release,
)
from ..model.tensor_files import new_folder
from ..model.transformer import Transformer
from ..train.checkpoint import find_tokenizer, find_weights
from ..train.config import ConfigError, run_config
from ..train.progress import progress_bar


@dataclass(frozen=True)
class ExportConfig:
    """Attributes:
    checkpoint: a run, one of its checkpoints, or another export.
    output: folder to write; must not exist, or be empty.
    format: bf16, fp32, fp8 (as the Base models) or fp4+fp8 (as the instruct models).
    base: folder of quantised weights that the run started from: what training left alone gets its bits back. null
        takes the run's own.
    max_shard_gb: size beyond which the weights are split over several files, in 10^9 bytes.
    """

    checkpoint: str
    output: str
    format: Literal["bf16", "fp32", "fp8", "fp4+fp8"] = "bf16"
    base: str | None = None
    max_shard_gb: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.max_shard_gb < math.inf:
            raise ConfigError(f"max_shard_gb={self.max_shard_gb} must be positive")


CONFIG = ExportConfig


def run(config: ExportConfig) -> None:
    weights = find_weights(config.checkpoint)  # checksums are compared here, once
    if (weights / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{weights} holds adapters; use openv4 merge adapter={config.checkpoint} output={config.output}"
        )
    release = Release(weights)
    with torch.device("meta"):
        model = Transformer(release.config)
    release.check(dict(released_tensors(model)))
    trained = run_config(config.checkpoint)
    folder = config.base or (trained[1].pretrained if trained else None)
    base = Release(folder) if folder else None
    tokenizer = find_tokenizer(config.checkpoint)
    rounded: list[str] = []

    def observe(name: str, value: Tensor, stored: Mapping[str, Tensor]) -> None:
        scale = stored.get(scale_name(name))
        if scale is None or not release.is_quantized(name):
            return
        if not torch.equal(dequantize(stored[name], scale, torch.float32), value.float()):
            rounded.append(name)

    refuse_unconstrained(release.config)
    with new_folder(Path(config.output)) as temporary, progress_bar("writing") as advance:
        kept = (base or release).copies if release.config.num_nextn_predict_layers else None
        shard = int(config.max_shard_gb * 1e9)
        write_release(temporary, release.weights(base), release.config, config.format, shard, kept, observe, advance)
        copy_companions(base.folder if base else weights, temporary)
        if tokenizer is not None and not (temporary / "tokenizer.json").exists():
            copy_tokenizer(tokenizer, temporary, release.config)
    if rounded:
        print(
            f"warning: {len(rounded)} matrices, such as {rounded[0]}, hold values that {config.format} must round: the "
            "scales of a block differ too much, or the format is coarser than theirs"
        )
    print(f"{weights} written to {Path(config.output)} as {config.format}")
