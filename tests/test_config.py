"""The configuration: what users type becomes dataclasses, strictly, and every mistake is one line with the way out."""

import functools
import math
import re
import time
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from openv4.data.prepare import PrepareConfig
from openv4.launch.evaluate import EvaluateConfig
from openv4.launch.export import ExportConfig
from openv4.launch.generate import GenerateConfig
from openv4.model.config import ModelConfig, ModelConfigError, YarnConfig
from openv4.model.tensor_files import write_json, write_tensors
from openv4.optim.schedule import Plan, Schedule
from openv4.train.config import (
    CONF,
    ConfigError,
    DataConfig,
    LoggingConfig,
    TrainConfig,
    from_yaml,
    load,
    load_config,
    normalize,
    presets_of,
    to_yaml,
)

STAGE = "{name:only,tokens:4096,sequence_length:128,batch_tokens:1024,lr:1e-3}"
SECRET = "do-not-write-this-down"


@functools.cache
def saved_smoke() -> str:
    return to_yaml(load_config([]))


def changed(override: str) -> DictConfig:
    """The smoke run with one value changed; spares the fifth of a second that Hydra takes to compose."""
    key, _, value = override.partition("=")
    config = OmegaConf.create(saved_smoke())
    OmegaConf.update(config, key, OverridesParser.create().parse_override(f"key={value}").value(), force_add=True)
    assert isinstance(config, DictConfig)
    return config


def changed_refusal(override: str) -> str:
    with pytest.raises(ConfigError) as raised:
        from_yaml(TrainConfig, changed(override))
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def refusal(*overrides: str, name: str = "train", schema: type[Any] = TrainConfig) -> str:
    """The message of the ConfigError that these overrides cause, which is one line."""
    with pytest.raises(ConfigError) as raised:
        load(name, schema, overrides)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


# What architecture.md and the README print.


def test_the_command_lines_of_the_documentation() -> None:
    smoke = load_config(["run=smoke"])
    assert (smoke.name, smoke.output, smoke.steps) == ("smoke", "runs/smoke", None)
    assert smoke == load_config([]), "smoke is the default"
    assert len(smoke.stages) == 2 and smoke.model.hidden_size == 256

    config = load_config(["run=smoke", "model=nano", "steps=60", "checkpoint.every=10", "output=a"])
    assert (config.steps, config.checkpoint.every, config.output, config.model.hidden_size) == (60, 10, "a", 64)
    assert config.stages == smoke.stages

    assert load_config(["precision=bf16"]).precision.compute == "bf16"
    assert load_config(["model.swiglu_limit=7"]).model.swiglu_limit == 7.0, "a key that no YAML file mentions"
    assert load_config(["name=mine"]).output == "runs/mine"


def test_order_of_overrides_does_not_matter() -> None:
    assert load_config(["model.head_dim=64", "model=nano"]) == load_config(["model=nano", "model.head_dim=64"])


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_every_model_preset_builds(preset: str) -> None:
    model = load_config([f"model={preset}"]).model
    assert len(model.compress_ratios) == model.num_hidden_layers + model.num_nextn_predict_layers
    assert {"csa", "hca"} <= set(model.kinds), "each preset has both kinds of compression"


