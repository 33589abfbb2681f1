"""Mixture of experts: a router (hash or learned), routed experts, one shared expert.

Shapes: B batch, T tokens, M = B T, D hidden, E experts, K experts per token, F expert intermediate. Source: recipe 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..kernels.balance import balance_loss
from ..kernels.moe import routed_experts
from ..kernels.quantize import Quantized
from ..kernels.router import expert_load, expert_weights, router_scores, top_experts
from ..kernels.swiglu import clamp_hits, clamped_swiglu
from .config import ModelConfig
from .context import Part
from .layers import Linear
from .precision import CastWeight, RoundedWeight
from .recompute import Route


class Routing(NamedTuple):
    """What a MoE layer reports about one batch."""

    load: Tensor  # [E] int64: valid tokens that chose each expert
    balance: Tensor  # 0-dim: sequence-wise balance loss times tokens, summed over documents; 0 for hash layers
    clamped: Tensor  # 0-dim: share of SwiGLU inputs clamped in routed and shared experts
    experts: Tensor  # [M, K] int64: ids of each token's experts
    stale: Tensor | None = None  # 0-dim: of ids that were given, the share that the router would not choose now


class Gate(nn.Module):
    """Chooses K experts per token and weighs them. A hash layer chooses by token id, its weights are learned all
    the same; a learned layer chooses by score plus ``bias``, which the trainer moves to even out the load."""

    def __init__(self, config: ModelConfig, hash_routed: bool) -> None:
        super().__init__()
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.bias: Tensor | None
        self.tid2eid: Tensor | None
        table = torch.empty(config.vocab_size, self.top_k, dtype=torch.long) if hash_routed else None
        self.register_buffer("tid2eid", table)
        self.register_buffer("bias", None if hash_routed else torch.empty(config.n_routed_experts))

    def forward(self, x: Tensor, tokens: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
        """Expert ids ``[M, K]``, their weights ``[M, K]`` and all scores ``[M, E]``; x ``[M, D]``, tokens ``[M]``."""
        scores = router_scores(x, self.weight)
        if self.tid2eid is not None:
            ids = self.tid2eid[tokens]
        else:
            assert self.bias is not None
            ids = route.recall("experts", top_experts, scores.detach() + self.bias, self.top_k)
        return ids, expert_weights(scores, ids, self.scale), scores

    @torch.no_grad()
    def stale(self, ids: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The share of the ``ids [M, K]`` of valid tokens ``[M]`` that are not among those of the highest scores."""
        assert self.bias is not None
        chosen = top_experts(scores.detach() + self.bias, self.top_k)
        missing = (ids.unsqueeze(2) != chosen.unsqueeze(1)).all(2)
        return missing[valid].float().mean()


