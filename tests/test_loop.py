"""The training loop: resume, accumulation, skipped steps, router biases, the schedule in a run, the run's folder.

Golden losses: `golden_nano.txt` holds the losses of eight steps of the preset `nano`. A change that leaves the
mathematics alone reproduces them. One that means to change them is followed by

    OPENV4_REGENERATE=1 .venv/bin/pytest tests/test_loop.py -k golden
"""

import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import random_config, random_model, relative_rms
from run_cases import OVERRIDES, STEPS, contents, optimizers_of, packed_batch, plan, rows, summary, tiny_config, trained
from torch import Tensor

import openv4.train.loop as loop
from openv4.data.loader import Batch
from openv4.data.prepare import PrepareConfig, prepare
from openv4.model import Transformer
from openv4.model.init import init_weights
from openv4.model.loss import training_losses
from openv4.optim.schedule import Schedule
from openv4.train.config import CheckpointError, ConfigError, TrainConfig, from_yaml, load_config, to_yaml
from openv4.train.folder import claim_folder
from openv4.train.loop import split_batch, train, training_step
from openv4.train.metrics import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parent / "golden_nano.txt"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that keeps the checkpoint of every step; its folder is `straight`'s."""
    config = tiny_config(small_data, tmp_path_factory.mktemp("straight") / "run")
    return replace(config, checkpoint=replace(config.checkpoint, every=1, keep=STEPS))


@pytest.fixture(scope="module")
def straight(config: TrainConfig, one_thread: None) -> Path:
    """The folder of that run, never interrupted; not to be written to."""
    return train(config)


def assert_same_run(run: Path, straight: Path) -> None:
    """Same last checkpoint, byte for byte (weights, optimizer, data order, counters), same metrics and summary."""
    name = f"step_{STEPS}"
    ours, theirs = contents(run / "checkpoints" / name), contents(straight / "checkpoints" / name)
    assert sorted(ours) == sorted(theirs)
    assert [file for file in ours if ours[file] != theirs[file]] == []
    assert (run / "checkpoints" / "latest").read_text() == f"{name}\n"
    assert rows(run) == rows(straight)
    assert summary(run) == summary(straight)
    assert (run / "expert_load.jsonl").read_bytes() == (straight / "expert_load.jsonl").read_bytes()
    assert not list((run / "checkpoints").glob(".*"))


# Resume.


def test_the_uninterrupted_run_has_all_that_resuming_must_get_right(straight: Path) -> None:
    found = rows(straight)
    assert [row["train/batch_tokens"] for row in found] == [128, 128, 192, 192, 256, 256, 256, 256]
    assert [row["train/sequence_length"] for row in found] == [64] * 5 + [128] * 3
    assert [row["data/epoch"] for row in found][-1] >= 2
    assert found[-1]["train/loss"] < found[0]["train/loss"] - 0.2


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("step", range(1, STEPS))
def test_killed_after_any_step_and_resumed(step: int, config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    """A kill after the checkpoint of a step; the rows of later steps have been written already."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step_{later}")
    (run / "checkpoints" / "latest").write_text(f"step_{step}\n")
    (run / "summary.json").unlink()
    train(replace(config, output=str(run)))
    assert_same_run(run, straight)


@pytest.mark.usefixtures("no_plot")
def test_stopped_after_every_step(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    """`steps=1`, then `steps=2`, and so on: each checkpoint is that of the run that went straight through."""
    run = tmp_path / "run"
    for step in range(1, STEPS + 1):
        train(replace(config, output=str(run), steps=step))
        name = f"step_{step}"
        assert contents(run / "checkpoints" / name) == contents(straight / "checkpoints" / name), name
    assert_same_run(run, straight)


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("calls", [0, 1, 4, 7])
def test_killed_between_checkpoints(
    calls: int, config: TrainConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint every third step, a row for every one; the kill comes anywhere in between."""
    every_third = replace(config, output=str(tmp_path / "run"), checkpoint=replace(config.checkpoint, every=3))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", fail_after(calls))
        with pytest.raises(KeyboardInterrupt):
            train(every_third)
    assert len(rows(tmp_path / "run")) == calls if calls else not (tmp_path / "run" / "metrics.jsonl").read_text()
    train(every_third)
    assert_same_run(tmp_path / "run", straight)


def fail_after(calls: int) -> Callable[..., Any]:
    """`training_step` that is killed in the call after so many."""
    done = 0

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        if done == calls:
            raise KeyboardInterrupt
        done += 1
        return training_step(*arguments, **options)

    return step


@pytest.mark.usefixtures("no_plot")
def test_killed_before_the_summary(
    config: TrainConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is written, the validation after it is not: the same command does what is left."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "conclude", fail_after(0))
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, output=str(run)))
    assert not (run / "summary.json").exists()
    train(replace(config, output=str(run)))
    assert_same_run(run, straight)


