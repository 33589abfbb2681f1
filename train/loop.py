"""The training loop, one for every recipe. ``training_step`` is the whole of a step; ``train`` is what surrounds it."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..data.byte_model import ByteModel
from ..data.loader import Batch
from ..data.tokenizer import load_tokenizer
from ..model.accounting import count_parameters, parameter_table
from ..model.generate import generate
from ..model.init import init_weights
from ..model.lora import add_lora
from ..model.loss import Counts, Losses, training_losses
from ..model.released import load_pretrained, weights_fingerprint
from ..model.tensor_files import write_json
from ..model.transformer import Transformer
from ..optim.groups import GroupRow, Optimizers
from ..optim.schedule import Plan, Schedule
from .anticipation import Feed, split_batch
from .checkpoint import Processes, TrainState, load_checkpoint, load_newest, make_latest, set_aside
from .checkpoint_writer import CheckpointWriter
from .config import CheckpointError, ConfigError, PrecisionConfig, Preempted, TrainConfig
from .dataset import Dataset, open_dataset
from .environment import code_version
from .evaluation import Evaluation, evaluate, without_dropout
from .folder import claim_folder, write_description
from .integrity import IntegrityChecks
from .journal import Journal
from .meter import Meter, StepReport
from .metrics import finite, plot_loss, read_metrics, summarize_rows, summary_table
from .parallel import ALONE, Alone, start
from .precision import apply_precision, describe_precision
from .progress import progress_bar
from .signals import StopSignal
from .stability import Guard, Spike, decisions, drop_spiked


def training_step(
    model: Transformer,
    optimizers: Optimizers,
    micro_batches: Sequence[Batch],
    plan: Plan,
    grad_clip: float | None,
    statistics: bool = False,
    processes: Alone = ALONE,
) -> StepReport:
    """Forward and backward over the micro-batches, one update of weights and router biases; each process has
    micro-batches of its own, as many as the others.

    The loss is a sum over tokens divided by the count of the whole step, so its value and gradient do not depend on how
    the step is cut, nor on how many processes share it. A step whose gradient norm is not finite changes nothing; the
    device decides, the host never waits.
    """
    counts = global_counts(micro_batches, processes)
    sums = torch.zeros(6, device=model.embed.weight.device)
    load: dict[str, Tensor] = {}
    details: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
        loss, losses = processes.forward(losses_of, model, batch, counts, plan, statistics and not details)
        processes.backward(loss, last=index == len(micro_batches) - 1)
        sums += torch.stack((losses.main, losses.mtp, losses.balance, *losses.indexer)).detach()
        load = {name: count + load.get(name, 0) for name, count in losses.load.items()}
        details = details or losses.statistics
    sums, load = processes.total(sums), dict(zip(load, processes.total(torch.stack(list(load.values()))), strict=True))
    norm, found_inf = optimizers.clip(math.inf if grad_clip is None else grad_clip)
    processes.step(optimizers, plan.lr, found_inf)
    optimizers.zero_grad()
    update_router_biases(model, load, plan.bias_speed, found_inf)
    main, mtp, balance = sums[:3].unbind()
    return StepReport(main, mtp, balance, sums[3:], counts, norm, found_inf, load, details)


def global_counts(micro_batches: Sequence[Batch], processes: Alone) -> Counts:
    """What the loss sums of a step are divided by, over all processes; those that share rows know them whole."""
    counts = Counts.of([batch.segments for batch in micro_batches], [batch.trained for batch in micro_batches])
    total = processes.total(torch.stack((counts.main, counts.mtp, counts.valid))) // processes.context
    return Counts(*total.unbind())


def losses_of(model: Transformer, batch: Batch, counts: Counts, plan: Plan, statistics: bool) -> tuple[Tensor, Losses]:
    """The scalar to differentiate, and what it was made of."""
    losses = training_losses(
        model,
        batch.tokens,
        batch.segments,
        plan.attention,
        mtp=plan.mtp_weight > 0,
        indexer=plan.indexer_weight > 0,
        statistics=statistics,
        trained=batch.trained,
        experts=batch.experts,
    )
    return losses.total(counts, plan.mtp_weight, plan.balance_weight, plan.indexer_weight), losses


def loss_alone(model: Transformer, batch: Batch, plan: Plan) -> Tensor:
    """The scalar to differentiate of a micro-batch that is a step by itself."""
    counts = Counts.of([batch.segments], [batch.trained])
    return losses_of(model, batch, counts, plan, statistics=False)[0]


@torch.no_grad()
def update_router_biases(model: Transformer, load: dict[str, Tensor], speed: float, found_inf: Tensor) -> None:
    """Moves each expert's selection bias by ``speed`` towards the mean load (recipe 3; V3's form)."""
    for name, count in load.items():
        bias = model.get_submodule(name).ffn.gate.bias  # type: ignore[union-attr]
        if bias is not None:
            shortfall = count.float().mean() - count
            bias += speed * shortfall.sign() * (1 - found_inf)  # type: ignore[operator]


def train(config: TrainConfig) -> Path:
    """Trains until the schedule ends, from the newest checkpoint of ``config.output`` if there is one. Every process of
    a run calls it.

    Returns:
        the run's folder.

    Raises:
        Preempted: a signal asked to stop; all is saved.
    """
    run = Path(config.output)
    with ExitStack() as stack:
        device = device_of(config)
        processes = start(config, device)
        stack.push(lambda kind, error, trace: processes.close(error))
        stop = stack.enter_context(StopSignal())
        processes.first_does(lambda: claim_folder(run, config, stack))
        guard = Guard(config.stability, run)
        make_deterministic(config, device, processes.rank)
        data = processes.first_does(lambda: open_run_dataset(config, run))
        if data is None:  # the first process has prepared it, and compared its checksums
            data = open_run_dataset(replace(config, data=replace(config.data, verify=False)), run)
        processes.preflight(config, data.fingerprint)
        schedule = make_schedule(config, data)
        loader = data.loader(config.seed, config.data.workers)

        model = build_model(config, device, processes)
        optimizers = processes.optimizers(model, config.optim)
        base = weights_fingerprint(Path(config.pretrained)) if config.pretrained else ""
        state = TrainState(data=loader.state_dict(), fingerprint=data.fingerprint, base=base)
        writers = Processes(processes.rank, processes.world, processes.agree)
        held = processes.held(model, optimizers)
        feed = Feed(config, model, loader, schedule, processes, data.eos, device)

        def resume() -> tuple[Path | None, list[str]]:
            """Takes up the newest checkpoint, if there is one: at the start of a process, and on the way back."""
            processes.first_does(lambda: drop_spiked(run))
            with processes.whole(model):
                newest, damaged = restore(run, model, optimizers, state, data, config.checkpoint.keep, writers, held)
            feed.load_state_dict(state.data, newest)
            decided = processes.agree(json.dumps(decisions(run)) if processes.first else "")
            guard.load(state.stability, json.loads(decided))
            return newest, damaged

        resumed, damaged = resume()
        processes.first_does(lambda: write_description(run, config, data))

        journal = Journal(run, config, state, schedule.total_steps, processes.first, stack)
        introduce(journal, config, optimizers, processes, data, resumed, state)
        for text in damaged:
            journal.warn("damaged", text)
        saver = stack.enter_context(
            CheckpointWriter(run / "checkpoints", config.checkpoint.keep, writers, config.checkpoint.asynchronous)
        )
        validator = Validator(config, data, device, processes)
        meter = Meter(config, device, processes)
        checks = IntegrityChecks(config.stability, model, processes, journal.warn)
        where = config.precision, device

        at_step = stack.enter_context(processes.watched(journal.warn))

        plan = schedule.plan(state.step, state.tokens)
        if plan is not None:
            processes.set_precision(model, config.precision, plan.compute)
            journal.event(*beginning(resumed, journal.repeated, describe_stage(plan, *where)))
        untrained = None
        if plan is not None and state.step == 0:
            with meter.aside("validation"):
                untrained = validator(model, plan)
        while plan is not None:
            with meter.waiting():
                feed.fetch(state, guard.anticipated, guard.skips)
            batch = feed.take(plan, guard.anticipated)
            validates = config.validation.every > 0 and (state.step + 1) % config.validation.every == 0
            due = validates or state.step == 0 or (state.step + 1) % config.logging.every == 0
            micro_batches = split_batch(batch, config.micro_batch_tokens, device)
            at_step(state.step)
            processes.steps = state.step
            checks.before_step(state.step, partial(loss_alone, model, micro_batches[0], plan))
            report = training_step(model, optimizers, micro_batches, plan, config.grad_clip, due, processes)
            state.step += 1
            state.tokens += plan.tokens
            meter.count(plan, report)
            spike = guard.observe(state.step, plan.stage, report.loss, report.grad_norm)
            if due or spike:
                settle(meter, state, journal)
                row = meter.row(state, plan, report, optimizers, batch) | guard.metrics(state.step)
                if untrained is not None:
                    row |= {"validation/untrained_loss": untrained.loss}
                    row |= {"validation/untrained_bits_per_byte": untrained.bits_per_byte}
                    untrained = None
                if validates:
                    with meter.aside("validation"):
                        result = validator(model, plan)
                    if result is not None:
                        row |= {"validation/loss": result.loss, "validation/bits_per_byte": result.bits_per_byte}
                journal.row(row, report)
            went_back = False
            if spike:
                with meter.aside("rollback"):
                    saver.wait()
                    went_back = answer(spike, guard, state, feed, processes, journal, resume)
            stage, plan = plan.stage, schedule.plan(state.step, state.tokens)
            if plan is not None and plan.stage != stage:
                processes.set_precision(model, config.precision, plan.compute)
                journal.event("stage", describe_stage(plan, *where))
            every = config.checkpoint.every
            stopping = plan is not None and processes.any(stop.signal)
            if plan is None or stopping or (every and state.step % every == 0 and not went_back):
                settle(meter, state, journal)
                state.data, state.stability = feed.state_dict(), guard.state_dict()
                with meter.aside("checkpoint"):
                    adapter = (config.lora, str(Path(config.pretrained or "").resolve())) if config.lora else None
                    snapshot = processes.snapshot(model, optimizers, state, adapter)
                    saver.save(replace(snapshot, ahead=feed.tensors()))
                if plan is None or stopping:
                    saver.wait()
                for saved in saver.published():
                    journal.event("checkpoint", saved.name)
            if stopping:
                journal.event("preempted", f"signal {stop.signal or 'to another process'}; the same command goes on")
                raise Preempted(f"{run}: stopped after step {state.step} by a signal, saved; the same command goes on")
        if meter.steps == 0 and (state.step > schedule.total_steps or concluded(run, state)):
            journal.print(f"{run}: this run is complete at step {state.step}; raise steps= to go on")
        elif last := schedule.plan(state.step - 1, schedule.tokens_before(state.step - 1)):
            processes.set_precision(model, config.precision, last.compute)
            final = validator(model, last, whole=True)
            conclude(run, journal, config, data, model, state, final, processes)
            journal.event("end", f"{state.tokens:,} tokens trained")
    return run


def device_of(config: TrainConfig) -> torch.device:
    """The device of this process."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def open_run_dataset(config: TrainConfig, run: Path) -> Dataset:
    return open_dataset(config.data, run, config.model, config.pretrained, config.shortest_row)


