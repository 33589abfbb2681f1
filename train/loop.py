"""The training loop, one for every recipe. ``training_step`` is the whole of a step; ``train`` is what surrounds it."""

import fcntl
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..data.byte_model import ByteModel
from ..data.loader import Batch
from ..data.tokenizer import load_tokenizer
from ..model.accounting import parameter_table, training_flops_per_token
from ..model.generate import generate
from ..model.init import init_weights
from ..model.lora import add_lora
from ..model.loss import Counts, training_losses
from ..model.released import copy_companions, copy_tokenizer, load_pretrained, weights_fingerprint
from ..model.tensor_files import write_json
from ..model.transformer import Transformer
from ..optim.groups import Optimizers, build_optimizers, clip_by_global_norm
from ..optim.schedule import Plan, Schedule
from .checkpoint import TrainState, latest_checkpoint, load_checkpoint, make_latest, remove_leftovers, save_checkpoint
from .config import CheckpointError, ConfigError, TrainConfig, from_yaml, to_yaml
from .dataset import Dataset, open_dataset
from .evaluation import Evaluation, evaluate, without_dropout
from .metrics import (
    MetricsFile,
    Row,
    Terminal,
    WandbLog,
    finite,
    group_table,
    peak_flops,
    plot_loss,
    read_metrics,
    write_environment,
)
from .progress import progress_bar

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class StepReport:
    """Sums over the micro-batches of one step, still on the device."""

    main: Tensor  # nats
    mtp: Tensor
    balance: Tensor
    indexer: Tensor  # [3] KL and what a uniform indexer would have, nats, and tokens x CSA layers
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
    counts = Counts.of([batch.segments for batch in micro_batches], [batch.trained for batch in micro_batches])
    sums = torch.zeros(6, device=model.embed.weight.device)
    load: dict[str, Tensor] = {}
    details: dict[str, Tensor] = {}
    for batch in micro_batches:
        losses = training_losses(
            model,
            batch.tokens,
            batch.segments,
            plan.attention,
            mtp=plan.mtp_weight > 0,
            indexer=plan.indexer_weight > 0,
            statistics=statistics and not details,
            trained=batch.trained,
        )
        losses.total(counts, plan.mtp_weight, plan.balance_weight, plan.indexer_weight).backward()
        sums += torch.stack((losses.main, losses.mtp, losses.balance, *losses.indexer)).detach()
        load = {name: count + load.get(name, 0) for name, count in losses.load.items()}
        details = details or losses.statistics
    norm, found_inf = clip_by_global_norm(model.parameters(), math.inf if grad_clip is None else grad_clip)
    optimizers.step(plan.lr, found_inf)
    optimizers.zero_grad()
    update_router_biases(model, load, plan.bias_speed, found_inf)
    main, mtp, balance = sums[:3].unbind()
    return StepReport(main, mtp, balance, sums[3:], counts, norm, found_inf, load, details)


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
        data = open_dataset(config.data, run, config.model, config.pretrained, config.shortest_row)
        schedule = make_schedule(config, data)
        loader = data.loader(config.seed, config.data.workers)

        model = build_model(config, device)
        optimizers = build_optimizers(model.named_parameters(), model.row_splits(), config.optim)
        base = weights_fingerprint(Path(config.pretrained)) if config.pretrained else ""
        state = TrainState(data=loader.state_dict(), fingerprint=data.fingerprint, base=base)
        resumed = restore(run, model, optimizers, state, data, config.checkpoint.keep)
        loader.load_state_dict(state.data or {})
        write_config(run, config)
        if config.pretrained:
            copy_companions(Path(config.pretrained), run)
        copy_tokenizer(data.tokenizer_path, run, config.model)

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
            validates = config.validation.every > 0 and (state.step + 1) % config.validation.every == 0
            due = validates or state.step == 0 or (state.step + 1) % config.logging.every == 0
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
                if validates:
                    with meter.aside():
                        result = validator(model, plan)
                    if result is not None:
                        row |= {"validation/loss": result.loss, "validation/bits_per_byte": result.bits_per_byte}
                metrics.write(row)
                terminal.show(row)
                wandb.write(row)
            plan = schedule.plan(state.step, state.tokens)
            every = config.checkpoint.every
            if plan is None or (every and state.step % every == 0):
                meter.settle(state)
                state.data = loader.state_dict()
                with meter.aside():
                    adapter = (config.lora, str(Path(config.pretrained or "").resolve())) if config.lora else None
                    save_checkpoint(run / "checkpoints", model, optimizers, state, config.checkpoint.keep, adapter)
        if meter.steps == 0 and (state.step > schedule.total_steps or concluded(run, state)):
            terminal.console.print(f"{run}: this run is complete at step {state.step}; raise steps= to go on")
        elif last := schedule.plan(state.step - 1, schedule.tokens_before(state.step - 1)):
            conclude(run, terminal, wandb, config, data, model, state, validator(model, last, whole=True))
    return run


