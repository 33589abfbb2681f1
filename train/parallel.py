"""Many processes on one model: which one this is, its groups, and what the processes do together.

DeepSpeed is the engine: it joins the processes, makes the groups of experts, runs backward passes and steps, and, where
AdamW trains alone, may partition its state (ZeRO). Ours are the way of tokens to experts (`ExpertDispatcher`), the
owners of parameters (`optim/ownership.py`, `optim/exchange.py`) and checkpoints. A run of one process is `Alone`, and
imports none of it.

Consecutive processes hold different experts (an expert-parallel group) and share rows (a context-parallel group).
Losses are sums over a process's own tokens, divided by counts of all; so gradients are sums over processes.
Shapes: M tokens of a process, K experts per token, D hidden, E experts, R rows that a process gets for its experts.
"""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ..kernels.norm import at_least_fp32
from ..kernels.router import expert_load
from ..model.config import LoRAConfig
from ..model.lora import lora_parameters, peft_files
from ..model.memory import Layout
from ..model.moe import Experts, MoE
from ..model.released import checkpoint_tensors, first_expert
from ..model.transformer import Transformer
from ..optim.config import OptimConfig
from ..optim.exchange import Exchange
from ..optim.groups import MUON_GROUPS, GroupRow, Optimizers, build_optimizers, group_of
from ..optim.ownership import Item, Ownership, assign
from .checkpoint import TrainState, split_experts
from .checkpoint_writer import Snapshot, whole_snapshot
from .config import ConfigError, ParallelConfig, StoppedElsewhere, TrainConfig
from .planning import Placement, why_impossible

T = TypeVar("T")