def build_model(config: TrainConfig, device: torch.device, processes: Alone = ALONE) -> Transformer:
    """The model before its first step: random, or pretrained, with fresh adapters where the config asks for LoRA. Of
    many processes each makes or reads its own experts alone."""
    if config.pretrained is None:
        with torch.device("meta"):
            model = Transformer(config.model, recompute=config.recompute)
        processes.spread(model)
        init_weights(model.to_empty(device="cpu"), config.seed)
        apply_precision(model.to(device), config.precision)
        return model
    base = config.precision.base
    with progress_bar("loading") as advance:
        model = load_pretrained(
            config.pretrained,
            torch.float32 if base == "fp32" else torch.bfloat16,
            device,
            mtp=config.model.num_nextn_predict_layers > 0,
            keep_quantized=base == "released",
            progress=advance,
            spread=processes.spread,
        )
    if differing := [key for key, value in asdict(config.model).items() if asdict(model.config)[key] != value]:
        key = differing[0]
        found, wanted = getattr(model.config, key), getattr(config.model, key)
        raise ConfigError(f"model.{key}={wanted}: {config.pretrained} has {found}; leave it out")
    model.recompute = config.recompute
    apply_precision(model, config.precision)
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


def make_deterministic(config: TrainConfig, device: torch.device, rank: int) -> None:
    """Same seed, same weights: deterministic kernels, and nothing that depends on time or thread scheduling. Processes
    drop different elements of adapters."""
    if config.threads:
        torch.set_num_threads(config.threads)
    # On CUDA some integer operations only warn: they have no deterministic twin, but are exact in any order.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.seed + rank)


