"""`openv4 train` on several processes: the run's folder, resume on another number, signals, processes that die."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_cases import QUICK
from model_cases import relative_rms
from run_cases import OVERRIDES, STEPS, contents, rows, summary
from safetensors.torch import load_file

from openv4.train.checkpoint import verify
from openv4.train.metrics import read_lines

pytestmark = pytest.mark.xdist_group("processes")

COMMAND = [str(Path(sys.executable).parent / "openv4"), "train", *OVERRIDES, "optim.adamw.eps=1e-6"]
SECONDS = 120


def command(data: Path, output: Path, *overrides: str) -> list[str]:
    return [*COMMAND, f"data={data}", f"output={output}", *overrides]


def run(data: Path, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(data, output, *overrides), capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )


def spread(nproc: int, expert: int) -> list[str]:
    return [f"parallel.nproc={nproc}", f"parallel.expert={expert}"]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    verify(checkpoint)
    return {name: tensor for file in checkpoint.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    result = run(small_data, output, "checkpoint.every=4")
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def spread_run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes with two experts each, never interrupted."""
    output = tmp_path_factory.mktemp("spread") / "run"
    result = run(small_data, output, "checkpoint.every=4", *spread(2, 2))
    assert result.returncode == 0, result.stderr
    return output


def test_a_run_of_two_processes_is_that_of_one(alone: Path, spread_run: Path) -> None:
    """To the rounding of sums, which two updates make more of; exactly in what is counted."""
    ours, theirs = rows(spread_run), rows(alone)
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    counted = ("step", "tokens", "data/", "train/stage", "train/batch", "train/sequence", "stability/skipped")
    for mine, other in zip(ours, theirs, strict=True):
        for key, value in other.items():
            if key.startswith(counted):
                assert mine[key] == value, key
            elif key.startswith(("train/loss", "train/mtp_loss", "train/grad_norm", "validation/")):
                assert mine[key] == pytest.approx(value, rel=2e-4), key
    assert summary(spread_run)["validation/loss"] == pytest.approx(summary(alone)["validation/loss"], rel=2e-4)
    found = weights(spread_run / "checkpoints" / f"step_{STEPS}")
    for name, tensor in weights(alone / "checkpoints" / f"step_{STEPS}").items():
        assert found.pop(name).shape == tensor.shape
    assert not found


