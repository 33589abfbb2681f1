"""Every mistake on the way of ``test_cli``: one line, exit code 2, nothing half-written."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_cases import SMALL_RUN, TEXTS, Run, documents, prepared, spoil, untouched, write_texts
from safetensors.torch import load_file, save_file

from openv4.data.config import DataError
from openv4.train.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "modl=nano"], "modl: unknown key; did you mean model?"),
        (["train", "model=nanoo"], "model=nanoo: no such preset; did you mean nano?"),
        (["train", "logging.wandb=onlin"], "logging.wandb='onlin'; did you mean online?"),
        (["train", "steps=many"], "steps='many' must be a whole number"),
        (["train", "model.o_groups=3"], "model.o_groups=3 must divide num_attention_heads"),
        (["prepare", "inptu=a", "output=b"], "inptu: unknown key; did you mean input?"),
        (["prepare", "input=a"], "output is not set; give output=..."),
        (["prepare", "input=a", "output=b", "vocab_size=9"], "vocab_size=9: at least 265"),
        (["evaluate", "checkpoint=a", "attention=spars"], "attention='spars'; did you mean sparse?"),
        (["evaluate", "checkpoint=a", "data=b"], "data=b: no such folder"),
        (["generate", "prompt=a"], "checkpoint is not set; give checkpoint=..."),
        (["generate", "checkpoint=a", "top_p=0"], "top_p=0.0 must be above 0, at most 1"),
        (["export", "checkpoint=a", "output=b", "format=fp31"], "format='fp31'; did you mean fp32?"),
        (["export", "checkpoint=a", "output=b", "max_shard_gb=0"], "max_shard_gb=0.0 must be positive"),
        (["train", "smoke"], "'smoke' is not key=value"),
    ],
)
def test_unknown_keys_and_values(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert refused(*arguments).startswith(message)


def test_a_device_that_is_not_there(refused: Callable[..., str], workshop: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    message = refused("train", *SMALL_RUN, "device=cuda", f"data={workshop / 'data'}", f"output={tmp_path / 'run'}")
    assert "no CUDA device" in message and not (tmp_path / "run").exists()


def test_the_traceback_is_there_when_asked_for(openv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENV4_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="modl: unknown key"):
        openv4("train", "modl=nano")
    with pytest.raises(DataError, match="no such file or folder"):
        openv4("prepare", "input=nowhere", "output=b")


@pytest.mark.parametrize("command", ["train", "export"])
def test_an_interrupt(command: str, openv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"openv4.launch.{command}.run", interrupt)
    result = openv4(command, *({"export": ["checkpoint=a", "output=b"]}.get(command, [])))
    assert result.code == 130
    assert result.err.startswith("interrupted") and ("resumes" in result.err) == (command == "train")


def test_a_text_that_is_not_utf8(refused: Callable[..., str], tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", TEXTS)
    (texts / "002.txt").write_bytes(b"caf\xe9")
    message = refused("prepare", f"input={texts}", f"output={tmp_path / 'data'}", "vocab_size=300")
    assert message == f"{texts / '002.txt'}: byte 3 (0xe9) is not UTF-8: convert the file to UTF-8"
    (texts / "002.txt").unlink()
    lines = (texts / "more.jsonl").read_bytes()
    (texts / "more.jsonl").write_bytes(lines + b'{"text": "caf\xe9"}\n')
    message = refused("prepare", f"input={texts}", f"output={tmp_path / 'data'}", "vocab_size=300")
    assert "more.jsonl" in message and "is not UTF-8" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "texts"]


def test_an_empty_corpus(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    output = f"output={tmp_path / 'data'}"
    assert "no file of a known type" in refused("prepare", f"input={folder}", output)
    (folder / "a.txt").write_text(" \n\t")
    (folder / "b.jsonl").write_text("")
    message = refused("prepare", f"input={folder}", output)
    assert message == f"input={folder} holds no text (1 empty documents in 2 files)"
    assert "no such file or folder" in refused("prepare", f"input={tmp_path / 'nowhere'}", output)
    assert "openv4 reads .txt, .jsonl" in refused("prepare", f"input={__file__}", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "texts"]


def trains(openv4: Run, *arguments: object) -> None:
    result = openv4("train", *SMALL_RUN, "steps=1", *arguments)
    assert result.code == 0, result


def test_token_ids_beyond_the_vocabulary(
    openv4: Run, refused: Callable[..., str], workshop: Path, fp32: Path, tmp_path: Path
) -> None:
    data, run = workshop / "data", tmp_path / "run"
    message = refused("train", *SMALL_RUN, "model.vocab_size=299", f"data={data}", f"output={run}")
    assert message == (
        f"{data}: token ids reach 299, but model.vocab_size=299; set model.vocab_size=300 or prepare with a smaller "
        "tokenizer"
    )
    assert not list(run.glob("checkpoints/*"))
    trains(openv4, "model.vocab_size=300", f"data={data}", f"output={run}")  # the way out works, in the same folder

    larger = prepared(tmp_path / "larger", TEXTS, vocab_size=310)
    assert "token ids reach 309" in refused("evaluate", f"checkpoint={fp32}", f"data={larger}")


def test_a_token_id_beyond_the_tokenizer(refused: Callable[..., str], tmp_path: Path) -> None:
    """Ids that the shard should not hold are found though every checksum were right."""
    data = prepared(tmp_path / "data", TEXTS)
    file = data / "train" / "tokens-00000.npy"
    content = bytearray(file.read_bytes())
    content[-4:-2] = (60000).to_bytes(2, "little")
    file.write_bytes(content)
    message = refused("train", *SMALL_RUN, f"data={data}", f"output={tmp_path / 'run'}")
    assert str(file) in message


@pytest.mark.parametrize("name", ["train/tokens-00000.npy", "validation/offsets-00000.npy", "token_bytes.npy"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damaged_shards(name: str, how: str, refused: Callable[..., str], workshop: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(workshop / "data", data)
    spoil(data / name, how)
    words = {"flipped": "is damaged: SHA-256", "cut": "the manifest says", "gone": "is missing"}[how]
    with untouched(data):
        message = refused("train", *SMALL_RUN, f"data={data}", f"output={run}")
    assert str(data / name) in message and words in message and "prepare the data again" in message
    assert not list(run.glob("checkpoints/*")) and not (run / "metrics.jsonl").exists()


def test_damaged_manifest_and_folders_that_are_none(
    refused: Callable[..., str], workshop: Path, tmp_path: Path
) -> None:
    run = f"output={tmp_path / 'run'}"
    shutil.copytree(workshop / "data", tmp_path / "data")
    spoil(tmp_path / "data" / "manifest.json", "flipped")
    assert "damaged or foreign" in refused("train", *SMALL_RUN, f"data={tmp_path / 'data'}", run)
    assert "does not exist: make it with" in refused("train", *SMALL_RUN, f"data={tmp_path / 'nowhere'}", run)
    message = refused("train", *SMALL_RUN, f"data={workshop / 'texts'}", run)
    assert "is not a prepared folder" in message and f"openv4 prepare input={workshop / 'texts'}" in message


@pytest.fixture
def copy_of_run(workshop: Path, tmp_path: Path) -> Path:
    """The run, after steps of which some are still to come."""
    shutil.copytree(workshop / "run", tmp_path / "run")
    return tmp_path / "run"


def commands_that_read(run: Path, workshop: Path, output: Path) -> list[list[object]]:
    return [
        ["train", *SMALL_RUN, f"data={workshop / 'data'}", f"output={run}", "steps=9", "checkpoint.every=4"],
        ["evaluate", f"checkpoint={run}"],
        ["generate", f"checkpoint={run}", "prompt=a"],
        ["export", f"checkpoint={run}", f"output={output}"],
    ]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "flipped"),
        ("model.safetensors", "cut"),
        ("model.safetensors", "gone"),
        ("optimizer.safetensors", "flipped"),
        ("state.json", "cut"),
        ("config.json", "flipped"),
        ("manifest.json", "cut"),
    ],
)
def test_damaged_checkpoints(
    name: str, how: str, refused: Callable[..., str], copy_of_run: Path, workshop: Path, tmp_path: Path
) -> None:
    """A changed byte anywhere is found by every command, and nothing is changed or written. (With an older checkpoint a
    run would go on: test_faults.)"""
    folder = copy_of_run / "checkpoints" / "step_8"
    shutil.rmtree(copy_of_run / "checkpoints" / "step_4")
    spoil(folder / name, how)
    with untouched(copy_of_run):
        for command in commands_that_read(copy_of_run, workshop, tmp_path / "export"):
            message = refused(*command)
            assert str(folder) in message and f"remove {folder} to go on from an earlier checkpoint" in message
    assert not (tmp_path / "export").exists()


def test_the_way_out_of_a_damaged_checkpoint(openv4: Run, copy_of_run: Path, workshop: Path) -> None:
    """What the message says: without the damaged checkpoint the run goes on from the one before."""
    spoil(copy_of_run / "checkpoints" / "step_8" / "model.safetensors", "flipped")
    shutil.rmtree(copy_of_run / "checkpoints" / "step_8")
    result = openv4(*commands_that_read(copy_of_run, workshop, copy_of_run)[0])
    assert result.code == 0 and "resumed at step 4" in result.out, result


def test_checkpoint_of_another_architecture(
    openv4: Run, refused: Callable[..., str], copy_of_run: Path, workshop: Path, tmp_path: Path
) -> None:
    """A checkpoint folder that was moved into another model's run."""
    other = tmp_path / "other"
    trains(openv4, "model.q_lora_rank=8", f"data={workshop / 'data'}", f"output={other}")
    shutil.rmtree(copy_of_run / "checkpoints")
    shutil.copytree(other / "checkpoints", copy_of_run / "checkpoints")
    with untouched(copy_of_run):
        message = refused(*commands_that_read(copy_of_run, workshop, tmp_path)[0])
    assert "misshapen" in message and "q_norm.weight is (8,), not (32,)" in message and "another model" in message


