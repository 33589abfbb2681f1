"""Routed experts spread over processes: each keeps its share, and tokens travel to their experts and back.

DeepSpeed knows the layers and their parameters by marks (`keep_experts`, `mark`), so that what it does with gradients
is right; the way of the tokens (`ExpertDispatcher`) is ours. Shapes: M tokens of a process, K experts per token, D
hidden, E experts, R rows that a process gets for its experts.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..kernels.norm import at_least_fp32
from ..kernels.router import expert_load
from ..model.moe import Experts


def keep_experts(experts: Experts, place: int, expert: int) -> None:
    """Leaves the process at ``place`` of an expert-parallel group its share of a layer, and tells DeepSpeed."""
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    class SpreadExperts(Experts, DeepSpeedMoE):  # type: ignore[misc]
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


def mark(parameter: Parameter, expert: int) -> None:
    """Tells DeepSpeed that a parameter is of experts, which other processes of a group do not hold."""
    parameter.allreduce, parameter.group_name = False, f"ep_size_{expert}"  # type: ignore[attr-defined]


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
        rows = _Copies.apply(x, order // ids.shape[1], slot.view_as(ids))  # type: ignore[no-untyped-call]
        scales = weights.flatten()[order].unsqueeze(1)
        departed: tuple[Tensor, Tensor] = _Departure.apply(there, rows, scales)  # type: ignore[no-untyped-call]
        return _Sent(there, *departed, theirs, slot.view_as(ids), order // ids.shape[1])

    def finish(self, sent: "_Sent", experts: Experts) -> tuple[Tensor, Tensor]:
        there = sent.journey
        rows, scales = _Arrival.apply(there, sent.rows, sent.scales)  # type: ignore[no-untyped-call]
        size = dist.get_world_size(self._group)
        local = torch.arange(self._experts // size, device=rows.device).repeat(size)
        ids = local.repeat_interleave(sent.counts, output_size=len(rows)).unsqueeze(1)
        made, clamped = experts(rows, ids, scales)
        back = _Journey(self._group, there.incoming, there.outgoing, self.sent, "results")
        # Experts compute in the dtype of their tokens, so nothing is lost on the way.
        results = _Return.apply(back, made.to(rows.dtype))  # type: ignore[no-untyped-call]
        return _Sum.apply(results, sent.source, sent.slot), clamped  # type: ignore[no-untyped-call]


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
