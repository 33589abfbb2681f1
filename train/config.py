"""The only place where YAML meets dataclasses: Hydra composes ``conf/``, and the result becomes a tree of frozen
dataclasses, strictly. Whatever is wrong is said before anything is allocated: the key's full path, the value, the
nearest valid name."""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..data.config import Effort, SourceConfig
from ..model.config import LoRAConfig, ModelConfig, Recompute, without_mtp
from ..optim.config import OptimConfig
from ..optim.schedule import Compute, Schedule, Stage

CONF = Path(__file__).parents[1] / "conf"

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the way out."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the way out."""


class DamageError(CheckpointError):
    """A checkpoint whose files are no longer as they were written."""


class IntegrityError(RuntimeError):
    """Some process computes wrongly; the message names it, where it can be told, and the way out."""


class Preempted(Exception):  # noqa: N818 (no error)
    """A signal has asked a run to stop, and it is saved; it goes on when the same command is started again."""


class StoppedElsewhere(Exception):  # noqa: N818 (the error is another's)
    """Another process of the run has failed, and has said why."""


class DivergedError(ValueError):
    """The loss of a run has spiked once too often; the message tells when and what to do."""


# What a process ends with after Preempted, so that a batch script knows to requeue its job.
REQUEUE_EXIT = 85


@dataclass(frozen=True)
class DataConfig:
    """Where the training rows come from.

    Attributes:
        path: a folder that `openv4 prepare` wrote, or a .jsonl file of conversations, prepared below the output folder
            for the pretrained model's tokenizer; null prepares the shipped King James text there, `???` refuses to:
            this or `sources` must then be set.
        sources: several such folders with weights, instead of `path`.
        vocab_size: of the tokenizer trained for the shipped text.
        join_bytes: of the shipped text: join chapters until they hold so many bytes, for long documents; 0: never.
        effort, chat_templates: of conversations, as in `openv4 prepare kind=chat`.
        workers: threads that read batches ahead.
        verify: compare every shard with its checksum at start.
    """

    path: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    vocab_size: int = 4096
    join_bytes: int = 0
    effort: Effort | None = None
    chat_templates: str | None = None
    workers: int = 1
    verify: bool = True

    def __post_init__(self) -> None:
        if self.path in ("???", ""):  # OmegaConf's mark of a value that must be given; data.path=$UNSET
            if not self.sources:
                raise ConfigError(
                    "data.path is not set; give data.path=<folder from openv4 prepare>, or several as "
                    "data.sources=[{path:<folder>,weight:<share>},...]"
                )
            object.__setattr__(self, "path", None)
        if self.path and self.sources:
            raise ConfigError("data.path and data.sources are both set; keep one")
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must not be negative")


@dataclass(frozen=True)
class PrecisionConfig:
    """Attributes:
    compute: what matrix products compute in; a stage may say otherwise. fp32 and bf16 are dtypes of streams and
        products. fp8: linear maps and experts multiply FP8 numbers (recipe 8.1). fp4_qat: as fp8, with the routed
        experts' weights and the indexer's queries and keys rounded to FP4 before (recipe 8.2). Trained weights and
        optimizer state are always float32.
    streams: under fp8 and fp4_qat, dtype of the residual streams and of products that stay unrounded.
    kv: fp8 rounds the attention's keys/values to what an FP8 cache would hold of them (recipe 2.1, 2.2).
    base: what the frozen weights under LoRA are kept in; `released` leaves them in FP8 and FP4 as they were published,
        and dequantises each where it is used.
    """

    compute: Compute = "fp32"
    streams: Literal["fp32", "bf16"] = "bf16"
    kv: Literal["plain", "fp8"] = "plain"
    base: Literal["fp32", "bf16", "released"] = "fp32"