@pytest.mark.parametrize(("key", "value"), [("model_type", "deepseek_v3"), ("tie_word_embeddings", True)])
def test_exports_of_another_architecture(
    key: str, value: object, refused: Callable[..., str], workshop: Path, fp32: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(fp32, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {key: value}))
    for command in commands_that_read(foreign, workshop, tmp_path / "export")[1:]:
        message = refused(*command)
        assert str(foreign / "config.json") in message and "is not DeepSeek-V4" in message and key in message
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("how", ["cut", "gone", "other"])
def test_damaged_exports(how: str, refused: Callable[..., str], workshop: Path, fp32: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(fp32, broken)
    if how == "other":
        tensors = load_file(broken / "model.safetensors")
        tensors["evil"] = tensors.pop("norm.weight")
        save_file(tensors, broken / "model.safetensors")
    else:
        spoil(broken / "model.safetensors", how)
    for command in commands_that_read(broken, workshop, tmp_path / "export")[1:]:
        message = refused(*command)
        assert str(broken) in message
        assert {"cut": "damaged or unreadable", "gone": "neither", "other": "1 unexpected: evil"}[how] in message
    assert not (tmp_path / "export").exists()


def test_what_is_no_checkpoint(refused: Callable[..., str], workshop: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for command in commands_that_read(nothing, workshop, tmp_path / "export")[1:]:
        assert f"{nothing}: no such folder; name a run, a checkpoint or an exported model" in refused(*command)
    nothing.mkdir()
    for command in commands_that_read(nothing, workshop, tmp_path / "export")[1:]:
        assert f"{nothing}: holds neither config.json nor adapter_config.json" in refused(*command)
    (nothing / "checkpoints").mkdir()
    for command in commands_that_read(nothing, workshop, tmp_path / "export")[1:]:
        assert f"{nothing}: this run has no checkpoint yet" in refused(*command)
    assert not (tmp_path / "export").exists()


def test_output_folder_of_another_run(refused: Callable[..., str], copy_of_run: Path, workshop: Path) -> None:
    again = commands_that_read(copy_of_run, workshop, copy_of_run)[0]
    with untouched(copy_of_run):
        for change, words in (
            ("model.n_routed_experts=8", "model.n_routed_experts was 4, now 8"),
            ("seed=1", "seed was 0, now 1"),
            ("optim.muon.momentum=0.9", "optim.muon.momentum was 0.95, now 0.9"),
            ("stages.1.lr=1e-3", "stages.1.lr was 0.006, now 0.001"),
            ("precision=bf16", "precision.compute was fp32, now bf16"),
        ):
            message = refused(*again, change)
            assert f"output={copy_of_run} holds another run" in message and words in message
            assert "choose another output or remove the folder" in message


def test_output_folder_trained_on_other_data(
    refused: Callable[..., str], copy_of_run: Path, workshop: Path, tmp_path: Path
) -> None:
    other = prepared(tmp_path / "other", documents(40, seed=1))
    again = commands_that_read(copy_of_run, workshop, copy_of_run)[0]
    with untouched(copy_of_run):
        message = refused(*again, f"data={other}")
    assert f"was trained on other data than {other}" in message


def test_output_that_exists(
    openv4: Run, refused: Callable[..., str], workshop: Path, fp32: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for target in (mine, tmp_path / "file"):
        commands = [
            ["prepare", f"input={workshop / 'texts'}", f"output={target}"],
            ["train", *SMALL_RUN, f"data={workshop / 'data'}", f"output={target}"],
            ["export", f"checkpoint={workshop / 'run'}", f"output={target}"],
        ]
        with untouched(tmp_path):
            for command in commands:
                message = refused(*command)
                assert str(target) in message and ("choose another" in message or "choose a folder" in message)
    with untouched(workshop):
        assert "is a prepared folder already" in refused(*commands[0][:2], f"output={workshop / 'data'}")
        assert "already there and not empty" in refused(*commands[2][:2], f"output={workshop / 'fp32'}")


@contextmanager
def small_disk(largest_file: int) -> Iterator[None]:
    """Every write beyond so many bytes of a file fails, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_space_left(refused: Callable[..., str], copy_of_run: Path, workshop: Path, tmp_path: Path) -> None:
    commands = commands_that_read(copy_of_run, workshop, tmp_path / "export")
    with small_disk(50_000):
        message = refused(*commands[3])
        assert f"{tmp_path / 'export'}: cannot write" in message and "free some space" in message
        with untouched(copy_of_run / "checkpoints"):
            message = refused(*commands[0])
            assert "cannot write" in message and "free some space" in message
    with small_disk(2_000):
        refused("prepare", f"input={workshop / 'texts'}", f"output={tmp_path / 'data'}", "vocab_size=300")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run"]


def test_and_then_there_is_space_again(openv4: Run, copy_of_run: Path, workshop: Path) -> None:
    again = commands_that_read(copy_of_run, workshop, copy_of_run)[0]
    with small_disk(50_000):
        assert openv4(*again).code == 2
    result = openv4(*again)
    assert result.code == 0 and "resumed at step 8" in result.out, result