def test_every_preset_of_every_group_loads(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", nano().to_json())
    write_tensors(tmp_path / "model.safetensors", {"norm.weight": torch.ones(3)})
    for group, presets in presets_of("train").items():
        for preset in presets:
            overrides = [f"{group}={preset}", "data.path=x"]  # the pretraining recipes bring none
            if preset in ("finetune", "lora"):
                assert refusal(*overrides).startswith("model.pretrained is not set; give model.pretrained=")
                assert refusal(overrides[0], f"model.pretrained={tmp_path}").startswith("data.path is not set; give")
                overrides.append(f"model.pretrained={tmp_path}")
            config = load_config(overrides)
            assert isinstance(config, TrainConfig), (group, preset)


def test_released_presets_are_those_of_the_recipe() -> None:
    flash, pro = (load_config([f"model=v4_{size}"]).model for size in ("flash", "pro"))
    assert flash.compress_ratios == (0, 0, *(4, 128) * 20, 4, 0)
    assert pro.compress_ratios == (128, 128, *(4, 128) * 29, 4, 0)
    assert [flash.kinds[:43].count(kind) for kind in ("swa", "csa", "hca")] == [2, 21, 20]
    assert [pro.kinds[:61].count(kind) for kind in ("swa", "csa", "hca")] == [0, 30, 31]
    for model in (flash, pro):
        assert model.rope_scaling == YarnConfig(16.0, 65536, 32.0, 1.0)
        assert model.max_position_embeddings == 65536 * 16


@dataclass(frozen=True)
class Published:
    """The paper's training section (recipe 6), and ours of the dense part where it gives a bound only."""

    hidden_size: int
    tokens: int
    rows: tuple[int, int, int, int]  # of the full batch at 4K, 16K, 64K, 1M
    lr: float
    dense: tuple[float, float]  # tokens seen under dense attention: at least, at most


PUBLISHED = {
    "flash": Published(4096, 32 * 10**12, (18432, 4608, 1152, 72), 2.7e-4, (0.999e12, 1.001e12)),
    "pro": Published(7168, 33 * 10**12, (23040, 5760, 1440, 90), 2.0e-4, (1.5e12, 3e12)),
}


@functools.cache
def recipe(size: str) -> tuple[TrainConfig, Schedule, list[tuple[int, Plan]]]:
    """The config, its schedule, and the first and last step of each stage with the step's plan."""
    config = load_config([f"run=pretrain_{size}", "data.path=x"])
    began = time.perf_counter()
    schedule = Schedule(config.stages)
    steps, tokens = [0], 0
    for stage in config.stages[:-1]:
        tokens += stage.tokens
        steps.append(bisect_left(range(schedule.total_steps), tokens, key=schedule.tokens_before))
    steps += [first - 1 for first in steps[1:]] + [schedule.total_steps - 1]
    plans = []
    for step in sorted(steps):
        plan = schedule.plan(step, schedule.tokens_before(step))
        assert plan is not None
        plans.append((step, plan))
    assert time.perf_counter() - began < 1.0
    return config, schedule, plans


@pytest.mark.parametrize("size", PUBLISHED)
def test_pretraining_is_that_of_the_paper(size: str) -> None:
    wanted, (config, schedule, plans) = PUBLISHED[size], recipe(size)
    assert (config.name, config.model.hidden_size) == (f"pretrain_{size}", wanted.hidden_size)
    assert (config.precision.compute, config.grad_clip) == ("fp8", 1.0)
    assert sum(stage.tokens for stage in config.stages) == wanted.tokens
    last_step, last = plans[-1]
    assert 0 <= schedule.total_tokens - wanted.tokens < last.tokens
    assert schedule.plan(last_step + 1, schedule.total_tokens) is None

    lengths = [4096, 16384, 65536, 1048576]
    assert list(dict.fromkeys(plan.sequence_length for _, plan in plans)) == lengths
    rows = {plan.sequence_length: plan.rows for _, plan in plans}  # at the last step of each length
    assert tuple(rows[length] for length in lengths) == wanted.rows
    assert (plans[0][1].rows, plans[1][1].rows) == (3072, wanted.rows[0]), "the ramp ends within the first stage"

    modes = [plan.attention for _, plan in plans]
    assert list(dict.fromkeys(modes)) == ["dense", "indexer_warmup", "sparse"]
    assert {plan.sequence_length for _, plan in plans if plan.attention == "indexer_warmup"} == {65536}
    dense = sum(stage.tokens for stage in config.stages if stage.attention == "dense")
    assert wanted.dense[0] <= dense <= wanted.dense[1]
    for _, plan in plans:
        frozen = plan.attention == "indexer_warmup"
        assert (plan.balance_weight, plan.bias_speed) == ((0, 0) if frozen else (1e-4, 0.001))
        assert plan.indexer_weight == {"dense": 0, "indexer_warmup": 1, "sparse": 0.01}[plan.attention]


@pytest.mark.parametrize("size", PUBLISHED)
def test_learning_rate_and_mtp_weight_of_pretraining(size: str) -> None:
    peak, (config, schedule, plans) = PUBLISHED[size].lr, recipe(size)

    def at(step: int) -> Plan:
        plan = schedule.plan(step, schedule.tokens_before(step))
        assert plan is not None
        return plan

    for step in (0, 999, 1998):
        assert at(step).lr == pytest.approx(peak * (step + 1) / 2000)
    assert at(1999).lr == at(2000).lr == peak
    (decay,) = (index for index, stage in enumerate(config.stages) if stage.lr_shape != "constant")
    assert config.stages[decay].lr_shape == "cosine"
    start, end = (step for step, plan in plans if plan.stage == decay)
    assert schedule.tokens_before(start) > 0.75 * schedule.total_tokens, "near the end"
    for step, plan in plans[1:]:
        if plan.attention == "indexer_warmup":
            assert (plan.lr, plan.mtp_weight) == (1e-3, 0.0)
        elif step < start:
            assert (plan.lr, plan.mtp_weight) == (peak, 0.3)
        elif step > end:
            assert (plan.lr, plan.mtp_weight) == (pytest.approx(peak / 10), 0.1)
    assert (at(start).lr, at(start - 1).mtp_weight, at(start).mtp_weight) == (peak, 0.3, 0.1)
    middle = at((start + end) // 2)
    assert (middle.lr, middle.mtp_weight) == (pytest.approx(0.55 * peak, rel=1e-3), 0.1)


@pytest.mark.parametrize("size", PUBLISHED)
def test_stages_of_pretraining_begin_and_end_with_a_step(size: str) -> None:
    """So the indexer's warm-up has the 1,000 steps of V3.2, not what the batch before it left over."""
    config, schedule, plans = recipe(size)
    tokens = 0
    for stage, (first, _), (last, plan) in zip(config.stages, plans[::2], plans[1::2], strict=True):
        assert schedule.tokens_before(first) == tokens
        tokens += stage.tokens
        if stage.attention == "indexer_warmup":
            assert (last + 1 - first, stage.tokens) == (1000, 1000 * plan.tokens)


@pytest.mark.parametrize("size", PUBLISHED)
def test_pretraining_does_not_fall_back_on_the_shipped_text(size: str) -> None:
    run = f"run=pretrain_{size}"
    assert refusal(run) == (
        "data.path is not set; give data.path=<folder from openv4 prepare>, or several as "
        "data.sources=[{path:<folder>,weight:<share>},...]"
    )
    assert refusal(run, "data.path=").startswith("data.path is not set"), "a shell variable that was not set"
    assert load_config([run, "data=./x"]).data.path == "./x"
    config = load_config([run, "data.sources=[{path:a},{path:b}]"])
    assert (config.data.path, [source.path for source in config.data.sources]) == (None, ["a", "b"])
    assert from_yaml(TrainConfig, to_yaml(config)) == config
    assert load_config([run, "data=king_james"]).data.path is None, "the shipped text, by name"
    assert "keep one" in refusal(run, "data.path=a", "data.sources=[{path:b}]")


# Values.


def test_numbers_in_every_spelling() -> None:
    config = load_config(["stages.0.lr=1e-4", "optim.adamw.eps=1e-20", "steps=3.0", "grad_clip=2", "seed=-7"])
    assert (config.stages[0].lr, config.optim.adamw.eps, config.steps, config.seed) == (1e-4, 1e-20, 3, -7)
    assert type(config.grad_clip) is float and type(config.steps) is int
    for text in ("1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4"):
        assert from_yaml(TrainConfig, changed(f"stages.0.lr={text}")).stages[0].lr == 1e-4, text
    assert from_yaml(TrainConfig, changed("steps=1e3")).steps == 1000
    assert from_yaml(TrainConfig, changed("grad_clip=null")).grad_clip is None
    for text in ("1e-4", "1.0e-4", "0.0001", "1E-4"):
        saved = saved_smoke().replace(
            "micro_batch_tokens: 2048", f"micro_batch_tokens: 2048\nsteps: 5\ngrad_clip: {text}"
        )
        saved = re.sub("(?m)^(steps: null|grad_clip: 1.0)\n", "", saved)
        assert from_yaml(TrainConfig, saved).grad_clip == 1e-4, text


def test_lists() -> None:
    config = load_config(["stages.1.lr=2e-3", "stages.0.warmup_steps=4"])
    assert (config.stages[1].lr, config.stages[0].warmup_steps, config.stages[1].lr_end) == (2e-3, 4, 6e-4)
    config = load_config([f"stages=[{STAGE}]"])
    assert [(stage.name, stage.lr, stage.attention) for stage in config.stages] == [("only", 1e-3, "sparse")]
    config = load_config(["model=nano", "model.num_hidden_layers=2", "model.compress_ratios=[4,0]"])
    assert config.model.compress_ratios == (4, 0, 0), "the MTP block's entry may be left out"
    config = load_config(["data.sources=[{path:a},{path:b,weight:2}]"])
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 1.0), ("b", 2.0)]