class Alone:
    """One process, which is all of them.

    Attributes:
        steps: of the optimizer that the run has done, for what must be random anew in each and the same when repeated.
    """

    rank, world, expert, context = 0, 1, 1, 1
    steps = 0

    @property
    def replicas(self) -> int:
        """Groups of processes that have rows of their own."""
        return self.world // self.context

    @property
    def replica(self) -> int:
        return self.rank // self.context

    @property
    def first(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        return numbers

    def largest(self, numbers: Tensor) -> Tensor:
        """The maximum over all processes."""
        return numbers

    def any(self, mark: object) -> bool:
        """Whether ``mark`` is true in any process."""
        return bool(mark)

    def agree(self, text: str) -> str:
        """The first text that is not empty, of those that the processes give, in the order of their ranks."""
        return text

    def first_does(self, function: Callable[[], T]) -> T | None:
        """What ``function`` returns in the first process; the others wait for it, and get None.

        Raises:
            StoppedElsewhere: in the others, if it failed.
        """
        return function()

    def table(self, optimizers: Optimizers) -> list[GroupRow]:
        """What goes to which optimizer, of the whole model."""
        return optimizers.table()

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)``, which begins with a forward pass."""
        return function(*arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        """``last``: of the step, so that complete gradients may leave."""
        loss.backward()

    def step(self, optimizers: Optimizers, lr: float, found_inf: Tensor) -> None:
        """The update of weights."""
        optimizers.step(lr, found_inf)

    def optimizers(self, model: Transformer, config: OptimConfig) -> Optimizers:
        return build_optimizers(model.named_parameters(), model.row_splits(), config)

    def spread(self, model: Transformer) -> None:
        """Leaves to this process its own experts."""

    def held(self, model: Transformer, optimizers: Optimizers) -> dict[str, range | None]:
        """The parameters of ``optimizers``, and the global numbers of the experts that each stacks."""
        return {name: _numbers(model, name, 0, p) for name, p in optimizers.parameters.items()}

    def snapshot(
        self, model: Transformer, optimizers: Optimizers, state: TrainState, adapter: tuple[LoRAConfig, str] | None
    ) -> Snapshot:
        """What this process writes of a checkpoint; ``adapter`` as for ``whole_snapshot``."""
        return whole_snapshot(model, optimizers, state, adapter)

    def close(self, error: object) -> None:
        """Parts from the other processes; after an error without waiting for them."""


ALONE = Alone()


class Together(Alone):
    """One of many processes.

    Args:
        config: how they are spread.
        device: of this process.

    Raises:
        ConfigError: the number of processes does not go with the config.
    """

    def __init__(self, config: ParallelConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        self._deepspeed = _join(config, device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.expert, self.context = config.expert, config.context
        # Marks and the like go past the device, whose work they need not wait for.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(minutes=config.timeout_minutes))
        self.ownership: Ownership | None = None
        self.dispatchers: list[ExpertDispatcher] = []
        self._experts = self._holders = dist.group.WORLD
        if self.expert > 1:
            groups = self._deepspeed.utils.groups
            name = f"ep_size_{self.expert}"
            groups._create_expert_and_data_parallel(self.expert)
            self._experts = groups._get_expert_parallel_group(name)
            self._holders = groups._get_expert_data_parallel_group(name)
        self._engine: Any = None
        self._client: _Client
        self._exchanges: list[Exchange] = []

    def total(self, numbers: Tensor) -> Tensor:
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: Tensor) -> Tensor:
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def _reduced(self, numbers: Tensor, how: Any) -> Tensor:
        result = numbers.detach().to(self.device, copy=True)
        dist.all_reduce(result, how)
        return result

    def any(self, mark: object) -> bool:
        marked = torch.tensor([bool(mark)], dtype=torch.int32)
        dist.all_reduce(marked, dist.ReduceOp.MAX, group=self._control)
        return bool(marked)

    def agree(self, text: str) -> str:
        if not self.any(text):
            return ""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = int(torch.cat(sizes).max())
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, F.pad(data, (0, longest - len(data))), group=self._control)
        found = (bytes(t[: int(size)].tolist()).decode() for t, size in zip(texts, sizes, strict=True))
        return next(text for text in found if text)

    def first_does(self, function: Callable[[], T]) -> T | None:
        result, error = None, None
        if self.first:
            try:
                result = function()
            except Exception as caught:  # raised again, once the others know
                error = caught
        failed = self.any(error)
        if error is not None:
            raise error
        if failed:
            raise StoppedElsewhere
        return result

    def table(self, optimizers: Optimizers) -> list[GroupRow]:
        assert self.ownership is not None
        return optimizers.table()

    def __str__(self) -> str:
        assert self.ownership is not None
        sizes = f"{self.world}: experts over {self.expert}, rows over {self.context}"
        return f"{sizes}; owners of parameters: {self.ownership.balance()}"

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        result: T = self._engine(function, *arguments)
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        if last:
            for index, exchange in enumerate(self._exchanges):
                exchange.watch(hash((self.seed, self.steps, self.rank, index)) % 2**63)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, optimizers: Optimizers, lr: float, found_inf: Tensor) -> None:
        self._client.update = partial(optimizers.step, lr, found_inf)
        self._engine.step()

    def spread(self, model: Transformer) -> None:
        if self.expert == 1:
            return
        for module in list(model.modules()):
            if isinstance(module, Experts):
                _keep(module, self.rank % self.expert, self.expert)
            elif isinstance(module, MoE):
                module.dispatcher = ExpertDispatcher(self._experts, model.config.n_routed_experts)
                self.dispatchers.append(module.dispatcher)

    def held(self, model: Transformer, optimizers: Optimizers) -> dict[str, range | None]:
        shards = {name: shard for exchange in self._exchanges for name, shard in exchange.shards.items()}
        return {name: _numbers(model, name, shard.first, shard.parameter) for name, shard in shards.items()}

    def snapshot(
        self, model: Transformer, optimizers: Optimizers, state: TrainState, adapter: tuple[LoRAConfig, str] | None
    ) -> Snapshot:
        held = self.held(model, optimizers)
        numbers = {name: found for name, found in held.items() if found is not None}
        states = split_experts(optimizers.state_tensors(), numbers)
        if adapter is not None:
            values = {name: self._whole(name, p.detach()) for name, p in lora_parameters(model).items()}
            settings, tensors = peft_files(model, *adapter, values)
            return Snapshot(tensors if self.first else {}, states, state, model.config, settings)
        mine = set(split_experts(dict(optimizers.parameters), numbers))
        # Buffers, and copies that a release has of a matrix, are the same in all processes.
        shared = {name for name, _ in model.named_buffers()} | set(model.origin.copies) if self.first else set()
        tensors = {name: t for name, t in checkpoint_tensors(model).items() if name in mine | shared}
        return Snapshot(tensors, states, state, model.config)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """Of a stack of experts those of all processes."""
        if self.expert == 1 or ".experts." not in name:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.expert)]
        dist.all_gather(parts, tensor.contiguous(), group=self._experts)
        return torch.cat(parts)

    def optimizers(self, model: Transformer, config: OptimConfig) -> Optimizers:
        """Optimizers of what this process owns."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.expert > 1:
            for name, parameter in trained.items():
                if ".experts." in name:  # how DeepSpeed tells an expert's parameter
                    parameter.allreduce, parameter.group_name = False, f"ep_size_{self.expert}"  # type: ignore[attr-defined]
        splits = model.row_splits()
        items = [item_of(name, p, splits, config) for name, p in trained.items()]
        self.ownership = assign(items, self.world, self.expert)
        both = (
            ({name: p for name, p in trained.items() if ".experts." not in name}, dist.group.WORLD),
            ({name: p for name, p in trained.items() if ".experts." in name}, self._holders),
        )
        # Experts are held by processes `expert` apart; an owner's place is its number among them.
        dtype = torch.bfloat16 if self.config.gradients == "bf16" else torch.float32
        self._exchanges = [
            Exchange(held, self.ownership.pieces, group, self.config.bucket_mb * 1e6, dtype) for held, group in both
        ]
        owned = {name: shard.parameter for exchange in self._exchanges for name, shard in exchange.shards.items()}
        known = {name: rows for name, rows in splits.items() if name in owned}
        optimizers = build_optimizers(owned.items(), known, config, self._exchanges, self.total)
        self._engine, self._client = _engine(self._deepspeed, model)
        return optimizers

    def close(self, error: object) -> None:
        if error is None:
            dist.barrier()  # a process that leaves early can abort those that still talk to it
            dist.destroy_process_group()


