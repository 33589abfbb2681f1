"""Many processes on one model: which one this is, its groups, and what the processes do together.

DeepSpeed is the engine: it makes the groups of experts, runs backward passes and steps, and, where AdamW trains alone,
may partition its state (ZeRO). Ours are how processes meet (`preflight.py`), the way of tokens to experts
(`dispatch.py`), the owners of parameters (`optim/ownership.py`, `optim/exchange.py`) and checkpoints. A run of one
process is `Alone`, and imports none of DeepSpeed.

Consecutive processes hold different experts (an expert-parallel group) and share rows (a context-parallel group).
Losses are sums over a process's own tokens, divided by counts of all; so gradients are sums over processes.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.nn import Parameter

from ..model.config import LoRAConfig
from ..model.lora import lora_parameters, peft_files
from ..model.moe import Experts, MoE
from ..model.released import first_expert, released_tensors
from ..model.transformer import Transformer
from ..optim.config import OptimConfig
from ..optim.exchange import Exchange
from ..optim.groups import EXPERTS, MUON_GROUPS, GroupRow, Optimizers, build_optimizers, group_of
from ..optim.ownership import Item, Ownership, assign
from ..optim.schedule import Compute
from .checkpoint import TrainState, split_experts
from .checkpoint_writer import Snapshot, whole_snapshot
from .config import ParallelConfig, PrecisionConfig, StoppedElsewhere, TrainConfig
from .context import ContextGroup
from .dispatch import ExpertDispatcher, keep_experts, mark
from .precision import apply_precision, held_values
from .preflight import check_layout, gather_json, host_name, launched, meet, preflight
from .watchdog import Watchdog

T = TypeVar("T")


class Alone:
    """One process, which is all of them.

    Attributes:
        steps: of the optimizer that the run has done, for what must be random anew in each and the same when repeated.
        dispatchers: what brings tokens to experts, one a layer; exchanges: what brings gradients to owners.
        before_update: what many processes do before the next update of weights, besides it.
    """

    rank, world, expert, context = 0, 1, 1, 1
    steps = 0
    dispatchers: Sequence[ExpertDispatcher] = ()
    exchanges: Sequence[Exchange] = ()
    before_update: Callable[[], None] | None = None

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

    def everywhere(self, value: Any) -> list[Any]:
        """What each process gives, by rank; anything that JSON can hold."""
        return [value]

    def agree(self, text: str) -> str:
        """The first text that is not empty, of those that the processes give, in the order of their ranks."""
        return text

    def preflight(self, config: TrainConfig, fingerprint: str) -> None:
        """Compares what the processes are about to do; ``fingerprint`` is that of the data.

        Raises:
            PreflightError: they cannot train together, or not be saved.
        """
        preflight(config, self.rank, int(os.environ.get("LOCAL_RANK", "0")), self.everywhere, fingerprint)

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

    @contextmanager
    def watched(self, tell: Callable[[str, str], None]) -> Iterator[Callable[[int], None]]:
        """Within, ``tell`` is given an event where a process holds others up; returns what to call with each step."""
        yield lambda step: None

    def step(self, optimizers: Optimizers, lr: float, found_inf: Tensor) -> None:
        """The update of weights."""
        optimizers.step(lr, found_inf)

    def optimizers(self, model: Transformer, config: OptimConfig) -> Optimizers:
        return build_optimizers(model.named_parameters(), model.row_splits(), config)

    def spread(self, model: Transformer) -> None:
        """Leaves to this process its own experts, and lets it find those with whom it shares rows."""

    def held(self, model: Transformer, optimizers: Optimizers) -> dict[str, range | None]:
        """The parameters of ``optimizers``, and the global numbers of the experts that each stacks."""
        return {name: _numbers(model, name, 0, p) for name, p in optimizers.parameters.items()}

    def set_precision(self, model: Transformer, config: PrecisionConfig, compute: Compute | None = None) -> None:
        """``apply_precision``; from then on a process has of a weight what it multiplies with, and what it owns."""
        apply_precision(model, config, compute)

    @contextmanager
    def whole(self, model: Transformer) -> Iterator[None]:
        """Within, all parameters of the model have their float32 weights, which may be written to."""
        yield

    def copies(self, model: Transformer) -> Iterator[tuple[str, Tensor]]:
        """What this process has of the model's parameters and buffers, by name."""
        yield from chain(model.named_parameters(), model.named_buffers())

    def snapshot(
        self, model: Transformer, optimizers: Optimizers, state: TrainState, adapter: tuple[LoRAConfig, str] | None
    ) -> Snapshot:
        """What this process writes of a checkpoint; ``adapter`` as for ``whole_snapshot``."""
        return whole_snapshot(model, optimizers, state, adapter)

    def settle(self) -> None:
        """Waits until all new weights are in; forward passes need not, but whatever else reads weights must."""
        for exchange in self.exchanges:
            exchange.settle()

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
        self._everybody: Any = dist.group.WORLD
        self._experts: Any = self._everybody
        self._holders: Any = self._everybody
        if self.expert > 1:
            groups = self._deepspeed.utils.groups
            name = f"ep_size_{self.expert}"
            groups._create_expert_and_data_parallel(self.expert)
            self._experts = groups._get_expert_parallel_group(name)
            self._holders = groups._get_expert_data_parallel_group(name)
        self._rows: Any = None
        for low in range(0, self.world, self.context) if self.context > 1 else ():
            group = dist.new_group(list(range(low, low + self.context)))  # made by all processes, whoever is in it
            self._rows = group if low <= self.rank < low + self.context else self._rows
        self._engine: Any = None
        self._client: _Client | None = None
        self._table: list[GroupRow] = []
        self._precision: tuple[PrecisionConfig, Compute] | None = None  # as it was set last

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

    def everywhere(self, value: Any) -> list[Any]:
        return gather_json(value, group=self._control)

    def agree(self, text: str) -> str:
        if not self.any(text):
            return ""
        found: str = next(text for text in self.everywhere(text) if text)
        return found

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
        return self._table

    def __str__(self) -> str:
        sizes = f"{self.world}: experts over {self.expert}, rows over {self.context}"
        if self.ownership is None:
            return f"{sizes}; optimizer state over all by ZeRO, stage {self.config.zero}"
        return f"{sizes}; owners of parameters: {self.ownership.balance()}"

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        result: T = self._engine(function, *arguments)
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        if last:
            for index, exchange in enumerate(self.exchanges):
                exchange.watch(hash((self.seed, self.steps, self.rank, index)) % 2**63)
        # DeepSpeed reduces to means; ours is a sum.
        self._engine.backward(loss * self.world if self.config.zero else loss, scale_wrt_gas=False)

    @contextmanager
    def watched(self, tell: Callable[[str, str], None]) -> Iterator[Callable[[int], None]]:
        address, port, seconds = *_address(), 60 * self.config.hang_minutes
        store = TCPStore(address, port, is_master=False, wait_for_workers=False)  # training has its own
        with Watchdog(store, self.rank, self.world, host_name(), seconds, tell) as watchdog:
            yield watchdog.step

    def step(self, optimizers: Optimizers, lr: float, found_inf: Tensor) -> None:
        if self.before_update is not None:
            self.before_update()
        if self._client is None:
            optimizers.step(lr, found_inf)  # steps the engine
        else:
            self._client.update = partial(optimizers.step, lr, found_inf)
            self._engine.step()

    def spread(self, model: Transformer) -> None:
        if self._rows is not None:
            model.context = ContextGroup(self._rows)
        if self.expert == 1:
            return
        for module in list(model.modules()):
            if isinstance(module, Experts):
                keep_experts(module, self.rank % self.expert, self.expert)
            elif isinstance(module, MoE):
                module.dispatcher = ExpertDispatcher(self._experts, model.config.n_routed_experts)
                self.dispatchers = [*self.dispatchers, module.dispatcher]

    def held(self, model: Transformer, optimizers: Optimizers) -> dict[str, range | None]:
        if self.config.zero:
            return super().held(model, optimizers)
        shards = {name: shard for exchange in self.exchanges for name, shard in exchange.shards.items()}
        return {name: _numbers(model, name, shard.first, shard.parameter) for name, shard in shards.items()}

    def set_precision(self, model: Transformer, config: PrecisionConfig, compute: Compute | None = None) -> None:
        wanted = config, compute or config.compute
        if wanted == self._precision:  # float32 weights need not travel
            self.settle()
            return
        self._release()
        apply_precision(model, config, compute)
        self._hold(model)
        self._precision = wanted

    @contextmanager
    def whole(self, model: Transformer) -> Iterator[None]:
        held = any(exchange.held for exchange in self.exchanges)
        self._release()  # after which all weights are in
        yield
        if held:
            self._hold(model)

    def _hold(self, model: Transformer) -> None:
        makers = held_values(model)
        for exchange in self.exchanges:
            exchange.hold(makers)

    def _release(self) -> None:
        for exchange in self.exchanges:
            exchange.release()

    def copies(self, model: Transformer) -> Iterator[tuple[str, Tensor]]:
        self.settle()
        held = {name: maker.held for exchange in self.exchanges for name, maker in exchange.held.items()}
        for name, tensor in super().copies(model):
            values = held.get(name)
            yield name, tensor if values is None else values

    def snapshot(
        self, model: Transformer, optimizers: Optimizers, state: TrainState, adapter: tuple[LoRAConfig, str] | None
    ) -> Snapshot:
        self.settle()
        held = self.held(model, optimizers)
        numbers = {name: found for name, found in held.items() if found is not None}
        written = {name: p.detach() for name, p in optimizers.parameters.items() if self._writes(name)}
        mine = split_experts(written, numbers)
        states = split_experts(optimizers.state_tensors(), numbers)
        states = {name: state for name, state in states.items() if name.partition(".")[2] in mine}
        if adapter is not None:
            values = {name: self._whole(name, p.detach()) for name, p in lora_parameters(model).items()}
            settings, tensors = peft_files(model, *adapter, values)
            return Snapshot(tensors if self.first else {}, states, state, model.config, settings)
        copies = {name: mine[source].clone() for name, source in model.origin.copies.items() if source in mine}
        # Buffers are the same in all processes.
        buffers = {name for name, _ in model.named_buffers()} if self.first else ()
        shared = {name: tensor for name, tensor in released_tensors(model) if name in buffers}
        return Snapshot({**mine, **copies, **shared}, states, state, model.config)

    def _writes(self, name: str) -> bool:
        """Whether a checkpoint gets a parameter of ``optimizers`` from this process: its owner, or under ZeRO, where
        several hold it, the first of them."""
        return not self.config.zero or self.rank < (self.expert if ".experts." in name else 1)

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
        for name, parameter in model.named_parameters() if self.expert > 1 else ():
            if ".experts." in name:  # frozen ones too: DeepSpeed makes all alike that it takes for dense
                mark(parameter, self.expert)
        splits = {name: rows for name, rows in model.row_splits().items() if name in trained}
        items = [item_of(name, p, splits, config) for name, p in trained.items()]
        if self.config.zero:
            return self._zero(model, build_optimizers(trained.items(), splits, config, total=self.total))
        self.ownership = assign(items, self.world, self.expert)
        both = (
            ({name: p for name, p in trained.items() if ".experts." not in name}, self._everybody),
            ({name: p for name, p in trained.items() if ".experts." in name}, self._holders),
        )
        self._table = self._whole_model(build_optimizers(trained.items(), splits, config))
        dtype = torch.bfloat16 if self.config.gradients == "bf16" else torch.float32
        self.exchanges = [
            Exchange(held, self.ownership.pieces, group, self.config.bucket_mb * 1e6, dtype) for held, group in both
        ]
        owned = {name: shard.parameter for exchange in self.exchanges for name, shard in exchange.shards.items()}
        known = {name: rows for name, rows in splits.items() if name in owned}
        for exchange in self.exchanges:
            exchange.deliver(_callers(model))
        optimizers = build_optimizers(owned.items(), known, config, self.exchanges, self.total)
        self._client = _client_of(model)
        self._engine = _engine(self._deepspeed, model, self._client, {"stage": 0})
        return optimizers

    def _whole_model(self, optimizers: Optimizers) -> list[GroupRow]:
        """The table of optimizers of what this process holds, with all experts."""
        every = self.expert
        return [
            replace(row, matrices=row.matrices * every, parameters=row.parameters * every)
            if row.group == EXPERTS
            else row
            for row in optimizers.table()
        ]

    def _zero(self, model: Transformer, plain: Optimizers) -> Optimizers:
        from .zero import ZeroOptimizers, grouped  # imports DeepSpeed

        self._table = self._whole_model(plain)
        zero = {
            "stage": self.config.zero,
            "compute_grad_norm": False,
            "overlap_comm": False,
            "reduce_bucket_size": int(self.config.bucket_mb * 1e6 / 4),
        }
        self._engine = _engine(self._deepspeed, model, grouped(plain), zero)
        return ZeroOptimizers(plain, self._engine)

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