def restore(
    run: Path,
    model: Transformer,
    optimizers: Optimizers,
    state: TrainState,
    data: Dataset,
    keep: int,
    writers: Processes,
    held: Mapping[str, Sequence[int] | None],
) -> tuple[Path | None, list[str]]:
    """Loads the newest checkpoint, if there is one, and makes sure that it continues on the same data.

    Returns:
        the checkpoint; and on the first process, what it says of newer ones, which were damaged and set aside.
    """
    fingerprint, base = state.fingerprint, state.base
    newest, damaged = load_newest(
        run / "checkpoints", lambda folder: load_checkpoint(folder, model, optimizers, state, writers, held), writers
    )
    if newest is None:
        return None, []
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
    if writers.rank != 0:
        return newest, []
    told = [f"{line}, going on from {newest.name}" for line in set_aside(damaged)]
    make_latest(newest, keep)
    return newest, told


class Validator:
    """Runs the validation pass of a run; None where the data has no validation documents."""

    def __init__(self, config: TrainConfig, data: Dataset, device: torch.device, processes: Alone = ALONE) -> None:
        self.config, self.data, self.processes = config, data, processes
        self.stores, self.token_bytes = data.validation, data.token_bytes(device)

    def __call__(self, model: Transformer, plan: Plan, whole: bool = False) -> Evaluation | None:
        """By the rows and the attention of ``plan``; ``whole`` reads all of the split, whatever the config allows."""
        if not self.stores:
            return None
        tokens, batch = None if whole else self.config.validation.tokens, self.config.micro_batch_tokens
        length, pad = plan.sequence_length, self.data.eos
        return evaluate(
            model, self.stores, self.token_bytes, length, plan.attention, tokens, batch, pad, self.processes
        )

    def byte_model(self, order: int) -> float | None:
        """Bits per byte of a byte n-gram model fitted on the training text, on the validation text."""
        if not self.stores:
            return None
        train, held_out = (
            [text.encode() for folder in self.data.folders for text in folder.texts(split)]
            for split in ("train", "validation")
        )
        return ByteModel.fit(train, order).bits_per_byte(held_out)


