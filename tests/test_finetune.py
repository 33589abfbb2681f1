"""Fine-tuning: released weights in, trained on conversations with adapters or whole, out in the released format."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import release_fixture as oracle
import torch
from cli_cases import TEXTS, Run, console, prepared, spoil, untouched
from finetune_cases import QUICK, SIZES, SLACK, assert_quantised, conversations, quick_config, write_base, write_chat
from lora_cases import randomise
from model_cases import relative_rms
from run_cases import OVERRIDES, contents, packed_batch, plan, rows, summary
from safetensors.torch import load_file
from torch import Tensor

import openv4.kernels.moe as moe
import openv4.train.loop as loop
from openv4.data.packing import pack
from openv4.data.shards import PreparedData
from openv4.model import ModelConfig, Transformer, load_pretrained
from openv4.model.config import WeightsError
from openv4.model.lora import lora_parameters
from openv4.model.loss import Counts, training_losses
from openv4.model.released import released_tensors
from openv4.optim.groups import build_optimizers
from openv4.train.checkpoint import base_of, find_tokenizer, load_model, split_experts
from openv4.train.config import CheckpointError, ConfigError, TrainConfig, load_config
from openv4.train.loop import build_model, train, training_step
from openv4.train.parallel import Alone

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")

CPU = torch.device("cpu")
EVERYTHING = "lora.targets=[attention,shared_experts,experts,compressor,indexer]"
WITH_INDEXER = [EVERYTHING, "stages.0.indexer_weight=0.01"]
UNTOUCHED = ("mtp.", ".indexer.", "gate.bias", "tid2eid")  # where nothing asks for their training


@pytest.fixture(scope="module", autouse=True)
def _no_plot() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_loss", lambda run: run / "plots" / "loss.png")
        yield


def refusal(*overrides: str) -> str:
    """The message of what these overrides cause in ``load_config``, one line."""
    with pytest.raises((ConfigError, WeightsError, ValueError)) as raised:
        load_config(overrides)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


# `model.pretrained`.


def test_the_architecture_is_that_of_the_folder(release: Path) -> None:
    given = f"model.pretrained={release}"
    whole = ModelConfig.from_json(release)
    for overrides in (["run=lora", given, "data.path=x"], [given, "data.path=x", "run=finetune"]):
        config = load_config([*overrides, *QUICK])
        assert (config.model, config.pretrained) == (whole, str(release))
        assert (config.lora is None) == ("run=finetune" in overrides)
    assert whole.hidden_size == SIZES["hidden_size"] and whole.num_nextn_predict_layers == 1
    smoke = load_config(["run=smoke", given])
    assert (smoke.model, smoke.lora, smoke.epochs, len(smoke.stages)) == (whole, None, None, 2)
    bare = load_config(["run=lora", given, "data.path=x", "model.num_nextn_predict_layers=0", *QUICK]).model
    assert bare.compress_ratios == whole.compress_ratios[:3] and bare.num_nextn_predict_layers == 0
    assert asdict(bare) == asdict(whole) | {
        "num_nextn_predict_layers": 0,
        "compress_ratios": bare.compress_ratios,
        "layer_types": bare.layer_types,
    }


def test_dropping_the_mtp_block(release: Path, chat: Path, tmp_path: Path) -> None:
    """What is left is the same model; a checkpoint of it has no MTP tensors."""
    given = ("model.num_nextn_predict_layers=0", "steps=1")
    bare = build_model(quick_config("finetune", release, chat, tmp_path / "run", *given), CPU)
    whole = build_model(quick_config("finetune", release, chat, tmp_path / "run"), CPU)
    tokens = torch.arange(60)[None]
    assert torch.equal(bare(tokens), whole(tokens))
    names = set(whole.state_dict()) - set(bare.state_dict())
    assert names and all(name.startswith("mtp.") for name in names)
    run = train(quick_config("finetune", release, chat, tmp_path / "run", *given))
    trained = load_pretrained(run / "checkpoints" / "step_1")
    assert trained.config.num_nextn_predict_layers == 0


def test_another_recipe_from_pretrained_weights(release: Path, tmp_path: Path) -> None:
    """`run=smoke model.pretrained=` goes on with pretraining; its first loss is that of the released weights."""
    data = prepared(tmp_path / "data", TEXTS)
    given = ["run=smoke", f"model.pretrained={release}", f"data={data}", f"output={tmp_path / 'run'}", *OVERRIDES[8:]]
    config = replace(load_config(given), steps=1)
    (row,) = rows(train(config))
    model = load_pretrained(release, torch.float32)
    batch = loop.open_dataset(config.data, tmp_path, config.model).loader(config.seed, 0).next_batch(2, 64)
    losses = training_losses(model, batch.tokens, batch.segments, "dense")
    expected = float(losses.main.detach() / Counts.of([batch.segments]).main)
    assert row["train/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("run", ["lora", "finetune"])
def test_folders_that_are_none(run: str, release: Path, chat: Path, tmp_path: Path) -> None:
    data = f"data.path={chat}"
    assert refusal(f"run={run}", data) == (
        "model.pretrained is not set; give model.pretrained=<folder of released weights>"
    )
    assert refusal(f"run={run}", data, "model.pretrained=").startswith("model.pretrained is not set")
    assert str(tmp_path / "nowhere") in refusal(f"run={run}", data, f"model.pretrained={tmp_path / 'nowhere'}")
    file = release / "config.json"
    assert str(file) in refusal(f"run={run}", data, f"model.pretrained={file}")
    (tmp_path / "config.json").write_bytes(file.read_bytes())
    message = refusal(f"run={run}", data, f"model.pretrained={tmp_path}")
    assert message.startswith(f"{tmp_path}: neither model.safetensors nor ") and "name a folder of released" in message
    for content, words in (("{", "config.json"), (json.dumps({"model_type": "llama"}), "is not DeepSeek-V4")):
        (tmp_path / "config.json").write_text(content)
        assert words in refusal(f"run={run}", data, f"model.pretrained={tmp_path}")


def test_what_contradicts_the_folder(refused: Callable[..., str], release: Path, chat: Path, tmp_path: Path) -> None:
    command = ["train", "run=lora", f"model.pretrained={release}", f"data.path={chat}", f"output={tmp_path / 'run'}"]
    assert refused(*command, *QUICK, "model.hidden_size=96") == (
        f"model.hidden_size=96: {release} has 64; leave it out"
    )
    assert refused(*command, *QUICK, "model.swiglu_limit=7.0").startswith("model.swiglu_limit=7.0: ")
    message = refused(*command, *QUICK, "model=nano")
    assert message.startswith("model.") and message.endswith("; leave it out")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert console(*command, *QUICK, "steps=1") == 0, "the way out works in the same folder"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=null", "precision.base=released"], "precision.base=released is for frozen weights; set lora.rank"),
        (["lora=null", "precision.base=bf16"], "precision.base=bf16 is for frozen weights"),
        (["precision.base=fp4"], "precision.base='fp4'"),
        (["pretrained=null", "model=nano"], "lora adapts a pretrained model; give model.pretrained="),
        (["stages.0.bias_speed=0.001"], "stages.0.bias_speed=0.001: with lora the router's biases are frozen; set 0"),
        (["stages.0.indexer_weight=0.01"], "stages.0 trains the indexer, which lora freezes; set stages.0.indexer"),
        (["stages.0.attention=indexer_warmup"], "stages.0 trains the indexer, which lora freezes"),
        (["lora.targets=[indexer]"], "lora.targets=['indexer']: stages.0 does not train the indexer; give it"),
        (["lora.targets=[attention,indexer]"], "lora.targets=['attention', 'indexer']: stages.0 does not train"),
        (
            [*WITH_INDEXER[1:], "stages.0.attention=dense", "lora.targets=[indexer]"],
            "lora.targets=['indexer']: stages.0 does not train the indexer",
        ),
        (["lora.targets=[attn]"], "lora.targets = ['attn']: choose from attention, wq_a"),
        (["lora.targets=[]"], "lora.targets = []: choose from"),
        (["lora.targets=attention"], "lora.targets='attention' must be a list"),
        (["lora.rank=0"], "lora.rank = 0: choose a whole number"),
        (["lora.alpha=-1"], "lora.alpha = -1.0: choose a positive number"),
        (["lora.dropout=0.1"], "lora.dropout = 0.1: PEFT has no dropout for wo_a"),
        (["lora.dropout=1"], "lora.dropout = 1.0: choose a number in [0, 1)"),
        (["lora.rnak=4"], "lora.rnak: unknown key; did you mean rank?"),
        (["epochs=0"], "epochs=0.0 must be positive, or null"),
        (["epochs=-1"], "epochs=-1.0 must be positive, or null"),
        (["epochs=inf"], "epochs=inf must be positive, or null"),
        (["epochs=nan"], "epochs=nan must be positive, or null"),
        (["epochs=many"], "epochs='many' must be a number"),
        (["stages.0.sequence_length=1024", "stages.0.batch_tokens=1024"], "stages: 'lora' has sequence_length=1024"),
    ],
)
def test_contradictions(overrides: list[str], message: str, release: Path) -> None:
    given = ["run=lora", f"model.pretrained={release}", "data.path=x"]
    assert refusal(*given, *QUICK, *overrides).startswith(message)


def test_a_target_that_the_model_lacks(refused: Callable[..., str], chat: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", compress_ratios=[16, 0, 0, 0])
    given = [f"model.pretrained={base}", f"data.path={chat}", f"output={tmp_path / 'run'}"]
    message = refused("train", "run=lora", *given, *QUICK, *WITH_INDEXER)
    assert message.startswith("lora.targets = ['attention', 'shared_experts', 'experts', 'compressor', 'indexer']: ")
    assert message.endswith("no layer of this model has indexer; leave it out")


# What the base is kept in.


@pytest.fixture(scope="module")
def prepared_chat(release: Path, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversations, prepared once."""
    folder = tmp_path_factory.mktemp("prepared") / "chat"
    assert console("prepare", "kind=chat", f"input={chat}", f"tokenizer={release}", f"output={folder}") == 0
    return folder


