"""Training steps on several gloo processes, for comparison with one; the processes of a world serve all its cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from model_cases import random_config, random_model
from process_cases import run_processes
from run_cases import plan
from torch import Tensor

from openv4.data.loader import Batch
from openv4.model.outliers import MAXIMA
from openv4.model.released import released_tensors
from openv4.model.transformer import Transformer
from openv4.optim.config import AdamWConfig, OptimConfig
from openv4.optim.groups import Optimizers
from openv4.train.anticipation import filled, split_batch
from openv4.train.checkpoint import TrainState, split_experts
from openv4.train.config import ParallelConfig, PrecisionConfig
from openv4.train.loop import StepReport, training_step
from openv4.train.meter import over_processes
from openv4.train.parallel import ALONE, Alone, Together
from openv4.train.precision import apply_precision

SECONDS = 300  # for all cases of a world


@dataclass(frozen=True)
class Case:
    """Some steps of training; rows are dealt to the processes in turn."""

    name: str
    expert: int = 1
    context: int = 1
    seed: int = 0  # of the model's config and weights
    steps: int = 2
    rows: int = 4
    length: int = 24
    micro_rows: int = 1  # of each process
    attention: str = "sparse"
    compute: str = "fp32"
    streams: Literal["fp32", "bf16"] = "fp32"
    then: str = ""  # compute from the second step on
    held: bool = False  # owners alone have float32 weights, as in a run
    clip: float | None = 1e9
    matrices: str = "muon"
    recompute: str = "none"
    gradients: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2] = 0
    first: float = 1e-5  # how far the gradients of the first step may be from those of one process, relative
    after: float = 1e-5  # the same of the losses of all steps; weights are allowed more
    poisoned: bool = False  # a gradient of the last process is not a number
    anticipated: bool = False  # experts of all steps are chosen before the first
    starved: bool = False  # all tokens choose the first experts, so that the others get none
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        fixed: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
        return random_config(
            self.seed, **(fixed | {k: tuple(v) if isinstance(v, list) else v for k, v in self.model.items()})
        )


def run(case: Case, processes: Alone, together: int = 1) -> dict[str, Tensor]:
    """What this process has after the case: losses, norms, loads, and the model by released names. One process alone
    takes the micro-batches of so many ``together``."""
    config = case.config
    model = random_model(config, case.seed)
    model.recompute = case.recompute  # type: ignore[assignment]
    if case.starved:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("gate.bias"):
                    buffer[: config.num_experts_per_tok] += 100
                elif name.endswith("tid2eid"):
                    buffer.copy_(torch.arange(config.num_experts_per_tok).expand_as(buffer))
    processes.spread(model)
    precision = PrecisionConfig(case.compute, case.streams)  # type: ignore[arg-type]
    apply_precision(model, precision)
    # An eps above the rounding of gradients: AdamW would move what has no gradient but rounding as far as all else.
    optim = OptimConfig(matrices=case.matrices, adamw=AdamWConfig(eps=1e-6))  # type: ignore[arg-type]
    optimizers = processes.optimizers(model, optim)
    if case.held:
        processes.set_precision(model, precision)
    now = plan(sequence_length=case.length, rows=case.rows, attention=case.attention, bias_speed=0.05)
    if case.poisoned and processes.rank == processes.world - 1:
        model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    gradients: dict[str, Tensor] = {}
    update = optimizers.step

    def step_and_keep(lr: float, found_inf: Tensor) -> None:
        """Keeps the gradients of the first step, clipped, as they are at their owners."""
        held = {name: numbers for name, numbers in processes.held(model, optimizers).items() if numbers is not None}
        found = {name: p.grad for name, p in optimizers.parameters.items() if p.grad is not None}
        for name, gradient in split_experts(found, held).items():
            gradients.setdefault(f"gradient.{name}", gradient.clone())
        update(lr, found_inf)

    optimizers.step = step_and_keep  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(case.seed)
    reports: list[StepReport] = []
    steps = []
    for step in range(case.steps):
        tokens = torch.randint(0, config.vocab_size, (case.rows, case.length), generator=generator)
        segments = torch.randint(0, 3, (case.rows, case.length), generator=generator).sort(1).values
        segments[:, case.length - 2 :] = -1 if step else 2
        mine = list(range(processes.replica, case.rows, processes.replicas))
        whole = filled(Batch(tokens[mine], segments[mine], ((),) * len(mine)), -(-case.rows // processes.replicas), 1)
        many = case.micro_rows * (together if processes.world == 1 else 1)
        steps.append(split_batch(whole, many * case.length, torch.device("cpu")))
        if case.anticipated:
            steps[-1] = [batch._replace(experts=model.choose_experts(*batch[:2], now.attention)) for batch in steps[-1]]
    for step, batches in enumerate(steps):
        processes.steps = step
        if case.then and step == 1:
            switch = processes.set_precision if case.held else apply_precision
            switch(model, replace(precision, compute=case.then))  # type: ignore[arg-type]
        reports.append(training_step(model, optimizers, batches, now, case.clip, step == 0, processes))
    result = {
        "losses": torch.stack([torch.stack((r.main, r.mtp, r.balance, *r.indexer)) for r in reports]),
        "norms": torch.stack([r.grad_norm for r in reports]),
        "loads": torch.stack([torch.stack(list(r.load.values())) for r in reports]),
        "update_rms": torch.stack(list(optimizers.update_rms().values())),
    }
    if case.matrices == "muon" and case.after < 1e-4:
        # Not of matrices whose gradient is rounding, in part or, for low precision, in many matrices.
        residuals = {group: value for group, value in optimizers.residuals().items() if group != "mHC projections"}
        result["residuals"] = torch.stack(list(residuals.values()))
    if case.context == 1:  # else one process has other rows in its first micro-batch than all together
        found = over_processes(reports[0].statistics, processes)
        result["maxima"] = torch.tensor([value for name, value in found.items() if name.startswith(MAXIMA)])
    if processes.world > 1:
        processes.settle()
        sent = [each.sent for each in (*processes.dispatchers, *processes.exchanges)]
        for kind in ("tokens", "results", "gradients", "weights"):
            result[f"sent.{kind}"] = torch.tensor(sum(each.get(kind, 0) for each in sent))
    result |= gradients
    if case.streams == "bf16":
        result |= of_held_weights(model, optimizers, reports[0], processes)
    with processes.whole(model):
        return result | {f"model.{name}": tensor.detach().clone() for name, tensor in released_tensors(model)}


def of_held_weights(
    model: Transformer, optimizers: Optimizers, report: StepReport, processes: Alone
) -> dict[str, Tensor]:
    """What a checkpoint gets from this process, the bytes of weights that it has, and how much rounding loses."""
    snapshot = processes.snapshot(model, optimizers, TrainState(), None)
    rates = {n: v for n, v in over_processes(report.statistics, processes).items() if n.startswith("precision/")}
    parameters = dict(model.named_parameters())
    tensors = [tensor for name, tensor in processes.copies(model) if name in parameters]
    tensors += [shard.parameter.detach() for exchange in processes.exchanges for shard in exchange.shards.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "bytes": torch.tensor(sum(storages.values())),
        "rates": torch.tensor(list(rates.values())),
        **{f"saved.{name}": tensor.clone() for name, tensor in snapshot.weights.items()},
        **{f"state.{name}": tensor.clone() for name, tensor in snapshot.optimizer.items()},
    }


def alone(case: Case, together: int) -> dict[str, Tensor]:
    return run(case, ALONE, together)


def launch(cases: Sequence[Case], world: int) -> dict[str, list[dict[str, Tensor]]]:
    """Runs the cases in ``world`` processes; by case, what each process had."""
    ranks = run_processes("parallel_cases:run_all", world, cases, timeout=SECONDS)
    return {case.name: [results[case.name] for results in ranks] for case in cases}


def run_all(cases: Sequence[Case]) -> dict[str, dict[str, Tensor]]:
    """In a process of a world."""
    torch.use_deterministic_algorithms(True)
    results = {}
    for case in cases:
        results[case.name] = run(case, joined(case))
    return results


def joined(case: Case) -> Together:
    """This process of a world, as the case spreads the model over it."""
    config = ParallelConfig(
        expert=case.expert, context=case.context, gradients=case.gradients, bucket_mb=0.02, zero=case.zero
    )
    return Together(config, case.seed, torch.device("cpu"))


@dataclass
class Arrivals:
    """What one process has seen of new weights: names of parameters whose weights were not yet new, when the step was
    over, and of each block's own, when the block was called; how many broadcasts had begun, at the same moments; and
    the losses of all steps."""

    after_step: set[str]
    at_call: dict[str, set[str]]
    begun: list[int]
    losses: list[float]


def all_arrivals(cases: Sequence[Case]) -> dict[str, tuple[Arrivals, Arrivals]]:
    """In a process of a world: by case, what it saw; then what it saw where every step waited for all weights."""
    return {case.name: (arrivals(case, at_once=False), arrivals(case, at_once=True)) for case in cases}


def arrivals(case: Case, at_once: bool) -> Arrivals:
    """Three steps, and the forward pass of a fourth."""
    processes = joined(case)
    model = random_model(case.config, case.seed)
    model.recompute = case.recompute  # type: ignore[assignment]
    processes.spread(model)
    precision = PrecisionConfig(case.compute, case.streams)  # type: ignore[arg-type]
    apply_precision(model, precision)
    optimizers = processes.optimizers(model, OptimConfig())
    processes.set_precision(model, precision)
    now = plan(sequence_length=case.length, rows=case.rows)
    generator = torch.Generator().manual_seed(case.seed)
    losses = []
    for step in range(3):
        tokens = torch.randint(0, case.config.vocab_size, (case.rows, case.length), generator=generator)
        mine = tokens[processes.rank :: processes.world]
        batch = Batch(mine, torch.zeros_like(mine), ((),) * len(mine))
        processes.steps = step
        batches = split_batch(batch, case.length, torch.device("cpu"))
        losses.append(float(training_step(model, optimizers, batches, now, 1.0, False, processes).loss))
        if at_once:
            processes.settle()

    def copies() -> dict[str, Tensor]:
        """Whatever has come so far, without waiting for more."""
        held = {name: maker.held for exchange in processes.exchanges for name, maker in exchange.held.items()}
        here = {name: held.get(name) for name, _ in model.named_parameters()}
        return {
            name: (p if here[name] is None else here[name]).detach().clone() for name, p in model.named_parameters()
        }

    seen, begun = [copies()], [0]
    broadcast = dist.broadcast

    def counted(*arguments: Any, **more: Any) -> Any:
        begun[-1] += 1
        return broadcast(*arguments, **more)

    def called(*_: object) -> None:
        seen.append(copies())
        begun.append(0)

    blocks = {f"layers.{index}": block for index, block in enumerate(model.layers)} | {"mtp.0": model.mtp[0]}
    for block in blocks.values():
        block.register_forward_pre_hook(called)  # after those of the exchange
    dist.broadcast = counted
    try:
        with torch.no_grad():
            model.run(tokens[:1])
    finally:
        dist.broadcast = broadcast
    final = {name: tensor.clone() for name, tensor in processes.copies(model)}
    old = [{name for name, tensor in each.items() if not torch.equal(tensor, final[name])} for each in seen]
    at_call = {name: {n for n in each if n.startswith(f"{name}.")} for name, each in zip(blocks, old[1:], strict=True)}
    return Arrivals(old[0], at_call, begun, losses)