class Experts(nn.Module):
    """The weights of all routed experts of this process, stacked: w1 (gate), w3 (up) ``[E, F, D]``, w2 (down)
    ``[E, D, F]``.

    Frozen, they may be held as they were released: FP4 or FP8 codes, with their scales in ``w1_scale`` and so on.
    ``lora``, where ``model.lora.add_lora`` puts one, holds their adapters. With ``rounded``, one for each matrix, the
    products are of FP8 numbers, which ``engine``, if there is one, carries out (``train.precision`` sets both).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(experts, inner, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner))
        self.w3 = nn.Parameter(torch.empty(experts, inner, hidden))
        for name in ("w1", "w2", "w3"):
            self.register_buffer(f"{name}_scale", None)
        self.lora: nn.Module | None = None
        self.casts = {name: CastWeight() for name in ("w1", "w3", "w2")}
        self.rounded: tuple[RoundedWeight, ...] = ()
        self.engine: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.limit = config.swiglu_limit
        self.first = 0  # global number of the first expert

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.engine is not None:
            return self.engine(x, ids, weights, self.w1, self.w3, self.w2)
        adapters = None if self.lora is None else self.lora()
        w1, w3, w2 = (self._matrices(name) for name in ("w1", "w3", "w2"))
        rounded, held = None, tuple(cast.held for cast in self.casts.values() if cast.held is not None)
        if self.rounded:
            self.rounded[0].count_activations(x)
            r1, r3, r2 = self.rounded
            rounded = r1.values(self.w1, x.dtype), r3.values(self.w3, x.dtype), r2.values(self.w2, x.dtype)
        return routed_experts(x, ids, weights, w1, w3, w2, self.limit, adapters, rounded, held or None)  # type: ignore[arg-type]

    def hold_quantized(self, name: str, codes: Tensor, scale: Tensor) -> None:
        """Replaces the parameter ``name`` by buffers: stacked codes and scales as in ``kernels.quantize``."""
        delattr(self, name)
        self.register_buffer(name, codes)
        setattr(self, f"{name}_scale", scale)

    def _matrices(self, name: str) -> Tensor | Quantized:
        matrices, scale = getattr(self, name), getattr(self, f"{name}_scale")
        return matrices if scale is None else Quantized(matrices, scale)


class Dispatcher(Protocol):
    """Brings tokens to their experts, wherever these are, and what the experts made of them back."""

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        """Sets the tokens ``[M, D]`` on their way, by the ids and weights ``[M, K]`` of all experts."""

    def finish(self, sent: Any, experts: Experts) -> tuple[Tensor, Tensor]:
        """What ``Experts.forward`` returns, of the tokens that were sent; called once for each ``send``."""


class LocalDispatcher:
    """All experts are in this process."""

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, ids, weights

    def finish(self, sent: tuple[Tensor, Tensor, Tensor], experts: Experts) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = experts(*sent)
        return result


class SharedExpert(nn.Module):
    """The expert that every token passes through; clamped like the routed ones (recipe 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.w2 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.w1(x), self.w3(x)
        hidden = clamped_swiglu(gate, up, self.limit, x.dtype)
        return self.w2(hidden), clamp_hits(gate.detach(), up.detach(), self.limit)


class MoE(nn.Module):
    """Routed experts plus the shared expert, ``[B, T, D]`` to ``[B, T, D]``. Where routed experts are spread over
    processes, ``train.parallel`` puts another dispatcher in place of the local one."""

    def __init__(self, config: ModelConfig, hash_routed: bool) -> None:
        super().__init__()
        self.gate = Gate(config, hash_routed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(
        self, x: Tensor, tokens: Tensor, first: Tensor, valid: Tensor, route: Route, part: Part | None = None
    ) -> tuple[Tensor, Routing]:
        """``tokens [B, T]`` for hash routing; ``first`` and ``valid`` ``[B, T]`` bound the documents (statistics), of
        which other parts of the rows may have more."""
        flat = x.flatten(0, 1)
        ids, weights, scores = self.gate(flat, tokens.flatten(), route)
        sent = self.dispatcher.send(flat, ids, weights)
        shared, shared_clamped = self.shared_experts(flat)  # while tokens travel
        routed, routed_clamped = self.dispatcher.finish(sent, self.experts)
        load = expert_load(ids, scores.shape[1], valid.flatten())
        share = self.gate.top_k / (self.gate.top_k + 1)
        clamped = routed_clamped * share + shared_clamped * (1 - share)
        if self.gate.tid2eid is None:
            best = route.recall("balance", top_experts, scores.detach(), self.gate.top_k)
            best, elsewhere = best.view(*tokens.shape, -1), None
            if part is not None:
                elsewhere = route.recall("elsewhere", part.count_elsewhere, best, first, valid, scores.shape[1])
            balance = balance_loss(scores.view(*tokens.shape, -1), best, first, valid, elsewhere)
        else:
            balance = scores.new_zeros(())
        stale = None
        if "experts" in route.given and self.gate.tid2eid is None:
            stale = route.recall("stale", self.gate.stale, ids, scores, valid.flatten())
        output = (routed + shared).to(x.dtype).view_as(x)
        return output, Routing(load, balance, clamped, ids, stale)