@pytest.mark.parametrize(("nproc", "expert"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_resumes_on_other_numbers_of_processes(
    nproc: int, expert: int, small_data: Path, spread_run: Path, tmp_path: Path
) -> None:
    """From two processes with experts spread; the steps after the checkpoint have the losses that they had there."""
    output = tmp_path / "run"
    result = run(small_data, output, "checkpoint.every=4", "steps=4", *spread(2, 2))
    assert result.returncode == 0, result.stderr
    before = weights(output / "checkpoints" / "step_4")
    wanted = weights(spread_run / "checkpoints" / "step_4")
    assert all(torch.equal(before[name], tensor) for name, tensor in wanted.items())
    result = run(small_data, output, "checkpoint.every=4", *spread(nproc, expert))
    assert result.returncode == 0, result.stderr
    assert "resumed at step 4" in result.stdout
    for mine, other in zip(rows(output)[4:], rows(spread_run)[4:], strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=2e-4)
    assert rows(output)[4]["train/loss"] == pytest.approx(rows(spread_run)[4]["train/loss"], rel=1e-6)


def test_goes_on_where_owners_alone_have_weights(small_data: Path, tmp_path: Path) -> None:
    """In bfloat16 (test_held_weights). Stopped and resumed, through a change of precision: the same bits."""
    mixed = [*spread(2, 2), "precision=bf16", "stages.1.compute=fp4_qat", "stability.check_every=1"]
    for output, steps in ((tmp_path / "whole", ()), (tmp_path / "parts", ("steps=4",)), (tmp_path / "parts", ())):
        result = run(small_data, output, "checkpoint.every=4", "checkpoint.asynchronous=true", *mixed, *steps)
        assert result.returncode == 0, result.stderr
    ours, theirs = (contents(tmp_path / name / "checkpoints") for name in ("parts", "whole"))
    assert ours == theirs
    assert [row["train/loss"] for row in rows(tmp_path / "parts")] == [
        row["train/loss"] for row in rows(tmp_path / "whole")
    ]


@pytest.mark.slow
def test_from_four_processes_to_others(small_data: Path, alone: Path, tmp_path: Path) -> None:
    """Each with one expert; the first steps have rows for two of them. Saved, and gone on with by 1, by 2 with two
    experts each, by 2 with all; 3 are refused."""
    four = tmp_path / "four"
    result = run(small_data, four, "steps=4", "checkpoint.every=4", *spread(4, 4))
    assert result.returncode == 0, result.stderr
    for mine, other in zip(rows(four), rows(alone), strict=False):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=2e-4)
    losses = []
    for nproc, expert in ((1, 1), (2, 2), (2, 1)):
        output = tmp_path / f"{nproc}_{expert}"
        shutil.copytree(four, output)
        result = run(small_data, output, "steps=6", *spread(nproc, expert))
        assert result.returncode == 0 and "resumed at step 4" in result.stdout, result.stderr
        losses.append([row["train/loss"] for row in rows(output)[4:]])
        first = weights(output / "checkpoints" / "step_4")
        assert all(
            torch.equal(tensor, first[name]) for name, tensor in weights(four / "checkpoints" / "step_4").items()
        )
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    result = run(small_data, four, "steps=6", *spread(3, 3))
    assert result.returncode == 2 and "does not divide the 4 routed experts" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_and_the_same_command_goes_on(
    number: signal.Signals, small_data: Path, spread_run: Path, tmp_path: Path
) -> None:
    """The rows, the weights and the optimizer's state are to the bit those of a run that was not interrupted."""
    output = tmp_path / "run"
    process = started(small_data, output, "checkpoint.every=4")
    process.send_signal(number)
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 85, text
    assert "saved; the same command goes on" in text
    stopped = len(read_lines(output / "metrics.jsonl"))
    assert 0 < stopped < STEPS and (output / "checkpoints" / f"step_{stopped}").is_dir()
    result = run(small_data, output, "checkpoint.every=4", *spread(2, 2))
    assert result.returncode == 0, result.stderr
    assert rows(output) == rows(spread_run)
    last = f"step_{STEPS}"
    ours, theirs = (contents(folder / "checkpoints" / last) for folder in (output, spread_run))
    assert ours == theirs
    kinds = [event["kind"] for event in read_lines(output / "events.jsonl")]
    assert kinds.count("preempted") == kinds.count("resume") == 1 and "failed" not in kinds


def test_a_process_that_dies_ends_the_run_and_is_named(small_data: Path, spread_run: Path, tmp_path: Path) -> None:
    """Killed while the other one waits for it within a step; the same command goes on, bit for bit."""
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(small_data, output, "checkpoint.every=1", *spread(2, 2)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while not (output / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = int(child_of(process.pid, 1))
    os.kill(victim, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    text, _ = process.communicate(timeout=SECONDS)
    assert time.monotonic() - begun < 30
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL; the others were stopped" in text
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    result = run(small_data, output, "checkpoint.every=4", *spread(2, 2))
    assert result.returncode == 0 and "resumed at step" in result.stdout, result.stderr
    assert rows(output) == rows(spread_run)
    ours, theirs = (contents(folder / "checkpoints" / f"step_{STEPS}") for folder in (output, spread_run))
    assert ours == theirs


def test_a_process_that_hangs_is_named(small_data: Path, tmp_path: Path) -> None:
    """Stopped, not ended: the others wait for it, and it cannot say so itself. Woken, it goes on."""
    output = tmp_path / "run"
    process = started(small_data, output, "parallel.hang_minutes=0.1")
    deadline = time.monotonic() + SECONDS
    victim = int(child_of(process.pid, 1))
    os.kill(victim, signal.SIGSTOP)
    while not (hangs := [event for event in read_lines(output / "events.jsonl") if event["kind"] == "hang"]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(victim, signal.SIGCONT)
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    assert re.search(
        r"no step has ended for \d+ s, at step \d+: rank 1 \(.*\) has not answered for \d+ s", hangs[0]["text"]
    )
    assert f"hang: {hangs[0]['text']}" in text
    assert re.search(r"rank 0 \(.*\): no step has ended for .* s\n +File", text)  # its stack


@pytest.mark.slow
def test_a_process_that_is_slow_is_named(small_data: Path, tmp_path: Path) -> None:
    """It runs a tenth of the time."""
    output = tmp_path / "run"
    process = started(small_data, output, "parallel.hang_minutes=0.1", "steps=100000")
    victim, deadline = int(child_of(process.pid, 1)), time.monotonic() + SECONDS
    try:
        while not (slow := [event for event in read_lines(output / "events.jsonl") if event["kind"] == "slow"]):
            assert time.monotonic() < deadline and process.poll() is None
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.45)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.05)
    finally:
        os.kill(victim, signal.SIGCONT)
        process.kill()
        process.communicate()
    assert slow[0]["text"].startswith("rank 1 (")


def started(data: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run of two processes, after its first step."""
    process = subprocess.Popen(
        command(data, output, *overrides, *spread(2, 2)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while not read_lines(output / "metrics.jsonl"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    return process


def child_of(pid: int, rank: int) -> str:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(c for c in children if f"RANK={rank}" in Path(f"/proc/{c}/environ").read_text().split("\0"))


def test_what_cannot_be_spread_is_refused_in_one_line(small_data: Path, tmp_path: Path) -> None:
    for overrides, reason in (
        (spread(2, 4), "parallel.expert=4 does not divide the number of processes, 2"),
        (spread(3, 3), "parallel.expert=3 does not divide the 4 routed experts"),
        ([*spread(2, 1), "parallel.context=2", "model.sliding_window=40"], "leaves 32 tokens of a row"),
    ):
        result = run(small_data, tmp_path / "run", *overrides)
        assert result.returncode == 2 and reason in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_asynchronous_saves_change_nothing(small_data: Path, spread_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(small_data, output, "checkpoint.every=4", "checkpoint.asynchronous=true", *spread(2, 2))
    assert result.returncode == 0, result.stderr
    ours, theirs = (contents(folder / "checkpoints") for folder in (output, spread_run))
    assert ours == theirs
    events = [event["text"] for event in read_lines(output / "events.jsonl") if event["kind"] == "checkpoint"]
    assert events == ["step_4", f"step_{STEPS}"]


LORA = [
    "lora.rank=4",
    "lora.targets=[attention,shared_experts,experts]",
    "steps=3",
    "optim.adamw.eps=1e-6",
    "checkpoint.every=2",
]


@pytest.mark.parametrize("base", ["fp32", pytest.param("released", marks=pytest.mark.slow)])
def test_adapters_on_two_processes(base: str, release: Path, chat: Path, tmp_path: Path) -> None:
    """Experts spread, plainly and under ZeRO, resumed under the other; adapters are those of one process."""
    launcher = [COMMAND[0], "train", "run=lora", f"model.pretrained={release}", f"data.path={chat}", *QUICK, *LORA]
    launcher.append(f"precision.base={base}")

    def finetune(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        result = subprocess.run(
            [*launcher, f"output={tmp_path / name}", *overrides],
            capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        newest = tmp_path / name / "checkpoints" / (tmp_path / name / "checkpoints" / "latest").read_text().strip()
        verify(newest)
        return load_file(newest / "adapter_model.safetensors")

    wanted = finetune("alone")
    found = [finetune("owners", *spread(2, 2))]
    finetune("zero", *spread(2, 2), "parallel.zero=1", "steps=2")
    found.append(finetune("zero", *spread(2, 1), "parallel.zero=2"))
    for adapters in found:
        assert set(adapters) == set(wanted)
        for name, tensor in wanted.items():
            # B begins at 0: what moves it is the gradient alone, and its rounding shows.
            assert relative_rms(adapters[name], tensor) < 1e-3, name


def test_a_release_is_finetuned_by_two_processes(release: Path, chat: Path, tmp_path: Path) -> None:
    """Each process reads its own experts; all weights are trained and written."""
    command = [COMMAND[0], "train", "run=finetune", f"model.pretrained={release}", f"data.path={chat}", *QUICK]
    found = {}
    for name, overrides in {"alone": [], "spread": spread(2, 2)}.items():
        result = subprocess.run(
            [*command, f"output={tmp_path / name}", "steps=2", "optim.adamw.eps=1e-6", *overrides],
            capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found[name] = weights(tmp_path / name / "checkpoints" / "step_2")
        losses = [row["train/loss"] for row in rows(tmp_path / name)]
        found[name]["losses"] = torch.tensor(losses)
    assert set(found["alone"]) == set(found["spread"])
    assert relative_rms(found["spread"]["losses"], found["alone"]["losses"]) < 1e-5
    for name, tensor in found["alone"].items():
        if not name.startswith("layers.0.hc_attn_"):  # no gradient but rounding (test_parallel)
            assert relative_rms(found["spread"][name].float(), tensor.float()) < 1e-2, name


LAUNCHERS = {
    "torchrun": ["--standalone", "--nproc_per_node=2", "--no-python"],
    "deepspeed": ["--no_python", "--no_local_rank", "--num_accelerators", "2"],
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_launchers_start_a_run(launcher: str, small_data: Path, spread_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    program = str(Path(sys.executable).parent / launcher)
    result = subprocess.run(
        [program, *LAUNCHERS[launcher], *command(small_data, output, "checkpoint.every=4", "parallel.expert=2")],
        capture_output=True, text=True, timeout=SECONDS, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert rows(output) == rows(spread_run)
    assert len(re.findall("tokens trained", result.stdout)) == 1  # one process speaks
    assert json.loads((output / "summary.json").read_text())["step"] == STEPS