def beginning(resumed: Path | None, repeated: int, stage: str) -> tuple[str, str]:
    """Kind and text of the event that a process starts with; ``repeated``: logged steps after the checkpoint."""
    if resumed is None:
        return "start", stage
    again = f"; {repeated} logged steps are done again" if repeated else ""
    return "resume", f"from {resumed.name}{again}"


def describe_stage(plan: Plan, precision: PrecisionConfig, device: torch.device) -> str:
    return (
        f"stage {plan.name}: rows of {plan.sequence_length:,} tokens, {plan.tokens:,} tokens a step, "
        f"attention {plan.attention}, {describe_precision(precision, plan.compute, device)}"
    )


def answer(
    spike: Spike,
    guard: Guard,
    state: TrainState,
    feed: Feed,
    processes: Alone,
    journal: Journal,
    resume: Callable[[], tuple[Path | None, list[str]]],
) -> bool:
    """Does about a spike what the config says; whether the run stands at an earlier step now."""
    journal.warn("spike", str(spike))
    if guard.config.on_spike == "warn":
        return False

    def decide() -> str:
        rollback = guard.decide(spike, feed.state_dict())
        if rollback is None:
            return ""
        guard.record(rollback)
        return str(rollback)

    decided = processes.agree(processes.first_does(decide) or "")
    if not decided:
        guard.stay(state.step)
        journal.warn("spike", f"there is no checkpoint from before step {spike.onset} to go back to; the run goes on")
        return False
    _, damaged = resume()
    journal.go_back("rollback", decided)
    for text in damaged:
        journal.warn("damaged", text)
    return True


def settle(meter: Meter, state: TrainState, journal: Journal) -> None:
    """Brings ``state.skipped`` up to date, and tells if it grew."""
    if skipped := meter.settle(state):
        steps = "a step had a gradient that was" if skipped == 1 else f"{skipped} steps had gradients that were"
        journal.event("skipped", f"{steps} not finite, here or since the last row; nothing was changed")


def introduce(
    journal: Journal,
    config: TrainConfig,
    optimizers: Optimizers,
    processes: Alone,
    data: Dataset,
    resumed: Path | None,
    state: TrainState,
) -> None:
    """Prints what is about to be trained, on what, from where."""
    print_ = journal.print
    for label, text in parameter_table(config.model):
        print_(f"{label:>12}: {text}")
    for folder in data.folders:
        splits = folder.manifest.splits
        text = ", ".join(f"{s.tokens:,} tokens of {s.documents:,} documents ({n})" for n, s in splits.items())
        print_(f"{'data':>12}: {folder.folder}: {text}")
    print_(f"{'output':>12}: {config.output}" + (f", resumed at step {state.step}" if resumed else ""))
    rows = processes.table(optimizers)
    print_(group_table(rows))
    if processes.world > 1:
        print_(f"{'processes':>12}: {processes}")
    if not data.validation:
        print_("no validation: the data was prepared from a single document")


