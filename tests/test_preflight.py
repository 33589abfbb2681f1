"""What many processes check before they train: that they meet, and that they are about to do the same."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_cases import tiny_config
from slurm_cases import free_ports

from openv4.model.accounting import checkpoint_bytes
from openv4.train import preflight as module
from openv4.train.config import ConfigError, TrainConfig, load_config
from openv4.train.preflight import (
    Facts,
    PreflightError,
    check_layout,
    compare,
    facts_of,
    idle,
    meet,
    preflight,
    source_hash,
)

# Numbers of processes.


def test_layouts() -> None:
    check_layout(load_config(["run=smoke", "parallel.expert=4", "parallel.context=2"]), 8)
    flash = ["run=pretrain_flash", "data.path=x"]
    check_layout(load_config([*flash, "parallel=ep256"]), 256)
    with pytest.raises(ConfigError, match=r"^parallel.expert=256 does not divide the number of processes, 128$"):
        check_layout(load_config([*flash, "parallel=ep256"]), 128)
    with pytest.raises(ConfigError, match=r"stage '4k' on 384 processes: parallel.expert=384 does not divide the 256"):
        check_layout(load_config([*flash, "parallel.expert=384"]), 384)
    with pytest.raises(ConfigError, match=r"parallel.context=64 leaves 64 tokens of a row to each GPU, a block"):
        check_layout(load_config([*flash, "parallel.context=64"]), 64)


def test_processes_without_a_row_are_told() -> None:
    flash = ["run=pretrain_flash", "data.path=x"]
    (line, _) = idle(load_config(flash), 256)
    assert line == "stage '64k_indexer' has 32 rows of 65,536 tokens a step for 256 processes: 224 have none"
    assert idle(load_config([*flash, "parallel.context=8"]), 256) == []
    assert idle(load_config(["run=smoke"]), 8) == []


# What they tell each other, in this process.


@pytest.fixture
def config(small_data: Path, tmp_path: Path) -> TrainConfig:
    return tiny_config(small_data, tmp_path / "run", "device=cpu")


def facts(rank: int = 0, **changes: Any) -> Facts:
    same = {"openv4": "0.1.0", "torch": "2.13.0", "Python": "3.11", "config": "abc", "data": "def"}
    base = Facts(rank, rank % 2, f"n{rank // 2}", 2, "/runs/x", "", 10**12, 10**9, same)
    return replace(base, **changes)


def test_equal_processes_have_no_problem() -> None:
    assert compare([facts(rank) for rank in range(8)]) == []
    assert compare([facts(rank, gpus=0) for rank in range(8)]) == []  # a cluster of CPUs
    assert compare([facts(rank, gpus=0) for rank in range(8)], "cpu") == []


@pytest.mark.parametrize("key", ["openv4", "torch", "Python", "config", "data"])
def test_who_differs_is_named(key: str) -> None:
    odd = [facts(rank, same=facts().same | {key: "other"}) if rank in (2, 3, 6) else facts(rank) for rank in range(8)]
    (line,) = compare(odd)
    assert line == f"ranks 2-3, 6 (n1): {key} other, but ranks 0-1, 4-5, 7 have {facts().same[key]}"


def test_gpus() -> None:
    """A line for each node that has fewer than it has processes; the others are not named."""
    lines = compare([facts(rank, gpus=1 if rank >= 4 else 2) for rank in range(8)])
    assert [line.partition(";")[0] for line in lines] == [
        "rank 4 (n2): 1 GPUs for the 2 processes of the node",
        "rank 6 (n3): 1 GPUs for the 2 processes of the node",
    ]
    assert len(compare([facts(rank, gpus=2 if rank else 0) for rank in range(4)])) == 1  # auto, and one node has none
    assert len(compare([facts(rank, gpus=0) for rank in range(4)], "cuda")) == 2


def test_a_folder_that_is_full_or_closed() -> None:
    (line,) = compare([facts(rank, free=5 * 10**8) for rank in range(2)])
    assert line.startswith("rank 0 (n0): 0.5 GB free at output=/runs/x, checkpoints need 1.0 GB")
    lines = compare([facts(rank, problem="cannot write to output=x (Read-only file system)") for rank in range(4)])
    assert lines == [f"rank {rank} (n{rank // 2}): cannot write to output=x (Read-only file system)" for rank in (0, 2)]


def test_many_problems_are_one_line() -> None:
    error = PreflightError([f"rank {rank}: x" for rank in range(100)])
    assert str(error).endswith("rank 5: x; and 94 more") and len(error.problems) == 100


def test_the_space_is_two_checkpoints(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    size = checkpoint_bytes(config.model)
    assert facts_of(config, 0, 0, gpus=0).needed == 2 * size
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert (compare([facts_of(config, 0, 0, gpus=0)]) == []) == fits
    (Path(config.output) / "checkpoints").mkdir()
    (Path(config.output) / "checkpoints" / "latest").write_text("step_1\n")
    assert facts_of(config, 0, 0, gpus=0).needed == size


def test_an_output_that_cannot_be_written(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = facts_of(replace(config, output=str(tmp_path / "file" / "run")), 0, 0, gpus=0)
    assert found.problem == f"cannot write to output={tmp_path / 'file' / 'run'} (Not a directory)"


def test_alone(config: TrainConfig) -> None:
    (found,) = preflight(config, 0, 0, lambda value: [json.loads(json.dumps(value))], "data")
    assert (found.rank, found.same["data"], found.problem) == (0, "data", "")
    assert list(Path(config.output).iterdir()) == []


def test_a_change_of_the_source_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("train", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train" / "preflight.py").write_text("a")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "train" / "preflight.py"))
    before = source_hash()
    (tmp_path / "model" / "new.py").touch()
    assert source_hash() != before


# Two processes.

PROGRAM = """
import json, os, sys, time
from functools import partial
import torch.distributed as dist
from openv4.train.config import load_config
from openv4.train import preflight as module
from openv4.train.preflight import PreflightError, gather_json, meet, preflight
module.SEEN_SECONDS = 1.0  # both are on this machine
print("ready", flush=True)
rank, world, port, seconds, fingerprint, *overrides = sys.argv[1:]
rank, world = int(rank), int(world)
start = time.monotonic()
try:
    store = meet(rank, world, "127.0.0.1", int(port), float(seconds))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    values = gather_json({"rank": rank, "text": "\\u4f60" * (rank * 1000), "none": None})
    assert values == [{"rank": r, "text": "\\u4f60" * (r * 1000), "none": None} for r in range(world)]
    if overrides:
        preflight(load_config(overrides), rank, rank, gather_json, fingerprint)
    dist.barrier()
    dist.destroy_process_group()
    print("together")
