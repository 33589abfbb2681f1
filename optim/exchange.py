"""Gradients to the owners of parameters, new weights from them: what makes `ownership` work between processes.

A parameter is held by all processes of a group. When its gradient is complete in each, they send it to its owner, who
adds the parts up in the order of the ranks, in float32: two runs are equal to the bit, and so are results on any
network. Parameters travel in buckets, from the last layer to the first, while the backward pass still works on earlier
ones. After the update the owners send the new weights back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from .ownership import Piece

# Broadcasts of new weights under way at once: as many buffers exist.
IN_FLIGHT = 4


class Exchange:
    """The parameters that the processes of one group hold alike.

    Args:
        parameters: by name, float32, in the order of the forward pass; the same in every process of the group.
        pieces: their owners, as indices in the group (``ownership.assign``).
        group: the process group; None: this process alone.
        bucket_bytes: gradients that travel together.
        dtype: in which they do. bfloat16 rounds what leaves a process stochastically, so that sums have no bias.

    Attributes:
        shards: what this process owns, by name: a parameter of its own, which shares the memory of the model's, with
            the number of the first expert in the model's parameter.
        sent: bytes that this process has sent so far: ``gradients`` and ``weights``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        pieces: Mapping[str, tuple[Piece, ...]],
        group: dist.ProcessGroup | None,
        bucket_bytes: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._parameters, self._group, self._dtype = dict(parameters), group, dtype
        self._size, self._rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
        self._pieces = {name: pieces[name] for name in parameters}
        self.shards = {
            name: Shard(Parameter(_part(parameter.detach(), piece)), piece.first)
            for name, parameter in parameters.items()
            for piece in pieces[name]
            if piece.owner == self._rank
        }
        self.sent = {"gradients": 0, "weights": 0}
        self._buckets = list(_buckets(self._parameters, bucket_bytes))
        self._expected: set[str] = set()  # what had a gradient in the last step
        self._watched = False
        self._ready: set[str] = set()
        self._under_way: list[_Bucket] = []
        self._generator = torch.Generator(next((p.device for p in parameters.values()), None))
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._arrived(name))

    def watch(self, seed: int) -> None:
        """Says that the next backward pass is the last before ``collect``: gradients leave as they get complete.

        ``seed``: of the stochastic rounding, another one in each step and process.
        """
        self._watched, self._ready = True, set()
        self._generator.manual_seed(seed)

    def _arrived(self, name: str) -> None:
        if not self._watched:
            return
        self._ready.add(name)
        # In order, so that all processes send the same buckets in the same sequence.
        while self._expected and len(self._under_way) < len(self._buckets):
            expected = self._expected.intersection(self._buckets[len(self._under_way)])
            if not expected <= self._ready:
                break
            self._send(expected)

    def _send(self, names: set[str]) -> None:
        """The next bucket, of which ``names`` have a gradient."""
        bucket = self._buckets[len(self._under_way)]
        self._under_way.append(self._sent_bucket([name for name in bucket if name in names]))

    def _sent_bucket(self, names: list[str]) -> _Bucket:
        by_owner: list[list[Tensor]] = [[] for _ in range(self._size)]
        mine: list[str] = []
        for name in names:
            gradient = self._parameters[name].grad
            assert gradient is not None
            for piece in self._pieces[name]:
                by_owner[piece.owner].append(_part(gradient, piece).flatten())
                if piece.owner == self._rank:
                    mine.append(name)
        own = torch.cat(by_owner[self._rank]) if by_owner[self._rank] else torch.empty(0)
        work, outgoing, received = None, own, own
        if self._size > 1 and names:
            like = self._parameters[names[0]]
            sizes = [sum(part.numel() for part in parts) for parts in by_owner]
            outgoing = torch.cat([part for parts in by_owner for part in parts])
            if self._dtype == torch.bfloat16:
                outgoing = stochastic_bf16(outgoing, self._generator)
            received = torch.empty(self._size * sizes[self._rank], dtype=outgoing.dtype, device=like.device)
            even = [sizes[self._rank]] * self._size
            work = dist.all_to_all_single(received, outgoing, even, sizes, group=self._group, async_op=True)
            self.sent["gradients"] += (len(outgoing) - sizes[self._rank]) * outgoing.element_size()
        for name in names:
            self._parameters[name].grad = None
        return _Bucket(names, mine, own, outgoing, received, work)

    def collect(self) -> None:
        """Waits until every gradient is with its owner, as that of its shard; those of the model are gone then.

        Which parameters have one must be the same in all processes of the group: it follows from the stage alone.
        """
        held = {name for name, parameter in self._parameters.items() if parameter.grad is not None}
        while len(self._under_way) < len(self._buckets):
            self._send(held.intersection(self._buckets[len(self._under_way)]))
        # What had none in the last step, but has one now, may have come after its bucket had left.
        late = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        if late:
            self._under_way.append(self._sent_bucket(late))
        self._expected = set()
        for bucket in self._under_way:
            self._expected.update(bucket.names)
            if bucket.work is not None:
                bucket.work.wait()
            start = 0
            total = self._total(bucket)
            for name in bucket.mine:
                shard = self.shards[name].parameter
                shard.grad = total[start : start + shard.numel()].view_as(shard)
                start += shard.numel()
        self._under_way, self._watched = [], False

    def _total(self, bucket: _Bucket) -> Tensor:
        """The sum of what all processes sent; this one's own part was never rounded."""
        if self._size == 1 or not bucket.mine:
            return bucket.own
        parts = list(bucket.received.view(self._size, -1))
        parts[self._rank] = bucket.own
        total: Tensor = parts[0].float()
        total = total.clone() if total is parts[0] else total
        for part in parts[1:]:
            total += part
        return total

    def publish(self) -> None:
        """Sends the new weights of what had a gradient to all processes of the group, and waits until they are in."""
        pending: deque[tuple[dist.Work | None, int, list[tuple[str, Piece]], Tensor]] = deque()
        for bucket in reversed(self._buckets):
            names = [name for name in bucket if name in self._expected]
            for owner in range(self._size):
                parts = [(name, piece) for name in names for piece in self._pieces[name] if piece.owner == owner]
                if not parts:
                    continue
                if self._size == 1:
                    self._written(parts)
                    continue
                weights = [_part(self._parameters[name].detach(), piece).flatten() for name, piece in parts]
                # To be received it is empty; what is in it then does not matter.
                flat = torch.cat(weights) if owner == self._rank else weights[0].new_empty(sum(map(len, weights)))
                if owner == self._rank:
                    self.sent["weights"] += flat.numel() * flat.element_size() * (self._size - 1)
                work = dist.broadcast(flat, group_src=owner, group=self._group, async_op=True)
                pending.append((work, owner, parts, flat))
                if len(pending) > IN_FLIGHT:
                    self._receive(*pending.popleft())
        while pending:
            self._receive(*pending.popleft())

    @torch.no_grad()
    def _receive(self, work: dist.Work | None, owner: int, parts: list[tuple[str, Piece]], flat: Tensor) -> None:
        assert work is not None
        work.wait()
        if owner == self._rank:
            self._written(parts)
            return
        start = 0
        for name, piece in parts:
            weights = _part(self._parameters[name], piece)
            weights.copy_(flat[start : start + weights.numel()].view_as(weights))
            start += weights.numel()

    def _written(self, parts: list[tuple[str, Piece]]) -> None:
        """The model's parameters share the memory of shards, but not their count of changes, by which rounded weights
        know that they are old."""
        for name, _ in parts:
            torch.autograd.graph.increment_version(self._parameters[name])


