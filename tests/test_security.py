"""Hostile files, names and neighbours: nothing that openv4 reads runs code, leaves its folder or tells a secret."""

import ast
import base64
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_cases import SMALL_RUN, Run, console
from safetensors.torch import load_file
from slurm_cases import free_ports
from test_imports import MODULES

from openv4.data.config import DataError
from openv4.data.shards import PreparedData
from openv4.launch import cli
from openv4.launch.report import Server
from openv4.model import load_pretrained
from openv4.model.config import LoRAConfig, ModelConfigError, WeightsError
from openv4.model.lora import add_lora, save_adapter
from openv4.model.tensor_files import INDEX, new_folder
from openv4.train.checkpoint import Checkpoint, seal, verify
from openv4.train.config import CheckpointError, TrainConfig, from_yaml
from openv4.train.folder import exposed
from openv4.train.metrics import read_lines
from openv4.train.preflight import meet
from openv4.train.record import open_runs
from openv4.train.secret import is_secret, redacted, secret_in
from openv4.train.wandb_log import WandbLog

pytestmark = [pytest.mark.usefixtures("one_thread", "elsewhere"), pytest.mark.xdist_group("security")]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def as_torch_writes_it(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"model": trap}, file)
    return file.getvalue()


def as_numpy_writes_it(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap, None], dtype=object), allow_pickle=True)
    return file.getvalue()