def _numbers(model: Transformer, name: str, first: int, parameter: Parameter) -> range | None:
    """Global numbers of the experts that a parameter stacks, the first of them counted within this process."""
    owner, stacked, _ = name.partition(".experts.")
    if not stacked:
        return None
    first += first_expert(model.get_submodule(f"{owner}.experts"))
    return range(first, first + len(parameter))


def item_of(name: str, parameter: Parameter, splits: Mapping[str, tuple[int, ...]], config: OptimConfig) -> Item:
    """What `optim.ownership` needs to know of a parameter."""
    shape = tuple(parameter.shape)
    muon = config.matrices == "muon" and group_of(name, parameter.ndim) in MUON_GROUPS
    return Item(name, shape, splits.get(name, shape[-2:-1]) if muon else ())


def start(config: TrainConfig, device: torch.device) -> Alone:
    """Joins the other processes of the run, if a launcher has started several.

    Raises:
        ConfigError: their number does not go with the config.
    """
    world = int(os.environ["WORLD_SIZE"]) if launched() else 1
    check_layout(config, world)
    return Alone() if world == 1 else Together(config.parallel, config.seed, device)


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, srun, ourselves) has started this process as one of several."""
    _from_slurm(os.environ)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_layout(config: TrainConfig, world: int) -> None:
    """Refuses what cannot be spread over so many processes, before anything is allocated.

    Raises:
        ConfigError: with the reason.
    """
    parallel = config.parallel
    for key in ("expert", "context"):
        if world % getattr(parallel, key):
            raise ConfigError(
                f"parallel.{key}={getattr(parallel, key)} does not divide the run's {world} "
                f"process{'es' if world > 1 else ''}; start a multiple of it (parallel.nproc=, torchrun, deepspeed or "
                "srun), or lower it"
            )
    layout = Layout(world, parallel.expert, parallel.context)
    for stage in config.stages:
        if reason := why_impossible(config, stage, Placement(layout, 1, config.recompute)):
            raise ConfigError(f"stages: {stage.name!r} cannot run on {world} processes: {reason}")


def _from_slurm(environment: Any) -> None:
    """What torch and DeepSpeed want to know, where ``srun`` has started one task for each process."""
    tasks = int(environment.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in environment else 1
    if "RANK" in environment or tasks == 1:
        return
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(tasks)
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


def _join(config: ParallelConfig, device: torch.device) -> Any:
    """DeepSpeed, with the process group made."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # A shared-memory sum for inference on CPUs, compiled for half a minute at every first start; nothing here sums so.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=config.timeout_minutes),
        verbose=False,
    )
    return deepspeed