class Shard(NamedTuple):
    parameter: Parameter
    first: int  # expert of the model's parameter with which it begins


class _Bucket(NamedTuple):
    names: list[str]  # whose gradients are in it
    mine: list[str]  # those that this process owns
    own: Tensor  # its own part of their gradients
    outgoing: Tensor  # kept until it has left
    received: Tensor  # everybody's part of them
    work: dist.Work | None


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    """The view of a piece."""
    return tensor[piece.first : piece.last] if piece.last else tensor


def _buckets(parameters: Mapping[str, Parameter], most: float) -> Iterator[list[str]]:
    """Names in the order in which gradients come, the last first."""
    bucket: list[str] = []
    room = most
    for name, parameter in reversed(list(parameters.items())):
        size = parameter.numel() * parameter.element_size()
        if bucket and size > room:
            yield bucket
            bucket, room = [], most
        bucket.append(name)
        room -= size
    if bucket:
        yield bucket


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 rounded to one of its two neighbours in bfloat16, the nearer the likelier: right on average.

    Values that are not finite, and bfloat16 numbers, stay what they are.
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    # Beyond the largest bfloat16, and what noise makes of infinities and NaN.
    kept = torch.where(x.isfinite() & rounded.isfinite(), rounded, x)
    return kept.to(torch.bfloat16)