def archive_of_arrays(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.savez(file, tokens=np.array([trap, None], dtype=object))
    return file.getvalue()


KINDS = {"pickle": pickle.dumps, "torch": as_torch_writes_it, "npy": as_numpy_writes_it, "npz": archive_of_arrays}
ARRAYS, STATES = ("pickle", "npy", "npz"), ("pickle", "torch")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder that must never appear."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "code of a file was run"


@pytest.mark.parametrize("kind", KINDS)
def test_the_traps_work(kind: str, tmp_path: Path) -> None:
    """For whoever reads them as they ask for."""
    file = io.BytesIO(KINDS[kind](Trap(tmp_path / "canary")))
    if kind == "torch":
        torch.load(file, weights_only=False)
    elif kind == "pickle":
        pickle.load(file)
    else:
        loaded = np.load(file, allow_pickle=True)
        assert loaded["tokens"].dtype == object if kind == "npz" else loaded.dtype == object
    assert (tmp_path / "canary").is_dir()


# S1: pickles, at every place where a file is read.


def entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def reseal_checkpoint(folder: Path) -> None:
    """Makes its manifest fit, as who has written the files can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {path.name: entry(path) for path in folder.iterdir() if path.name != "manifest.json"}
    manifest["checksum"] = seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def reseal_data(folder: Path, rename: Callable[[str], str] = str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]

    def sealed(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"name", "size", "sha256"}:
            found = entry(folder / rename(value["name"]))
            return {"name": rename(value["name"]), "size": found["bytes"], "sha256": found["sha256"]}
        if isinstance(value, dict):
            return {key: sealed(item) for key, item in value.items()}
        return [sealed(item) for item in value] if isinstance(value, list) else value

    manifest = sealed(manifest)
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run(workshop: Path, tmp_path: Path) -> Path:
    """A copy of a run that has ended, which the command of ``train_words`` looks at again."""
    return shutil.copytree(workshop / "run", tmp_path / "run")


def train_words(workshop: Path, run: Path) -> list[str]:
    return ["train", *SMALL_RUN, f"data={workshop / 'data'}", f"output={run}", "checkpoint.every=4"]


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "pytorch_model.bin", "rng_state.pth", "state.pkl"])
def test_a_pickle_in_a_checkpoint(name: str, canary: Path, run: Path, refused: Callable[..., str]) -> None:
    """What does not belong there is not looked at."""
    newest = run / "checkpoints" / "step_8"
    (newest / name).write_bytes(as_torch_writes_it(Trap(canary)))
    assert f"files missing or added: {name}" in refused("inspect", newest)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pickle_for_a_file_of_a_checkpoint(
    name: str, canary: Path, run: Path, workshop: Path, refused: Callable[..., str]
) -> None:
    """Also where its checksum is right. (With an older checkpoint a resume would go on from that.)"""
    newest = run / "checkpoints" / "step_8"
    shutil.rmtree(run / "checkpoints" / "step_4")
    for kind in STATES:
        (newest / name).write_bytes(KINDS[kind](Trap(canary)))
        with pytest.raises(CheckpointError, match=re.escape(name)):
            verify(newest)
    if name != "manifest.json":
        reseal_checkpoint(newest)
    assert str(newest / name) in refused(*train_words(workshop, run))


def test_pickles_for_the_files_of_a_run(
    canary: Path, run: Path, workshop: Path, openv4: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    """What is no row or event is passed over, for the report and for training, which writes the others anew."""
    names = ("metrics.jsonl", "events.jsonl", "expert_load.jsonl", "env.json", "summary.json", "checkpoints/latest")
    for name in names:
        (run / name).write_bytes(pickle.dumps(Trap(canary)))
    assert openv4("report", run, f"output={tmp_path / 'page.html'}").code == 0
    result = openv4(*train_words(workshop, run))
    assert result.code == 0, result.err
    (run / "config.yaml").write_bytes(pickle.dumps(Trap(canary)))
    assert "config.yaml: unreadable" in refused(*train_words(workshop, run))
    refused("evaluate", f"checkpoint={run}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", INDEX, "by the index"])
def test_a_pickle_among_released_weights(
    name: str, canary: Path, fp32: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """Weights that are there as a pickle alone are not looked at."""
    folder = shutil.copytree(fp32, tmp_path / "weights")
    if name in ("pytorch_model.bin", "by the index"):
        (folder / "model.safetensors").unlink()
    if name == "by the index":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"embed.weight": "pytorch_model.bin"}}))
    wanted = f"neither model.safetensors nor {INDEX}" if name == "pytorch_model.bin" else name
    file = folder / ("pytorch_model.bin" if name == "by the index" else name)
    for kind in STATES:
        file.write_bytes(KINDS[kind](Trap(canary)))
        with pytest.raises((WeightsError, ModelConfigError)) as error:
            load_pretrained(folder)
        assert wanted.replace("by the index", "pytorch_model.bin: damaged") in str(error.value)
    assert refused("train", "run=lora", f"model.pretrained={folder}", f"data={folder}") == str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_a_pickle_for_an_adapter(
    name: str, canary: Path, fp32: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = adapter(fp32, tmp_path / "adapter")
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    for kind in STATES:
        (folder / name).write_bytes(KINDS[kind](Trap(canary)))
        message = refused("merge", f"adapter={folder}", f"output={tmp_path / 'merged'}")
        assert name.replace(".bin", ".safetensors") in message


def adapter(base: Path, folder: Path) -> Path:
    model, lora = load_pretrained(base), LoRAConfig(rank=2, targets=("shared_experts",))
    add_lora(model, lora)
    save_adapter(model, lora, folder, str(base))
    return folder


@pytest.mark.parametrize("name", ["tokens", "offsets", "token_bytes.npy", "tokenizer.json", "manifest.json"])
def test_a_pickle_in_prepared_data(
    name: str, canary: Path, workshop: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """Also where its checksum is right, and where no checksum is asked for."""
    folder = shutil.copytree(workshop / "data", tmp_path / "data")
    name = f"train/{name}-00000.npy" if "." not in name else name
    for kind in ARRAYS:
        (folder / name).write_bytes(KINDS[kind](Trap(canary)))
        with pytest.raises(DataError, match=re.escape(name)):
            PreparedData(folder)
        if name.startswith("train/"):
            reseal_data(folder)
            with pytest.raises(DataError, match=re.escape(name)):
                PreparedData(folder)
    if name != "manifest.json":
        reseal_data(folder)
    words = ["train", *SMALL_RUN, f"data={folder}", f"output={tmp_path / 'run'}", "steps=1", "data.verify=false"]
    assert str(folder / name) in refused(*words)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.txt", "chat.jsonl"])
def test_a_pickle_for_text(
    name: str, canary: Path, workshop: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    file, output = tmp_path / name, tmp_path / "data"
    chat = ["kind=chat", f"tokenizer={workshop / 'data'}"] if name == "chat.jsonl" else []
    for kind in STATES:
        content = KINDS[kind](Trap(canary))
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert str(file) in refused("prepare", f"input={file}", f"output={output}", *chat)
        assert not output.exists()


def test_pickles_where_a_tokenizer_or_templates_are_named(
    canary: Path, workshop: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    file, words = tmp_path / "x.json", ["prepare", f"input={workshop / 'texts'}", f"output={tmp_path / 'data'}"]
    file.write_bytes(pickle.dumps(Trap(canary)))
    assert f"{file} is not a Hugging Face tokenizer.json" in refused(*words, f"tokenizer={file}")
    chat = ["kind=chat", f"tokenizer={workshop / 'data'}", f"chat_templates={file}"]
    assert f"chat_templates={file} cannot be read" in refused(*words, *chat)


def test_a_pickled_type_in_a_parquet_file(canary: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    """Arrow once unpickled extension types that a file names (CVE-2023-47248)."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Trap(canary)),
    }
    field = pa.field("text", pa.binary(), metadata=metadata)
    pq.write_table(pa.table([pa.array([b"a", b"b"])], pa.schema([field])), tmp_path / "x.parquet")
    assert "is not text" in refused("prepare", f"input={tmp_path / 'x.parquet'}", f"output={tmp_path / 'data'}")