except PreflightError as error:
    print(json.dumps([*error.problems, time.monotonic() - start]))
sys.stdout.flush()
os._exit(0)  # `launch.cli._exit` says why
"""

Ranks = Callable[..., list[str]]


def start(rank: int, world: int, port: int, seconds: float, words: Sequence[str], **environment: str) -> Any:
    command = [sys.executable, "-c", PROGRAM, str(rank), str(world), str(port), str(seconds), *words]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "TORCHELASTIC"))}
    return subprocess.Popen(
        command,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes: Sequence[Any]) -> list[str]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        found.append(out.strip().splitlines()[-1])
    return found


def test_two_processes_that_agree(config: TrainConfig, small_data: Path) -> None:
    words = ["data", "run=smoke", "device=cpu", f"data={small_data}", f"output={config.output}"]
    (port,) = free_ports(1)
    assert outputs([start(rank, 2, port, 30, words) for rank in range(2)]) == ["together"] * 2
    assert list(Path(config.output).iterdir()) == []


def test_two_processes_that_differ(tmp_path: Path, small_data: Path) -> None:
    """Config, data and folder: the same lines on both ranks."""
    common = ["run=smoke", "device=cpu", f"data={small_data}"]
    words = [["one", *common, f"output={tmp_path / 'a'}"], ["two", *common, f"output={tmp_path / 'b'}", "seed=1"]]
    (port,) = free_ports(1)
    found = outputs([start(rank, 2, port, 30, words[rank], SLURMD_NODENAME=f"n{rank}") for rank in range(2)])
    first, second = (json.loads(text)[:-1] for text in found)
    assert first == second and len(first) == 3
    assert first[0].startswith("rank 1 (n1): config ") and ", but rank 0 has " in first[0]
    assert first[1] == "rank 1 (n1): data two, but rank 0 has one"
    assert first[2] == (
        f"rank 1 (n1): output={tmp_path / 'b'} is another folder than that of rank 0 (n0); choose one on a file system "
        "that all nodes share"
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def at(port: int) -> str:
    return f"127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)"


def test_a_peer_that_never_joins() -> None:
    """Those who came say who did not, and where they waited."""
    (port,) = free_ports(1)
    third = start(2, 3, port, 60, ["-"], SLURMD_NODENAME="n2")
    assert third.stdout.readline() == "ready\n"  # it need not be waited for, however busy the machine is
    first = start(0, 3, port, 4, ["-"], SLURMD_NODENAME="n0")
    for rank, text in zip((0, 2), outputs([first, third]), strict=True):
        line, seconds = json.loads(text)
        assert line == f"rank {rank} (n{rank}): rank 1 of 3 did not come to {at(port)} within 4 s"
        assert seconds < 8 or rank == 2


def test_rank_0_never_comes() -> None:
    (port,) = free_ports(1)
    begin = time.monotonic()
    with pytest.raises(
        PreflightError, match=rf"^rank 1 \(.*\): no rank 0 at 127.0.0.1:{port} \(MASTER_ADDR:MASTER_PORT\)"
    ):
        meet(1, 2, "127.0.0.1", port, 2)
    assert time.monotonic() - begin < 10


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(
        PreflightError, match=r"no rank 0 at nowhere.invalid:29500 \(MASTER_ADDR:MASTER_PORT\) within 2 s"
    ):
        meet(1, 2, "nowhere.invalid", 29500, 2)


def test_a_port_that_is_taken() -> None:
    """By somebody who listens and never answers: rank 0 says so at once, rank 1 does not wait for ever."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        begin = time.monotonic()
        with pytest.raises(PreflightError) as error:
            meet(0, 2, "127.0.0.1", port)
        assert time.monotonic() - begin < 2
        assert str(error.value).partition(": ")[2] == (
            f"cannot open {at(port)}: port {port}: Address already in use; choose another MASTER_PORT"
        )
        (text,) = outputs([start(1, 2, port, 3, ["-"], SLURMD_NODENAME="n1")])
    line, seconds = json.loads(text)
    assert line.startswith(f"rank 1 (n1): no rank 0 at {at(port)} within 3 s: ") and seconds < 10


def test_the_waits_are_less_than_a_minute() -> None:
    assert module.MEET_SECONDS * 1.25 < 60


def test_nothing_is_pickled() -> None:
    text = Path(module.__file__).read_text()
    assert "_object" not in text.replace("all_gather_into_tensor", "")
    assert json.loads(json.dumps(asdict(facts()))) == asdict(facts())


def test_it_imports_no_torch() -> None:
    code = "import sys; import openv4.train.preflight; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