class Kept:
    """The models that runs have built."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.models: list[Transformer] = []

        def build(config: TrainConfig, device: torch.device, processes: Alone) -> Transformer:
            self.models.append(build_model(config, device, processes))
            return self.models[-1]

        patch.setattr(loop, "build_model", build)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


def resident_bytes(model: Transformer) -> int:
    """Of parameters and buffers but the adapters, those that no file holds included."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(tensor.untyped_storage().nbytes() for name, tensor in held.items() if ".lora." not in name)


@pytest.mark.parametrize("variant", ["instruct", "base"])
def test_one_training_for_every_base(variant: str, chat: Path, kept: Kept, tmp_path: Path) -> None:
    """float32, bfloat16 and the released codes hold the same numbers, and each is used in the dtype of the streams:
    all metrics are equal to the last bit. What is resident is no larger than the files."""
    base = write_base(tmp_path / "base", variant)
    found, sizes = {}, {}
    for kind in ("fp32", "bf16", "released"):
        options = [*WITH_INDEXER, f"precision.base={kind}", "steps=2"]
        found[kind] = rows(train(quick_config("lora", base, chat, tmp_path / kind, *options)))
        sizes[kind] = resident_bytes(kept.models[-1])
    assert found["fp32"] == found["bf16"] == found["released"]
    assert found["fp32"][1]["train/loss"] < found["fp32"][0]["train/loss"] - 0.2
    raw = oracle.read_release(base)
    assert sizes["released"] == sum(len(stored.data) for stored in raw.values())
    numbers = {name: value.size for name, value in oracle.values(raw).items()}
    wide = sum(count for name, count in numbers.items() if raw[name].dtype == "I64")
    full = sum(count for name, count in numbers.items() if raw[name].dtype == "F32")
    narrow = sum(numbers.values()) - wide - full
    assert sizes["bf16"] == 8 * wide + 4 * full + 2 * narrow
    assert sizes["fp32"] == 8 * wide + 4 * (full + narrow)
    assert sizes["released"] < sizes["bf16"] < sizes["fp32"]