# S2, S3: what would be run, instantiated or expanded elsewhere.

SECRET = "sesame/Open+0123456789=="
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_sesameOpenSesame",
    "MY_PASSWORD": SECRET,
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def holds_secret(content: bytes) -> bool:
    values = [value.encode() for value in SECRETS.values()]
    return any(value in content or base64.b64encode(value) in content for value in values)


def assert_tells_nothing(*folders: Path) -> int:
    """No file below holds a secret; the number of files."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for file in files:
        assert not holds_secret(file.read_bytes()), file
    return len(files)


def hostile_keys(canary: Path) -> dict[str, Any]:
    jinja = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}{{ env.MY_PASSWORD }}"
    return {
        "_target_": "os.mkdir",
        "_args_": [str(canary)],
        "!!python/object/apply:os.mkdir": [str(canary)],
        "note": "${oc.env:MY_PASSWORD}",
        "chat_template": jinja,
        "auto_map": {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"},
        "trust_remote_code": True,
    }


def add_keys(file: Path, keys: dict[str, Any]) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | keys))


@pytest.mark.usefixtures("secrets")
def test_released_weights_bring_no_code(canary: Path, fp32: Path, openv4: Run, tmp_path: Path) -> None:
    """`auto_map`, targets, templates: weights with them are read as any others, and none of it is looked at."""
    folder = shutil.copytree(fp32, tmp_path / "weights")
    keys, code = hostile_keys(canary), f"import os\nos.mkdir({str(canary)!r})\n"
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        add_keys(folder / name, keys)
    (folder / "chat_template.jinja").write_text(keys["chat_template"])
    for name in ("modeling_trap.py", "__init__.py", "torch.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    for words in (
        ["inspect", folder],
        ["generate", f"checkpoint={folder}", "chat=true", "prompt=light", "max_new_tokens=2"],
        ["export", f"checkpoint={folder}", f"output={tmp_path / 'exported'}"],
    ):
        result = openv4(*words)
        assert result.code == 0, result.err
        assert not holds_secret((result.out + result.err).encode())
    assert not keys.keys() & json.loads((tmp_path / "exported" / "config.json").read_text()).keys()
    assert not (tmp_path / "exported" / "modeling_trap.py").exists() and "modeling_trap" not in sys.modules
    assert assert_tells_nothing(tmp_path / "exported") > 3


@pytest.mark.usefixtures("secrets")
def test_an_adapter_brings_no_code(canary: Path, fp32: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    folder = adapter(fp32, tmp_path / "adapter")
    (folder / "modeling_trap.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    add_keys(folder / "adapter_config.json", hostile_keys(canary))
    message = refused("merge", f"adapter={folder}", f"output={tmp_path / 'merged'}")
    assert "_target_='os.mkdir'" in message and "is no plain LoRA" in message and not holds_secret(message.encode())
    add_keys(folder / "adapter_config.json", dict.fromkeys(hostile_keys(canary)))
    for base in ("https://example.org/model", "someone/model", "../../etc"):
        add_keys(folder / "adapter_config.json", {"base_model_name_or_path": base})
        assert f"{base!r} is not here" in refused("merge", f"adapter={folder}", f"output={tmp_path / 'merged'}")


@pytest.mark.usefixtures("secrets")
def test_what_a_run_reads_again_is_no_template(
    canary: Path, run: Path, workshop: Path, openv4: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    """The manifest of data, a checkpoint's state, the saved config."""
    keys, data = hostile_keys(canary), shutil.copytree(workshop / "data", tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["config"] |= keys
    (data / "manifest.json").write_text(json.dumps(manifest))
    reseal_data(data)
    newest = run / "checkpoints" / "step_8"
    add_keys(newest / "state.json", keys)
    reseal_checkpoint(newest)
    words = ["train", *SMALL_RUN, f"data={data}", f"output={run}", "checkpoint.every=4"]
    result = openv4(*words)
    assert result.code == 0 and not holds_secret((result.out + result.err).encode()), result
    assert assert_tells_nothing(run, data) > 20
    text = (run / "config.yaml").read_text()
    for line in (f"!!python/object/apply:os.mkdir ['{canary}']", "${oc.env:MY_PASSWORD}", "{_target_: os.mkdir}"):
        (run / "config.yaml").write_text(text.replace("name: smoke", f"name: {line}"))
        assert not holds_secret(refused(*words).encode())
        assert not holds_secret(refused("evaluate", f"checkpoint={run}").encode())
    assert openv4("report", run, f"output={tmp_path / 'page.html'}").code == 0
    assert not holds_secret((tmp_path / "page.html").read_bytes())


# S4: archives.


@pytest.mark.parametrize(("kind", "suffix"), [("text", ".jsonl.gz"), ("chat", ".jsonl.zst")])
def test_a_bomb_is_one_line(
    kind: str, suffix: str, workshop: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """A gibibyte of zeros in some kilobytes: reading stops at the longest line that is allowed."""
    file, block = tmp_path / f"bomb{suffix}", bytes(1 << 24)
    member = gzip.compress(block) if suffix.endswith("gz") else pa.Codec("zstd").compress(block).to_pybytes()
    file.write_bytes(member * 64)
    assert file.stat().st_size < 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = ["kind=chat", f"tokenizer={workshop / 'data'}"] if kind == "chat" else []
    message = refused("prepare", f"input={file}", f"output={tmp_path / 'data'}", *words)
    assert message == f"{file}:1 is longer than 128 MiB: split the document"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000, f"{grown} KiB for a line of at most 128 MiB"


def test_archives_are_not_unpacked(refused: Callable[..., str], openv4: Run, canary: Path, tmp_path: Path) -> None:
    """No file of openv4 is an archive: they are refused by name, and passed over in a folder."""
    texts = tmp_path / "texts"
    texts.mkdir()
    with tarfile.open(texts / "x.tar", "w") as tar, zipfile.ZipFile(texts / "x.zip", "w") as zipped:
        for name in ("../canary/x.txt", str(canary / "x.txt"), "x.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
            zipped.writestr(name, "x")
    for file in list(texts.iterdir()):
        assert "openv4 reads .txt" in refused("prepare", f"input={file}", f"output={tmp_path / 'data'}")
        assert "no such folder" in refused("inspect", file)
    assert "no file of a known type" in refused("prepare", f"input={texts}", f"output={tmp_path / 'data'}")


# S5: names that leave their folder.

OUTSIDE = [
    "../../etc/passwd",
    "/etc/passwd",
    "https://example.org/x.safetensors",
    "file:///etc/passwd",
    "..",
    "a/../../b",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_nothing_outside(name: str, fp32: Path, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fp32, tmp_path / "weights")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    with pytest.raises(WeightsError, match=rf"weight_map entry {re.escape(repr(name))} leaves the folder; refused"):
        load_pretrained(folder)
    newest = run / "checkpoints" / "step_8"
    (newest / "optimizer.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    reseal_checkpoint(newest)
    with pytest.raises(CheckpointError, match="leaves the folder; refused"):
        Checkpoint(newest).optimizer_state({})


@pytest.mark.parametrize("link", ["the weights", "by the index"])
def test_a_link_out_of_the_folder(link: str, fp32: Path, tmp_path: Path) -> None:
    """But for a download cache, whose folders are links into its `blobs`."""
    folder, elsewhere = tmp_path / "weights", tmp_path / "elsewhere"
    shutil.copytree(fp32, folder)
    elsewhere.mkdir()
    name = "model.safetensors" if link == "the weights" else "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(elsewhere / "x")
    (folder / name).symlink_to(elsewhere / "x")
    if link == "by the index":
        names = load_file(elsewhere / "x")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(WeightsError, match=f"{name}: a link that leaves the folder, to {elsewhere / 'x'}; refused"):
        load_pretrained(folder)
    elsewhere.rename(tmp_path / "blobs")
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/x")
    load_pretrained(folder)


def test_no_link_brings_a_file_into_an_export(fp32: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    """What lies beside the weights is copied unread: a link could name a private key."""
    folder = shutil.copytree(fp32, tmp_path / "weights")
    (tmp_path / "id_rsa").write_text("private")
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    message = refused("export", f"checkpoint={folder}", f"output={tmp_path / 'exported'}")
    assert message.startswith(f"{folder / 'LICENSE'}: a link that leaves the folder")
    assert not list(tmp_path.glob("*exported*"))


@pytest.mark.parametrize("name", ["../outside.npy", "absolute"])
def test_a_manifest_of_data_names_nothing_outside(name: str, workshop: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(workshop / "data", tmp_path / "data")
    name = str(tmp_path / "outside.npy") if name == "absolute" else name
    (folder / "token_bytes.npy").rename(tmp_path / "outside.npy")
    reseal_data(folder, lambda old: name if old == "token_bytes.npy" else old)
    for verify_all in (True, False):
        with pytest.raises(DataError, match=f"{re.escape(repr(name))} of its manifest leaves the folder; refused"):
            PreparedData(folder, verify_all)


# S6: secrets.


def test_which_variables_are_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(map(is_secret, ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "TOKEN"]))
    assert not any(map(is_secret, ["TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "PATH"]))
    values = {"A_KEY": "abcdefgh", "B_KEY": "abcdefgh12", "C_TOKEN": "short", "D_TOKEN": str(tmp_path)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert redacted(f"abcdefgh12 abcdefgh short {tmp_path}") == f"[B_KEY] [A_KEY] short {tmp_path}"
    assert secret_in("xabcdefghx") == "A_KEY" and secret_in(f"short {tmp_path}") is None


@pytest.mark.usefixtures("secrets")
def test_a_run_tells_no_secret(small_data: Path, openv4: Run, tmp_path: Path) -> None:
    """Not its logs, its checkpoints, W&B's folder, its report, nor the script that would submit it."""
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", f"output={tmp_path / 'run'}", "steps=2"]
    for command in (
        ["train", *words, "logging.wandb=offline"],
        ["report", tmp_path / "run"],
        ["submit", *words, "launch=slurm", "--print"],
        ["generate", f"checkpoint={tmp_path / 'run'}", "prompt=x", "max_new_tokens=2"],
        ["export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'exported'}"],
    ):
        result = openv4(*command)
        assert result.code == 0, result.err
        assert not holds_secret((result.out + result.err).encode()) and "warning" not in result.err, command
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "run" / "report.html").exists()
    assert assert_tells_nothing(tmp_path) > 20


@pytest.mark.usefixtures("secrets")
def test_a_config_that_holds_a_secret_is_refused(small_data: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    """It would be written to config.yaml, and sent to W&B."""
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", f"output={tmp_path / 'run'}"]
    message = refused("train", *words, f"logging.project=x{SECRET}")
    assert message.startswith("the config holds the value of MY_PASSWORD") and not holds_secret(message.encode())
    assert not (tmp_path / "run").exists()
    message = refused("train", *words, f"stages.0.lr={SECRET}")  # told in an error
    assert "stages.0.lr" in message and not holds_secret(message.encode())


@pytest.mark.usefixtures("secrets")
def test_a_crash_tells_no_secret(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries put addresses, with their passwords, into errors."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"no answer from https://me:{SECRET}@example.org")

    monkeypatch.setattr("openv4.train.loop.training_step", fail)
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", f"output={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError) as error:
        console("train", *words)
    cli._crash(error.type, error.value, error.tb)
    WandbLog("disabled", "p", "n", tmp_path, {}).disable(error.value)
    told = capsys.readouterr()
    assert told.err.count("https://me:[MY_PASSWORD]@example.org") == 2 and "Traceback" in told.err
    assert not holds_secret((told.out + told.err).encode())
    assert "[MY_PASSWORD]" in (tmp_path / "run" / "events.jsonl").read_text()
    assert assert_tells_nothing(tmp_path / "run") >= 4


# S7: names.


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """The syntax of the package, each part with the place where it stands."""
    found = [(path, node) for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    return [(f"{path}:{getattr(node, 'lineno', '')}", node) for path, node in found]


def test_no_code_is_made_of_text() -> None:
    """No shell, no eval, no pickle, nowhere in the package: what is called, read from the calls themselves."""
    calls = {"eval", "exec", "compile", "__import__", "execfile"}
    methods = {
        *("system", "popen", "getoutput", "getstatusoutput", "mktemp", "load_module", "exec_module", "unsafe_load"),
        *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),  # which pickle
        *("send_object_list", "recv_object_list", "from_file_unsafe", "full_load", "load_source"),
    }
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jinja2", "commands", "pty", "xmlrpc"}
    for where, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            assert not modules & {name.split(".")[0] for name in named}, where
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in calls, where
        elif isinstance(node.func, ast.Attribute):
            assert node.func.attr not in methods, where
            if node.func.attr == "load":
                assert ast.unparse(node.func.value) not in ("torch", "np", "numpy", "yaml"), where
        for option in node.keywords:
            if option.arg in ("shell", "allow_pickle", "trust_remote_code"):
                assert ast.unparse(option.value) == "False", where


def hostile_name(canary: Path) -> str:
    return f"-x $(mkdir '{canary}') `mkdir {canary}`; mkdir {canary} && \"'it's\" | > ${{HOME}} \\ * % # ~"


def test_a_hostile_name_is_a_name(
    canary: Path, small_data: Path, openv4: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    """In training and its report, in a folder of such a name; where SLURM would read one, it is refused."""
    name = hostile_name(canary).replace("${", "\\${")
    folder = tmp_path / "it's $(mkdir canary) `mkdir canary`; &&\n| -x" / "run"
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", f"name={name}"]
    result = openv4("train", *words, f"output={folder}", "steps=1")
    assert result.code == 0, result.err
    assert from_yaml(TrainConfig, (folder / "config.yaml").read_text()).name == hostile_name(canary)
    assert openv4("report", folder).code == 0
    assert "name=" in refused("submit", *words, "output=out", "launch=slurm", "--print")
    assert "output=" in refused("submit", *words[:-1], f"output={tmp_path / 'a b'}", "launch=slurm", "--print")


def test_bash_reads_the_printed_command_as_words(canary: Path, openv4: Run, tmp_path: Path) -> None:
    name = hostile_name(canary).replace("${", "\\${")
    words = ["run=smoke", f"name={name}", "output=out"]
    printed = openv4("submit", *words, "launch=local", "--print").out
    stub = "openv4() { printf '%s\\0' \"$@\"; }\n"
    done = subprocess.run(["bash"], input=stub + printed, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("\0")[:-1] == ["train", *words] and done.stderr == ""


# S8: other users of the machine.


def test_who_else_could_change_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exposed(run) == ""
    run.chmod(0o775)  # as groups share folders on clusters
    assert exposed(run) == ""
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step_8"):
        folder.chmod(0o777)
        assert exposed(run) == f"anybody on this machine may change {folder}, and with it this run; chmod o-w {folder}"
        folder.chmod(0o755)
    run.parent.chmod(0o1777)  # as /tmp
    assert exposed(run) == ""
    run.parent.chmod(0o777)
    assert exposed(run).startswith(f"anybody on this machine may replace {run}")
    run.parent.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(run / "checkpoints" / "step_8", 54321, -1)
    monkeypatch.setattr("openv4.train.folder.os.geteuid", lambda: 4242)
    assert "belongs to another user (" in exposed(run)


def test_an_open_folder_is_told_of(workshop: Path, run: Path, openv4: Run) -> None:
    """In one line, at every start; and the run goes on."""
    run.chmod(0o777)
    result = openv4(*train_words(workshop, run))
    assert result.code == 0 and result.err.count("warning: anybody on this machine may change") == 1


def test_temporary_files_have_no_names_to_foresee(workshop: Path, tmp_path: Path) -> None:
    """Nothing is put into a shared folder by a fixed name; a new folder is as private as the umask says."""
    for where, node in nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/tmp", "/var/tmp", "/dev/shm")), where
    seen: list[str] = []
    before = os.umask(0o077)
    try:
        for number in range(2):
            with new_folder(tmp_path / f"out{number}") as temporary:
                seen.append(temporary.name.removeprefix(f".out{number}-"))
            assert stat.S_IMODE((tmp_path / f"out{number}").stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert len(set(seen)) == 2 and all(len(name) == 16 for name in seen)


class Child:
    """Stands for a process of ``openv4 train parallel.nproc=``; looks at what it was given."""

    started: ClassVar[list["Child"]] = []

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.command, self.environment = command, env
        self.config = Path(command[-1])
        self.modes = [stat.S_IMODE(path.stat().st_mode) for path in (self.config.parent, self.config)]
        self.text = self.config.read_text()
        self.started.append(self)

    def poll(self) -> int:
        return 0

    wait = poll

    def kill(self) -> None:
        """Has ended."""


@pytest.mark.usefixtures("secrets")
def test_what_processes_are_started_with(
    small_data: Path, openv4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret in their arguments, which all users see; the config in a folder of ours alone, gone afterwards."""
    monkeypatch.setattr("openv4.launch.train.subprocess.Popen", Child)
    monkeypatch.setattr(Child, "started", [])
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", f"output={tmp_path / 'run'}"]
    assert openv4("train", *words, "parallel.nproc=2").code == 0
    assert len(Child.started) == 2
    for child in Child.started:
        assert child.modes[0] == 0o700 and not child.config.parent.exists()
        assert re.search(r"openv4-\w{8}$", child.config.parent.name)
        assert not holds_secret(" ".join(child.command).encode() + child.text.encode())
        assert child.environment["MASTER_ADDR"] == "127.0.0.1" and child.environment["HF_TOKEN"]  # for W&B and the like
        assert child.environment["GLOO_SOCKET_IFNAME"] == "lo" or sys.platform != "linux"


# S9: who listens where.


def listening(pid: int | str = "self") -> set[str]:
    """Addresses at which a process listens, as the kernel writes them; 0100007F is 127.0.0.1."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(str(descriptor.readlink()))
        except OSError:  # closed since
            continue
    texts = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for text in texts for line in text.splitlines()]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_store_of_one_machine_is_not_open_to_others(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    before = listening()
    (port,) = free_ports(1)
    store = meet(0, 1, address, port)
    assert store.get("all") == b"" and listening() - before == {"0100007F"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_report_is_served_to_this_machine_alone(run: Path) -> None:
    with Server(open_runs((str(run),)), 0, 1.0) as server:
        assert server.server_address[0] == "127.0.0.1" and "0100007F" in listening()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("secrets")
def test_processes_of_one_machine_listen_to_it_alone(small_data: Path, tmp_path: Path) -> None:
    """Two real ones, in the middle of training: all that listens, and all arguments."""
    command = [str(Path(sys.executable).parent / "openv4"), "train", *SMALL_RUN, "model.vocab_size=512"]
    words = [f"data={small_data}", f"output={tmp_path / 'run'}", "steps=100000", "parallel.nproc=2"]
    process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not read_lines(tmp_path / "run" / "metrics.jsonl"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        for pid in [str(process.pid), *children]:
            assert not holds_secret(Path(f"/proc/{pid}/cmdline").read_bytes())
            assert listening(pid) <= {"0100007F"}
        assert listening(children[0])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert assert_tells_nothing(tmp_path) > 5
