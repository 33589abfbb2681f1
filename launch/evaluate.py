"""``openv4 evaluate``: loss and bits per byte of a model on held-out text."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..train.checkpoint import find_tokenizer, load_model
from ..train.config import ConfigError, DataConfig, PrecisionConfig, run_config
from ..train.dataset import open_dataset
from ..train.evaluation import evaluate
from ..train.precision import apply_precision


@dataclass(frozen=True)
class EvaluateConfig:
    """Attributes:
    checkpoint: a run, one of its checkpoints, or an exported model.
    data: prepared folder whose validation split is read; by default that of the run.
    sequence_length: of the rows; null takes the run's last stage, or 2048.
    attention: null takes the run's last stage, or sparse.
    tokens: stop after so many; null reads all.
    batch_tokens: read at once.
    precision: what products compute in, whatever the model was trained with: fp4_qat shows what FP4 experts cost.
    """

    checkpoint: str
    data: DataConfig = field(default_factory=DataConfig)
    sequence_length: int | None = None
    attention: Literal["dense", "sparse"] | None = None
    tokens: int | None = None
    batch_tokens: int = 4096
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    def __post_init__(self) -> None:
        for key in ("sequence_length", "tokens", "batch_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value} must be at least 1")


CONFIG = EvaluateConfig


def run(config: EvaluateConfig) -> None:
    model = load_model(config.checkpoint)
    apply_precision(model, config.precision)
    trained = run_config(config.checkpoint)
    data = config.data
    if data.path is None and not data.sources:
        if trained is None:
            raise ConfigError(f"{config.checkpoint} is no run of ours: name the text with data=<prepared folder>")
        data = trained[1].data
    dataset = open_dataset(
        data,
        trained[0] if trained else Path(),
        model.config,
        trained[1].pretrained if trained else None,
        trained[1].shortest_row if trained else None,
    )
    own = find_tokenizer(config.checkpoint)
    if own is not None and own.read_bytes() != dataset.tokenizer_path.read_bytes():
        raise ConfigError(
            f"{dataset.folders[0].folder} was prepared with another tokenizer; prepare it with tokenizer={own}"
        )
    if not dataset.validation:
        raise ConfigError(f"{dataset.folders[0].folder} has no validation documents; prepare more than one document")
    last = trained[1].stages[-1] if trained else None
    length = config.sequence_length or (last.sequence_length if last else 2048)
    attention = config.attention or (last.attention if last else "sparse")
    result = evaluate(
        model,
        dataset.validation,
        dataset.token_bytes(model.embed.weight.device),
        length,
        attention,
        config.tokens,
        config.batch_tokens,
        dataset.eos,
    )
    print(json.dumps({"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens}))