def _callers(model: Transformer) -> dict[nn.Module, tuple[str, ...]]:
    """Blocks, and with what begin the names of the parameters that must be there when they are called: the last layer
    answers for the MTP blocks too, parts of which are not called by their block."""
    *layers, last = model.layers
    prefixes: dict[nn.Module, tuple[str, ...]] = {block: (f"layers.{i}.",) for i, block in enumerate(layers)}
    return prefixes | {last: (f"layers.{len(layers)}.", "mtp.")}


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


def _address() -> tuple[str, int]:
    """Where the processes meet."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))


def _join(config: ParallelConfig, device: torch.device) -> Any:
    """DeepSpeed, with the process group made."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # A shared-memory sum for inference on CPUs, compiled for half a minute at every first start; nothing here sums so.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit = timedelta(minutes=config.timeout_minutes)
    if not dist.is_initialized():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(rank, world, *_address())
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    deepspeed.init_distributed(timeout=limit, verbose=False)
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


def _client_of(model: Transformer) -> _Client:
    trained = [p for p in model.parameters() if p.requires_grad]
    dense, experts = ([p for p in trained if getattr(p, "allreduce", True) is each] for each in (True, False))
    return _Client([{"params": params} for params in (dense, experts) if params], {})


def _engine(deepspeed: Any, model: Transformer, optimizer: torch.optim.Optimizer, zero: dict[str, Any]) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**12,
    }
    engine, *_ = deepspeed.initialize(model=_Function(model), optimizer=optimizer, config=config)
    if not zero["stage"]:
        engine.enable_backward_allreduce = False  # gradients go to their owners
    spread = any(not getattr(p, "allreduce", True) for p in model.parameters())
    assert engine.has_moe_layers or not spread  # else it would add up gradients of different experts
    return engine
