"""What a run would cost on a cluster: memory of each GPU, time of a step, communication, GPU-hours; all calculated.

Nothing is built and torch is not imported. Rates are those of the GPU (``conf/gpu``) times the shares of them that a
step is assumed to reach (``Shares``); the command prints both. Nothing is assumed to overlap but what ``overlap`` says.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..model.accounting import count_parameters, training_flops, training_flops_per_token
from ..model.config import AttentionMode, ModelConfig, Recompute
from ..model.memory import Layout, MemoryItem, training_memory
from ..model.shapes import Shape, logical_rows, tensor_shapes
from ..optim.ownership import newton_schulz_flops
from ..optim.schedule import Schedule, Stage
from .cluster import Cluster, GpuConfig, Shares
from .config import ConfigError, TrainConfig, run_config
from .metrics import read_metrics

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
# How far a search goes: tokens of a micro-batch on a GPU, and doublings of the number of GPUs.
MICRO_TOKENS, MOST_DOUBLINGS = 65536, 10


@dataclass(frozen=True)
class Placement:
    """How a stage is spread over the GPUs, and in what portions it is computed.

    Attributes:
        layout: GPUs, expert-parallel and context-parallel size.
        rows: rows of a micro-batch, of each context-parallel group.
        recompute: what the backward pass computes again.
    """

    layout: Layout
    rows: int
    recompute: Recompute

    @property
    def replicas(self) -> int:
        """Groups that work on rows of their own: the data-parallel size."""
        return self.layout.gpus // self.layout.context

    @property
    def short(self) -> str:
        return f"{self.layout.expert} / {self.layout.context} / {self.recompute} / {self.rows}"

    def __str__(self) -> str:
        sizes = f"expert={self.layout.expert} context={self.layout.context}"
        return f"{sizes} recompute={self.recompute} micro_rows={self.rows}"


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a step: bytes that each GPU sends."""

    name: str
    link: float  # to GPUs of its node
    network: float  # to those of other nodes
    how: str


@dataclass(frozen=True)
class StagePlan:
    """One stage on a cluster. Times are seconds of a step at its full batch; memory is that of each GPU."""

    stage: Stage
    steps: int
    placement: Placement
    memory: tuple[MemoryItem, ...]
    capacity: float
    micro_batches: int
    compute: dict[str, float]  # seconds by kind of work
    communication: float  # seconds that are not hidden
    update: float  # seconds of the optimizer
    traffic: tuple[Traffic, ...]
    flops_per_token: float
    tokens: int
    step_tokens: int
    seconds: float  # of the whole stage

    @property
    def bytes(self) -> float:
        return sum(item.bytes for item in self.memory)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.capacity

    @property
    def step_seconds(self) -> float:
        return sum(self.compute.values()) + self.communication + self.update

    @property
    def tokens_per_second(self) -> float:
        return self.step_tokens / self.step_seconds

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.placement.layout.gpus / 3600


def rows_per_step(stage: Stage) -> int:
    """Rows of a full batch."""
    return stage.batch_tokens // stage.sequence_length


def why_impossible(run: TrainConfig, stage: Stage, placement: Placement) -> str | None:
    """What makes a placement contradict the model or the stage, in one line; None if nothing does. Memory aside."""
    layout, rows = placement.layout, rows_per_step(stage)
    if reason := why_indivisible(run, stage, layout):
        return reason
    if rows < placement.replicas:
        return (
            f"a step has {rows} rows of {stage.sequence_length:,} tokens for {placement.replicas} groups of GPUs: "
            f"some would have none; use at most {rows * layout.context} GPUs, a larger batch or context parallelism"
        )
    return None


def why_indivisible(run: TrainConfig, stage: Stage, layout: Layout) -> str | None:
    """What of experts or rows cannot be spread as the layout says, in one line; None if nothing."""
    if run.model.n_routed_experts % layout.expert:
        return f"expert={layout.expert} does not divide the {run.model.n_routed_experts} routed experts"
    if stage.sequence_length % layout.context:
        return f"context={layout.context} does not divide rows of {stage.sequence_length:,} tokens"
    block = run.model.shortest_part
    part = stage.sequence_length // layout.context
    if layout.context > 1 and part < block:
        return f"context={layout.context} leaves {part} tokens of a row to each GPU, a block or window has {block}"
    return None