@pytest.mark.parametrize("elements", [None, 1, 3 * 64 * 32])
def test_adapters_of_experts_that_stay_quantised(
    elements: int | None, release: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients, all experts at once, one by one, and three and one, against dense experts."""
    if elements is not None:
        monkeypatch.setattr(moe, "CPU_ELEMENTS", elements)
    results = []
    for kind in ("released", "fp32"):
        options = [*WITH_INDEXER, f"precision.base={kind}"]
        model = build_model(quick_config("lora", release, chat, tmp_path, *options), CPU)
        randomise(model)
        batch = packed_batch(SIZES["vocab_size"], rows=2, width=96)
        losses = training_losses(model, batch.tokens, batch.segments, "sparse", mtp=False, indexer=True)
        total = losses.total(Counts.of([batch.segments]), 0.0, 0.1, 0.5)
        total.backward()
        results.append((total, {name: p.grad for name, p in lora_parameters(model).items()}))
    (ours, gradients), (theirs, expected) = results
    # The same products of the same numbers; blocks of experts change which product sums up first at most.
    assert relative_rms(ours, theirs) < 1e-6
    assert len(gradients) == len(expected) > 60
    for name, gradient in gradients.items():
        other = expected[name]
        assert gradient is not None and other is not None and other.any(), name
        assert relative_rms(gradient, other) < 1e-5, name


# LoRA.


@pytest.fixture(scope="module")
def lora_run(
    release: Path, prepared_chat: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[TrainConfig, Transformer]:
    """Six steps on released codes, adapters everywhere, every checkpoint kept; and the model as it was then."""
    output = tmp_path_factory.mktemp("lora") / "run"
    options = [*WITH_INDEXER, "steps=6", "checkpoint.every=1", "checkpoint.keep=6", "lora.rank=4"]
    config = quick_config("lora", release, prepared_chat, output, *options)
    with pytest.MonkeyPatch.context() as patch:
        kept, before = Kept(patch), contents(release)
        train(config)
        assert contents(release) == before
    return config, kept.models[0]


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)


def test_only_adapters_change(lora_run: tuple[TrainConfig, Transformer]) -> None:
    config, trained = lora_run
    fresh = build_model(config, CPU)
    for name, tensor in fresh.state_dict().items():
        same = torch.equal(raw_bytes(tensor), raw_bytes(trained.state_dict()[name]))
        assert same == (".lora." not in name), name
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == set(lora_parameters(trained))
    run = Path(config.output)
    losses = [row["train/loss"] for row in rows(run)]
    assert losses[-1] < losses[0] - 1


def test_a_checkpoint_holds_adapters_alone(lora_run: tuple[TrainConfig, Transformer]) -> None:
    config, trained = lora_run
    folder = Path(config.output) / "checkpoints" / "step_6"
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == weights | {
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    state = load_file(folder / "optimizer.safetensors")
    names = {name.partition(".")[2] for name in state if not name.startswith("rng.")}
    assert names == set(split_experts(lora_parameters(trained)))
    moments = sum(tensor.numel() for name, tensor in state.items() if name.startswith(("exp_avg.", "exp_avg_sq.")))
    assert moments == 2 * sum(p.numel() for p in lora_parameters(trained).values())
    again = load_model(config.output)
    tokens = torch.arange(90)[None]
    trained.eval(), again.eval()
    assert relative_rms(again(tokens), trained(tokens)) < 1e-6, "the adapters on dense weights"
    assert relative_rms(again(tokens), load_pretrained(str(config.pretrained), torch.float32)(tokens)) > 0.1
    assert base_of(folder) == Path(str(config.pretrained))
    assert find_tokenizer(folder) == Path(config.output) / "tokenizer.json"


def test_peft_loads_a_checkpoint(lora_run: tuple[TrainConfig, Transformer], tmp_path: Path) -> None:
    """On transformers' model of the same weights in float32, with our logits."""
    transformers = pytest.importorskip("transformers", reason="installed by `make test`")
    peft = pytest.importorskip("peft", reason="installed by `make test`")
    transformers.utils.logging.disable_progress_bar()
    config, trained = lora_run
    assert console("export", f"checkpoint={config.pretrained}", f"output={tmp_path / 'fp32'}", "format=fp32") == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp32", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    folder = Path(config.output) / "checkpoints" / "step_6"
    adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    tokens = torch.arange(1, 97)[None]
    with torch.no_grad():
        assert relative_rms(trained.eval()(tokens), adapted(tokens, use_cache=False).logits) < 1e-5
        with adapted.disable_adapter():
            assert relative_rms(trained(tokens), adapted(tokens, use_cache=False).logits) > 0.1


@pytest.mark.parametrize("step", [1, 4])
def test_resumed_lora(step: int, lora_run: tuple[TrainConfig, Transformer], tmp_path: Path) -> None:
    """Killed after the checkpoint of a step: the last checkpoint is that of the run that was not, byte for byte."""
    config, _ = lora_run
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    for later in range(step + 1, 7):
        shutil.rmtree(run / "checkpoints" / f"step_{later}")
    (run / "checkpoints" / "latest").write_text(f"step_{step}\n")
    (run / "summary.json").unlink()
    train(replace(config, output=str(run)))
    assert_same_end(run, Path(config.output), 6)


def assert_same_end(run: Path, straight: Path, steps: int) -> None:
    ours, theirs = (contents(folder / "checkpoints" / f"step_{steps}") for folder in (run, straight))
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert rows(run) == rows(straight)
    assert summary(run) == summary(straight)


def test_resumed_with_dropout(release: Path, prepared_chat: Path, openv4: Run, tmp_path: Path) -> None:
    """The masks go on where they were, though blocks are computed again; they act, but not in validation."""
    targets = "lora.targets=[wq_a,wq_b,wkv,wo_b,shared_experts,compressor]"
    options = [targets, "lora.dropout=0.3", "recompute=selective", "checkpoint.every=1", "steps=3"]
    config = quick_config("lora", release, prepared_chat, tmp_path / "straight", *options)
    straight = train(config)
    for steps in (1, 3):
        run = train(replace(config, output=str(tmp_path / "run"), steps=steps))
    assert_same_end(run, straight, 3)
    validated = json.loads((run / "summary.json").read_text())["validation/loss"]
    assert json.loads(openv4("evaluate", f"checkpoint={run}").out)["loss"] == pytest.approx(validated, rel=1e-6)
    assert config.lora is not None
    dry = replace(config, output=str(tmp_path / "dry"), lora=replace(config.lora, dropout=0.0), steps=2)
    assert rows(train(dry))[1]["train/loss"] != rows(straight)[1]["train/loss"]


def test_resumed_on_another_base(release: Path, prepared_chat: Path, tmp_path: Path) -> None:
    """A folder may move, but not change; adapters of other shapes are another run."""
    base = tmp_path / "base"
    shutil.copytree(release, base)
    config = quick_config("lora", base, prepared_chat, tmp_path / "run", "steps=1")
    run = train(config)
    moved = tmp_path / "moved"
    base.rename(moved)
    train(replace(config, pretrained=str(moved), steps=2))
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert base_of(run / "checkpoints" / "step_2") == moved
    spoil(moved / "model.safetensors", "flipped")
    with untouched(run / "checkpoints"), pytest.raises(CheckpointError) as raised:
        train(replace(config, pretrained=str(moved), steps=3))
    assert "step_2: was trained from other weights than those that are in model.pretrained now" in str(raised.value)
    spoil(moved / "model.safetensors", "flipped")
    train(replace(config, pretrained=str(moved), steps=3))
    lora = config.lora
    assert lora is not None
    for changed, words in (
        (replace(lora, rank=8), "lora.rank was 16, now 8"),
        (replace(lora, alpha=1.0), "lora.alpha was 32.0, now 1.0"),
        (replace(lora, targets=("attention",)), "lora.targets.1 was shared_experts, now None"),
    ):
        with untouched(run), pytest.raises(ConfigError, match="holds another run") as refused_:
            train(replace(config, lora=changed, pretrained=str(moved), steps=4))
        assert words in str(refused_.value)
    other = quick_config("finetune", moved, prepared_chat, run, "steps=4")
    with untouched(run), pytest.raises(ConfigError, match="holds another run"):
        train(other)


@pytest.mark.parametrize("targets", [["indexer"], ["wq_a", "indexer"]])
def test_the_indexer_as_a_target(
    targets: list[str], release: Path, prepared_chat: Path, kept: Kept, tmp_path: Path
) -> None:
    """Its loss alone trains it."""
    options = [f"lora.targets=[{','.join(targets)}]", "stages.0.indexer_weight=0.05", "steps=2"]
    run = train(quick_config("lora", release, prepared_chat, tmp_path / "run", *options))
    trained = lora_parameters(kept.models[0])
    assert {name.rsplit(".", 2)[0].endswith("wq_a") for name in trained} == {name == "wq_a" for name in targets}
    for name, parameter in trained.items():
        assert parameter.any(), name  # B was zero
    assert all(row["attn/indexer_kl"] > 0 for row in rows(run))


# All weights.


def released_values(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder by released name, float32 where it is a float."""
    return {name: tensor.detach() for name, tensor in released_tensors(load_pretrained(folder, torch.float32))}


@pytest.fixture(scope="module")
def full_run(release: Path, prepared_chat: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Two steps with Muon in which MTP block, indexer and selection biases have nothing that trains them."""
    output = tmp_path_factory.mktemp("full") / "run"
    weights = ["stages.0.mtp_weight=0", "stages.0.indexer_weight=0", "stages.0.bias_speed=0"]
    return train(quick_config("finetune", release, prepared_chat, output, *weights, "steps=2"))


def test_what_nothing_trains_stays(full_run: Path, release: Path) -> None:
    """Not by weight decay either. All else moves."""
    before, after = released_values(release), released_values(full_run / "checkpoints" / "step_2")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if any(part in name for part in UNTOUCHED)}
    for part in UNTOUCHED:
        assert any(part in name for name in same), part
    assert rows(full_run)[1]["train/loss"] < rows(full_run)[0]["train/loss"] - 0.2


def test_what_is_asked_for_is_trained(release: Path, prepared_chat: Path, tmp_path: Path) -> None:
    """The recipe's own weights for MTP and indexer; the selection biases move in steps of their speed."""
    options = ["stages.0.bias_speed=0.01", "steps=2"]
    run = train(quick_config("finetune", release, prepared_chat, tmp_path / "run", *options))
    before, after = released_values(release), released_values(run / "checkpoints" / "step_2")
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("tid2eid")
    }
    biases = [name for name in before if name.endswith("gate.bias")]
    assert len(biases) == 3  # two learned layers and the MTP block's
    for name in biases:
        moved = (after[name] - before[name]) / 0.01
        assert torch.allclose(moved, moved.round(), atol=1e-4) and 0 < moved.abs().max() < 2.1, name


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_the_optimizer_of_matrices(matrices: str, release: Path, chat: Path, tmp_path: Path) -> None:
    """AdamW is torch's, on the same gradients; the default is Muon."""
    given = [] if matrices == "muon" else ["optim.matrices=adamw"]
    config = quick_config("finetune", release, chat, tmp_path, *given)
    model = build_model(config, CPU)
    optimizers = build_optimizers(model.named_parameters(), model.row_splits(), config.optim)
    assert {row.optimizer for row in optimizers.table() if row.group == "attention"} == {
        {"muon": "Muon", "adamw": "AdamW"}[matrices]
    }
    names = ("layers.1.attn.wq_b.weight", "layers.0.ffn.experts.w1", "layers.2.ffn.gate.weight", "layers.1.hc_ffn_fn")
    parameters = {name: model.get_parameter(name) for name in names}
    copies = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    adamw = config.optim.adamw
    torchs = torch.optim.AdamW(
        copies.values(),
        lr=3e-3,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        foreach=False,
        fused=False,
    )
    for name, parameter in parameters.items():
        parameter.register_hook(lambda gradient, name=name: setattr(copies[name], "grad", gradient.clone()))
    for seed in range(2):
        batch = packed_batch(SIZES["vocab_size"], rows=2, width=64, seed=seed)
        training_step(model, optimizers, [batch], plan(3e-3), None)
        torchs.step()
    for name, parameter in parameters.items():
        # Muon's update has an RMS of 0.18, AdamW's is near one, so they differ.
        equal = relative_rms(parameter - before[name], copies[name] - before[name]) < 1e-4
        assert equal == (matrices == "adamw"), name