def group_table(rows: Sequence[GroupRow]) -> Table:
    """Which parameters go to which optimizer, to print at start."""
    table = Table("group", "optimizer", "tensors", "matrices", "parameters", "shapes", title="parameter groups")
    for row in rows:
        shapes = ", ".join("x".join(map(str, shape)) for shape in row.shapes[:3]) + (
            " ..." if len(row.shapes) > 3 else ""
        )
        table.add_row(
            row.group, row.optimizer, str(row.tensors), str(row.matrices or "-"), f"{row.parameters:,}", shapes
        )
    return table


def concluded(run: Path, state: TrainState) -> bool:
    """Whether the run ended in peace at this step, and was not killed between its last checkpoint and its summary."""
    try:
        return bool(json.loads((run / "summary.json").read_text())["step"] == state.step)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def conclude(
    run: Path,
    journal: Journal,
    config: TrainConfig,
    data: Dataset,
    model: Transformer,
    state: TrainState,
    final: Evaluation | None,
    processes: Alone,
) -> None:
    """The end of a run: plot, a sample, what to do next, and last the summary, which says that all was done."""
    sample = None
    if config.logging.sample_prompt is not None and (final is None or math.isfinite(final.loss)):
        sample = sample_text(config, data, model, config.logging.sample_prompt)  # all processes have experts to lend
    if not processes.first:
        return
    print_ = journal.print
    rows = read_metrics(run / "metrics.jsonl")
    code = code_version()
    summary: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "skipped": state.skipped}
    summary |= {"parameters": count_parameters(config.model).total} | summarize_rows(rows)
    if final is not None:
        summary |= {"validation/loss": final.loss, "validation/bits_per_byte": final.bits_per_byte}
        losses = [final.loss, *(row["validation/loss"] for row in rows if "validation/loss" in row)]
        summary["validation/best_loss"] = min(filter(math.isfinite, losses), default=math.nan)
        before = rows[0].get("validation/untrained_bits_per_byte") if rows else None
        summary["validation/untrained_bits_per_byte"] = before
        table = Table("validation", "bits per byte", title=f"{config.name}: {state.tokens:,} tokens trained")
        if before is not None:
            table.add_row(f"this model, {'untrained' if config.pretrained is None else 'before'}", f"{before:.3f}")
        order = config.validation.byte_model_order
        if order is not None:
            reference = Validator(config, data, torch.device("cpu")).byte_model(order)
            summary[f"validation/byte_model_order_{order}"] = reference
            table.add_row(f"order-{order} byte model, fitted on the same text", f"{reference:.3f}")
        table.add_row("this model, trained", f"{final.bits_per_byte:.3f}")
        print_(table)
    summary = finite(summary) | {"git": code["git"], "git_dirty": code["git_dirty"]}
    print_(summary_table(summary))
    plot = plot_loss(run)
    journal.conclude(summary, plot)
    if sample is not None:
        print_("a sample: ", sample, markup=False)
    chats = any(folder.manifest.splits["train"].trained is not None for folder in data.folders)
    question = "chat=true prompt='Hello'" if chats else "prompt='In the beginning'"
    print_(f"loss plot:  {plot}")
    print_("try next:")
    print_(f"  openv4 generate checkpoint={run} {question}", markup=False)
    print_(f"  openv4 evaluate checkpoint={run}", markup=False)
    print_(f"  openv4 report {run}", markup=False)
    if config.lora is None:
        print_(f"  openv4 export checkpoint={run} output={run}/export", markup=False)
    else:
        print_(f"  openv4 merge adapter={run} output={run}/merged", markup=False)
    write_json(run / "summary.json", summary)


def sample_text(config: TrainConfig, data: Dataset, model: Transformer, prompt: str) -> str:
    """The prompt, continued by the model."""
    tokenizer = load_tokenizer(data.tokenizer_path)
    ids = [config.model.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    with without_dropout(model):
        ids = generate(model, ids, config.logging.sample_tokens, seed=config.seed, stop=(data.eos,))
    return tokenizer.decode(ids)