def plan_stage(run: TrainConfig, stage: Stage, steps: int, cluster: Cluster, placement: Placement) -> StagePlan:
    """One stage as it would go with a placement.

    Raises:
        ConfigError: the placement contradicts the model, the stage or the cluster.
    """
    if reason := why_impossible(run, stage, placement):
        raise ConfigError(f"stage {stage.name!r} is impossible: {reason}")
    cluster = cluster.computing(stage.compute)
    micro_batches = math.ceil(rows_per_step(stage) / (placement.replicas * placement.rows))
    tokens = placement.rows * stage.sequence_length / placement.layout.context  # of a GPU, in a micro-batch
    compute = {name: micro_batches * value for name, value in _compute(run, stage, cluster, placement, tokens).items()}
    traffic = tuple(_traffic(run, stage, cluster, placement, tokens, micro_batches))
    sent = max(
        sum(t.link for t in traffic) / (cluster.gpu.link_gb_s * 1e9),
        sum(t.network for t in traffic) / (cluster.gpu.network_gb_s * 1e9),
    )
    exposed = sent / cluster.shares.network * (1 - cluster.shares.overlap)
    update = _update(run, stage, cluster)
    step_tokens = rows_per_step(stage) * stage.sequence_length
    return StagePlan(
        stage=stage,
        steps=steps,
        placement=placement,
        memory=stage_memory(run, stage, cluster, placement),
        capacity=cluster.capacity,
        micro_batches=micro_batches,
        compute=compute,
        communication=exposed,
        update=update,
        traffic=traffic,
        flops_per_token=training_flops_per_token(
            run.model, stage.sequence_length, stage.attention, **_flop_options(run, stage)
        ),
        tokens=stage.tokens,
        step_tokens=step_tokens,
        # Smaller batches of a ramp take as long per token, but each step has its update.
        seconds=stage.tokens / step_tokens * (sum(compute.values()) + exposed) + steps * update,
    )


def stage_memory(run: TrainConfig, stage: Stage, cluster: Cluster, placement: Placement) -> tuple[MemoryItem, ...]:
    return _memory(
        run.model,
        placement.layout,
        rows=placement.rows,
        length=stage.sequence_length,
        attention=stage.attention,
        compute=stage.compute or cluster.compute,
        streams=run.precision.streams,
        recompute=placement.recompute,
        matrices=run.optim.matrices,
        mtp=stage.mtp_weight > 0 and stage.attention != "indexer_warmup",
        indexer=stage.indexer_weight > 0 and stage.attention == "sparse",
        micro_batches=min(2, math.ceil(rows_per_step(stage) / (placement.replicas * placement.rows))),
        lora=run.lora,
        base=run.precision.base,
        device=cluster.gpu.kind,
        threads=run.threads,
    )


def stage_bytes(run: TrainConfig, stage: Stage, cluster: Cluster, placement: Placement) -> float:
    return sum(item.bytes for item in stage_memory(run, stage, cluster, placement))


@functools.cache
def _memory(*arguments: Any, **options: Any) -> tuple[MemoryItem, ...]:
    try:
        return tuple(training_memory(*arguments, **options))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _flop_options(run: TrainConfig, stage: Stage) -> dict[str, Any]:
    return {
        "mtp": stage.mtp_weight > 0,
        "indexer_loss": stage.indexer_weight > 0 and stage.attention == "sparse",
        "lora": run.lora,
    }


_NAMES = {
    "projection": "linear maps",
    "expert": "routed experts",
    "core": "attention",
    "index": "indexer",
    "fp32": "router, compressors, mHC",
    "head": "output head",
    "adapter": "adapters",
}