def test_export_gives_what_did_not_change_its_bits_back(full_run: Path, release: Path, tmp_path: Path) -> None:
    """Codes, scales and all; what changed is quantised from the trained values."""
    assert console("export", f"checkpoint={full_run}", f"output={tmp_path / 'out'}", "format=fp4+fp8") == 0
    before, after = oracle.read_release(release), oracle.read_release(tmp_path / "out")
    assert before.keys() == after.keys()
    trained = released_values(full_run / "checkpoints" / "step_2")
    for name, stored in before.items():
        assert (after[name].dtype, after[name].shape) == (stored.dtype, stored.shape), name
        if any(part in name for part in UNTOUCHED):
            assert after[name] == stored, name
        elif (scale := oracle.scale_of(name)) in before and name != scale:
            assert after[name] != stored, name
            assert_quantised(name, trained[name].double().numpy(), after, before)
    files = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
    assert all((tmp_path / "out" / file).read_bytes() == (release / file).read_bytes() for file in files)
    model = load_pretrained(tmp_path / "out", torch.float32)
    decoded = oracle.values(after)
    assert all(torch.equal(t.double(), torch.from_numpy(decoded[n])) for n, t in released_tensors(model))


def test_export_with_a_base_by_name(full_run: Path, release: Path, tmp_path: Path) -> None:
    """A checkpoint that left its run has no base of its own, and scales of its own making."""
    shutil.copytree(full_run / "checkpoints" / "step_2", tmp_path / "alone")
    export = ["export", f"checkpoint={tmp_path / 'alone'}", "format=fp4+fp8"]
    assert console(*export, f"output={tmp_path / 'with'}", f"base={release}") == 0
    assert console("export", f"checkpoint={full_run}", f"output={tmp_path / 'run'}", "format=fp4+fp8") == 0
    assert contents(tmp_path / "with") == contents(tmp_path / "run")
    assert console(*export, f"output={tmp_path / 'without'}") == 0
    before, after = oracle.read_release(release), oracle.read_release(tmp_path / "without")
    changed = {name for name in before if name.startswith("mtp.") and before[name] != after[name]}
    assert changed == {f"{name}.{part}" for name in SLACK for part in ("weight", "scale") if name.startswith("mtp.")}
    # The values are the same, in codes of another scale.
    values, others = oracle.values(before), oracle.values(after)
    assert all((values[name] == others[name]).all() for name in values if name.startswith("mtp."))