def test_a_complete_run_is_left_alone(
    config: TrainConfig, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {name: data for name, data in contents(run).items() if name not in ("config.yaml", "env.json")}
    train(replace(config, output=str(run)))
    assert "complete at step 8; raise steps=" in capsys.readouterr().out
    train(replace(config, output=str(run), steps=5))  # fewer than done already
    assert "complete at step 8" in capsys.readouterr().out
    after = contents(run)
    assert [name for name in before if before[name] != after[name]] == []
    assert sorted(after) == sorted({*before, "config.yaml", "env.json"})


@pytest.mark.usefixtures("no_plot")
def test_rows_of_validation_and_rare_logging_survive_a_resume(config: TrainConfig, tmp_path: Path) -> None:
    """Also the validation before the first step, where the first checkpoint comes before the first multiple."""
    sparse = replace(
        config,
        logging=replace(config.logging, every=5),
        validation=replace(config.validation, every=4, tokens=64),
        checkpoint=replace(config.checkpoint, every=2),
    )
    train(replace(sparse, output=str(tmp_path / "straight")))
    for steps in (2, 3, 7, None):
        train(replace(sparse, output=str(tmp_path / "run"), steps=steps))
    found = rows(tmp_path / "run")
    assert found == rows(tmp_path / "straight")
    assert [row["step"] for row in found] == [1, 4, 5, 8]
    assert [row["step"] for row in found if "validation/bits_per_byte" in row] == [4, 8]
    assert found[0]["validation/untrained_bits_per_byte"] > found[-1]["validation/bits_per_byte"]


@pytest.mark.usefixtures("no_plot")
def test_steps_beyond_the_stages_and_back(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    """More steps than the stages have tokens for: the last stage goes on at its final learning rate."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train(replace(config, output=str(run), steps=STEPS + 1))
    found = rows(run)
    assert found[:-1] == rows(straight)
    assert found[-1]["train/lr"] == config.stages[1].lr_end
    assert found[-1]["tokens"] == found[-2]["tokens"] + 256


@pytest.mark.slow
def test_kill_9_at_random_moments(small_data: Path, tmp_path: Path) -> None:
    """The console script, killed again and again at moments drawn from a seed, then left to finish."""
    console_script = Path(sys.executable).with_name("openv4")
    options = ["steps=24", "checkpoint.every=1", "checkpoint.keep=2"]
    reference = train(tiny_config(small_data, tmp_path / "straight", *options))
    run = tmp_path / "run"
    command = [console_script, "train", *OVERRIDES, *options, f"data={small_data}", f"output={run}"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    rng = random.Random(0)
    killed = 0
    for attempt in range(12):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if attempt < 6:
            # The first attempts end while the process starts; the others once training has begun.
            seen = (run / "metrics.jsonl").stat().st_mtime if (run / "metrics.jsonl").exists() else 0.0
            while attempt >= 1 and process.poll() is None:
                if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_mtime > seen:
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5 if attempt else 4.0))
            process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output.decode()
    assert killed >= 3
    assert process.returncode == 0
    ours, theirs = contents(run / "checkpoints"), contents(reference / "checkpoints")
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert rows(run) == rows(reference)
    assert summary(run) == summary(reference)
    assert (run / "expert_load.jsonl").read_bytes() == (reference / "expert_load.jsonl").read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in reference.iterdir())


# Reproducibility.


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("workers", [0, 2])
def test_one_seed_gives_one_run_for_any_number_of_workers(
    workers: int, config: TrainConfig, straight: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)  # whatever the process did before
    train(replace(config, output=str(tmp_path / "run"), data=replace(config.data, workers=workers)))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.usefixtures("no_plot")
def test_another_seed_gives_another_run(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    run = train(replace(config, output=str(tmp_path / "run"), seed=1, steps=1))
    ours, theirs = contents(run / "checkpoints" / "step_1"), contents(straight / "checkpoints" / "step_1")
    assert ours["model.safetensors"] != theirs["model.safetensors"]
    assert ours["state.json"] != theirs["state.json"]  # another order of the documents
    assert rows(run)[0]["train/loss"] != rows(straight)[0]["train/loss"]


def test_golden_losses() -> None:
    """Eight steps of `nano` on the same pseudo-random tokens: three dense, two of indexer warm-up, three sparse.

    Another CPU or torch adds float32 numbers in another order, 6e-8 a rounding. Measured on one machine: other thread
    counts, other micro-batches, and initial weights changed by a factor of 1 +- 1e-6 all stay within 2e-7 of the loss;
    where such a change made the indexer choose another entry, a step's loss moved by 3e-6. The bound is 1e-5: room for
    three such choices. The last loss moves by 2e-5 if Muon decays by 0.09 instead of 0.1, by 2e-4 if MTP weighs 0.29
    instead of 0.3, by 8e-4 if the indexer chooses 7 entries instead of 8.
    """
    config = load_config(["model=nano"])
    model = Transformer(config.model)
    init_weights(model, 0)
    optimizers = optimizers_of(model)
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand((4, 64), generator=generator) ** 3 * config.model.vocab_size).long()  # skewed, as words are
    segments = torch.zeros(4, 64, dtype=torch.int32)
    segments[1, 40:], segments[3, 50:] = 1, -1
    losses = []
    stages = [{"attention": "dense", "balance_weight": 1e-4, "bias_speed": 1e-3, "indexer_weight": 0.0}] * 3
    stages += [{"attention": "indexer_warmup", "balance_weight": 0.0, "bias_speed": 0.0, "indexer_weight": 1.0}] * 2
    stages += [{"attention": "sparse", "balance_weight": 1e-4, "bias_speed": 1e-3, "indexer_weight": 0.01}] * 3
    for stage in stages:
        now = plan(6e-3, **stage)
        report = training_step(model, optimizers, [Batch(tokens, segments, ())], now, 1.0)
        losses.append(float(report.main / report.counts.main))
    if os.environ.get("OPENV4_REGENERATE"):
        GOLDEN.write_text("".join(f"{step} {loss:.7f}\n" for step, loss in enumerate(losses, 1)))
    golden = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    assert losses == pytest.approx(golden, rel=1e-5)


# One step.


def test_accumulation_does_not_change_the_step() -> None:
    """One row four times is four rows once: losses, norm, gradients and the new weights, to float32 rounding.

    Sums of some thousand float32 terms: 1e-6, and 1e-5 where gradients cancel. Muon's matrices are rank-deficient here
    (96 tokens), and its Newton-Schulz steps lift the rounding in their null space, 1e-7 of the largest singular
    value, by up to 3.4445^8 = 2e4: hence 5e-3 on updates. At the first mHC site the streams are still equal, so that
    the gradient of their mixing is rounding alone, of which both optimizers make full steps: it is left out.
    """
    config = random_config(3, num_hash_layers=1, num_hidden_layers=2, compress_ratios=(4, 8, 0), layer_types=())
    batch = packed_batch(config.vocab_size)
    outcomes = []
    for rows_at_once in (4, 1):
        model = random_model(config, 3)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        micro_batches = split_batch(batch, rows_at_once * 24, CPU)
        assert len(micro_batches) == 4 // rows_at_once
        optimizers = optimizers_of(model)
        report = training_step(model, optimizers, micro_batches, plan(), 1.0)
        updates = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        moments = optimizers.state_tensors()
        gradients = {name: moments[name] for name in moments if name.startswith(("momentum.", "exp_avg."))}
        outcomes.append((report, updates, gradients, model.state_dict()))
    (whole, updates, gradients, state), (cut, cut_updates, cut_gradients, cut_state) = outcomes
    for name in ("main", "mtp", "balance", "grad_norm"):
        assert relative_rms(getattr(cut, name), getattr(whole, name)) < 1e-6, name
        assert float(getattr(whole, name)) > 0
    assert asdict(whole.counts) == asdict(cut.counts)
    assert all(torch.equal(whole.load[name], cut.load[name]) for name in whole.load)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():  # after one step momentum and first moment are the gradient, scaled
        assert (cut_gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-6 * total, name
    for name, update in updates.items():
        if not name.startswith("layers.0.hc_attn_"):
            assert relative_rms(cut_updates[name], update) < 5e-3, name
    for name in state:
        if name.endswith("gate.bias"):
            assert torch.equal(state[name], cut_state[name])


def test_split_batch_takes_a_row_at_least_and_keeps_the_rest() -> None:
    batch = packed_batch(50, rows=5)
    assert [len(part.tokens) for part in split_batch(batch, 48, CPU)] == [2, 2, 1]
    assert [len(part.tokens) for part in split_batch(batch, 1, CPU)] == [1] * 5
    assert torch.equal(torch.cat([part.segments for part in split_batch(batch, 71, CPU)]), batch.segments)


def snapshot(model: Transformer, optimizers: Any) -> dict[str, Tensor]:
    tensors = {f"weight.{name}": tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in (tensors | optimizers.state_tensors()).items()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embed.weight", math.nan),
        ("embed.weight", math.inf),
        ("layers.1.ffn.experts.w2", -math.inf),
        ("layers.0.hc_attn_base", math.nan),
        ("mtp.0.enorm.weight", math.nan),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, value: float) -> None:
    """Neither weights nor optimizer state nor router biases, bit for bit, in one element of one gradient once."""
    model, optimizers, _ = trained(0)
    batch = packed_batch(model.config.vocab_size)
    before = snapshot(model, optimizers)

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    hook = model.get_parameter(name).register_hook(spoil)
    report = training_step(model, optimizers, split_batch(batch, 48, CPU), plan(), 1.0)
    hook.remove()
    assert float(report.found_inf) == 1 and not math.isfinite(float(report.grad_norm))
    after = snapshot(model, optimizers)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert all(parameter.grad is None for parameter in model.parameters())

    report = training_step(model, optimizers, split_batch(batch, 48, CPU), plan(), 1.0)
    assert float(report.found_inf) == 0
    clean, clean_optimizers, _ = trained(0)
    training_step(clean, clean_optimizers, split_batch(batch, 48, CPU), plan(), 1.0)
    after, clean_after = snapshot(model, optimizers), snapshot(clean, clean_optimizers)
    assert [key for key in after if not torch.equal(after[key], clean_after[key])] == []


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])
def test_a_loss_that_is_not_finite_changes_nothing(factor: float) -> None:
    """The streams' last norm overflows in the second micro-batch, and with it the logits."""
    model, optimizers, _ = trained(1)
    before = snapshot(model, optimizers)
    calls = 0

    def overflow(module: Any, arguments: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * factor if calls == 2 else output

    hook = model.norm.register_forward_hook(overflow)
    batch = packed_batch(model.config.vocab_size)
    report = training_step(model, optimizers, split_batch(batch, 24, CPU), plan(), 1.0, statistics=True)
    hook.remove()
    assert calls == 4
    assert not math.isfinite(float(report.main)) and float(report.found_inf) == 1
    after = snapshot(model, optimizers)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.usefixtures("no_plot")
def test_a_run_counts_skipped_steps_and_goes_on(
    config: TrainConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 5 of 8 have NaN gradients; every second step is logged, a stop and a resume come after the fifth."""
    calls = 0

    def step(model: Transformer, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        hook = model.head.weight.register_hook(lambda gradient: gradient * math.nan) if calls in (4, 5) else None
        report = training_step(model, *arguments, **options)
        if hook is not None:
            hook.remove()
        return report

    monkeypatch.setattr(loop, "training_step", step)
    run = tmp_path / "run"
    thrifty = replace(config, output=str(run), logging=replace(config.logging, every=2))
    train(replace(thrifty, steps=5))
    train(thrifty)
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 4, 6, 8]
    assert [row["stability/skipped_steps"] for row in found] == [0, 0, 1, 2, 2]
    assert found[2]["train/grad_norm"] is None and found[2]["train/loss"] > 0
    assert all(row["train/grad_norm"] is not None for row in found if row["step"] != 4)
    assert json.loads((run / "summary.json").read_text())["skipped"] == 2
    skipped = [event for event in read_lines(run / "events.jsonl") if event["kind"] == "skipped"]
    assert [event["step"] for event in skipped] == [4, 5]
    checkpoints = run / "checkpoints"
    third, fourth, fifth, sixth = (contents(checkpoints / f"step_{step}") for step in (3, 4, 5, 6))
    assert third == contents(straight / "checkpoints" / "step_3")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert third[name] == fourth[name] == fifth[name] != sixth[name]
    state = json.loads(fifth["state.json"])
    assert (state["step"], state["skipped"]) == (5, 2)
    assert state["data"] == json.loads(contents(straight / "checkpoints" / "step_5")["state.json"])["data"]


def test_a_run_of_nan_weights_ends_in_order(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to train any more: every step is skipped, files stay valid JSON, plot and sample do not fail."""

    def spoil(model: Transformer, seed: int) -> None:
        init_weights(model, seed)
        model.embed.weight.data[:] = math.nan

    monkeypatch.setattr(loop, "init_weights", spoil)
    short = replace(config, output=str(tmp_path / "run"), steps=2)
    train(replace(short, logging=replace(config.logging, sample_prompt="In the", sample_tokens=2)))
    found = rows(tmp_path / "run")
    assert [(row["train/loss"], row["stability/skipped_steps"]) for row in found] == [(None, 1), (None, 2)]
    ending = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ending["skipped"] == 2 and ending["validation/bits_per_byte"] is None
    train(replace(short, steps=3))  # null rows are read back
    assert len(rows(tmp_path / "run")) == 3


# Router biases.


def test_router_biases_move_towards_the_mean_load() -> None:
    """By exactly the speed, up where an expert got less than the mean, down where more, not at all where equal."""
    model, optimizers, _ = trained(0)
    gates = {name: model.get_submodule(name).ffn.gate for name in ("layers.0", "layers.1", "mtp.0")}  # type: ignore[union-attr]
    table = gates["layers.0"].tid2eid.clone()  # type: ignore[operator, union-attr]
    before = {name: gate.bias.clone() for name, gate in gates.items() if gate.bias is not None}  # type: ignore[operator, union-attr]
    batch = packed_batch(model.config.vocab_size)
    report = training_step(model, optimizers, split_batch(batch, 48, CPU), plan(bias_speed=0.25), 1.0)
    assert sorted(before) == ["layers.1", "mtp.0"]
    for name, old in before.items():
        load = report.load[name]
        sign = (load.sum() - len(load) * load).sign()  # in whole numbers
        assert sign.any()
        assert torch.equal(gates[name].bias, old + 0.25 * sign)  # type: ignore[arg-type]
    assert gates["layers.0"].bias is None
    assert torch.equal(gates["layers.0"].tid2eid, table)  # type: ignore[arg-type]


def test_equal_loads_leave_the_bias_and_hash_layers_have_none() -> None:
    model, _, _ = trained(0)
    gate = model.get_submodule("layers.1").ffn.gate  # type: ignore[union-attr]
    before = gate.bias.clone()  # type: ignore[operator, union-attr]
    experts = model.config.n_routed_experts
    even = {"layers.0": torch.arange(experts), "layers.1": torch.full((experts,), 7)}
    loop.update_router_biases(model, even, 0.5, torch.zeros(()))
    assert torch.equal(gate.bias, before)  # type: ignore[arg-type, union-attr]
    loads = torch.arange(experts)
    loop.update_router_biases(model, {"layers.1": loads}, 0.5, torch.ones(()))  # a skipped step
    assert torch.equal(gate.bias, before)  # type: ignore[arg-type, union-attr]
    loop.update_router_biases(model, {"layers.1": loads}, 0.5, torch.zeros(()))
    assert torch.equal(gate.bias, before + 0.5 * ((experts - 1) / 2 - loads).sign())  # type: ignore[arg-type, union-attr]


def test_load_counts_leave_out_padding() -> None:
    model, _, _ = trained(0)
    batch = packed_batch(model.config.vocab_size)
    valid = batch.segments >= 0
    followed = valid[:, :-1] & (batch.segments[:, 1:] == batch.segments[:, :-1])
    top_k = model.config.num_experts_per_tok
    losses = training_losses(model, batch.tokens, batch.segments)
    counts = {name: int(load.sum()) for name, load in losses.load.items()}
    everywhere = int(valid.sum()) * top_k
    assert counts == {"layers.0": everywhere, "layers.1": everywhere, "mtp.0": int(followed.sum()) * top_k}
    other = batch.tokens.masked_fill(~valid, 5)
    again = training_losses(model, other, batch.segments).load
    assert all(torch.equal(losses.load[name], again[name]) for name in again)


# The schedule and the data in a run.


def test_rows_follow_the_schedule(config: TrainConfig, straight: Path) -> None:
    found = rows(straight)
    first, second = config.stages
    rates = [row["train/lr"] for row in found]
    assert rates[:5] == pytest.approx([first.lr / 3, first.lr * 2 / 3, first.lr, first.lr, first.lr])
    begin = 0
    for row in found[5:]:  # the cosine of the tokens done, from the stage's first step to its last token
        done = max(found[4]["tokens"] + begin - 896, 0) / (1536 - 896)
        assert second.lr_end is not None
        expected = second.lr_end + (second.lr - second.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
        assert row["train/lr"] == pytest.approx(expected)
        begin += row["train/batch_tokens"]
    assert [row["train/stage"] for row in found] == [0] * 5 + [1] * 3
    assert [row["tokens"] for row in found] == [128, 256, 448, 640, 896, 1152, 1408, 1664]
    assert Schedule(config.stages).total_tokens == 1664


def test_epochs_are_counted(straight: Path, small_data: Path) -> None:
    """An epoch is at least its tokens long, and padding makes it no more than a third longer here."""
    found = rows(straight)
    epochs = [row["data/epoch"] for row in found]
    assert epochs[0] == 0 and epochs == sorted(epochs)
    epoch_tokens = json.loads((small_data / "manifest.json").read_text())["splits"]["train"]["tokens"]
    for row in found:
        assert row["tokens"] / epoch_tokens / 1.34 - 1 < row["data/epoch"] <= row["tokens"] / epoch_tokens
    padding = [row["data/padding"] * row["train/batch_tokens"] for row in found]
    assert padding == pytest.approx([round(tokens) for tokens in padding])  # a share of whole tokens
    seen = sum(row["train/batch_tokens"] for row in found) - sum(padding)
    assert sum(padding) > 0 and epochs[-2] * epoch_tokens <= seen <= (epochs[-1] + 1) * epoch_tokens


@pytest.fixture(scope="module")
def other_data(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, the same tokenizer."""
    folder = tmp_path_factory.mktemp("other_data")
    (folder / "text.txt").write_text("\n".join(f"Verily, sentence {n} of the other source." for n in range(60)))
    prepare(
        PrepareConfig(
            input=str(folder / "text.txt"),
            output=str(folder / "prepared"),
            tokenizer=str(small_data / "tokenizer.json"),
            separator="\n",
        )
    )
    return folder / "prepared"


@pytest.mark.usefixtures("no_plot")
def test_a_mixture_of_two_sources(config: TrainConfig, small_data: Path, other_data: Path, tmp_path: Path) -> None:
    """Rows are dealt 2 : 1, and a resumed run goes on with the same mixture."""
    sources = f"data.sources=[{{path: '{small_data}', weight: 2.0}}, {{path: '{other_data}', weight: 1.0}}]"
    mixed = load_config([*OVERRIDES, sources, f"output={tmp_path / 'straight'}", "checkpoint.every=1", "steps=6"])
    run = train(mixed)
    state = json.loads((run / "checkpoints" / "step_6" / "state.json").read_text())
    assert [source["taken"] for source in state["data"]["sources"]] == [11, 5]  # of 16 rows
    assert len(state["fingerprint"].split("+")) == 2
    train(replace(mixed, output=str(tmp_path / "run"), steps=2))
    train(replace(mixed, output=str(tmp_path / "run")))
    names = ("straight", "run")
    ours, theirs = (contents(tmp_path / name / "checkpoints" / "step_6") for name in names)
    assert ours == theirs
    heavier = (replace(mixed.data.sources[0], weight=3.0), mixed.data.sources[1])
    with pytest.raises(ValueError, match=r"weights=.*set it back, or start a new run"):
        train(replace(mixed, output=str(run), steps=7, data=replace(mixed.data, sources=heavier)))


# The run's folder.


def claim(run: Path, config: TrainConfig) -> None:
    with ExitStack() as stack:
        claim_folder(run, config, stack)


CHANGES = {
    "seed=1": "seed was 0, now 1",
    "grad_clip=null": "grad_clip was 1.0, now None",
    "model.swiglu_limit=7": "model.swiglu_limit was 10.0, now 7.0",
    "model.num_attention_heads=2": "model.num_attention_heads was 4, now 2",
    "optim.muon.momentum=0.9": "optim.muon.momentum was 0.95, now 0.9",
    "precision=bf16": "precision.compute was fp32, now bf16",
    "stages.0.lr=1.0e-3": "stages.0.lr was 0.006, now 0.001",
    "stages.1.mtp_weight=0.3": "stages.1.mtp_weight was 0.1, now 0.3",
    "stages.0.tokens=1024": "stages.0.tokens was 768, now 1024",
}


@pytest.mark.parametrize("override", CHANGES)
def test_another_run_in_the_folder_is_refused(
    override: str, config: TrainConfig, straight: Path, small_data: Path
) -> None:
    other = tiny_config(small_data, straight, override)
    before = contents(straight)
    with pytest.raises(ConfigError, match=r"holds another run .*choose another output or remove the folder") as error:
        train(other)
    assert CHANGES[override] in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(straight) == before


def test_many_differences_are_counted(config: TrainConfig, straight: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(stages\.1\.name was long, now None; .*; \d+ more\)"):
        claim(straight, replace(config, stages=config.stages[:1]))


ALLOWED = [
    "steps=12",
    "logging.every=7",
    "checkpoint.every=5",
    "checkpoint.keep=1",
    "micro_batch_tokens=64",
    "validation.every=2",
    "threads=2",
    "data.workers=3",
    "data.verify=false",
    "name=renamed",
    "device=cpu",
]


@pytest.mark.parametrize("override", ALLOWED)
def test_what_decides_no_weight_may_change(
    override: str, config: TrainConfig, straight: Path, small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(straight / "config.yaml", run)
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_1\n")
    claim(run, tiny_config(small_data, run, override))


def test_moved_data_are_the_same_data(config: TrainConfig, straight: Path, small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.copytree(small_data, tmp_path / "moved")
    moved = replace(config, output=str(tmp_path / "run"), data=replace(config.data, path=str(tmp_path / "moved")))
    train(moved)
    assert from_yaml(TrainConfig, (tmp_path / "run" / "config.yaml").read_text()) == moved


def test_changed_data_are_refused(config: TrainConfig, straight: Path, other_data: Path, tmp_path: Path) -> None:
    """By their fingerprint, whatever folder they are in; the run is left as it was."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = contents(run)
    with pytest.raises(
        CheckpointError, match=r"was trained on other data than .*; give the same data, or another output"
    ):
        train(replace(config, output=str(run), data=replace(config.data, path=str(other_data))))
    assert contents(run) == before


def test_a_config_that_trained_nothing_binds_nobody(config: TrainConfig, tmp_path: Path) -> None:
    """A first attempt that failed before its first checkpoint does not stand in the way of the mended second one."""
    run = tmp_path / "run"
    claim(run, config)
    claim(run, replace(config, seed=5))
    assert from_yaml(TrainConfig, (run / "config.yaml").read_text()).seed == 5


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".config.yaml"]])
def test_a_run_killed_at_once_is_taken_up(left: list[str], config: TrainConfig, tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).touch()
    claim(tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "config.yaml", "env.json"]


def test_foreign_folders_and_files_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(ConfigError, match="thesis holds files that are no run's; choose another folder"):
        claim(tmp_path / "thesis", config)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    with pytest.raises(ConfigError, match=r"chapter\.tex is a file; choose a folder"):
        claim(tmp_path / "thesis" / "chapter.tex", config)
    (tmp_path / "empty").mkdir()
    claim(tmp_path / "empty", config)


@pytest.mark.parametrize("text", ["", "name: [", "name: run\nmodle: {}\n", "\x00\x01"])
def test_a_damaged_config_file_is_named(text: str, config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run/config\.yaml: unreadable .*; restore it, choose another output"):
        claim(run, config)


def test_a_second_process_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """While the first lives, and no longer: the kernel drops its lock however it ends."""
    run = tmp_path / "run"
    claim(run, config)
    before = contents(run)
    lock = str(run / ".lock")
    code = f"import fcntl; file = open({lock!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match=r"another process \(.+\) trains here; wait for it or choose"):
            claim(run, config)
        assert contents(run) == before
        process.kill()
    claim(run, config)
    with (run / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and ours is gone with the stack


def test_config_yaml_reads_back(config: TrainConfig, straight: Path) -> None:
    text = (straight / "config.yaml").read_text()
    assert from_yaml(TrainConfig, text) == config
    assert to_yaml(from_yaml(TrainConfig, text)) == text
