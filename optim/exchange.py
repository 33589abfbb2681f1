"""Gradients to the owners of parameters, new weights from them: what makes `ownership` work between processes.

A parameter is held by all processes of a group. When its gradient is complete in each, they send it to its owner, who
adds the parts up in the order of the ranks, in float32: two runs are equal to the bit, and so are results on any
network. Parameters travel in buckets, from the last layer to the first, while the backward pass still works on earlier
ones. After the update the owners send the new weights back, from the first layer to the last, while the forward pass
already works on earlier ones.

Of what is multiplied in bfloat16 or FP8, the owners alone have float32 weights (``hold``). They cast or round them for
all, and send what products need, in bfloat16; the model's parameters are then shapes without numbers, whose gradients
are float32 as before. Nothing is computed differently.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from .ownership import Piece

# What values that take the place of float32 weights are held in: it has all of FP8's, whatever their scale.
HELD = torch.bfloat16
# Broadcasts of new weights under way at once: as many buffers exist.
IN_FLIGHT = 4


class Maker(Protocol):
    """What a parameter's products need of it, and what takes it for them: ``model.precision.CastWeight`` and such."""

    held: Tensor | None

    def make(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """Of a float32 parameter, or of some of its experts."""

    def hold(self, values: Tensor | None, master: Tensor | None = None) -> None:
        """Takes what was made of a whole parameter, of which this process owns ``master``; or lets go of it."""


class Exchange:
    """The parameters that the processes of one group hold alike.

    Args:
        parameters: by name, float32, in the order of the forward pass; the same in every process of the group.
        pieces: their owners, as indices in the group (``ownership.assign``).
        group: the process group; None: this process alone.
        bucket_bytes: gradients that travel together.
        dtype: in which they do. bfloat16 rounds what leaves a process stochastically, so that sums have no bias.

    Attributes:
        shards: what this process owns, by name: a parameter of its own, with the number of the first expert in the
            model's parameter, whose memory it shares unless that is held in another dtype.
        held: what makes the values of parameters that are held so, by name.
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
        self.held: dict[str, Maker] = {}
        self.sent = {"gradients": 0, "weights": 0}
        self._buckets = list(_buckets(self._parameters, bucket_bytes))
        self._expected: set[str] = set()  # what had a gradient in the last step
        self._watched = False
        self._ready: set[str] = set()
        self._under_way: list[_Bucket] = []
        self._waited_for: set[str] = set()  # by the modules of `deliver`
        self._shipments: list[_Parts] = []  # of new weights, in the order in which all processes send and receive
        self._last: dict[str, int] = {}  # how many of them must be in for a parameter to be whole
        self._received = 0
        self._coming: deque[tuple[dist.Work | None, Tensor]] = deque()  # those that follow, as far as they are sent
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
        self.settle()  # also what no forward pass has asked for
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

    @torch.no_grad()
    def hold(self, makers: Mapping[str, Maker]) -> None:
        """From now on the model has, of these parameters that are here, what is made of them in place of float32
        weights. These must be the same in all processes."""
        self.settle()
        for name, parameter in self._parameters.items():
            maker, shard = makers.get(name), self.shards.get(name)
            if maker is None:
                continue
            weights, values = parameter.detach(), torch.empty_like(parameter, dtype=HELD)
            # This process's own last: makers know what was lost of what they made last.
            for piece in sorted(self._pieces[name], key=lambda piece: piece.owner == self._rank):
                _part(values, piece).copy_(maker.make(_part(weights, piece), HELD))
            if shard is not None:
                shard.parameter.data = shard.parameter.detach().clone()
            parameter.data = weights.new_zeros(()).expand(weights.shape)
            self.held[name] = maker
            self._renew(name, values)

    @torch.no_grad()
    def release(self) -> None:
        """Gives all processes their float32 weights back."""
        self.settle()
        held, self.held = self.held, {}
        for name, maker in held.items():
            maker.hold(None)
            parameter = self._parameters[name]
            parameter.data = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            for piece in self._pieces[name]:
                if piece.owner == self._rank:
                    shard, part = self.shards[name].parameter, _part(parameter.detach(), piece)
                    shard.data = part.copy_(shard.detach())
        self._send_weights(set(held))
        self.settle()

    def deliver(self, modules: Mapping[Module, tuple[str, ...]]) -> None:
        """Lets new weights arrive as late as the call of the module that needs them.

        Whatever reads weights otherwise calls ``settle`` first. All processes call the same modules in the same order.

        Args:
            modules: in the order of their calls, with what names of the parameters begin with that must be in then.
        """
        for module, prefixes in modules.items():
            names = {name for name in self._parameters if name.startswith(prefixes)}
            self._waited_for |= names
            module.register_forward_pre_hook(lambda *_, names=names: self.settle(names))

    def publish(self) -> None:
        """Sends the new weights of what had a gradient to all processes of the group, and waits until those are in that
        no module waits for (``deliver``)."""
        self._send_weights(self._expected)
        self.settle(self._parameters.keys() - self._waited_for)

    @torch.no_grad()
    def settle(self, names: Collection[str] | None = None) -> None:
        """Waits until the new weights of these parameters, or of all, are in. Does nothing where they are."""
        names = self._last if names is None else names
        needed = max((self._last.get(name, 0) for name in names), default=0)
        while self._received < needed:
            self._send_some()
            self._receive()
            self._received += 1
        self._send_some()

    @torch.no_grad()
    def _send_weights(self, names: Container[str]) -> None:
        """Makes what is to be sent, and begins to, once all that was sent before is in."""
        self._shipments, self._received = list(self._split(names)), 0
        self._last = {name: index + 1 for index, parts in enumerate(self._shipments) for name, _ in parts}
        for parts in self._shipments:
            if parts[0][1].owner == self._rank:
                self._make(parts)
        self._send_some()

    def _split(self, names: Container[str]) -> Iterator[_Parts]:
        """What travels together: of a bucket, an owner and a dtype, in the order of the forward pass, but first what
        no module waits for."""
        for later in (False, True):
            for bucket in reversed(self._buckets):
                now = [name for name in bucket if name in names and (name in self._waited_for) is later]
                pieces = [(name, piece) for name in now for piece in self._pieces[name]]
                for owner in range(self._size):
                    mine = [(name, piece) for name, piece in pieces if piece.owner == owner]
                    for held in (False, True):
                        if parts := [(name, piece) for name, piece in mine if (name in self.held) is held]:
                            yield parts

    def _send_some(self) -> None:
        """Begins with as many shipments as there are buffers."""
        sent = self._received + len(self._coming)
        for parts in self._shipments[sent : self._received + IN_FLIGHT]:
            owner = parts[0][1].owner
            weights = [self._copy(name, piece).flatten() for name, piece in parts] if self._size > 1 else []
            if not weights:
                self._coming.append((None, torch.empty(0)))
                continue
            # To be received it is empty; what is in it then does not matter.
            flat = torch.cat(weights) if owner == self._rank else weights[0].new_empty(sum(map(len, weights)))
            if owner == self._rank:
                self.sent["weights"] += flat.numel() * flat.element_size() * (self._size - 1)
            work = dist.broadcast(flat, group_src=owner, group=self._group, async_op=True)
            self._coming.append((work, flat))

    def _make(self, parts: _Parts) -> None:
        """What the model has of this process's own parts, where it does not share their memory."""
        for name, piece in parts:
            if maker := self.held.get(name):
                self._copy(name, piece).copy_(maker.make(self.shards[name].parameter.detach(), HELD))

    def _copy(self, name: str, piece: Piece) -> Tensor:
        """What the model has of a piece."""
        held = self.held[name].held if name in self.held else None
        return _part(self._parameters[name].detach() if held is None else held, piece)

    def _receive(self) -> None:
        """The shipment that comes next."""
        parts, (work, flat) = self._shipments[self._received], self._coming.popleft()
        if work is not None:
            work.wait()
        if parts[0][1].owner != self._rank:
            start = 0
            for name, piece in parts:
                weights = self._copy(name, piece)
                weights.copy_(flat[start : start + weights.numel()].view_as(weights))
                start += weights.numel()
        self._written(parts)

    def _written(self, parts: _Parts) -> None:
        """Says that weights are new: the model's parameters may share the memory of shards, but not their count of
        changes, by which rounded weights know that they are old."""
        for name, _ in parts:
            if name in self.held:
                self._renew(name, self.held[name].held)
            else:
                torch.autograd.graph.increment_version(self._parameters[name])

    def _renew(self, name: str, values: Tensor | None) -> None:
        """Hands values over as another tensor, on the same memory, so that it shows that they are new."""
        assert values is not None
        master = self.shards[name].parameter.detach() if name in self.shards else None
        self.held[name].hold(values.view_as(values), master)


_Parts = list[tuple[str, Piece]]


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