# Epochs.


def steps_of(config: TrainConfig, data: Path) -> int:
    """Packed rows of the training split, over the rows of a step."""
    store = PreparedData(data).split("train")
    lengths = store.length(np.arange(store.documents))
    assert config.epochs is not None
    stage = config.stages[-1]
    return max(1, round(config.epochs * pack(lengths, 128).rows * 128 / stage.batch_tokens))


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 2.6])
def test_epochs_set_the_steps(epochs: float, release: Path, prepared_chat: Path, tmp_path: Path) -> None:
    options = [f"epochs={epochs}", "stages.0.warmup_steps=20"]
    config = quick_config("lora", release, prepared_chat, tmp_path / "run", *options)
    steps = steps_of(config, prepared_chat)
    data = loop.open_dataset(config.data, tmp_path, config.model)
    schedule = loop.make_schedule(config, data)
    (stage,) = schedule.stages
    assert schedule.total_steps == steps
    assert stage.tokens == steps * 256 and stage.warmup_steps == steps // 4
    assert replace(stage, tokens=config.stages[0].tokens, warmup_steps=20) == config.stages[0]
    config = replace(config, epochs=None, stages=(replace(config.stages[0], warmup_steps=0),))
    assert loop.make_schedule(config, data).stages == config.stages
    assert steps == {0.01: 1, 0.5: 2, 1: 4, 2.6: 10}[epochs]


