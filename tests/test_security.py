"""Hostile files, names and neighbours: nothing that openv4 reads runs code, leaves its folder or tells a secret."""

import ast
import base64
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_cases import SMALL_RUN, Run, console
from model_cases import random_model
from openv4.data.config import DataError
from openv4.data.reading import lines
from openv4.data.shards import PreparedData
from openv4.launch import cli
from openv4.launch.report import Server
from openv4.model import load_pretrained
from openv4.model.config import WeightsError
from openv4.model.lora import LoRAConfig, add_lora, save_adapter
from openv4.model.tensor_files import INDEX, new_folder
from openv4.train import folder as run_folder
from openv4.train.config import ConfigError, load_config
from openv4.train.folder import exposed
from openv4.train.preflight import meet
from openv4.train.record import open_runs
from openv4.train.secret import is_secret, redacted, secret_in
from openv4.train.wandb_log import WandbLog
from test_imports import FOLDERS, MODULES, ROOT

pytestmark = [pytest.mark.usefixtures("one_thread", "elsewhere"), pytest.mark.xdist_group("workshop")]


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


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "pytorch_model.bin", "rng_state.pth", "scheduler.ckpt"])
def test_a_pickle_in_a_checkpoint(
    name: str, kind: str, canary: Path, run: Path, workshop: Path, refused: Callable[..., str]
) -> None:
    newest = run / "checkpoints" / "step_8"
    (newest / name).write_bytes(KINDS[kind](Trap(canary)))
    assert f"files missing or added: {name}" in refused(*train_words(workshop, run))
    assert f"files missing or added: {name}" in refused("inspect", newest)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pickle_for_a_file_of_a_checkpoint(
    name: str, kind: str, canary: Path, run: Path, workshop: Path, refused: Callable[..., str]
) -> None:
    """Also where its checksum is right."""
    newest = run / "checkpoints" / "step_8"
    (newest / name).write_bytes(KINDS[kind](Trap(canary)))
    assert name in refused(*train_words(workshop, run))
    if name != "manifest.json":
        reseal_checkpoint(newest)
        assert name in refused(*train_words(workshop, run))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "expert_load.jsonl", "env.json", "summary.json", "checkpoints/latest"]
)
def test_a_pickle_for_a_file_of_a_run(
    name: str, canary: Path, run: Path, workshop: Path, openv4: Run, tmp_path: Path
) -> None:
    """What is no row or event is passed over; training writes the others anew."""
    (run / name).write_bytes(pickle.dumps(Trap(canary)))
    assert openv4("report", run, f"output={tmp_path / 'page.html'}").code == 0
    result = openv4(*train_words(workshop, run))
    assert result.code == 0, result.err


def test_a_pickle_for_the_config(canary: Path, run: Path, workshop: Path, refused: Callable[..., str]) -> None:
    (run / "config.yaml").write_bytes(pickle.dumps(Trap(canary)))
    assert "config.yaml: unreadable" in refused(*train_words(workshop, run))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", INDEX, "by the index"])
def test_a_pickle_among_released_weights(
    name: str, kind: str, canary: Path, fp32: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """Weights that are there as a pickle alone are not looked at."""
    folder = shutil.copytree(fp32, tmp_path / "weights")
    if name in ("pytorch_model.bin", "by the index"):
        (folder / "model.safetensors").unlink()
    if name == "by the index":
        name = "pytorch_model.bin"
        (folder / INDEX).write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    (folder / name).write_bytes(KINDS[kind](Trap(canary)))
    wanted = f"neither model.safetensors nor {INDEX}" if not (folder / INDEX).exists() and name[0] == "p" else name
    for words in (["inspect", folder], ["generate", folder, "prompt=x"], ["train", "run=lora", f"model.pretrained={folder}", "data=x/y"]):
        words = [words[0], f"checkpoint={folder}", *words[2:]] if words[0] == "generate" else words
        assert wanted in refused(*words)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_a_pickle_for_an_adapter(
    name: str, kind: str, canary: Path, fp32: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    model, lora, folder = load_pretrained(fp32), LoRAConfig(rank=2, targets=("shared_experts",)), tmp_path / "adapter"
    add_lora(model, lora)
    save_adapter(model, lora, folder, str(fp32))
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(KINDS[kind](Trap(canary)))
    message = refused("merge", f"adapter={folder}", f"output={tmp_path / 'merged'}")
    assert name.replace(".bin", ".safetensors") in message
    assert name.replace(".bin", ".safetensors") in refused("generate", f"checkpoint={folder}", "prompt=x")


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("name", ["tokens", "offsets", "token_bytes.npy", "tokenizer.json", "manifest.json"])
def test_a_pickle_in_prepared_data(
    name: str, kind: str, canary: Path, workshop: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """Also where its checksum is right, and where no checksum is asked for."""
    folder = shutil.copytree(workshop / "data", tmp_path / "data")
    name = f"train/{name}-00000.npy" if "." not in name else name
    (folder / name).write_bytes(KINDS[kind](Trap(canary)))
    words = ["train", *SMALL_RUN, f"data={folder}", f"output={tmp_path / 'run'}", "steps=1"]
    assert str(folder / name) in refused(*words)
    if name != "manifest.json":
        reseal_data(folder)
        assert str(folder / name) in refused(*words)
        assert str(folder / name) in refused(*words, "data.verify=false")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.txt", "chat.jsonl"])
def test_a_pickle_for_text(
    name: str, kind: str, canary: Path, workshop: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    file, output = tmp_path / name, tmp_path / "data"
    content = KINDS[kind](Trap(canary))
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    chat = ["kind=chat", f"tokenizer={workshop / 'data'}"] if name == "chat.jsonl" else []
    message = refused("prepare", f"input={file}", f"output={output}", *chat)
    assert str(file) in message and not output.exists()


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
