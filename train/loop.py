"""The training loop, one for every recipe. ``training_step`` is the whole of a step; ``train`` is what surrounds it."""

import fcntl
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from ..data.byte_model import ByteModel
from ..data.loader import Batch
from ..data.tokenizer import load_tokenizer
from ..model.accounting import parameter_table, training_flops_per_token
from ..model.generate import generate
from ..model.init import init_weights
from ..model.loss import Counts, training_losses
from ..model.released import copy_tokenizer, write_json
from ..model.transformer import Transformer
from ..optim.groups import Optimizers, build_optimizers, clip_by_global_norm
from ..optim.schedule import Plan, Schedule
from .checkpoint import (
    CheckpointError,
    TrainState,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from .config import ConfigError, TrainConfig, from_yaml, to_yaml
from .dataset import Dataset, open_dataset
from .evaluation import Evaluation, evaluate
from .metrics import MetricsFile, Row, Terminal, WandbLog, group_table, peak_flops, plot_loss, write_environment

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class StepReport:
    """Sums over the micro-batches of one step, still on the device."""

    main: Tensor  # nats
    mtp: Tensor
    balance: Tensor
    counts: Counts
    grad_norm: Tensor
    found_inf: Tensor  # 1 if the step was skipped, else 0
    load: dict[str, Tensor] = field(default_factory=dict)  # by block: tokens per expert
    statistics: dict[str, Tensor] = field(default_factory=dict)  # of the first micro-batch


def training_step(
    model: Transformer,
    optimizers: Optimizers,
    micro_batches: Sequence[Batch],
    plan: Plan,
    grad_clip: float | None,
    statistics: bool = False,
) -> StepReport:
    """Forward and backward over the micro-batches, one update of weights and router biases.

    The loss is a sum over tokens divided by the count of the whole step, so its value and gradient do not depend on how
    the step is cut. A step whose gradient norm is not finite changes nothing; the device decides, the host never waits.
    """
    counts = Counts.of(batch.segments for batch in micro_batches)
    sums = torch.zeros(3, device=model.embed.weight.device)
    load: dict[str, Tensor] = {}
    details: dict[str, Tensor] = {}
    for batch in micro_batches:
        losses = training_losses(
            model,
            batch.tokens,
            batch.segments,
            plan.attention,
            mtp=plan.mtp_weight > 0,
            statistics=statistics and not details,
        )
        losses.total(counts, plan.mtp_weight, plan.balance_weight).backward()
        sums += torch.stack((losses.main, losses.mtp, losses.balance)).detach()
        load = {name: count + load.get(name, 0) for name, count in losses.load.items()}
        details = details or losses.statistics
    norm, found_inf = clip_by_global_norm(model.parameters(), math.inf if grad_clip is None else grad_clip)
    optimizers.step(plan.lr, found_inf)
    optimizers.zero_grad()
    update_router_biases(model, load, plan.bias_speed, found_inf)
    main, mtp, balance = sums.unbind()
    return StepReport(main, mtp, balance, counts, norm, found_inf, load, details)


@torch.no_grad()
def update_router_biases(model: Transformer, load: dict[str, Tensor], speed: float, found_inf: Tensor) -> None:
    """Moves each expert's selection bias by ``speed`` towards the mean load (recipe 3; V3's form)."""
    for name, count in load.items():
        bias = model.get_submodule(name).ffn.gate.bias  # type: ignore[union-attr]
        if bias is not None:
            shortfall = count.float().mean() - count
            bias += speed * shortfall.sign() * (1 - found_inf)  # type: ignore[operator]


def train(config: TrainConfig) -> Path:
    """Trains until the schedule ends, from the newest checkpoint of ``config.output`` if there is one.

    Returns:
        the run's folder.
    """
    run = Path(config.output)
    with ExitStack() as stack:
        claim_folder(run, config, stack)
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        make_deterministic(config, device)
        schedule = Schedule(config.stages, config.steps)
        data = open_dataset(config.data, run, config.model.vocab_size)
        loader = data.loader(config.seed, config.data.workers)

        model = Transformer(config.model, COMPUTE_DTYPES[config.precision.compute])
        init_weights(model, config.seed)
        model.to(device)
        optimizers = build_optimizers(model.named_parameters(), model.row_splits(), config.optim)
        state = TrainState(data=loader.state_dict(), fingerprint=data.fingerprint)
        resumed = restore(run, model, optimizers, state, data)
        loader.load_state_dict(state.data or {})

        metrics = MetricsFile(run / "metrics.jsonl", state.step)
        terminal = stack.enter_context(Terminal(schedule.total_steps, state.step))
        introduce(terminal, config, optimizers, data, resumed, state)
        wandb = WandbLog(config.logging.wandb, config.logging.project, config.name, run, asdict(config))
        stack.callback(wandb.finish)
        validator = Validator(config, data, device)
        meter = Meter(config, device)

        plan = schedule.plan(state.step, state.tokens)
        with meter.aside():
            untrained = validator(model, plan) if state.step == 0 and plan else None
        while plan is not None:
            batch = loader.next_batch(plan.rows, plan.sequence_length)
            due = (state.step + 1) % config.logging.every == 0
            micro_batches = split_batch(batch, config.micro_batch_tokens, device)
            report = training_step(model, optimizers, micro_batches, plan, config.grad_clip, statistics=due)
            state.step += 1
            state.tokens += plan.tokens
            meter.count(plan, report)
            if due:
                row = meter.row(state, plan, report, optimizers, batch)
                if untrained is not None:
                    row |= {"validation/untrained_loss": untrained.loss}
                    row |= {"validation/untrained_bits_per_byte": untrained.bits_per_byte}
                    untrained = None
                if config.validation.every and state.step % config.validation.every == 0:
                    with meter.aside():
                        result = validator(model, plan)
                    if result is not None:
                        row |= {"validation/loss": result.loss, "validation/bits_per_byte": result.bits_per_byte}
                metrics.write(row)
                terminal.show(row)
                wandb.write(row)
            last, plan = plan, schedule.plan(state.step, state.tokens)
            every = config.checkpoint.every
            if plan is None or (every and state.step % every == 0):
                meter.settle(state)
                state.data = loader.state_dict()
                with meter.aside():
                    save_checkpoint(run / "checkpoints", model, optimizers, state, config.checkpoint.keep)
            if plan is None:
                conclude(run, terminal, wandb, config, data, model, state, validator(model, last, whole=True))
        if resumed and state.step >= schedule.total_steps and not meter.steps:
            terminal.console.print(f"{run}: this run is complete at step {state.step}; raise steps= to go on")
    return run


def claim_folder(run: Path, config: TrainConfig, stack: ExitStack) -> None:
    """Creates the run's folder or recognises it as this run's, locks it, and writes what describes the run."""
    config_file = run / "config.yaml"
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output={run} is a file; choose a folder")
    if run.is_dir() and not config_file.exists() and any(path.name != ".lock" for path in run.iterdir()):
        raise ConfigError(f"output={run} holds files that are no run's; choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((run / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however this process ends
    except OSError:
        raise ConfigError(f"output={run}: another process trains here; wait for it or choose another folder") from None
    if config_file.exists():
        before = from_yaml(TrainConfig, config_file.read_text())
        changed = differences(before, config)
        if changed:
            raise ConfigError(
                f"output={run} holds another run ({'; '.join(changed)}); choose another output or remove the folder"
            )
    temporary = run / ".config.yaml"
    temporary.write_text(to_yaml(config))
    temporary.rename(config_file)
    write_environment(run / "env.json")
    (run / "checkpoints").mkdir(exist_ok=True)
    remove_leftovers(run / "checkpoints")


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """What makes ``now`` another run than ``before``: all that decides a weight. (Data is told by its fingerprint.)"""
    found = []
    for key in ("seed", "grad_clip", "model", "optim", "precision", "stages"):
        old, new = getattr(before, key), getattr(now, key)
        if key in ("model", "optim"):
            pairs = {name: (value, asdict(new)[name]) for name, value in asdict(old).items()}
            found += [f"{key}.{name} was {a}, now {b}" for name, (a, b) in pairs.items() if a != b]
        elif old != new:
            found.append(f"{key} differ" if key == "stages" else f"{key} was {old}, now {new}")
    return found


def make_deterministic(config: TrainConfig, device: torch.device) -> None:
    """Same seed, same weights: deterministic kernels, and nothing that depends on time or thread scheduling."""
    if config.threads:
        torch.set_num_threads(config.threads)
    # On CUDA some integer operations only warn: they have no deterministic twin, but are exact in any order.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.seed)


def restore(run: Path, model: Transformer, optimizers: Optimizers, state: TrainState, data: Dataset) -> Path | None:
    """Loads the newest checkpoint, if there is one, and makes sure that it continues on the same data."""
    newest = latest_checkpoint(run / "checkpoints")
    if newest is None:
        return None
    fingerprint = state.fingerprint
    load_checkpoint(newest, model, optimizers, state)
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{newest}: was trained on other data than {data.folders[0].folder}; "
            "give the same data, or another output to start a new run"
        )
    for later in complete_checkpoints(run / "checkpoints"):
        if int(later.name.removeprefix("step_")) > state.step:
            raise CheckpointError(f"{later} is newer than 'latest' ({newest.name}); remove one of them")
    return newest


def split_batch(batch: Batch, micro_batch_tokens: int, device: torch.device) -> list[Batch]:
    """The rows of a step's batch in portions of at most ``micro_batch_tokens`` (one row at least), on the device."""
    rows = max(1, micro_batch_tokens // batch.tokens.shape[1])
    starts = range(0, len(batch.tokens), rows)
    return [
        Batch(
            batch.tokens[i : i + rows].to(device, non_blocking=True),
            batch.segments[i : i + rows].to(device, non_blocking=True),
            batch.pieces[i : i + rows],
        )
        for i in starts
    ]


class Validator:
    """Runs the validation pass of a run; None where the data has no validation documents."""

    def __init__(self, config: TrainConfig, data: Dataset, device: torch.device) -> None:
        self.config, self.data = config, data
        self.stores, self.token_bytes = data.validation, data.token_bytes(device)

    def __call__(self, model: Transformer, plan: Plan, whole: bool = False) -> Evaluation | None:
        """By the rows and the attention of ``plan``; ``whole`` reads all of the split, whatever the config allows."""
        if not self.stores:
            return None
        tokens, batch = None if whole else self.config.validation.tokens, self.config.micro_batch_tokens
        length, pad = plan.sequence_length, self.data.eos
        return evaluate(model, self.stores, self.token_bytes, length, plan.attention, tokens, batch, pad)

    def byte_model(self, order: int) -> float | None:
        """Bits per byte of a byte n-gram model fitted on the training text, on the validation text."""
        if not self.stores:
            return None
        train, held_out = (
            [text.encode() for folder in self.data.folders for text in folder.texts(split)]
            for split in ("train", "validation")
        )
        return ByteModel.fit(train, order).bits_per_byte(held_out)


class Meter:
    """Turns step reports into rows of metrics; the only place that waits for the device."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.steps = 0
        self._tokens, self._since = 0, time.perf_counter()
        self._skipped = torch.zeros((), device=device)
        given = config.logging.peak_tflops
        self._peak = given * 1e12 if given else peak_flops(device)

    def count(self, plan: Plan, report: StepReport) -> None:
        self.steps += 1
        self._tokens += plan.tokens
        self._skipped += report.found_inf

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens within is no training, and does not count as its time."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def settle(self, state: TrainState) -> None:
        """Moves the count of skipped steps from the device to the state."""
        state.skipped += int(self._skipped)
        self._skipped.zero_()

    def row(self, state: TrainState, plan: Plan, report: StepReport, optimizers: Optimizers, batch: Batch) -> Row:
        """The metrics of the step just done; speeds are means since the last row."""
        self.settle(state)
        counts = report.counts
        row: Row = {
            "step": state.step,
            "tokens": state.tokens,
            "train/loss": float(report.main / counts.main.clamp(min=1)),
            "train/mtp_loss": float(report.mtp / counts.mtp.clamp(min=1)),
            "train/balance_loss": float(report.balance / counts.valid.clamp(min=1)),
            "train/lr": plan.lr,
            "train/grad_norm": float(report.grad_norm),
            "train/stage": plan.stage,
            "train/sequence_length": plan.sequence_length,
            "train/batch_tokens": plan.tokens,
            "data/padding": 1 - int(counts.valid) / batch.segments.numel(),
            "data/epoch": max((piece[1] for pieces in batch.pieces for piece in pieces), default=0),
            "stability/skipped_steps": state.skipped,
        }
        row |= {name: float(value) for name, value in report.statistics.items()}
        row |= load_metrics(report.load)
        row |= {f"optim/update_rms/{g.replace(' ', '_')}": float(v) for g, v in optimizers.update_rms().items()}
        now = time.perf_counter()
        row["train/tokens_per_second"] = speed = self._tokens / (now - self._since)
        if self._peak is not None:
            flops = training_flops_per_token(
                self.config.model, plan.sequence_length, plan.attention, plan.mtp_weight > 0
            )
            row["train/mfu"] = speed * flops / self._peak
        self._tokens, self._since = 0, now
        return row


def load_metrics(load: dict[str, Tensor]) -> Row:
    """Largest and smallest load of an expert over the mean of its layer (1 = even), and experts without a token."""
    if not load:
        return {}
    counts = torch.stack([count.float() for count in load.values()]).cpu()  # [blocks, E]
    relative = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)
    row: Row = {f"moe/load_max/{name}": float(value) for name, value in zip(load, relative.amax(1), strict=True)}
    row |= {"moe/load_max": float(relative.max()), "moe/load_mean": float(counts.mean())}
    row |= {"moe/load_min": float(relative.min()), "moe/dead_experts": int((counts == 0).sum())}
    return row


def introduce(
    terminal: Terminal,
    config: TrainConfig,
    optimizers: Optimizers,
    data: Dataset,
    resumed: Path | None,
    state: TrainState,
) -> None:
    """Prints what is about to be trained, on what, from where."""
    print_ = terminal.console.print
    for label, text in parameter_table(config.model):
        print_(f"{label:>12}: {text}")
    for folder in data.folders:
        splits = folder.manifest.splits
        text = ", ".join(f"{s.tokens:,} tokens of {s.documents:,} documents ({n})" for n, s in splits.items())
        print_(f"{'data':>12}: {folder.folder}: {text}")
    print_(f"{'output':>12}: {config.output}" + (f", resumed at step {state.step}" if resumed else ""))
    print_(group_table(optimizers))
    if not data.validation:
        print_("no validation: the data was prepared from a single document")


def conclude(
    run: Path,
    terminal: Terminal,
    wandb: WandbLog,
    config: TrainConfig,
    data: Dataset,
    model: Transformer,
    state: TrainState,
    final: Evaluation | None,
) -> None:
    """The end of a run: summary, plot, a sample, and what to do next."""
    print_ = terminal.console.print
    copy_tokenizer(data.tokenizer_path, run, config.model)
    summary: dict[str, float | int | None] = {"step": state.step, "tokens": state.tokens, "skipped": state.skipped}
    first = json.loads((run / "metrics.jsonl").read_text().partition("\n")[0])
    if final is not None:
        summary |= {"validation/loss": final.loss, "validation/bits_per_byte": final.bits_per_byte}
        summary["validation/untrained_bits_per_byte"] = first.get("validation/untrained_bits_per_byte")
        table = Table("validation", "bits per byte", title=f"{config.name}: {state.tokens:,} tokens trained")
        if summary["validation/untrained_bits_per_byte"] is not None:
            table.add_row("this model, untrained", f"{summary['validation/untrained_bits_per_byte']:.3f}")
        order = config.validation.byte_model_order
        if order is not None:
            reference = Validator(config, data, torch.device("cpu")).byte_model(order)
            summary[f"validation/byte_model_order_{order}"] = reference
            table.add_row(f"order-{order} byte model, fitted on the same text", f"{reference:.3f}")
        table.add_row("this model, trained", f"{final.bits_per_byte:.3f}")
        print_(table)
    write_json(run / "summary.json", summary)
    plot = plot_loss(run)
    wandb.image("plots/loss", plot)
    if config.logging.sample_prompt is not None:
        tokenizer = load_tokenizer(data.tokenizer_path)
        prompt = [config.model.bos_token_id, *tokenizer.encode(config.logging.sample_prompt).ids]
        ids = generate(model, prompt, config.logging.sample_tokens, seed=config.seed, stop=(data.eos,))
        print_("a sample: ", tokenizer.decode(ids), markup=False)
    weights = f"checkpoint={run}"
    print_(f"loss plot:  {plot}")
    print_("try next:")
    print_(f"  openv4 generate {weights} prompt='In the beginning'", markup=False)
    print_(f"  openv4 evaluate {weights}", markup=False)
    print_(f"  openv4 export {weights} output={run}/export", markup=False)