def test_epochs_of_a_run_that_was_interrupted(release: Path, prepared_chat: Path, tmp_path: Path) -> None:
    options = ["epochs=1.5", "stages.0.warmup_steps=1", "checkpoint.every=1"]
    config = quick_config("lora", release, prepared_chat, tmp_path / "straight", *options)
    straight = train(config)
    steps = steps_of(config, prepared_chat)
    assert [row["step"] for row in rows(straight)] == list(range(1, steps + 1)) and steps == 6
    assert rows(straight)[0]["data/epoch"] == 0 and rows(straight)[-1]["data/epoch"] == 1
    again = replace(config, output=str(tmp_path / "run"))
    train(replace(again, steps=2))
    assert_same_end(train(again), straight, steps)
    with pytest.raises(ConfigError, match=r"epochs was 1\.5, now 2\.0"):
        train(replace(again, epochs=2.0))


# Bad input.


def talk(*messages: tuple[str, str], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]} | keys


GOOD = talk(("user", "light?"), ("assistant", "day."))
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"a": '}}
BAD_LINES: dict[str, tuple[str, str]] = {
    "no assistant": (json.dumps(talk(("user", "light?"))), "assistant"),
    "not JSON": ('{"messages": [', "JSON"),
    "no messages": ('{"text": "light"}', "messages"),
    "a role of no one": (json.dumps(talk(("user", "a"), ("narrator", "b"))), "narrator"),
    "a content that is a number": ('{"messages": [{"role": "user", "content": 1}]}', "content"),
    "a tool call that is no JSON": (
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "light?"},
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                ]
            }
        ),
        "arguments",
    ),
    "longer than a row": (json.dumps(talk(("user", "light " * 300), ("assistant", "day."))), "128"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_conversations(case: str, refused: Callable[..., str], release: Path, tmp_path: Path) -> None:
    """One line with file and line; and when the line is mended, the same command trains."""
    line, word = BAD_LINES[case]
    good = json.dumps(GOOD)
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{good}\n{good}\n{line}\n")
    command = ["train", "run=lora", f"model.pretrained={release}", f"data.path={file}", f"output={tmp_path / 'run'}"]
    message = refused(*command, *QUICK, "steps=1")
    assert f"{file}:3" in message and word in message
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".npy", ".safetensors"))]
    if case in ("no assistant", "longer than a row"):
        file.write_text(f"{good}\n" * 3)
        assert console(*command, *QUICK, "steps=1") == 0