def _compute(run: TrainConfig, stage: Stage, cluster: Cluster, placement: Placement, tokens: float) -> dict[str, float]:
    """Seconds of a micro-batch on a GPU, by kind of work."""
    c, bandwidth = run.model, cluster.gpu.bandwidth_tb_s * 1e12 * cluster.shares.bandwidth
    warmup = stage.attention == "indexer_warmup"
    seconds = dict.fromkeys(_NAMES.values(), 0.0)
    options = _flop_options(run, stage)
    for work in training_flops(c, stage.sequence_length, stage.attention, recompute=placement.recompute, **options):
        seconds[_NAMES[work.kind]] += tokens * work.total / cluster.rate(work.kind)
    width = 4 if cluster.compute == "fp32" else 2
    # Few tokens per expert: then reading the experts' weights takes longer than multiplying by them. Forward and
    # backward read them once each, and gradients are added to float32 sums.
    local = sum(s.numel for s in tensor_shapes(c) if s.part == "routed experts") / placement.layout.expert
    passes = 1 if warmup else 2 + (placement.recompute == "full")
    traffic = local * (passes * width + (0 if run.lora or warmup else 8))
    seconds["routed experts"] = max(seconds["routed experts"], traffic / bandwidth)
    # mHC moves streams: read and written forward, with their gradients backward; 2.5 and 3.75 passes when the mixing of
    # one site is fused with the collapse of the next.
    sites = 2 * _blocks(c, stage)
    passes_of_streams = 2.5 if warmup else 6.25 + 2.5 * (placement.recompute != "none")
    seconds["streams of mHC"] = sites * tokens * c.hc_mult * c.hidden_size * width * passes_of_streams / bandwidth
    return seconds


def _blocks(config: ModelConfig, stage: Stage) -> int:
    """Blocks that a token passes through."""
    mtp = stage.mtp_weight > 0 and stage.attention != "indexer_warmup"
    return config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)


def _trained(run: TrainConfig, stage: Stage) -> list[Shape]:
    """The model's parameters that the stage changes."""
    if run.lora is not None:
        return []
    warmup = stage.attention == "indexer_warmup"
    return [s for s in tensor_shapes(run.model) if s.trained and (s.part == "indexer" or not warmup)]