def test_nested_dataclasses_that_are_null_by_default() -> None:
    assert load_config(["model=nano"]).model.rope_scaling is None
    assert load_config(["model=nano", "model.rope_scaling.factor=4"]).model.rope_scaling == YarnConfig(factor=4.0)
    assert load_config(["model=v4_flash", "model.rope_scaling=null"]).model.rope_scaling is None


def test_prefixes_of_hydra() -> None:
    assert load_config(["++steps=4"]).steps == load_config(["+steps=4"]).steps == 4
    assert load_config(["seed=9", "~seed"]).seed == 0, "a removed key takes the dataclass's default"
    assert "unknown key" in refusal("+foo=1")
    assert "unknown key" in refusal("++model.foo=1")
    assert "model is not set" in refusal("~model")


TEXTS = [
    "And God said, Let there be light: and there was light.",
    "It's",
    "'tis",
    '"Hello," he said',
    "'a' and 'b'",
    "(a) [b] {c}",
    "a=b",
    "a;b#c%d&e",
    "<think>",
    "1e3",
    "007",
    "true",
    "x,",
    "~a",
    "a\\b",
    "a\\'b",
    "ends with \\",
    "  blanks around  ",
    "tab\tand\nnew line",
    "\u00fc \u4f60\u597d \U0001f389",
    "$HOME ${",
    "",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_text_is_taken_as_it_is(text: str) -> None:
    """The shell has eaten the user's quotes: commas, apostrophes and all must not be Hydra's syntax again."""
    typed = text.replace("${", "\\${")
    config = load("generate", GenerateConfig, ["checkpoint=x", f"prompt={typed}"])
    assert config.prompt == text
    assert from_yaml(GenerateConfig, to_yaml(config)) == config


def test_a_text_may_be_quoted_as_hydra_wants_it() -> None:
    for typed in ("'a, b'", '"a, b"'):
        assert load("generate", GenerateConfig, ["checkpoint=x", f"prompt={typed}"]).prompt == "a, b"
    assert load_config(["logging.sample_prompt=null"]).logging.sample_prompt is None
    assert load_config(["logging.sample_prompt='null'"]).logging.sample_prompt == "null"
    assert refusal("output=null") == "output=None must be text"


FOLDERS = [
    "plain",
    "with space",
    "it's",
    'a "b" c',
    "a=b",
    "a,b",
    "(c)",
    "[d]",
    "\u00fc\u4f60\u597d",
    "2024",
    "e\\f",
    "g'",
]


@pytest.mark.parametrize("name", FOLDERS, ids=ascii)
def test_data_is_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for typed in (name, f"./{name}", str(tmp_path / name)):
        (override,) = normalize("evaluate", EvaluateConfig, [f"data={typed}"])
        parsed = OverridesParser.create().parse_override(override)
        assert (parsed.key_or_group, parsed.value()) == ("data.path", typed)
    config = load("evaluate", EvaluateConfig, ["checkpoint=x", f"data={name}"])
    assert config.data.path == name
    assert from_yaml(EvaluateConfig, to_yaml(config)) == config


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(["data=king_james"]).data.path is None, "the preset"
    assert load_config(["data=./it's, later"]).data.path == "./it's, later", "the loader says what is wrong there"
    assert refusal("data=king_jamse").endswith("no such folder, no such preset; did you mean king_james?")
    assert "no such folder" in refusal("checkpoint=x", "data=mine", name="evaluate", schema=EvaluateConfig)
    assert "keep one" in refusal("data.path=a", "data.sources=[{path:b}]")


# Mistakes.

UNKNOWN = [
    ("modl=nano", "modl", "model"),
    ("step=3", "step", "steps"),
    ("model.hiden_size=3", "model.hiden_size", "hidden_size"),
    ("model.rope_scaling.facto=3", "model.rope_scaling.facto", "factor"),
    ("data.pth=x", "data.pth", "path"),
    ("data.sources=[{path:a,wight:1}]", "data.sources.0.wight", "weight"),
    ("optim.muon.momentm=0.9", "optim.muon.momentm", "momentum"),
    ("optim.adamw.bta1=0.9", "optim.adamw.bta1", "beta1"),
    ("stages.1.warmup=3", "stages.1.warmup", "warmup_steps"),
    ("checkpoint.evry=3", "checkpoint.evry", "every"),
    ("validation.token=3", "validation.token", "tokens"),
    ("logging.wandbb=offline", "logging.wandbb", "wandb"),
    ("precision.compte=bf16", "precision.compte", "compute"),
]


@pytest.mark.parametrize(("override", "path", "nearest"), UNKNOWN)
def test_unknown_keys(override: str, path: str, nearest: str) -> None:
    assert changed_refusal(override) == f"{path}: unknown key; did you mean {nearest}?"


def test_an_unknown_key_like_no_other_lists_them_all() -> None:
    assert refusal("modl=nano") == "modl: unknown key; did you mean model?"
    message = refusal("validation.zzz=1")
    assert message == "validation.zzz: unknown key; choose from every, tokens, byte_model_order"


def test_unknown_presets() -> None:
    assert refusal("model=nanoo") == "model=nanoo: no such preset; did you mean nano?"
    assert refusal("run=smok") == "run=smok: no such preset; did you mean smoke?"
    assert refusal("precision=fp99").startswith("precision=fp99: no such preset; choose from bf16, fp32")
    assert "choose from nano, small, tiny, v4_flash, v4_pro" in refusal("model={hidden_size:3}")


WRONG = [
    ("logging.wandb=onlin", "logging.wandb='onlin'; did you mean online?"),
    ("stages.0.attention=spars", "stages.0.attention='spars'; did you mean sparse?"),
    ("stages.1.lr_shape=cosin", "stages.1.lr_shape='cosin'; did you mean cosine?"),
    ("model.hc_init=none", "model.hc_init='none'; choose from zero, identity"),
    ("device=tpu", "device='tpu'; did you mean cpu?"),
    ("steps=abc", "steps='abc' must be a whole number"),
    ("steps=1.5", "steps=1.5 must be a whole number"),
    ("steps=true", "steps=True must be a whole number"),
    ("steps=[1]", "steps=[1] must be a whole number"),
    ("model.hidden_size=null", "model.hidden_size=None must be a whole number"),
    ("model.hidden_size='64'", "model.hidden_size='64' must be a whole number"),
    ("grad_clip=big", "grad_clip='big' must be a number such as 1.0e-4"),
    ("data.verify=1", "data.verify=1 must be true or false"),
    ("name.first=1", "name={'first': 1} must be text"),
    ("checkpoint=3", "checkpoint=3 must hold the keys of CheckpointConfig"),
    ("stages=3", "stages=3 must be a list"),
    ("stages=[1]", "stages.0=1 must hold the keys of Stage"),
    ("model.compress_ratios=4", "model.compress_ratios=4 must be a list"),
    ("model.compress_ratios=[0,a]", "model.compress_ratios.1='a' must be a whole number"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_wrong_types_and_values(override: str, message: str) -> None:
    assert changed_refusal(override) == message


OUT_OF_RANGE = [
    "steps=0",
    "checkpoint.every=-1",
    "checkpoint.keep=0",
    "validation.every=-1",
    "validation.tokens=0",
    "validation.byte_model_order=-1",
    "validation.byte_model_order=7",
    "logging.every=0",
    "logging.sample_tokens=0",
    "logging.peak_tflops=0",
    "micro_batch_tokens=0",
    "grad_clip=0",
    "grad_clip=nan",
    "threads=0",
    "threads=-1",
    "data.workers=-1",
    "model.vocab_size=0",
    "model.hidden_size=-1",
    "model.hc_mult=0",
    "model.swiglu_limit=-1",
    "model.swiglu_limit=nan",
    "model.rms_norm_eps=0",
    "model.rope_theta=inf",
    "model.initializer_range=-0.1",
    "model.rope_scaling.factor=0",
    "model.bos_token_id=-1",
    "optim.muon.momentum=1",
    "optim.muon.momentum=nan",
    "optim.adamw.eps=0",
    "name=",
    "output=",
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_out_of_range(override: str) -> None:
    key, _, value = override.partition("=")
    message = changed_refusal(override)
    assert key in message
    assert not value or value.removeprefix("+") in message or f"{float(value)}" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages=[]", "stages is empty"),
        ("stages.0.lr=0", "stages.0: stage 'short': lr = 0.0"),
        ("stages.0.lr=nan", "lr = nan"),
        ("stages.0.batch_tokens=1000", "multiple of sequence_length = 128, e.g. 1024"),
        ("stages.1.lr_end=null", "lr_shape = cosine"),
        ("stages.0.batch_ramp_tokens=0", "set both or none"),
        ("stages.0.warmup_steps=1000000", "stage 'short': warmup_steps = 1000000: the stage holds 24 steps"),
        (
            "model.max_position_embeddings=200",
            "'long' has sequence_length=256, beyond model.max_position_embeddings=200",
        ),
        ("model.num_experts_per_tok=99", "model.num_experts_per_tok=99 exceeds the experts"),
        ("model.o_groups=3", "model.o_groups=3 must divide num_attention_heads"),
        ("model.qk_rope_head_dim=31", "must be even"),
        ("model.qk_rope_head_dim=1000", "exceeds head_dim"),
        ("model.index_head_dim=8", "below qk_rope_head_dim"),
        ("model.compress_ratios=[0,4]", "compress_ratios has 2 entries"),
        ("model.compress_ratios=[0,-4,4,4,0]", "whole numbers, 0 or more"),
        ("model.num_nextn_predict_layers=3", "compress_ratios has 5 entries"),
        ("model.n_shared_experts=2", "must be 1"),
        ("model.layer_types=[foo]", "choose from sliding_attention"),
        ("model.eos_token_id=4096", "beyond vocab_size=4096"),
        ("data.sources=[{path:a,weight:0}]", "data.sources.0: weight=0.0 of a: must be positive"),
        (f"stages=[{STAGE},{{name:b}}]", "stages.1.tokens is not set; give stages.1.tokens=..., stages.1.sequence_len"),
    ],
)
def test_impossible_combinations(override: str, words: str) -> None:
    assert words in changed_refusal(override)


@pytest.mark.parametrize("override", ["foo", "=3", "steps", "model.hidden_size", "stages[0].lr=1e-3", "--", "+", "~"])
def test_what_is_no_override(override: str) -> None:
    assert "is not key=value" in refusal(override)


def test_bytes_that_are_no_utf8() -> None:
    """As Python hands them on from the command line."""
    for override in ("output=caf\udce9", "seed=\udcff", "data=./\udcff"):
        assert "is not UTF-8" in refusal(override)


def test_an_unclosed_list_says_which() -> None:
    assert "stages=[{name:a" in refusal("stages=[{name:a")


def test_indices_of_lists() -> None:
    assert "stages" in refusal("stages.7.lr=1") and "out of range" in refusal("stages.7.lr=1")
    assert "stages.0.lr" in refusal("stages.x.lr=1")


def test_what_other_commands_refuse() -> None:
    assert refusal(name="export", schema=ExportConfig).startswith("checkpoint is not set; give checkpoint=..., output=")
    assert "format='fp31'; did you mean fp32?" in refusal(
        "checkpoint=a", "output=b", "format=fp31", name="export", schema=ExportConfig
    )
    assert "top_p=1.1" in refusal("checkpoint=a", "top_p=1.1", name="generate", schema=GenerateConfig)
    assert "tokens=-1" in refusal("checkpoint=a", "tokens=-1", name="evaluate", schema=EvaluateConfig)
    assert "vocab_size=10" in refusal("input=a", "output=b", "vocab_size=10", name="prepare", schema=PrepareConfig)
    bad: list[tuple[type[Any], dict[str, Any], dict[str, list[float]]]] = [
        (ExportConfig, {"checkpoint": "a", "output": "b"}, {"max_shard_gb": [0, -1, math.nan, math.inf]}),
        (
            GenerateConfig,
            {"checkpoint": "a"},
            {"top_p": [0, math.nan], "temperature": [-1, math.inf, math.nan], "max_new_tokens": [0]},
        ),
        (EvaluateConfig, {"checkpoint": "a"}, {"tokens": [0], "sequence_length": [0], "batch_tokens": [0]}),
        (
            PrepareConfig,
            {"input": "a", "output": "b"},
            {"validation_fraction": [1, -0.1, math.nan], "fim_rate": [2, math.nan], "workers": [0]},
        ),
    ]
    for schema, good, wrong in bad:
        for key, values in wrong.items():
            for value in values:
                with pytest.raises(ValueError, match=key):
                    schema(**good, **{key: value})


# Saved configs.


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=v4_pro", "precision=bf16", "steps=7"],
        ["data=./a b, c='d'"],
        ["data.sources=[{path:a},{path:b,weight:0.1}]", "logging.sample_prompt=null"],
        ["stages.0.lr=1e-7", "optim.adamw.eps=1e-30"],
        ["name=\\${not a key}", "output=null and yes: 1e3 # \u4f60"],
    ],
)
def test_round_trip_through_yaml(overrides: list[str]) -> None:
    config = load_config(overrides)
    text = to_yaml(config)
    assert from_yaml(TrainConfig, text) == config
    assert to_yaml(from_yaml(TrainConfig, text)) == text


