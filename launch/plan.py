"""``openv4 plan``: memory, time and communication of a run on a cluster, before it runs."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ..model.accounting import parameter_table
from ..model.memory import Layout
from ..optim.schedule import Stage
from ..train.cluster import Cluster, Compute, GpuConfig, Shares
from ..train.config import ConfigError, TrainConfig
from ..train.planning import (
    Placement,
    RunPlan,
    StagePlan,
    as_json,
    measured_shares,
    plan_run,
    powers_of_two,
    rows_per_step,
    search,
)
from .efficiency import run_efficiency
from .plan_page import amount, write_page

POSITIONAL = "show"


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A training run, and what it would run on.

    Attributes:
        show: the plan of a run, or the paper's efficiency table.
        gpu: what the cluster is made of, a preset of conf/gpu.
        nodes, gpus: how many; give one of them, or none for one node.
        expert: expert-parallel size; null: the largest power of two that divides GPUs and routed experts.
        context: context-parallel size; null: by stage, the smallest power of two that leaves no GPU without a row.
        micro_rows: rows of a micro-batch; null: as many as micro_batch_tokens holds.
        compute: of matrix products in all stages; null: as the run's precision and its stages say.
        row_tokens: length of the rows of every stage, instead of the run's.
        data_tokens: of the data, for runs that are measured in epochs.
        search: propose placements.
        measured: folder of a run whose measured speed replaces the assumed shares.
        shares: of the GPU's rates, assumed.
        json: print JSON; html: write a page; png, tokens: of the efficiency table.
    """

    gpu: GpuConfig = field(kw_only=True)
    show: Literal["run", "efficiency"] = "run"
    nodes: int | None = None
    gpus: int | None = None
    expert: int | None = None
    context: int | None = None
    micro_rows: int | None = None
    compute: Compute | None = None
    row_tokens: int | None = None
    data_tokens: float | None = None
    search: bool = False
    measured: str | None = None
    shares: Shares = field(default_factory=Shares)
    json: bool = False
    html: str | None = None
    tokens: float = 1e6
    png: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("nodes", "gpus", "expert", "context", "micro_rows", "row_tokens", "data_tokens", "tokens"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{key}={value} must be positive")
        if self.nodes is not None and self.gpus is not None and self.nodes * self.gpu.per_node != self.gpus:
            raise ConfigError(
                f"nodes={self.nodes} of {self.gpu.per_node} GPUs and gpus={self.gpus} contradict each other; give one"
            )

    @classmethod
    def complete(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        """A plan needs no data, and of pretrained weights the shapes alone, which ``model=`` may give as well."""
        data = values.get("data") or {}
        values = values | {"data": data | {"path": None if data.get("path") == "???" else data.get("path")}}
        if values.get("row_tokens") is not None:
            values["stages"] = [_with_rows(stage, values) for stage in values.get("stages") or ()]
        if values.get("compute") is not None:
            values["stages"] = [stage | {"compute": None} for stage in values.get("stages") or ()]
        if values.get("pretrained") == "???":
            if not values.get("model"):
                raise ConfigError("model is not set; give model=v4_flash or model.pretrained=<folder of weights>")
            return values | {"pretrained": "not needed"}
        return super().complete(values)

    def cluster(self) -> Cluster:
        gpus = self.gpus or (self.nodes or 1) * self.gpu.per_node
        shares = measured_shares(Path(self.measured), self.gpu) if self.measured else self.shares
        return Cluster(self.gpu, gpus, shares, self.compute or self.precision.compute)

    def placement(self, stage: Stage, gpus: int) -> Placement:
        """As the keys say, or as the trainer would do it."""
        expert = self.expert or powers_of_two(math.gcd(gpus, self.model.n_routed_experts))[-1]
        context = self.context or _smallest_context(gpus, stage)
        try:
            layout = Layout(gpus, expert, context)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        rows = self.micro_rows or max(1, self.micro_batch_tokens * context // stage.sequence_length)
        rows = min(rows, max(1, rows_per_step(stage) * context // gpus))
        return Placement(layout, rows, self.recompute)

    @property
    def planned_stages(self) -> tuple[Stage, ...]:
        """The run's stages; the last one as long as the epochs over the data, where both are known."""
        if self.epochs is None or self.data_tokens is None:
            return self.stages
        return (*self.stages[:-1], replace(self.stages[-1], tokens=max(1, round(self.epochs * self.data_tokens))))


CONFIG = PlanConfig


def run(config: PlanConfig) -> None:
    if config.show == "efficiency":
        run_efficiency(config.tokens, Path(config.png) if config.png else None, config.json)
        return
    cluster = config.cluster()
    config = replace(config, stages=config.planned_stages)
    plan = plan_run(config, cluster, lambda stage: config.placement(stage, cluster.gpus))
    proposals = {p.stage.name: search(config, p.stage, p.steps, cluster) for p in plan.stages} if config.search else {}
    if config.html:
        write_page(Path(config.html), config.name, plan)
    if config.json:
        print(json.dumps(as_json(config, plan, proposals), indent=1))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140
    _print_assumptions(console, config, plan)
    _print_memory(console, plan)
    _print_time(console, plan)
    for name, found in proposals.items():
        _print_proposals(console, name, found, cluster)
    if proposals and all(proposals.values()):
        fastest = [found[0] for found in proposals.values()]
        days, hours = sum(p.seconds for p in fastest) / 86400, sum(p.gpu_hours for p in fastest)
        console.print(f"the fastest placement of each stage: {days:,.4g} days, {amount(hours)} GPU-hours")
    _print_verdict(console, config, plan)
    if config.html:
        console.print(f"page: {config.html}")


def _print_assumptions(console: Console, config: PlanConfig, plan: RunPlan) -> None:
    cluster, shares = plan.cluster, plan.cluster.shares
    console.print(f"{config.name} on {cluster.gpus:,} x {cluster.gpu.name}, calculated, not measured")
    for label, text in parameter_table(config.model):
        console.print(f"{label:>12}: {text}")
    gpu = cluster.gpu
    console.print(
        f"{'rates':>12}: {gpu.bf16_tflops:g} TFLOP/s bf16, {gpu.fp8_tflops:g} FP8, {gpu.tf32_tflops:g} TF32, "
        f"{gpu.fp32_tflops:g} fp32; memory {gpu.bandwidth_tb_s:g} TB/s; links {gpu.link_gb_s:g} GB/s; network "
        f"{gpu.network_gb_s:g} GB/s ({gpu.source})"
    )
    origin = f"measured in {config.measured}" if config.measured else "assumed"
    console.print(
        f"{'reached':>12}: linear maps {shares.matmul:.0%}, experts {shares.experts:.0%}, attention "
        f"{shares.attention:.0%}, memory {shares.bandwidth:.0%}, network {shares.network:.0%}; "
        f"{shares.overlap:.0%} of communication hidden ({origin})"
    )
    console.print(f"{'compute':>12}: {cluster.compute}; experts and gradients evenly spread; no pipeline, no failures")


def _print_memory(console: Console, plan: RunPlan) -> None:
    """The kinds of memory of the stage that needs most, and each stage's sum."""
    worst = max(plan.stages, key=lambda p: p.bytes)
    table = Table("memory of each GPU", "GB", "how", title=f"stage {worst.stage.name!r}: {worst.placement}")
    for item in worst.memory:
        table.add_row(item.name, f"{item.bytes / 1e9:.2f}", item.how)
    table.add_row("all", f"{worst.bytes / 1e9:.2f}", f"of {worst.capacity / 1e9:g} GB")
    console.print(table)


def _print_time(console: Console, plan: RunPlan) -> None:
    columns = ("stage", "row", "attention", "tokens", "steps", "placement", "GB", "step s", "MFU", "tokens/day", "days")
    table = Table(*columns, "GPU-hours", title="stages")
    for p in plan.stages:
        table.add_row(
            p.stage.name,
            f"{p.stage.sequence_length:,}",
            p.stage.attention,
            amount(p.tokens),
            f"{p.steps:,}",
            p.placement.short,
            f"{p.bytes / 1e9:.1f}" + ("" if p.fits else " !"),
            f"{p.step_seconds:.2f}",
            f"{plan.mfu(p):.1%}",
            amount(86400 * p.tokens_per_second),
            f"{p.seconds / 86400:.3g}",
            amount(p.gpu_hours),
        )
    table.caption = "placement: expert / context / recompute / rows of a micro-batch; ! does not fit"
    console.print(table)
    longest = max(plan.stages, key=lambda p: p.seconds)
    parts = {**longest.compute, "communication": longest.communication, "optimizer": longest.update}
    table = Table("a step's seconds", "s", "share", title=f"stage {longest.stage.name!r}, the longest")
    for name, seconds in parts.items():
        if seconds > 0:
            table.add_row(name, f"{seconds:.3f}", f"{seconds / longest.step_seconds:.1%}")
    console.print(table)
    if longest.traffic:
        table = Table("sent by each GPU in a step", "GB in the node", "GB beyond", "how")
        for t in longest.traffic:
            table.add_row(t.name, f"{t.link / 1e9:.2f}", f"{t.network / 1e9:.2f}", t.how)
        console.print(table)


def _print_proposals(console: Console, name: str, found: list[StagePlan], cluster: Cluster, most: int = 5) -> None:
    table = Table("placement", "GB", "step s", "days", title=f"stage {name!r}: {len(found)} placements that fit")
    for p in found[:most]:
        table.add_row(str(p.placement), f"{p.bytes / 1e9:.1f}", f"{p.step_seconds:.2f}", f"{p.seconds / 86400:.3g}")
    if found:
        console.print(table)
    else:
        console.print(f"stage {name!r}: nothing fits {cluster.gpus:,} x {cluster.gpu.name}")


def _print_verdict(console: Console, config: PlanConfig, plan: RunPlan) -> None:
    days, hours = plan.seconds / 86400, plan.gpu_hours
    console.print(f"as asked: {amount(plan.tokens)} tokens, {days:,.4g} days, {amount(hours)} GPU-hours")
    if config.epochs is not None and config.data_tokens is None:
        console.print("its length depends on the data: give data_tokens=<number>")
    if plan.fits:
        spare = min(p.capacity - p.bytes for p in plan.stages)
        console.print(f"fits: {spare / 1e9:.1f} GB to spare")
        return
    for p in plan.stages:
        if not p.fits:
            over = f"stage {p.stage.name!r} does not fit: {p.bytes / 1e9:.1f} of {p.capacity / 1e9:g} GB"
            console.print(f"{over}; {_way_out(plan.ways_out[p.stage.name], plan.cluster)}")


def _way_out(found: StagePlan, cluster: Cluster) -> str:
    gpus = found.placement.layout.gpus
    if not found.fits:
        largest = sorted(found.memory, key=lambda item: -item.bytes)[:2]
        parts = " and ".join(f"{item.bytes / 1e9:.1f} GB of {item.name}" for item in largest)
        return f"nothing does on up to {gpus:,} GPUs: with {found.placement} each still holds {parts}; take larger GPUs"
    where = "this fits" if gpus == cluster.gpus else f"the nearest that does: gpus={gpus}"
    return f"{where}: {found.placement} ({found.bytes / 1e9:.1f} GB, {found.step_seconds:.2f} s a step)"


def _smallest_context(gpus: int, stage: Stage) -> int:
    sizes = powers_of_two(math.gcd(gpus, stage.sequence_length))
    return next((size for size in sizes if gpus // size <= rows_per_step(stage)), 1)


def _with_rows(stage: dict[str, Any], values: dict[Any, Any]) -> dict[str, Any]:
    """A stage with rows of ``row_tokens``, and a batch that has one for every group of GPUs."""
    row, context = values["row_tokens"], values.get("context") or 1
    gpus = values.get("gpus") or (values.get("nodes") or 1) * values["gpu"]["per_node"]
    numbers = row, context, gpus, *(stage.get(key, 0) for key in ("tokens", "batch_tokens", "warmup_steps"))
    if not all(type(number) is int and number >= 0 for number in numbers) or not row:
        return stage  # what is no number is refused where types are checked
    step = row * max(1, gpus // context)
    batch = -(-stage["batch_tokens"] // step) * step
    changed = {"sequence_length": row, "batch_tokens": batch, "batch_tokens_start": None, "batch_ramp_tokens": 0}
    return stage | changed | {"tokens": max(stage["tokens"], batch * max(1, stage.get("warmup_steps", 0)))}