@dataclass(frozen=True)
class CheckpointConfig:
    """`every` optimizer steps (0: only at the end), the newest `keep` stay. `asynchronous`: training goes on while one
    is written, for a copy of weights and optimizer state in the CPU's memory."""

    every: int = 100
    keep: int = 2
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ConfigError(
                f"checkpoint.every={self.every} and checkpoint.keep={self.keep}: must be at least 0 and at least 1"
            )


@dataclass(frozen=True)
class ValidationConfig:
    """Attributes:
    every: optimizer steps between validations, besides those before the first and after the last (0: only these).
    tokens: how much of the validation split to use; null uses all, and so does the last validation of a run.
    byte_model_order: order of a byte n-gram model, fitted on the training text, to print for comparison; null for none.
    """

    every: int = 100
    tokens: int | None = None
    byte_model_order: int | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"validation.every={self.every} must not be negative")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"validation.tokens={self.tokens} must be at least 1, or null for all")
        if self.byte_model_order is not None and not 0 <= self.byte_model_order <= 6:
            raise ConfigError(f"validation.byte_model_order={self.byte_model_order} must be 0 to 6, or null for none")


@dataclass(frozen=True)
class LoggingConfig:
    """Attributes:
    every: optimizer steps between rows of metrics.jsonl; the first step and those with a validation always have one.
    wandb: auto (online where WANDB_API_KEY is set, else offline), online, offline or disabled.
    detail: also log what every layer's numbers are (activation maxima and the like), and what costs more to measure.
    project: W&B project.
    peak_tflops: of the device at the training dtype, for MFU; null looks it up or, on a CPU, measures it.
    sample_prompt, sample_tokens: text to continue when training ends; null for none.
    """

    every: int = 1
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    detail: bool = False
    project: str = "openv4"
    peak_tflops: float | None = None
    sample_prompt: str | None = None
    sample_tokens: int = 80

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"logging.every={self.every} must be at least 1")
        if self.sample_tokens < 1:
            raise ConfigError(f"logging.sample_tokens={self.sample_tokens} must be at least 1")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"logging.peak_tflops={self.peak_tflops} must be positive, or null")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes; how many there are, `nproc` or the launcher (torchrun, deepspeed, srun) says.

    Attributes:
        nproc: processes that `openv4 train` starts on this machine, where no launcher has started it.
        expert: the routed experts of every layer are spread over so many processes.
        context: so many processes share each row, and have consecutive parts of it.
        zero: DeepSpeed's ZeRO stage of runs that AdamW trains alone; where Muon has matrices, their owners hold
            weights and state (optim/ownership.py), and DeepSpeed's stage is 0.
        gradients: dtype in which gradients travel to their owners; bf16 rounds them stochastically, sums are float32.
        bucket_mb: gradients that travel together, 10^6 bytes.
        timeout_minutes: how long a process waits for another one before it gives up.
        hang_minutes: without an end of a step, after which the process that the others wait for is named.
    """

    nproc: int = 1
    expert: int = 1
    context: int = 1
    zero: Literal[0, 1, 2] = 0
    gradients: Literal["fp32", "bf16"] = "fp32"
    bucket_mb: float = 256.0
    timeout_minutes: float = 30.0
    hang_minutes: float = 5.0

    def __post_init__(self) -> None:
        for key in ("nproc", "expert", "context"):
            if getattr(self, key) < 1:
                raise ConfigError(f"parallel.{key}={getattr(self, key)} must be at least 1")
        for key in ("bucket_mb", "timeout_minutes", "hang_minutes"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"parallel.{key}={getattr(self, key)} must be positive")


@dataclass(frozen=True)
class StabilityConfig:
    """What happens when a loss spikes, and what is compared to find wrong arithmetic. V4 detects spikes, goes back a
    little and trains for a while with anticipatory routing (recipe 7); its numbers are not published, these are ours.

    Attributes:
        on_spike: of the loss, or of the gradient norm together with it: rollback goes back to the newest checkpoint
            from before, warn tells of it, ignore does not look. `max_skipped` holds for rollback and warn.
        z: a spike is so many robust standard deviations above the level of the last `window` steps; nothing is said
            before as many steps of a stage are known.
        batch: after a rollback, the batches of the spike are left out (skip) or come again (keep).
        max_rollbacks: of a run; the next spike stops it.
        max_skipped: so many steps in a row without a finite gradient are a spike as well.
        anticipatory: never, after each rollback, or always: experts are chosen by the parameters of `delay` steps
            before, for `period` steps.
        check_every: steps between comparisons of the weights that several processes hold alike; 0 for none.
        replay_every: steps between repetitions of one step's forward and backward pass, which must give the same bits;
            0 for none.
    """

    on_spike: Literal["rollback", "warn", "ignore"] = "rollback"
    z: float = 10.0
    window: int = 64
    batch: Literal["skip", "keep"] = "skip"
    max_rollbacks: int = 5
    max_skipped: int = 20
    anticipatory: Literal["never", "after_rollback", "always"] = "after_rollback"
    delay: int = 8
    period: int = 200
    check_every: int = 10
    replay_every: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.z < math.inf:
            raise ConfigError(f"stability.z={self.z} must be at least 1; on_spike=ignore turns the guard off")
        for key, least in {"window": 8, "max_skipped": 1, "period": 1}.items():
            if getattr(self, key) < least:
                raise ConfigError(f"stability.{key}={getattr(self, key)} must be at least {least}")
        for key in ("max_rollbacks", "delay", "check_every", "replay_every"):
            if getattr(self, key) < 0:
                raise ConfigError(f"stability.{key}={getattr(self, key)} must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; `conf/train.yaml` and `conf/run/*.yaml` hold its values.

    Attributes:
        name: the run's; output: its folder.
        pretrained: folder of weights to start from, given as `model.pretrained`; what `model` does not say is then read
            from its config.json. null starts from random weights.
        lora: train low-rank adapters and freeze all else; null trains all weights.
        epochs: passes over the data; they set the tokens of the last stage, and shorten its warm-up to at most a
            quarter of it. null leaves both as they are.
        steps: stop after so many optimizer steps, the schedule unchanged; null trains all stages.
        micro_batch_tokens: tokens that one forward and backward pass takes; gradients add up to the stage's batch.
        grad_clip: bound of the global gradient norm; null for none.
        recompute: what each block computes again in the backward pass instead of keeping it: none, selective or full.
        device: auto takes a CUDA device if there is one; threads: of the CPU, null leaves torch's choice.
    """

    name: str
    output: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    pretrained: str | None = None
    lora: LoRAConfig | None = None
    seed: int = 0
    epochs: float | None = None
    steps: int | None = None
    micro_batch_tokens: int = 4096
    grad_clip: float | None = 1.0
    recompute: Recompute = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for key in ("name", "output"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; give the run a {'name' if key == 'name' else 'folder'}")
        if not self.stages:
            raise ConfigError("stages is empty: a run needs at least one stage")
        if self.lora is None and self.precision.base != "fp32":
            raise ConfigError(
                f"precision.base={self.precision.base} is for frozen weights; set lora.rank, or base=fp32"
            )
        if self.lora is not None:
            self._check_lora(self.lora)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs={self.epochs} must be positive, or null")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1, or null for all stages")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ConfigError(f"grad_clip={self.grad_clip} must be positive, or null for none")
        for stage in self.stages:
            if stage.sequence_length > self.model.max_position_embeddings:
                raise ConfigError(
                    f"stages: {stage.name!r} has sequence_length={stage.sequence_length}, beyond "
                    f"model.max_position_embeddings={self.model.max_position_embeddings}"
                )
            if stage.attention == "indexer_warmup" and "csa" not in self.model.kinds:
                raise ConfigError(
                    f"stages: {stage.name!r} has attention=indexer_warmup, but model.compress_ratios="
                    f"{list(self.model.compress_ratios)} has no CSA layer, hence no indexer; drop the stage"
                )
        size = self.model.index_head_dim
        modes = {stage.compute or self.precision.compute for stage in self.stages}
        if "fp4_qat" in modes and "csa" in self.model.kinds and size & (size - 1):
            raise ConfigError(
                f"fp4_qat rotates the indexer's queries and keys, for which model.index_head_dim={size} must be a "
                "power of two"
            )
        if self.parallel.zero:
            self._check_zero()
        if self.micro_batch_tokens < 1:
            raise ConfigError(f"micro_batch_tokens={self.micro_batch_tokens} must be positive")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads} must be at least 1, or null for torch's choice")
        if self.epochs is None:  # else the data decides
            Schedule(self.stages, self.steps)  # refuses stages that do not go together

    @classmethod
    def complete(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        """Composed values, and the architecture of the pretrained weights where they name any without its config."""
        folder, model = values.get("pretrained"), values.get("model") or {}
        if folder in ("???", ""):
            raise ConfigError("model.pretrained is not set; give model.pretrained=<folder of released weights>")
        if folder is None or not isinstance(model, dict) or "vocab_size" in model:
            return values
        from ..model.released import pretrained_config  # torch takes two seconds, which other configs need not wait for

        config = pretrained_config(Path(str(folder)))
        if model.get("num_nextn_predict_layers") == 0:
            config = without_mtp(config)
        return values | {"model": dataclasses.asdict(config) | model}

    @property
    def shortest_row(self) -> int:
        """Tokens of the shortest row of any stage: what a conversation must fit into."""
        return min(stage.sequence_length for stage in self.stages)

    def _check_zero(self) -> None:
        """ZeRO partitions what AdamW trains, and takes a parameter without a gradient for one whose gradient is 0."""
        key = f"parallel.zero={self.parallel.zero}"
        if self.lora is None and self.optim.matrices == "muon":
            raise ConfigError(
                f"{key}: Muon needs whole matrices, whose owners hold their state in any case; set parallel.zero=0, or "
                "optim.matrices=adamw"
            )
        parts = None if self.lora is None else self.lora.parts
        for index, stage in enumerate(self.stages):
            learns = stage.attention == "sparse" and stage.indexer_weight > 0
            idle = {
                "the indexer": "csa" in self.model.kinds and not learns and (parts is None or "indexer" in parts),
                "the MTP block": parts is None and self.model.num_nextn_predict_layers > 0 and stage.mtp_weight == 0,
                "all but the indexer": stage.attention == "indexer_warmup" and parts != frozenset({"indexer"}),
            }
            for what, found in idle.items():
                if found:
                    raise ConfigError(
                        f"{key}: stages.{index} gives {what} no gradient, and ZeRO would decay its weights; set "
                        "parallel.zero=0"
                    )

    def _check_lora(self, lora: LoRAConfig) -> None:
        if self.pretrained is None:
            raise ConfigError("lora adapts a pretrained model; give model.pretrained=<folder of weights>")
        for key, compute in (
            ("precision.compute", self.precision.compute),
            *((f"stages.{index}.compute", stage.compute) for index, stage in enumerate(self.stages)),
        ):
            if compute in ("fp8", "fp4_qat"):
                raise ConfigError(
                    f"{key}={compute}: the frozen weights of lora are used as they are; choose bf16 or fp32, or train "
                    "all weights (run=finetune)"
                )
        for index, stage in enumerate(self.stages):
            if stage.bias_speed:
                raise ConfigError(
                    f"stages.{index}.bias_speed={stage.bias_speed}: with lora the router's biases are frozen; set 0"
                )
            if (stage.attention == "indexer_warmup" or stage.indexer_weight) and "indexer" not in lora.targets:
                raise ConfigError(
                    f"stages.{index} trains the indexer, which lora freezes; set stages.{index}.indexer_weight=0 or "
                    "add indexer to lora.targets"
                )
        learning = [
            s.attention == "indexer_warmup" or (s.attention == "sparse" and s.indexer_weight > 0) for s in self.stages
        ]
        if "indexer" in lora.targets and not (all(learning) if lora.parts == {"indexer"} else any(learning)):
            index = learning.index(False)
            raise ConfigError(
                f"lora.targets={list(lora.targets)}: stages.{index} does not train the indexer; give it "
                "attention=sparse and indexer_weight=0.01, or leave indexer out"
            )


def load_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration that `openv4 train` with these overrides would run."""
    return load("train", TrainConfig, overrides)


def load(name: str, schema: type[T], overrides: Sequence[str]) -> T:
    """Composes ``conf/<name>.yaml`` with ``overrides`` (as on the command line) into ``schema``.

    Raises:
        ConfigError: unknown key, value or preset, wrong type, values that contradict each other.
    """
    overrides = normalize(name, schema, overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from None
    except (TypeError, ValueError) as error:  # how OmegaConf refuses the index of a list
        raise ConfigError(f"{_explain(error)}; the items of a list have numbers, as in stages.0.lr=1e-3") from None
    return from_yaml(schema, composed)


def from_yaml(schema: type[T], config: DictConfig | str) -> T:
    """A composed config, or the text of a saved ``config.yaml``, as ``schema``.

    ``${key}`` takes the value of another key. ``${oc.env:NAME}`` and every other resolver is refused: what it reads
    from this machine (a secret, maybe) would be written to ``config.yaml`` and sent to W&B. So is in a text what YAML
    lets grow beyond all measure.
    """
    try:
        if isinstance(config, str):
            refuse_bombs(config)
        node = OmegaConf.create(config)
        for text in _texts(OmegaConf.to_container(node)):
            if found := _RESOLVER.search(text):
                raise ConfigError(f"{found[0]}...}}: only ${{key}} is understood; let the shell put other values in")
        values = OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, YAMLError, RecursionError) as error:
        raise ConfigError(_explain(error)) from None
    if isinstance(values, dict) and issubclass(schema, TrainConfig):
        values = schema.complete(values)
    result: T = _convert(schema, values, "")
    return result


def refuse_bombs(text: str) -> None:
    """Raises YAMLError for aliases: ten lines of them, each naming the one before nine times, are a thousand million
    values, and ``to_yaml`` writes none."""
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise YAMLError(f"line {line}: *{event.anchor} repeats another value; write the value out")


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that ``from_yaml`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dataclasses.asdict(config))))


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``a.b.0``, value: of a nested config; an empty list or mapping is a value."""
    inner = dict(enumerate(values)) if isinstance(values, list | tuple) else values
    if not isinstance(inner, dict) or not inner:
        yield prefix, values
    else:
        for key, value in inner.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def run_config(checkpoint: str | Path) -> tuple[Path, TrainConfig] | None:
    """The run that a checkpoint belongs to (or that is named itself), and its config; None for an export."""
    path = Path(checkpoint).resolve()
    for folder in (path, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder, from_yaml(TrainConfig, (folder / "config.yaml").read_text(errors="replace"))
    return None


# Some backslashes escape each other; an odd one before ``${`` makes it plain text.
_RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^${}]*:")


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _texts(value)
    elif isinstance(values, str):
        yield values


def _escaped(values: Any) -> Any:
    """``values`` with every ``${`` marked as plain text."""
    if isinstance(values, dict):
        return {key: _escaped(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_escaped(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def presets_of(name: str) -> dict[str, list[str]]:
    """Config groups of a command and their presets: ``{"model": ["nano", ...], ...}``."""
    defaults: Any = OmegaConf.select(OmegaConf.load(CONF / f"{name}.yaml"), "defaults", default=[])
    groups = [str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry]
    return {group: sorted(file.stem for file in (CONF / group).glob("*.yaml")) for group in groups}


def normalize(name: str, schema: type[Any], overrides: Sequence[str]) -> list[str]:
    """The overrides of command ``name`` as Hydra should see them.

    A preset that does not exist is refused with the nearest name; ``data=<folder>`` means ``data.path=<folder>``; a
    value override may set any key that the dataclasses know, whether or not the YAML mentions it; the value of a key
    that holds text is that text, whatever characters are in it.
    """
    presets, normal = presets_of(name), []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key.strip("+~ ") or not (equals or key[0] == "~"):
            raise ConfigError(f"{override!r} is not key=value")
        if any("\ud800" <= character <= "\udfff" for character in override):  # how Python passes on other bytes
            raise ConfigError(f"{override!r} is not UTF-8; type it in a UTF-8 terminal, or rename the file")
        if key.lstrip("+") == "model.pretrained":
            prepared = f"++pretrained={value if _hydra_spelling(value) else quoted(value)}"
            if not any(other.startswith("model=") for other in overrides):
                normal.append("~model")  # its config.json says what the model is
        elif value in presets.get(key, ()):
            prepared = override
        elif key == "data" and (Path(value).exists() or "/" in value):
            prepared = f"++data.path={quoted(value)}"
        elif key == "data" and equals:
            hint = f", no such preset{_nearest(value, presets[key])}" if key in presets else ""
            raise ConfigError(f"{override}: no such folder{hint}")
        elif key in presets and equals:
            raise ConfigError(f"{override}: no such preset{_nearest(value, presets[key])}")
        else:
            prepared = override
            if equals and _is_text(schema, key.lstrip("+")) and not _hydra_spelling(value):
                prepared = f"{key}={quoted(value)}"
            prepared = prepared if key[0] in "+~" else f"++{prepared}"
        if not _parses(prepared):
            raise ConfigError(f"{override!r} is not key=value; quote values that hold special characters")
        normal.append(prepared)
    return normal


def quoted(text: str) -> str:
    """The text as a value of an override, whatever characters are in it."""
    return str(QuotedString(text, Quote.single).with_quotes())


def _hydra_spelling(value: str) -> bool:
    """Whether a text is given as Hydra wants it: null, or in quotes of its own."""
    return value == "null" or (value[:1] in ("'", '"') and value[0] == value[-1] and _parses(f"key={value}"))


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _is_text(schema: Any, key: str) -> bool:
    """Whether the dataclasses say that ``key`` holds a text."""
    for part in key.split("."):
        schema = get_type_hints(schema).get(part) if dataclasses.is_dataclass(schema) else None
    return schema in (str, str | None)


def _convert(kind: Any, value: Any, path: str) -> Any:
    """``value``, checked and converted to the annotated type ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _convert(kind, value, path)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path}={value!r}{_nearest(str(value), [str(a) for a in arguments])}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r} must be a list")
        return tuple(_convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    return _scalar(kind, value, path)


def _build(schema: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the config'}={values!r} must hold the keys of {schema.__name__}")
    known = [f.name for f in dataclasses.fields(schema)]
    hints = get_type_hints(schema)
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key{_nearest(str(key), known)}")
    required = [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [key for key in required if key not in values or values[key] == "???"]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is not set; give {', '.join(f'{prefix}{key}=...' for key in missing)}")
    converted = {key: _convert(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return schema(**converted)
    except ConfigError:
        raise
    except ValueError as error:  # the dataclass's own checks, which name key, value and way out
        in_list = any(part.isdigit() for part in path.split("."))
        raise ConfigError(f"{path}: {error}" if in_list else str(error)) from None


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number such as 1.0e-4", bool: "true or false", str: "text"}
        raise ConfigError(f"{path}={value!r} must be {words[kind]}")
    return value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(known)}"


def _explain(error: Exception) -> str:
    """The first lines of Hydra's or OmegaConf's message, as one, and those of its cause."""
    text = re.sub(r"\n *full_key: (\S*)\n *object_type=.*", r" (\1)", str(error).split("\nSee ")[0])
    text = re.sub(r"\s+", " ", text).strip().removesuffix(".")
    return f"{text}: {_explain(error.__cause__)}" if isinstance(error.__cause__, Exception) else text
