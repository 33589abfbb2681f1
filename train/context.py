"""Context parallelism: what processes that share rows send each other (recipe 10; ``model/context.py`` says when).

A part gets its halo from the part before, every part the compressed entries of all. Each sum of gradients is taken by
the one that owns the tokens, in float32 and in the order of parts: the same bits on every run, whatever the backend.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.norm import at_least_fp32


class ContextGroup:
    """``model.context.Neighbours`` over a process group whose ranks have consecutive parts of each row.

    Attributes:
        rank, size: this process's part, and how many there are.
        sent: bytes that this process has sent so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.sent = group, 0
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def before(self, rows: Tensor, count: int) -> Tensor:
        """The last ``count`` tokens of the part before, ``[B, count, C]``; zeros before the first part."""
        last = rows[:, rows.shape[1] - count :]
        halo: Tensor = _Before.apply(last, self) if count else last  # type: ignore[no-untyped-call]
        return halo

    def gather(self, rows: Tensor) -> Tensor:
        """``rows`` of all parts, ``[size, *rows.shape]``."""
        everywhere: Tensor = _Gather.apply(rows, self)  # type: ignore[no-untyped-call]
        return everywhere

    def shift(self, rows: Tensor, step: int) -> Tensor:
        """What the process ``step`` parts before sends to this one, as this one sends to the one ``step`` after; 0 from
        nobody."""
        received = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        transfers = []
        if 0 <= self.rank + step < self.size:
            to = dist.get_global_rank(self.group, self.rank + step)
            transfers.append(dist.P2POp(dist.isend, rows.contiguous(), to, self.group))
            self.sent += rows.nbytes
        if 0 <= self.rank - step < self.size:
            source = dist.get_global_rank(self.group, self.rank - step)
            transfers.append(dist.P2POp(dist.irecv, received, source, self.group))
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()
        return received


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor, context: ContextGroup) -> Tensor:
        ctx.context = context
        return context.shift(last, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.context.shift(gradient, -1), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, context: ContextGroup) -> Tensor:
        ctx.context = context
        everywhere = rows.new_empty(context.size, *rows.shape)
        dist.all_gather(list(everywhere.unbind()), rows.contiguous(), context.group)
        context.sent += (context.size - 1) * rows.nbytes
        return everywhere

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        context, gradient = ctx.context, gradient.contiguous()
        received = torch.empty_like(gradient)  # [size, ...] what each process adds to the gradient of these rows
        dist.all_to_all_single(received, gradient, group=context.group)
        context.sent += gradient.nbytes // context.size * (context.size - 1)
        total = at_least_fp32(received[0]).clone()
        for part in received[1:]:
            total += part
        return total.to(gradient.dtype), None