@pytest.mark.parametrize(
    "text", ["${", "${a", "a\\${b}", "\\\\${b}", "${oc.env:HOME}", "null", "1e-4", "#", "'", "- a"]
)
def test_any_text_survives_the_file(text: str) -> None:
    config = replace(
        from_yaml(TrainConfig, saved_smoke()), data=DataConfig(path=text), logging=LoggingConfig(sample_prompt=text)
    )
    assert from_yaml(TrainConfig, to_yaml(config)) == config


def test_saved_config_is_checked_as_strictly() -> None:
    text = saved_smoke()
    for old, new, words in (
        ("seed: 0", "sede: 0", "sede: unknown key; did you mean seed?"),
        ("seed: 0", "seed: x", "seed='x' must be a whole number"),
        ("name: smoke\n", "", "name is not set"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            from_yaml(TrainConfig, text.replace(old, new, 1))


# Nothing from the outside gets in.


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolved config is written to disk and sent to W&B; a secret must not come along."""
    monkeypatch.setenv("SECRET", SECRET)
    for override in ("data.path=${oc.env:SECRET}", "name=x${oc.env:SECRET}", "seed=${oc.env:SECRET}"):
        message = refusal(override)
        assert SECRET not in message and "let the shell put other values in" in message
    for value in (
        "'x${oc.env:SECRET}'",
        "'${ oc.env : SECRET }'",
        "'\\\\${oc.env:SECRET}'",
        "'${oc.decode:${oc.env:SECRET}}'",
        "{path:'${oc.env:SECRET}'}",
        "[{path:'${oc.env:SECRET}'}]",
    ):
        message = changed_refusal(f"extra={value}")
        assert SECRET not in message and "let the shell put other values in" in message
    assert load_config(["output=${name}/x"]).output == "smoke/x", "other keys may be named"
    assert load_config(["name=\\${oc.env:SECRET}", "output=x"]).name == "${oc.env:SECRET}", "as plain text"
    assert "'nothing' not found" in refusal("name=${nothing}")
    with pytest.raises(ConfigError, match="only"):  # a config.yaml that came with somebody's checkpoint
        from_yaml(TrainConfig, saved_smoke().replace("name: smoke", "name: ${oc.env:SECRET}"))


def test_targets_are_never_instantiated(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for override in (
        f"model={{_target_:os.mkdir,path:'{trap}'}}",
        f"data.sources=[{{_target_:os.mkdir,path:'{trap}'}}]",
        f"extra={{_target_:os.mkdir,path:'{trap}'}}",
        f"stages.0={{_target_:os.mkdir,_args_:['{trap}']}}",
    ):
        assert "_target_: unknown key" in changed_refusal(override) or "extra: unknown" in changed_refusal(override)
        assert not trap.exists()
    assert "model._target_: unknown key" in refusal("model._target_=os.getcwd")


def test_python_tags_of_yaml_are_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    text = saved_smoke() + f"extra: !!python/object/apply:os.mkdir ['{trap}']\n"
    with pytest.raises(Exception, match="python/object/apply"):
        from_yaml(TrainConfig, text)
    assert not trap.exists()


# The architecture's own checks, for those who build it in Python.


@functools.cache
def nano() -> ModelConfig:
    return load_config(["model=nano"]).model


def model_values(**changes: Any) -> dict[str, Any]:
    return asdict(nano()) | {"layer_types": ()} | changes


def test_numbers_of_a_wrong_kind_are_refused_in_python_too() -> None:
    for key, value in (
        ("vocab_size", True),
        ("head_dim", 32.0),
        ("hidden_size", "64"),
        ("hidden_size", 10**30),
        ("swiglu_limit", "7"),
        ("rms_norm_eps", float("nan")),
        ("compress_ratios", (0, 4.0, 16, 4, 0)),
        ("compress_ratios", (0, "4", 16, 4, 0)),
    ):
        with pytest.raises(ModelConfigError, match=key):
            ModelConfig(**model_values(**{key: value}))
    with pytest.raises(ModelConfigError, match=re.escape("model.rope_scaling.factor=0")):
        YarnConfig(factor=0)


def test_layer_types_and_ratios_must_agree() -> None:
    sliding, sparse, heavy = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
    good = ModelConfig(**model_values(layer_types=(sliding, heavy, sparse, sparse)))
    assert good.kinds == ("swa", "hca", "csa", "csa", "swa"), "any ratio with any kind of compression"
    with pytest.raises(ModelConfigError, match=re.escape("layer_types[1]")):
        ModelConfig(**model_values(layer_types=(sliding, sliding, sparse, sparse)))
    with pytest.raises(ModelConfigError, match=re.escape("layer_types[0]")):
        ModelConfig(**model_values(layer_types=(sparse, heavy, sparse, sparse)))