def _traffic(
    run: TrainConfig, stage: Stage, cluster: Cluster, placement: Placement, tokens: float, micro_batches: int
) -> Iterator[Traffic]:
    """What each GPU sends in a step."""
    c, layout, per_node = run.model, placement.layout, cluster.gpu.per_node
    warmup, blocks = stage.attention == "indexer_warmup", _blocks(run.model, stage)

    def spread(group: int, bytes: float, stride: int = 1) -> tuple[float, float]:
        """What goes to the members of a group, evenly, by where they are; ``stride`` from one to the next."""
        near = max(1, min(group, per_node // stride))
        return bytes * (near - 1) / group, bytes * (group - near) / group

    width = 4 if cluster.compute == "fp32" else 2
    dispatch = 1 if cluster.compute in ("fp8", "fp4_qat") else width
    if layout.expert > 1:
        ways = 1 if warmup else 2 + (placement.recompute == "full")  # forward, backward, replay
        copies = micro_batches * blocks * tokens * c.num_experts_per_tok
        how = f"{micro_batches} micro-batches x {blocks} blocks x tokens x K D x ({dispatch} + {width} bytes) x {ways}"
        yield Traffic(
            "tokens to experts and back",
            *spread(layout.expert, copies * c.hidden_size * ways * (dispatch + width)),
            how,
        )
    if layout.context > 1:
        part, others = stage.sequence_length // layout.context, layout.context - 1
        replay, trains = placement.recompute != "none", stage.indexer_weight > 0
        exchanges = context_exchanges(c, blocks, placement.rows, part, width, stage.attention, trains, replay)
        sent = micro_batches * sum((e.halo + others * e.entries) * (e.forward + e.backward) for e in exchanges)
        near = (min(layout.context, per_node) - 1) / others
        how = "every entry to the other ranks of its row, the last window to the next; gradients back"
        yield Traffic("compressed entries, windows", sent * near, sent * (1 - near), how)
    group = layout.gpus // layout.expert
    # Float32 gradients to the owner; from it what is multiplied with.
    sizes = [(s, s.numel * (4 + (width if s.quantized else 4))) for s in _trained(run, stage)]
    dense = sum(size for s, size in sizes if s.copies == 1)
    experts = sum(size for s, size in sizes if s.copies > 1) / layout.expert
    how = f"float32 gradients to the owner, new weights from it: {4 + width} bytes each"
    if dense and layout.gpus > 1:
        rest = "" if width == 4 else ", 8 of embedding, head and what else is float32"
        yield Traffic("dense gradients and weights", *spread(layout.gpus, dense), how + rest)
    if experts and group > 1:
        yield Traffic("experts' gradients and weights", *spread(group, experts, layout.expert), how)


class Exchange(NamedTuple):
    """What processes that share rows send for one purpose: bytes that each sends, and how often in a micro-batch."""

    halo: int  # to the part after; its gradient goes to the part before
    entries: int  # to each of the other parts, and so does the gradient of what these have sent
    forward: int  # replays included
    backward: int


def context_exchanges(
    config: ModelConfig,
    blocks: int,
    rows: int,
    part: int,
    width: int,
    attention: AttentionMode,
    indexer: bool,
    replay: bool,
) -> Iterator[Exchange]:
    """Of each of the first ``blocks`` blocks, parts of ``part`` tokens of ``rows`` rows each (recipe 10).

    Args:
        width: bytes of a number in activations; compressors pool in float32 or wider.
        indexer: its loss is computed; the warm-up computes it in any case.
        replay: the backward pass computes blocks again.
    """
    c, warmup = config, attention == "indexer_warmup"
    forward, learns = 1 + (replay and not warmup), indexer or warmup
    for layer, (kind, ratio) in enumerate(zip(c.kinds[:blocks], c.compress_ratios[:blocks], strict=True)):
        yield Exchange(rows * (c.sliding_window - 1) * c.head_dim * width, 0, forward, int(not warmup))
        halves = 1 + (kind == "csa")  # what overlapping blocks give to the next one and to their own
        dims = [(c.head_dim, not warmup)] if ratio else []
        if kind == "csa" and (attention == "sparse" or learns):
            dims.append((c.index_head_dim, learns))
        for dim, trained in dims:
            halo = rows * (halves * ratio - 1) * 2 * halves * dim * max(width, 4)  # values and gates
            yield Exchange(halo, rows * math.ceil(part / ratio) * dim * width, forward, int(trained))
        if layer >= c.num_hash_layers:  # balance statistics of the documents at both ends, int64
            yield Exchange(0, rows * 2 * (c.n_routed_experts + 1) * 8, 1, 0)


def _update(run: TrainConfig, stage: Stage, cluster: Cluster) -> float:
    """Seconds of the optimizer: Muon's products in float32, each matrix on its owner, and passes over the state."""
    trained = _trained(run, stage)
    flops = sum(muon_flops(s, run.model) for s in trained) if run.optim.matrices == "muon" else 0.0
    products = flops / cluster.gpus / (cluster.gpu.fp32_tflops * 1e12 * cluster.shares.matmul)
    owned = 24 * sum(s.numel for s in trained) / cluster.gpus  # gradient, momentum and weight read and written
    return products + owned / (cluster.gpu.bandwidth_tb_s * 1e12 * cluster.shares.bandwidth)


def muon_flops(shape: Shape, config: ModelConfig) -> float:
    """Operations of ten Newton-Schulz iterations on all matrices of an entry, as ``optim.muon`` does them."""
    if not shape.matrix:
        return 0.0
    return shape.copies * sum(newton_schulz_flops(rows, shape.shape[1]) for rows in logical_rows(shape, config))


def placements(run: TrainConfig, stage: Stage, gpus: int) -> Iterator[Placement]:
    """Every placement of a stage by powers of two that contradicts nothing, memory aside."""
    for expert in powers_of_two(math.gcd(gpus, run.model.n_routed_experts)):
        for context in powers_of_two(math.gcd(gpus, stage.sequence_length)):
            each = math.ceil(rows_per_step(stage) * context / gpus)
            most = max(1, min(each, MICRO_TOKENS * context // stage.sequence_length))
            for recompute in RECOMPUTE:
                for rows in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):
                    placement = Placement(Layout(gpus, expert, context), rows, recompute)
                    if why_impossible(run, stage, placement) is None:
                        yield placement


def powers_of_two(number: int) -> list[int]:
    """The powers of two that divide it, from 1 on."""
    return [2**i for i in range(number.bit_length()) if number % 2**i == 0]


class Fitting:
    """Whether placements of a stage fit; what needs more than one that did not is not calculated."""

    def __init__(self, run: TrainConfig, stage: Stage, cluster: Cluster) -> None:
        self.run, self.stage, self.cluster = run, stage, cluster
        self._failed: list[Placement] = []

    def __call__(self, placement: Placement) -> bool:
        if any(_needs_more(placement, failed) for failed in self._failed):
            return False
        if stage_bytes(self.run, self.stage, self.cluster, placement) <= self.cluster.capacity:
            return True
        self._failed.append(placement)
        return False


def _needs_more(one: Placement, other: Placement) -> bool:
    return (
        one.layout.gpus <= other.layout.gpus
        and one.layout.expert <= other.layout.expert
        and one.layout.context <= other.layout.context
        and one.rows >= other.rows
        and RECOMPUTE.index(one.recompute) <= RECOMPUTE.index(other.recompute)
    )


def search(run: TrainConfig, stage: Stage, steps: int, cluster: Cluster) -> list[StagePlan]:
    """Placements of a stage that fit, fastest first; of those that differ in rows alone, the largest that fits."""
    largest: dict[tuple[Layout, Recompute], Placement] = {}
    fits = Fitting(run, stage, cluster)
    # What spreads most comes first, and rows from the fewest on: what does not fit then rules out most of the rest.
    for placement in sorted(placements(run, stage, cluster.gpus), key=_leanness, reverse=True):
        if fits(placement):
            largest[placement.layout, placement.recompute] = placement
    found = [plan_stage(run, stage, steps, cluster, placement) for placement in largest.values()]
    return sorted(found, key=lambda plan: plan.seconds)


def _leanness(p: Placement) -> tuple[int, int, int, int]:
    return RECOMPUTE.index(p.recompute), p.layout.expert, p.layout.context, -p.rows


def _leanest(run: TrainConfig, stage: Stage, gpus: int) -> Placement | None:
    """The placement that spreads most and keeps least, if so many GPUs have one at all."""
    expert = powers_of_two(math.gcd(gpus, run.model.n_routed_experts))[-1]
    spread = (
        Layout(gpus, expert, context) for context in reversed(powers_of_two(math.gcd(gpus, stage.sequence_length)))
    )
    found = (Placement(layout, 1, "full") for layout in spread)
    return next((placement for placement in found if why_impossible(run, stage, placement) is None), None)


def nearest(run: TrainConfig, stage: Stage, steps: int, cluster: Cluster, wanted: Placement) -> StagePlan:
    """The placement that fits and differs least from ``wanted``: here, else on twice the GPUs, and so on.

    Where none fits, that which needs least, on the most GPUs.
    """

    def distance(p: Placement) -> float:
        return (
            2 * abs(RECOMPUTE.index(p.recompute) - RECOMPUTE.index(wanted.recompute))
            + abs(math.log2(p.layout.expert / wanted.layout.expert))
            + 2 * abs(math.log2(p.layout.context / wanted.layout.context))
            + abs(math.log2(p.rows / wanted.rows))
        )

    sizes = [replace(cluster, gpus=cluster.gpus * 2**doublings) for doublings in range(MOST_DOUBLINGS + 1)]
    leanest = {size: placement for size in sizes if (placement := _leanest(run, stage, size.gpus)) is not None}
    largest = max(leanest, key=lambda size: size.gpus, default=cluster)
    leanest.setdefault(largest, wanted)
    if not Fitting(run, stage, largest)(leanest[largest]):  # then nothing does
        return plan_stage(run, stage, steps, largest, leanest[largest])
    fitting = ((size, Fitting(run, stage, size)) for size in leanest)
    larger, fits = next((size, fits) for size, fits in fitting if fits(leanest[size]))
    possible = sorted(placements(run, stage, larger.gpus), key=distance)
    return plan_stage(run, stage, steps, larger, next(placement for placement in possible if fits(placement)))


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run on a cluster.

    Attributes:
        ways_out: for each stage that does not fit, what ``nearest`` found.
    """

    cluster: Cluster
    stages: tuple[StagePlan, ...]
    ways_out: dict[str, StagePlan]

    @property
    def fits(self) -> bool:
        return all(plan.fits for plan in self.stages)

    @property
    def tokens(self) -> int:
        return sum(plan.tokens for plan in self.stages)

    @property
    def seconds(self) -> float:
        return sum(plan.seconds for plan in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(plan.gpu_hours for plan in self.stages)

    def mfu(self, plan: StagePlan) -> float:
        """Useful operations over what the GPUs could do in bfloat16 (float32 where that is what they compute in)."""
        gpu = self.cluster.gpu
        peak = gpu.fp32_tflops if self.cluster.compute == "fp32" else gpu.bf16_tflops
        return plan.flops_per_token * plan.tokens_per_second / (self.cluster.gpus * peak * 1e12)


def plan_run(run: TrainConfig, cluster: Cluster, place: Callable[[Stage], Placement]) -> RunPlan:
    """Every stage with the placement that ``place`` gives it, and ways out of what does not fit."""
    try:
        steps = Schedule(run.stages).stage_steps
    except ValueError as error:
        raise ConfigError(str(error)) from None
    stages = tuple(plan_stage(run, s, n, cluster, place(s)) for s, n in zip(run.stages, steps, strict=True))
    ways_out = {p.stage.name: nearest(run, p.stage, p.steps, cluster, p.placement) for p in stages if not p.fits}
    return RunPlan(cluster, stages, ways_out)


def measured_shares(folder: Path, gpu: GpuConfig) -> Shares:
    """Shares at which a plan of a run gives the speed that was measured in it: one for everything but the network."""
    found = run_config(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    if found is None or len(rows) < 2:
        raise ConfigError(f"measured={folder}: no run with two logged steps; give a run's folder")
    run = found[1]
    last = [row for row in rows[1:] if row["train/stage"] == rows[-1]["train/stage"]] or rows[-1:]
    stage = run.stages[int(rows[-1]["train/stage"])]
    compute = stage.compute or run.precision.compute
    if compute in ("fp8", "fp4_qat") and not gpu.fp8_tflops:  # emulated at the rate of the streams' dtype
        compute, stage = run.precision.streams, replace(stage, compute=None)
    ideal = Cluster(gpu, 1, Shares(1, 1, 1, 1, 1, 0), compute)
    micro_rows = max(1, min(run.micro_batch_tokens, stage.batch_tokens) // stage.sequence_length)
    plan = plan_stage(run, stage, 1, ideal, Placement(Layout(), micro_rows, run.recompute))
    share = median(row["train/tokens_per_second"] for row in last) / plan.tokens_per_second
    if not 0 < share <= 1:
        raise ConfigError(f"measured={folder}: {share:.0%} of what {gpu.name} can do; give the GPU that it ran on")
    return Shares(share, share, share, share)


def as_json(run: TrainConfig, plan: RunPlan, proposals: dict[str, list[StagePlan]]) -> dict[str, Any]:
    """The plan for programs: bytes, seconds, tokens."""

    def brief(p: StagePlan) -> dict[str, Any]:
        layout = p.placement.layout
        return {
            "gpus": layout.gpus,
            "expert": layout.expert,
            "context": layout.context,
            "recompute": p.placement.recompute,
            "micro_rows": p.placement.rows,
            "bytes": p.bytes,
            "step_seconds": p.step_seconds,
            "seconds": p.seconds,
        }

    count = count_parameters(run.model)
    return {
        "name": run.name,
        "parameters": asdict(count),
        "cluster": asdict(plan.cluster.gpu)
        | {"gpus": plan.cluster.gpus, "compute": plan.cluster.compute, "memory_bytes": plan.cluster.capacity},
        "shares": asdict(plan.cluster.shares),
        "fits": plan.fits,
        "tokens": plan.tokens,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "stages": [
            brief(p)
            | {
                "name": p.stage.name,
                "tokens": p.tokens,
                "steps": p.steps,
                "sequence_length": p.stage.sequence_length,
                "batch_tokens": p.stage.batch_tokens,
                "attention": p.stage.attention,
                "fits": p.fits,
                "memory": [asdict(item) for item in p.memory],
                "micro_batches": p.micro_batches,
                "compute_seconds": p.compute,
                "communication_seconds": p.communication,
                "update_seconds": p.update,
                "traffic": [asdict(t) for t in p.traffic],
                "flops_per_token": p.flops_per_token,
                "tokens_per_second": p.tokens_per_second,
                "tokens_per_day": 86400 * p.tokens_per_second,
                "mfu": plan.mfu(p),
                "gpu_hours": p.gpu_hours,
                "nearest": brief(found) if (found := plan.ways_out.get(p.stage.name)) and found.fits else None,
                "proposals": [brief(proposal) for proposal in proposals.get(p.stage.name, [])],
            }
            for p in plan.stages
        ],
    }