class _Function(nn.Module):
    """What DeepSpeed's engine runs: any function of the model."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class _Client(torch.optim.Optimizer):
    """The optimizer that DeepSpeed's engine steps: ours, whose state is with the owners of parameters."""

    update: Callable[[], None]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.update()


def _engine(deepspeed: Any, model: Transformer) -> tuple[Any, _Client]:
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**12,
    }
    dense, experts = ([p for p in trained if getattr(p, "allreduce", True) is each] for each in (True, False))
    client = _Client([{"params": params} for params in (dense, experts) if params], {})
    engine, *_ = deepspeed.initialize(model=_Function(model), optimizer=client, config=config)
    engine.enable_backward_allreduce = False  # gradients go to their owners
    assert engine.has_moe_layers or not experts  # else it would add up gradients of different experts
    return engine, client


# Experts.


def _keep(experts: Experts, place: int, expert: int) -> None:
    """Leaves the process at ``place`` of an expert-parallel group its share, and tells DeepSpeed."""
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    class SpreadExperts(Experts, DeepSpeedMoE):
        """DeepSpeed knows a layer of experts by its class."""

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are there already."""

    total = len(experts.w1)
    count = total // expert
    experts.first = place * count
    for name, parameter in list(experts.named_parameters()):
        kept = Parameter(parameter.detach()[experts.first : experts.first + count].clone(), parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        experts.get_submodule(owner).register_parameter(leaf, kept)
    for name, buffer in list(experts.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        experts.get_submodule(owner).register_buffer(leaf, buffer[experts.first : experts.first + count].clone())
    experts.__class__ = SpreadExperts
    experts.num_experts, experts.num_local_experts, experts.ep_size = total, count, expert  # type: ignore[assignment]
    experts.expert_group_name = f"ep_size_{expert}"  # type: ignore[assignment]


class ExpertDispatcher:
    """Sends every copy of a token to the process that has its expert, and what comes of it back; nothing is dropped,
    nothing padded, and a process may get no token at all.

    Copies leave sorted by expert, and in the order of tokens within one, so that counts tell what they are. The sum
    over a token's experts is made where the token is, in the order in which it chose them, as in one process.

    Attributes:
        sent: bytes that this process has sent so far, by what they were: ``tokens`` (to experts, and their gradients)
            and ``results`` (back, and their gradients).
    """

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        self._group, self._experts = group, experts
        self.sent = {"tokens": 0, "results": 0}

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> "_Sent":
        size = dist.get_world_size(self._group)
        order = ids.flatten().argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device)
        counts = expert_load(ids, self._experts)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self._group)
        outgoing, incoming = torch.stack((counts, theirs)).view(2, size, -1).sum(2).tolist()
        there = _Journey(self._group, outgoing, incoming, self.sent, "tokens")
        rows = _Copies.apply(x, order // ids.shape[1], slot.view_as(ids))
        scales = weights.flatten()[order].unsqueeze(1)
        return _Sent(there, *_Departure.apply(there, rows, scales), theirs, slot.view_as(ids), order // ids.shape[1])

    def finish(self, sent: "_Sent", experts: Experts) -> tuple[Tensor, Tensor]:
        there = sent.journey
        rows, scales = _Arrival.apply(there, sent.rows, sent.scales)
        size = dist.get_world_size(self._group)
        local = torch.arange(self._experts // size, device=rows.device).repeat(size)
        ids = local.repeat_interleave(sent.counts, output_size=len(rows)).unsqueeze(1)
        made, clamped = experts(rows, ids, scales)
        back = _Journey(self._group, there.incoming, there.outgoing, self.sent, "results")
        # Experts compute in the dtype of their tokens, so nothing is lost on the way.
        results = _Return.apply(back, made.to(rows.dtype))
        return _Sum.apply(results, sent.source, sent.slot), clamped


class _Journey:
    """One exchange of rows within a group, and its way back in the backward pass."""

    def __init__(
        self, group: dist.ProcessGroup, outgoing: list[int], incoming: list[int], sent: dict[str, int], kind: str
    ) -> None:
        self.group, self.outgoing, self.incoming = group, outgoing, incoming
        self._sent, self._kind = sent, kind
        self._here = dist.get_rank(group)
        self.pending: list[tuple[Any, Tensor, Tensor]] = []

    def go(self, *tensors: Tensor, back: bool = False) -> tuple[Tensor, ...]:
        """Sends rows; what comes in is there after ``wait``."""
        outgoing, incoming = (self.incoming, self.outgoing) if back else (self.outgoing, self.incoming)
        received = []
        for rows in tensors:
            rows = rows.contiguous()
            new = rows.new_empty(sum(incoming), *rows.shape[1:])
            work = dist.all_to_all_single(new, rows, incoming, outgoing, group=self.group, async_op=True)
            self._sent[self._kind] += (len(rows) - outgoing[self._here]) * rows[:1].numel() * rows.element_size()
            self.pending.append((work, rows, new))  # what travels must not be freed
            received.append(new)
        return tuple(received)

    def wait(self) -> tuple[Tensor, ...]:
        """What has come in."""
        received = []
        for work, _, new in self.pending:
            work.wait()
            received.append(new)
        self.pending = []
        return tuple(received)


class _Sent(NamedTuple):
    journey: _Journey
    rows: Tensor  # [R, D], being received
    scales: Tensor  # [R, 1], likewise
    counts: Tensor  # [E] rows from each process for each expert that is here, process by process
    slot: Tensor  # [M, K] place of a token's copies among the rows that left
    source: Tensor  # [M K] token of each of them


class _Departure(torch.autograd.Function):
    """Rows on their way. What is computed until ``_Arrival`` is computed meanwhile, forward and backward: there the
    gradients leave at ``_Arrival`` and are waited for here."""

    @staticmethod
    def forward(ctx: Any, journey: _Journey, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.journey = journey
        return journey.go(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.journey.wait()


class _Arrival(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: _Journey, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.journey = journey
        journey.wait()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.journey.go(*gradients, back=True)
        return None, *gradients  # in their place; what comes in has other sizes, and goes past autograd


class _Return(torch.autograd.Function):
    """Rows there and, backward, back, waited for at once."""

    @staticmethod
    def forward(ctx: Any, journey: _Journey, rows: Tensor) -> Tensor:
        ctx.journey = journey
        journey.go(rows)
        (received,) = journey.wait()
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.journey.go(gradient, back=True)
        return None, *ctx.journey.wait()


class _Copies(torch.autograd.Function):
    """``[M, D]`` to the copies ``[M K, D]`` of which ``source [M K]`` tells the token, ``slot [M, K]`` the place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        return F.embedding_bag(slot, at_least_fp32(gradient), mode="sum").to(gradient.dtype), None, None


class _Sum(torch.autograd.Function):
    """The other way: the sum over a token's copies, ``[M, D]``, at least float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        ctx.dtype = rows.dtype
        return F.embedding_bag(slot, at_least_fp32(rows), mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return gradient.to(ctx.dtype).index_select(0, source), None, None