def test_a_longer_row_is_the_way_out(refused: Callable[..., str], release: Path, tmp_path: Path) -> None:
    file = write_chat(tmp_path / "chat.jsonl", [GOOD, talk(("user", "light " * 40), ("assistant", "day."))])
    command = ["train", "run=lora", f"model.pretrained={release}", f"data.path={file}", f"output={tmp_path / 'run'}"]
    assert f"{file}:2" in refused(*command, *QUICK, "steps=1")
    longer = ["stages.0.sequence_length=512", "stages.0.batch_tokens=512"]
    assert console(*command, *QUICK, *longer, "steps=1") == 0


def test_conversations_that_changed(refused: Callable[..., str], release: Path, tmp_path: Path) -> None:
    """Between two starts of a run."""
    file = write_chat(tmp_path / "chat.jsonl", conversations(8))
    run = tmp_path / "run"
    command = ["train", "run=lora", f"model.pretrained={release}", f"data.path={file}", f"output={run}", *QUICK]
    assert console(*command, "steps=1") == 0
    write_chat(file, conversations(8, seed=1))
    with untouched(run / "checkpoints", run / "data"):
        message = refused(*command, "steps=2")
    assert str(run / "data") in message and "was prepared with" in message


@pytest.mark.parametrize("what", ["data", "no file", "empty file", "tokenizer"])
def test_data_that_is_none(what: str, refused: Callable[..., str], release: Path, chat: Path, tmp_path: Path) -> None:
    base, path = release, chat
    if what == "data":
        path = tmp_path
    elif what == "no file":
        path = tmp_path / "nowhere.jsonl"
    elif what == "empty file":
        path = tmp_path / "empty.jsonl"
        path.write_text("")
    else:
        base = tmp_path / "base"
        shutil.copytree(release, base)
        (base / "tokenizer.json").unlink()
    command = ["train", "run=lora", f"model.pretrained={base}", f"data.path={path}", f"output={tmp_path / 'run'}"]
    message = refused(*command, *QUICK)
    assert str(base if what == "tokenizer" else path) in message
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("how", ["cut", "gone", "missing tensor", "NaN"])
def test_damaged_weights(how: str, refused: Callable[..., str], chat: Path, release: Path, tmp_path: Path) -> None:
    """In one of three shards; mended, the same command trains."""
    base, tensors = tmp_path / "base", oracle.read_release(release)
    config = json.loads((release / "config.json").read_text())
    oracle.write_folder(base, config, tensors, shards=3)
    shutil.copy(release / "tokenizer.json", base)
    shard = base / "model-00002-of-00003.safetensors"
    good, name = shard.read_bytes(), "layers.1.attn.wq_a.weight"
    command = ["train", "run=lora", f"model.pretrained={base}", f"data.path={chat}", f"output={tmp_path / 'run'}"]
    if how in ("cut", "gone"):
        spoil(shard, how)
    else:
        stored = tensors[name]
        changed = {name: replace(stored, data=b"\x7f" + stored.data[1:])} if how == "NaN" else {}
        shutil.rmtree(base)
        oracle.write_folder(base, config, {k: v for k, v in tensors.items() if k != name} | changed)
        shutil.copy(release / "tokenizer.json", base)
    message = refused(*command, *QUICK, "precision.base=bf16", "steps=1")
    assert (str(shard) if how in ("cut", "gone") else name) in message
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    if how == "cut":
        shard.write_bytes(good)
        assert console(*command, *QUICK, "precision.base=bf16", "steps=1") == 0
