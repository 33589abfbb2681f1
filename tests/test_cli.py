"""The commands, as users type them: from a folder of texts to a model in transformers."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_cases import SMALL_RUN, TEXTS, VOCAB, Run, documents, prepared, write_texts
from model_cases import relative_rms
from run_cases import OVERRIDES
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from openv4.data.shards import PreparedData
from openv4.launch import cli
from openv4.model import load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")

# Help.


def test_help_lists_every_command(openv4: Run) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        result = openv4(*arguments)
        assert result.code == 0 and result.err == ""
        for name, command in cli.COMMANDS.items():
            lines = result.out.splitlines()
            (at,) = [index for index, line in enumerate(lines) if line.split()[:1] == [name]]
            assert command.help in lines[at]
            assert lines[at + 1].strip() == command.example and command.example.startswith(f"openv4 {name} ")
    assert set(cli.COMMANDS) >= {"train", "prepare", "evaluate", "generate", "export"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_shows_its_settings(command: str, openv4: Run) -> None:
    result = openv4(command, "--help")
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"openv4 {command}: ")
    required = {"preview": "input", "merge": "adapter", "inspect": "path"}.get(command, "checkpoint")
    others = {"train": "checkpoint:", "prepare": "text_key:", "plan": "gpus: null", "report": "watch: false"}
    others |= {"submit": "signal_seconds: 300"}
    assert others.get(command, f"{required}: ???") in result.out
    if command == "train":
        assert "model: nano, small, tiny, v4_flash, v4_pro" in result.out and "run: " in result.out


def test_cfg_job_prints_what_would_run(openv4: Run, tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    result = openv4("train", "--cfg", "job", "model=nano", "steps=7", f"data={tmp_path / 'my data'}", "name=it's")
    assert result.code == 0
    shown = yaml.safe_load(result.out)
    assert (shown["model"]["hidden_size"], shown["steps"], shown["name"]) == (64, 7, "it's")
    assert shown["data"]["path"] == str(tmp_path / "my data")
    assert "checkpoint: x\nprompt: a, b\n" in openv4("generate", "checkpoint=x", "prompt=a, b", "--cfg", "job").out


def test_hydras_flags_refuse_in_one_line_too(refused: Callable[..., str]) -> None:
    assert refused("train", "--cfg", "job", "model=nanoo") == "model=nanoo: no such preset; did you mean nano?"
    assert refused("train", "--run", "modl=nano") == "modl: unknown key; did you mean model?"


def test_hydras_sweep(openv4: Run, tmp_path: Path) -> None:
    """--multirun runs a command once for each value of a list."""
    folder = tmp_path / "sweep"
    arguments = ["checkpoint=nowhere", "seed=0,1", f"hydra.sweep.dir={folder}", "--multirun"]
    result = openv4("generate", *arguments)
    assert result.code == 2 and "nowhere: no such folder" in result.err


def test_unknown_command(refused: Callable[..., str]) -> None:
    message = refused("trian", "run=smoke")
    assert message == f"openv4 trian: no such command; choose from {', '.join(cli.COMMANDS)}"


def test_the_installed_script(tmp_path: Path) -> None:
    """In a process of its own: the exit codes that a shell sees, with nothing of this repository on the path."""
    script = Path(sys.executable).with_name("openv4")

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": "", "COLUMNS": "80"}
        return subprocess.run([script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = shell("--help")
    assert (done.returncode, done.stderr) == (0, "") and "openv4 train run=smoke" in done.stdout
    done = shell("train", "run=smok")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: run=smok: no such preset; did you mean smoke?\n"


# The way of a stranger's text (issue A, done when 4).


def test_prepared_from_every_kind_of_file(workshop: Path) -> None:
    data = PreparedData(workshop / "data")
    texts = [*data.texts("train"), *data.texts("validation")]
    assert sorted(texts) == sorted(TEXTS)
    assert data.vocab_size == VOCAB


def test_what_prepare_prints(openv4: Run, tmp_path: Path) -> None:
    write_texts(tmp_path / "my texts", [*TEXTS[:9], " \n"])
    result = openv4(
        "prepare", f"input={tmp_path / 'my texts'}", f"output={tmp_path / 'my [/b] data'}", "vocab_size=300"
    )
    assert result.code == 0, result
    assert re.search(r"train: [\d,]+ tokens, 8 documents, [\d,]+ bytes of text", result.out)
    assert "validation: " in result.out and "skipped: 1 empty documents" in result.out
    assert f"try next: openv4 train run=smoke data='{tmp_path / 'my [/b] data'}'" in result.out


def test_the_run_has_what_the_design_says(workshop: Path) -> None:
    run = workshop / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "plots",
        "env.json",
        "summary.json",
        "tokenizer.json",
    }
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_8"
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 9))
    wanted = {"step", "tokens", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"}
    assert all(wanted <= set(row) for row in steps)


def test_evaluate(openv4: Run, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, one of its checkpoints, and its export give the run's own last validation."""
    summary = json.loads((workshop / "run" / "summary.json").read_text())
    for checkpoint in ("run", "run/checkpoints/step_8"):
        result = openv4("evaluate", f"checkpoint={workshop / checkpoint}")
        assert result.code == 0, result
        found = json.loads(result.out)
        assert found["loss"] == pytest.approx(summary["validation/loss"], rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(summary["validation/bits_per_byte"], rel=1e-5)
        assert found["tokens"] > 50
    monkeypatch.chdir(workshop / "run" / "checkpoints")
    first = json.loads(openv4("evaluate", "checkpoint=step_4").out)
    assert first["loss"] != found["loss"]


def test_evaluate_an_export_on_data(openv4: Run, refused: Callable[..., str], workshop: Path, fp32: Path) -> None:
    summary = json.loads((workshop / "run" / "summary.json").read_text())
    shape = ["sequence_length=128", "attention=sparse"]
    result = openv4("evaluate", f"checkpoint={fp32}", f"data={workshop / 'data'}", *shape)
    assert json.loads(result.out)["loss"] == pytest.approx(summary["validation/loss"], rel=1e-5)
    part = openv4("evaluate", f"checkpoint={fp32}", f"data={workshop / 'data'}", *shape, "tokens=1", "batch_tokens=1")
    assert 0 < json.loads(part.out)["tokens"] <= 128
    assert "is no run of ours: name the text with data=" in refused("evaluate", f"checkpoint={fp32}")


def test_evaluate_with_another_tokenizer_is_refused(
    openv4: Run, refused: Callable[..., str], fp32: Path, tmp_path: Path
) -> None:
    """The ids would mean other words, and the result nothing."""
    other = prepared(tmp_path / "other", documents(9, seed=1), vocab_size=290)
    message = refused("evaluate", f"checkpoint={fp32}", f"data={other}")
    assert "another tokenizer" in message and f"tokenizer={fp32 / 'tokenizer.json'}" in message
    fitting = prepared(tmp_path / "fitting", documents(9, seed=1), tokenizer=str(fp32 / "tokenizer.json"))
    assert openv4("evaluate", f"checkpoint={fp32}", f"data={fitting}", "sequence_length=64").code == 0


def test_generate(openv4: Run, workshop: Path, fp32: Path) -> None:
    prompt = "light, it's (\u4f60) = ${"
    arguments = ["generate", f"checkpoint={workshop / 'run'}", f"prompt={prompt.replace('$', chr(92) + '$')}"]
    texts = [openv4(*arguments, "max_new_tokens=12", f"seed={seed}") for seed in (0, 0, 1)]
    assert all(text.code == 0 and text.out.startswith(prompt) for text in texts), texts
    assert texts[0].out == texts[1].out, "the same seed, the same text"
    assert texts[0].out != texts[2].out
    greedy = [openv4(*arguments, "max_new_tokens=8", "temperature=0", f"seed={seed}").out for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    from_export = openv4("generate", f"checkpoint={fp32}", *arguments[2:], "max_new_tokens=8", "temperature=0")
    assert from_export.out == greedy[0]
    assert openv4("generate", f"checkpoint={workshop / 'run'}", "max_new_tokens=3").code == 0, "an empty prompt"


def test_generate_reads_special_tokens_in_a_prompt(openv4: Run, workshop: Path) -> None:
    """And a tokenizer may be named; one that does not fit is refused, not an index error."""
    run = workshop / "run"
    tokenizer = f"tokenizer={workshop / 'data' / 'tokenizer.json'}"
    assert openv4("generate", f"checkpoint={run}", "prompt=<think>", tokenizer, "max_new_tokens=2").code == 0


def test_a_tokenizer_that_is_too_large(refused: Callable[..., str], workshop: Path, tmp_path: Path) -> None:
    tokenizer = prepared(tmp_path / "larger", TEXTS, vocab_size=400) / "tokenizer.json"
    message = refused("generate", f"checkpoint={workshop / 'run'}", f"prompt={TEXTS[0]}", f"tokenizer={tokenizer}")
    assert re.search(r"gives token id 3\d\d, the model's vocab_size is 300", message)


def test_export_is_read_by_transformers(workshop: Path, fp32: Path) -> None:
    """No key missing or unexpected, equal logits, and a tokenizer that gives the same ids."""
    transformers = pytest.importorskip("transformers", reason="installed by `make test`")
    transformers.utils.logging.disable_progress_bar()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        fp32,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    ours = load_pretrained(fp32, torch.float32)
    data = PreparedData(workshop / "data")
    tokens = torch.tensor(data.split("train").read(0, 0, 60).astype("int64"))[None]
    with torch.no_grad():
        assert relative_rms(ours(tokens), theirs(tokens, use_cache=False).logits) < 1e-5

    tokenizer = transformers.AutoTokenizer.from_pretrained(fp32)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    text = next(data.texts("train"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids == tokens[0, 1 : len(ids) + 1].tolist()[: len(ids)] or ids[:59] == tokens[0, 1:].tolist()


def test_export_in_bf16(openv4: Run, workshop: Path, fp32: Path, tmp_path: Path) -> None:
    """The default: bfloat16, but for what the released files keep in float32 (recipe 8.3)."""
    result = openv4("export", f"checkpoint={workshop / 'run'}", f"output={tmp_path / 'bf16'}")
    assert result.code == 0 and "step_8" in result.out and "bf16" in result.out
    assert {file.name for file in (tmp_path / "bf16").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    full = load_file(fp32 / "model.safetensors")
    with safe_open(tmp_path / "bf16" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert set(names) == set(full)
        for name in names:
            tensor = file.get_tensor(name)
            if re.search(r"hc_\w+_(fn|base|scale)$|attn_sink$|\.ape$|gate\.bias$", name):
                assert tensor.dtype == torch.float32 and torch.equal(tensor, full[name]), name
            elif name.endswith("tid2eid"):
                assert tensor.dtype == torch.int64 and torch.equal(tensor, full[name]), name
            else:
                assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, full[name].bfloat16()), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_of_an_export_in_shards(openv4: Run, fp32: Path, tmp_path: Path) -> None:
    result = openv4(
        "export", f"checkpoint={fp32}", f"output={tmp_path / 'a' / 'b'}", "format=fp32", "max_shard_gb=1e-4"
    )
    assert result.code == 0, result
    assert len(list((tmp_path / "a" / "b").glob("*.safetensors"))) > 3
    mine, copy = load_pretrained(fp32, torch.float32), load_pretrained(tmp_path / "a" / "b", torch.float32)
    assert all(torch.equal(mine.state_dict()[name], tensor) for name, tensor in copy.state_dict().items())
    assert (tmp_path / "a" / "b" / "tokenizer.json").read_bytes() == (fp32 / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_readme_from_a_shell(tmp_path: Path) -> None:
    """All of it in processes of its own, with the README's settings but for the size of the model and the steps."""
    script = Path(sys.executable).with_name("openv4")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": ""}
    # Two threads on two busy cores wait for each other; OpenMP's default is to do so in a loop.
    environment["OMP_WAIT_POLICY"] = "passive"

    def shell(*arguments: str) -> str:
        done = subprocess.run([script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    write_texts(tmp_path / "my_texts", documents(60))
    assert "try next: openv4 train run=smoke data=my_data" in shell("prepare", "input=my_texts", "output=my_data")
    train = ["train", "run=smoke", "data=my_data", "output=runs/mine", "model=nano", "checkpoint.every=2"]
    first = shell(*train, "steps=3")
    assert "openv4 generate checkpoint=runs/mine" in first and "a sample:" in first
    assert "this run is complete at step 3" in shell(*train, "steps=3")
    assert "resumed at step 3" in shell(*train, "steps=4")
    assert json.loads(shell("evaluate", "checkpoint=runs/mine"))["bits_per_byte"] > 0
    texts = [shell("generate", "checkpoint=runs/mine", "prompt=Once upon", "max_new_tokens=9") for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("Once upon")
    shell("export", "checkpoint=runs/mine", "output=my_model")
    assert load_pretrained(tmp_path / "my_model").config.hidden_size == 64
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} >= {"wandb", "wandb_run_id"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "my_data", "my_model", "my_texts", "runs"]


# Small corpora of one's own.


@pytest.mark.parametrize(
    ("texts", "validation"),
    [
        (["One document, and that is all."], 0),
        (["a", "b"], 1),
        (["word " * 300, "a longer one " * 50], 1),
        ([*TEXTS[:3], "\u4f60\u597d" * 400], 1),
    ],
    ids=["one document", "two short ones", "longer than a row", "one long among short"],
)
def test_small_corpora_train(texts: list[str], validation: int, openv4: Run, tmp_path: Path) -> None:
    """Without a crash, with a vocabulary of which the tokenizer fills a part, to the end and into `generate`."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data, run = tmp_path / "data", tmp_path / "run"
    assert openv4("prepare", f"input={tmp_path / 'text.jsonl'}", f"output={data}").code == 0
    prepared_data = PreparedData(data)
    assert prepared_data.vocab_size < 512 and prepared_data.split("validation").documents == validation
    arguments = ["model.vocab_size=512", f"data={data}", f"output={run}", "steps=6", "validation.every=2"]
    result = openv4("train", *OVERRIDES, *arguments, "logging.sample_prompt=a b", "logging.sample_tokens=5")
    assert result.code == 0, result
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(math.isfinite(row["train/loss"]) for row in rows)
    assert ("validation/loss" in rows[1]) == bool(validation)
    assert openv4("generate", f"checkpoint={run}", "prompt=a", "max_new_tokens=5", "temperature=3").code == 0
    evaluated = openv4("evaluate", f"checkpoint={run}")
    if validation:
        assert evaluated.code == 0 and math.isfinite(json.loads(evaluated.out)["bits_per_byte"])
    else:
        assert evaluated.code == 2 and "has no validation documents; prepare more than one document" in evaluated.err


def test_a_tokenizer_of_ones_own(openv4: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    """Of another make: one end token for both ends, not the first ids. The model must know it; then all goes on."""
    transformers = pytest.importorskip("transformers", reason="installed by `make test`")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data, run = prepared(tmp_path / "data", TEXTS, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "run"
    command = ["train", *SMALL_RUN, "steps=2", f"data={data}", f"output={run}"]
    message = refused(*command)
    way_out = ["model.bos_token_id=280", "model.eos_token_id=280"]
    assert " ".join(way_out) in message
    assert openv4(*command, *way_out).code == 0
    assert openv4("generate", f"checkpoint={run}", "prompt=light", "max_new_tokens=4").code == 0
    assert openv4("export", f"checkpoint={run}", f"output={tmp_path / 'export'}").code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (theirs.bos_token, theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", "<|endoftext|>", 280)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (280, 280)


def test_folders_with_brackets_in_their_names(openv4: Run, tmp_path: Path) -> None:
    """The terminal's markup has them as well; a name must come out as it is."""
    data, run = prepared(tmp_path / "da[/b]ta [red]", TEXTS), tmp_path / "r[/b]un [red]"
    result = openv4("train", *SMALL_RUN, "steps=1", f"data={data}", f"output={run}")
    assert result.code == 0 and str(data) in result.out and str(run) in result.out
    assert openv4("evaluate", f"checkpoint={run}").code == 0


# What the documentation prints.