def build_model(config: TrainConfig, device: torch.device) -> Transformer:
    """The model before its first step: random, or pretrained, with fresh adapters where the config asks for LoRA."""
    compute = COMPUTE_DTYPES[config.precision.compute]
    if config.pretrained is None:
        model = Transformer(config.model, compute, config.recompute)
        init_weights(model, config.seed)
        return model.to(device)
    base = config.precision.base
    with progress_bar("loading") as advance:
        model = load_pretrained(
            config.pretrained,
            torch.float32 if base == "fp32" else torch.bfloat16,
            device,
            mtp=config.model.num_nextn_predict_layers > 0,
            keep_quantized=base == "released",
            progress=advance,
        )
    if differing := [key for key, value in asdict(config.model).items() if asdict(model.config)[key] != value]:
        key = differing[0]
        found, wanted = getattr(model.config, key), getattr(config.model, key)
        raise ConfigError(f"model.{key}={wanted}: {config.pretrained} has {found}; leave it out")
    model.compute_dtype, model.recompute = compute, config.recompute
    if config.lora is not None:
        try:
            add_lora(model, config.lora, config.seed)
        except ValueError as error:  # a target that this model has nothing of
            raise ConfigError(str(error)) from None
    return model


def make_schedule(config: TrainConfig, data: Dataset) -> Schedule:
    """The schedule of a run; with ``epochs``, the last stage is as long as so many passes over the data."""
    stages = config.stages
    try:
        if config.epochs is not None:
            last = stages[-1]
            rows = data.rows(last.sequence_length)
            steps = max(1, round(config.epochs * rows * last.sequence_length / last.batch_tokens))
            last = replace(last, tokens=steps * last.batch_tokens, warmup_steps=min(last.warmup_steps, steps // 4))
            stages = (*stages[:-1], last)
        return Schedule(stages, config.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def claim_folder(run: Path, config: TrainConfig, stack: ExitStack) -> None:
    """Creates the run's folder or recognises it as this run's, and locks it."""
    config_file = run / "config.yaml"
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output={run} is a file; choose a folder")
    ours = (".lock", ".config.yaml")  # all there is if a run was killed at once
    if run.is_dir() and not config_file.exists() and any(path.name not in ours for path in run.iterdir()):
        raise ConfigError(f"output={run} holds files that are no run's; choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((run / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however this process ends
    except OSError:
        raise ConfigError(f"output={run}: another process trains here; wait for it or choose another folder") from None
    if latest_checkpoint(run / "checkpoints") is None:
        write_config(run, config)  # whatever was configured here before has trained nothing
    else:
        try:
            changed = differences(from_yaml(TrainConfig, config_file.read_text()), config)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{config_file}: unreadable ({error}); restore it, choose another output or remove the folder"
            ) from None
        if changed:
            raise ConfigError(
                f"output={run} holds another run ({'; '.join(changed)}); choose another output or remove the folder"
            )
    (run / "checkpoints").mkdir(exist_ok=True)
    remove_leftovers(run / "checkpoints")


def write_config(run: Path, config: TrainConfig) -> None:
    """What describes the run, once it is sure that the folder is this run's."""
    temporary = run / ".config.yaml"
    temporary.write_text(to_yaml(config))
    temporary.rename(run / "config.yaml")
    write_environment(run / "env.json")


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """What makes ``now`` another run than ``before``: all that decides a weight. (Data is told by its fingerprint.)"""
    old, new = dict(_leaves(asdict(before))), dict(_leaves(asdict(now)))
    decisive = ("seed", "grad_clip", "model", "optim", "precision", "stages", "epochs", "lora")
    keys = [key for key in old | new if key.split(".")[0] in decisive and old.get(key) != new.get(key)]
    found = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in keys[:4]]
    return [*found, f"{len(keys) - 4} more"] if len(keys) > 4 else found


def _leaves(values: dict[str, Any] | Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list | tuple) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def make_deterministic(config: TrainConfig, device: torch.device) -> None:
    """Same seed, same weights: deterministic kernels, and nothing that depends on time or thread scheduling."""
    if config.threads:
        torch.set_num_threads(config.threads)
    # On CUDA some integer operations only warn: they have no deterministic twin, but are exact in any order.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.seed)


def restore(
    run: Path, model: Transformer, optimizers: Optimizers, state: TrainState, data: Dataset, keep: int
) -> Path | None:
    """Loads the newest checkpoint, if there is one, and makes sure that it continues on the same data."""
    newest = latest_checkpoint(run / "checkpoints")
    if newest is None:
        return None
    fingerprint, base = state.fingerprint, state.base
    load_checkpoint(newest, model, optimizers, state)
    if state.base != base:
        raise CheckpointError(
            f"{newest}: was trained from other weights than those that are in model.pretrained now; "
            "put them back, or give another output to start a new run"
        )
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{newest}: was trained on other data than {data.folders[0].folder}; "
            "give the same data, or another output to start a new run"
        )
    make_latest(newest, keep)
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
            None if batch.trained is None else batch.trained[i : i + rows].to(device, non_blocking=True),
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
        kl, uniform, compared = report.indexer.tolist()
        if compared:
            row |= {"indexer/kl": kl / compared, "indexer/kl_uniform": uniform / compared}
        row |= {name: float(value) for name, value in report.statistics.items()}
        if row.pop("indexer/recall_tokens", 1) == 0:
            del row["indexer/recall"]  # rows so short that the indexer takes all there is
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


def concluded(run: Path, state: TrainState) -> bool:
    """Whether the run ended in peace at this step, and was not killed between its last checkpoint and its summary."""
    try:
        return bool(json.loads((run / "summary.json").read_text())["step"] == state.step)
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
    """The end of a run: plot, a sample, what to do next, and last the summary, which says that all was done."""
    print_ = terminal.console.print
    summary: dict[str, float | int | None] = {"step": state.step, "tokens": state.tokens, "skipped": state.skipped}
    first: Row = next(iter(read_metrics(run / "metrics.jsonl")), {})
    if final is not None:
        summary |= {"validation/loss": final.loss, "validation/bits_per_byte": final.bits_per_byte}
        summary["validation/untrained_bits_per_byte"] = first.get("validation/untrained_bits_per_byte")
        table = Table("validation", "bits per byte", title=f"{config.name}: {state.tokens:,} tokens trained")
        if summary["validation/untrained_bits_per_byte"] is not None:
            table.add_row(
                f"this model, {'untrained' if config.pretrained is None else 'before'}",
                f"{summary['validation/untrained_bits_per_byte']:.3f}",
            )
        order = config.validation.byte_model_order
        if order is not None:
            reference = Validator(config, data, torch.device("cpu")).byte_model(order)
            summary[f"validation/byte_model_order_{order}"] = reference
            table.add_row(f"order-{order} byte model, fitted on the same text", f"{reference:.3f}")
        table.add_row("this model, trained", f"{final.bits_per_byte:.3f}")
        print_(table)
    plot = plot_loss(run)
    wandb.image("plots/loss", plot)
    if config.logging.sample_prompt is not None and (final is None or math.isfinite(final.loss)):
        tokenizer = load_tokenizer(data.tokenizer_path)
        prompt = [
            config.model.bos_token_id,
            *tokenizer.encode(config.logging.sample_prompt, add_special_tokens=False).ids,
        ]
        with without_dropout(model):
            ids = generate(model, prompt, config.logging.sample_tokens, seed=config.seed, stop=(data.eos,))
        print_("a sample: ", tokenizer.decode(ids), markup=False)
    chats = any(folder.manifest.splits["train"].trained is not None for folder in data.folders)
    question = "chat=true prompt='Hello'" if chats else "prompt='In the beginning'"
    print_(f"loss plot:  {plot}")
    print_("try next:")
    print_(f"  openv4 generate checkpoint={run} {question}", markup=False)
    print_(f"  openv4 evaluate checkpoint={run}", markup=False)
    if config.lora is None:
        print_(f"  openv4 export checkpoint={run} output={run}/export", markup=False)
    else:
        print_(f"  openv4 merge adapter={run} output={run}/merged", markup=False)
    write_json(run / "summary.json", finite(summary))
